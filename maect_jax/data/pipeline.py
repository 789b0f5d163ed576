"""From a source to batches on the devices: order, decode, crop, transfer.

Everything is a function of (seed, global step): which samples a step sees, and how they are cut. So a run resumes by
its step number, nothing about the loader is saved, and the numbers of hosts, devices and workers change nothing.

Two paths with one interface, chosen by `training_batches`:

  resident  the whole set lies on the devices as uint8 and a step gathers its rows there (small sets, one picture size)
  streamed  Grain reads, decodes and crops ahead in threads or worker processes; each host only its own rows
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from maect_jax.data import decode
from maect_jax.data.sources import Source, load_resident
from maect_jax.errors import ConfigError, DataError

ASPECT = (3 / 4, 4 / 3)
CHUNK = 32  # pictures that travel together between a loader thread or process and the batch


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The sample ids of an epoch in the order they are seen; a pure function of its arguments.

    Args:
      seed: of the run.
      epoch: from 0.
      n: samples in the training set.

    Returns:
      int32 [n], a permutation (read-only).
    """
    order = np.argsort(decode.random_words(seed, decode.ORDER, (epoch, 0, 0), n), kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


def step_ids(seed: int, step: int, batch: int, n: int) -> np.ndarray:
    """The sample ids of global step `step`, int32 [batch]; the last n % batch of an epoch are dropped."""
    epoch, within = divmod(step, n // batch)
    return epoch_order(seed, epoch, n)[within * batch : (within + 1) * batch]


def training_batches(
    source: Source,
    *,
    batch: int,
    seed: int,
    start_step: int,
    views: int,
    image_size: int,
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float] = ASPECT,
    sharding: NamedSharding,
    workers: int = 0,
    resident_limit: int = 2 << 30,
) -> "ResidentBatches | StreamedBatches":
    """An endless iterator over the batches from global step `start_step` on.

    Args:
      source: the training pictures.
      batch: global batch size; step s belongs to epoch s // (len(source) // batch).
      seed: of the run.
      start_step: the next step to run.
      views: crops of each picture (streamed only).
      image_size: side of a crop, pixels (streamed only).
      crop_scale: least and greatest share of the picture's area in a crop (streamed only).
      crop_ratio: least and greatest width / height of a crop (streamed only).
      sharding: of axis 0 of every array that is yielded.
      workers: loader processes; 0 loads in threads of this one (streamed only).
      resident_limit: bytes up to which a set of equally sized pictures is kept on every device; 0 always streams.

    Returns:
      `ResidentBatches` or `StreamedBatches`; both have `steps_per_epoch`, `resident`, `wait_seconds` (time spent in
      `next`, seconds) and `close()`.

    Raises:
      DataError: fewer pictures than one batch; a picture that can not be decoded.
      ConfigError: the batch does not divide over the devices.
    """
    n = len(source)
    if n < batch:
        raise DataError(
            f"data.train: {source.name!r} has {n} pictures, fewer than one batch of {batch}; "
            f"set batch to at most {n}, or add pictures"
        )
    rows = _local_rows(sharding, batch)
    images = load_resident(source, resident_limit) if resident_limit else None
    if images is not None:
        return ResidentBatches(images, source.labels, batch=batch, seed=seed, start_step=start_step, sharding=sharding)
    load = TrainingSample(source, rows, batch, seed, views, image_size, tuple(crop_scale), tuple(crop_ratio))
    return StreamedBatches(load, start_step=start_step, sharding=sharding, workers=workers)


class ResidentBatches:
    """Batches gathered on the devices from the whole set.

    Yields {'image': uint8 [b, h, w, c] whole pictures, 'id': int32 [b], 'label': int32 [b]}; cropping and everything
    after it happens on the device.
    """

    resident = True

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, *, batch: int, seed: int, start_step: int, sharding: NamedSharding
    ):
        self.steps_per_epoch = len(images) // batch
        self.wait_seconds = 0.0
        self._n, self._batch, self._seed, self._step, self._sharding = len(images), batch, seed, start_step, sharding
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        self._images = _place(everywhere, images.shape, lambda start, stop: images)
        self._labels = _place(everywhere, labels.shape, lambda start, stop: labels)
        self._gather = jax.jit(_gather, out_shardings=sharding)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        began = time.perf_counter()
        ids = step_ids(self._seed, self._step, self._batch, self._n)
        ids_b = _place(self._sharding, ids.shape, lambda start, stop: ids[start:stop])
        batch = self._gather(self._images, self._labels, ids_b)
        self._step += 1
        self.wait_seconds += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Frees the set on the devices."""
        self._images = self._labels = None


def _gather(images, labels, ids_b):
    return {"image": images[ids_b], "id": ids_b, "label": labels[ids_b]}


class StreamedBatches:
    """Batches of random-resized crops, made on the host ahead of time.

    Yields {'image': uint8 [b, v, size, size, c], 'id': int32 [b], 'label': int32 [b]}; the v crops of a picture come
    from one decode.
    """

    resident = False

    def __init__(self, load: "TrainingSample", *, start_step: int, sharding: NamedSharding, workers: int = 0):
        self.steps_per_epoch = len(load.source) // load.batch
        self.wait_seconds = 0.0
        self._rows, self._batch, self._sharding = load.rows, load.batch, sharding
        self._batches = _read_ahead(load, len(load.rows), start_step, None, workers)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        began = time.perf_counter()
        batch = _to_devices(next(self._batches), self._rows, self._batch, self._sharding)
        self.wait_seconds += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Stops the loader threads and processes."""
        self._batches.close()


