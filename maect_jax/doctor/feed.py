"""What this machine can feed: the loader of training, run for some seconds, and its parts by themselves."""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.batches.resident import BLOCK, ResidentBatches
from maect_jax.data.batches.training import training_batches
from maect_jax.data.host.counters import epoch_order
from maect_jax.data.host.decode import cores, open_picture, threads
from maect_jax.data.sources.base import Source
from maect_jax.errors import BadPicture

BATCH = 256  # pictures, at most, in a batch that is only measured
SAMPLE = 128  # pictures of which sizes are taken


@dataclass(frozen=True)
class Feed:
    """What was measured; rates are pictures (not views) a second of the whole machine.

    Attributes:
      resident: the set is kept on the devices; then only `pipeline` is known.
      pipeline: batches on the devices, as the settings say.
      workers: loader processes in that; 0 = threads.
      other_workers, other_pipeline: the same with the other kind of loader.
      read, decode: reading alone, and reading and decoding alone, in threads.
      bytes_each: of an encoded picture, mean.
      short_side: median, pixels.
      one_size: (height, width) where all of a sample are of one size.
      ready: batches that were ready when one was asked for, mean.
    """

    resident: bool
    pipeline: float
    workers: int
    other_workers: int = 0
    other_pipeline: float = 0.0
    read: float = 0.0
    decode: float = 0.0
    bytes_each: float = 0.0
    short_side: float = 0.0
    one_size: tuple[int, int] | None = None
    ready: float = 0.0


def measure(source: Source, config: ConfigDict, sharding: NamedSharding, seconds: float) -> Feed:
    """Measures for about `seconds`; pictures come in the order of training, so the disk sees what it will see.

    Raises:
      DataError: see `data.batches.training`.
    """
    devices = sharding.mesh.size
    batch = max(devices, min(BATCH, len(source)) // devices * devices)
    bad = BadPictures(config.data.bad, 1.0)
    limit = int(config.data.resident_gib * 2**30)

    def loader(workers: int, resident_limit: int):
        return training_batches(
            source,
            batch=batch,
            seed=config.seed,
            start_step=0,
            views=config.pretrain.views,
            image_size=config.model.image_size,
            crop_scale=config.tune.crop_scale,
            sharding=sharding,
            workers=workers,
            resident_limit=resident_limit,
            bad=bad,
        )

    workers = config.data.workers
    with closing(loader(workers, limit)) as batches:
        resident = isinstance(batches, ResidentBatches)
        rate = _rate_of_batches(batches, batch, seconds * (1.0 if resident else 0.4))
        if resident:
            return Feed(True, rate, workers)
        telemetry = batches.telemetry
        ready = telemetry.ready / max(telemetry.asked, 1)
    others = 0 if workers else cores()
    with closing(loader(others, 0)) as batches:
        other = _rate_of_batches(batches, batch, seconds * 0.2)
    order = epoch_order(config.seed, 1, len(source))  # another epoch's: what was just read is in the page cache
    sizes, encoded = _sample(source, order[:SAMPLE].tolist())
    one_size = sizes[0] if len(set(sizes)) == 1 else None
    read = _rate_of_parts(lambda i: source.read(i), order, seconds * 0.1)
    decode = _rate_of_parts(lambda i: _decode(source, i), order, seconds * 0.2)
    short_side = float(np.median([min(size) for size in sizes]))
    return Feed(False, rate, workers, others, other, read, decode, float(np.mean(encoded)), short_side, one_size, ready)


def _rate_of_batches(batches: Iterator, batch: int, seconds: float) -> float:
    """Pictures a second after the first batch, which starts threads and processes."""
    next(batches)
    began, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds or not done:
        next(batches)["image"].block_until_ready()
        done += batch
    return done / elapsed


def _rate_of_parts(part: Callable[[int], object], order: np.ndarray, seconds: float) -> float:
    """Calls a second of `part`, on ids in order, in as many threads as a loader has."""
    end, done = time.perf_counter() + seconds, 0

    def block(ids) -> int:
        for i in ids:
            try:
                part(int(i))
            except BadPicture:
                continue
        return len(ids)

    began = time.perf_counter()
    with ThreadPoolExecutor(threads()) as pool:
        blocks = itertools.cycle(np.array_split(order, max(1, len(order) // (BLOCK // 8))))
        while time.perf_counter() < end:
            done += sum(pool.map(block, itertools.islice(blocks, 2 * threads())))
    return done / (time.perf_counter() - began)


def _decode(source: Source, index: int) -> None:
    open_picture(source.read(index)[0], source.channels, source.where(index)).pixels()


def _sample(source: Source, ids: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Sizes, and bytes of the encoded pictures, of those that can be used."""
    sizes, encoded = [], []
    for index in ids:
        try:
            found = source.read(index)[0]
            picture = open_picture(found, source.channels, source.where(index))
        except BadPicture:
            continue
        sizes.append((picture.height, picture.width))
        encoded.append(len(found) if isinstance(found, bytes) else found.nbytes)
    return sizes, encoded