@dataclasses.dataclass(frozen=True)
class TrainingSample:
    """Position in this host's endless stream of samples -> that sample's crops. Runs in loader processes."""

    source: Source
    rows: np.ndarray  # of a global batch that this host loads
    batch: int
    seed: int
    views: int
    image_size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]

    def __call__(self, position: int) -> dict[str, np.ndarray]:
        step, row = divmod(position, len(self.rows))
        n = len(self.source)
        sample_id = int(step_ids(self.seed, step, self.batch, n)[self.rows[row]])
        epoch = step // (n // self.batch)
        image, label = self.source.sample(sample_id)
        crops = []
        for view in range(self.views):
            box = decode.crop_box(
                *image.shape[:2],
                seed=self.seed,
                epoch=epoch,
                sample_id=sample_id,
                view=view,
                scale=self.crop_scale,
                ratio=self.crop_ratio,
            )
            crops.append(decode.resized_crop(image, box, self.image_size))
        return {"image": np.stack(crops), "id": np.int32(sample_id), "label": np.int32(label)}


def evaluation_batches(
    source: Source,
    *,
    batch: int,
    image_size: int,
    sharding: NamedSharding,
    resize_ratio: float = 256 / 224,
    limit: int | None = None,
    workers: int = 0,
) -> "EvaluationBatches":
    """Every picture exactly once, in the order of the ids.

    Args:
      source: pictures.
      batch: global batch size; the last batch is padded to it.
      image_size: side of the central crop, pixels.
      sharding: of axis 0 of every array that is yielded.
      resize_ratio: the shorter side becomes round(image_size * resize_ratio) before the crop; with 1 a picture of
        exactly image_size x image_size is left as it is.
      limit: use only that many pictures: always the same ones, drawn over the whole set.
      workers: loader processes; 0 loads in threads of this one.

    Returns:
      An iterable (each `iter` is a new pass; `len` is the number of batches) of {'image': uint8 [b, size, size, c],
      'id': int32 [b], 'label': int32 [b], 'content': uint32 [b, 2], 'valid': bool [b]}. 'content' is a hash of the
      whole decoded picture. Rows of padding have id and label -1 and valid False.

    Raises:
      DataError: a picture that can not be decoded.
      ConfigError: the batch does not divide over the devices.
    """
    if resize_ratio < 1:
        raise ValueError(f"resize_ratio: {resize_ratio} would make pictures smaller than their crop; give 1 or more")
    return EvaluationBatches(source, batch, image_size, sharding, resize_ratio, limit, workers)


class EvaluationBatches:
    """What `evaluation_batches` returns; `ids` are the sample ids in the order they come, int32 [n]."""

    def __init__(self, source, batch, image_size, sharding, resize_ratio, limit, workers):
        n = len(source)
        self.ids = np.arange(n, dtype=np.int32)
        if limit is not None and limit < n:
            drawn = np.argsort(decode.random_words(0, decode.SUBSET, (0, 0, 0), n), kind="stable")[:limit]
            self.ids = np.sort(drawn).astype(np.int32)
        self._rows = _local_rows(sharding, batch)
        self._batch, self._sharding, self._workers = batch, sharding, workers
        self._load = EvaluationSample(source, self.ids, self._rows, batch, image_size, resize_ratio)

    def __len__(self) -> int:
        return -(-len(self.ids) // self._batch)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        batches = _read_ahead(self._load, len(self._rows), 0, len(self), self._workers)
        try:
            for batch in batches:
                yield _to_devices(batch, self._rows, self._batch, self._sharding)
        finally:
            batches.close()


@dataclasses.dataclass(frozen=True)
class EvaluationSample:
    """Position in this host's stream of evaluation rows -> that row. Runs in loader processes."""

    source: Source
    ids: np.ndarray
    rows: np.ndarray  # of a global batch that this host loads
    batch: int
    image_size: int
    resize_ratio: float

    def __call__(self, position: int) -> dict[str, np.ndarray]:
        step, row = divmod(position, len(self.rows))
        size = self.image_size
        place = step * self.batch + int(self.rows[row])
        if place >= len(self.ids):
            image, sample_id, label = np.zeros((size, size, self.source.channels), np.uint8), -1, -1
            content = np.zeros(2, np.uint32)
        else:
            sample_id = int(self.ids[place])
            image, label = self.source.sample(sample_id)
            content = content_hash(image)
            image = decode.central_crop(image, size, self.resize_ratio)
        columns = {"id": np.int32(sample_id), "label": np.int32(label), "valid": np.bool_(sample_id >= 0)}
        return {"image": image, "content": content} | columns


def content_hash(image_hwc: np.ndarray) -> np.ndarray:
    """64 bits of BLAKE2 of a picture's size and pixels, uint32 [2]: equal pixels, equal hash, whatever the file."""
    digest = hashlib.blake2b(repr(image_hwc.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(image_hwc))
    return np.frombuffer(digest.digest(), np.uint32)


# ------------------------------------------------------------------------------------------------- Grain and devices


def _read_ahead(load: Callable, rows: int, start: int, stop: int | None, workers: int):
    """Iterator over this host's batches `start` to `stop` (None: for ever), about two of them ahead.

    A chunk of at most CHUNK rows is loaded by one thread or process: fine enough to spread a batch over all of them,
    coarse enough that handing it over costs little. The order is Grain's, by position, whatever the workers.
    """
    chunk = next(c for c in range(min(CHUNK, rows), 0, -1) if rows % c == 0)
    chunks = rows // chunk
    stop = 2**40 // rows if stop is None else stop
    samples = grain.MapDataset.range(start * rows, stop * rows).map(load).batch(chunk)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags when it starts processes; outside absl.app no one did
            flags.FLAGS.mark_as_parsed()
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        processes = grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(1, -(-2 * chunks // workers)))
        dataset = samples.to_iter_dataset(reading).mp_prefetch(processes)
    else:
        reading = grain.ReadOptions(
            num_threads=decode.threads(), prefetch_buffer_size=max(decode.threads(), 2 * chunks)
        )
        dataset = samples.to_iter_dataset(reading)
    dataset = dataset.batch(chunks, drop_remainder=True, batch_fn=_concatenate)
    return iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1))


def _concatenate(chunks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([np.asarray(chunk[key]) for chunk in chunks]) for key in chunks[0]}


def _local_rows(sharding: NamedSharding, batch: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, sorted, int [rows]."""
    try:
        indices = sharding.addressable_devices_indices_map((batch,))
    except ValueError:
        raise ConfigError(
            f"batch: {batch} does not divide over the {sharding.mesh.size} devices; set it to a multiple"
        ) from None
    return np.unique(np.concatenate([np.arange(batch)[index] for index in indices.values()]))


def _place(sharding: NamedSharding, shape: tuple[int, ...], rows: Callable[[int, int], np.ndarray]) -> jax.Array:
    """A global array of `shape`, each device's part of axis 0 taken from rows(start, stop) on its own host."""

    def part(index):
        start, stop, _ = index[0].indices(shape[0])
        return rows(start, stop)

    return jax.make_array_from_callback(shape, sharding, part)


def _to_devices(local, rows: np.ndarray, batch: int, sharding: NamedSharding) -> dict[str, jax.Array]:
    def slicing(array):
        def take(start, stop):
            first = int(np.searchsorted(rows, start))
            return array[first : first + stop - start]

        return take

    return {key: _place(sharding, (batch, *a.shape[1:]), slicing(a)) for key, a in local.items()}
