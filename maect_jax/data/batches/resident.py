"""Small sets of equally sized pictures: the whole set lies on the devices as uint8, and a step gathers its rows there.

Every process holds the whole set, and so reads it once. Crops are made on the device (`device.augment`).
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.batches.placement import place
from maect_jax.data.batches.reading import Telemetry
from maect_jax.data.batches.samples import Bad, usable
from maect_jax.data.host.counters import step_ids
from maect_jax.data.host.decode import threads
from maect_jax.data.sources.base import ArraySource, Source
from maect_jax.errors import BadPicture

BLOCK = 256  # pictures that one thread loads at a time


class ResidentBatches:
    """Batches gathered on the devices from the whole set.

    Yields {'image': uint8 [b, h, w, c] whole pictures, 'id': int32 [b], 'label': int32 [b]}; cropping and everything
    after it happens on the device.
    """

    resident = True

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        used: np.ndarray,
        *,
        batch: int,
        seed: int,
        start_step: int,
        sharding: NamedSharding,
    ):
        self.steps_per_epoch = len(images) // batch
        self.telemetry = Telemetry()
        self._n, self._batch, self._seed, self._step, self._sharding = len(images), batch, seed, start_step, sharding
        self._used = used
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        self._images = place(everywhere, images.shape, lambda start, stop: images)
        self._labels = place(everywhere, labels.shape, lambda start, stop: labels)
        self._gather = jax.jit(_gather, out_shardings=sharding)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        began = time.perf_counter()
        ids = self._used[step_ids(self._seed, self._step, self._batch, self._n)]
        ids_b = place(self._sharding, ids.shape, lambda start, stop: ids[start:stop])
        batch = self._gather(self._images, self._labels, ids_b)
        self._step += 1
        self.telemetry.wait_seconds += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Frees the set on the devices."""
        self._images = self._labels = None


def _gather(images, labels, ids_b):
    return {"image": images[ids_b], "id": ids_b, "label": labels[ids_b]}


def load_resident(
    source: Source, limit_bytes: int = 2 << 30, bad: BadPictures | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """The whole set in memory, where that is possible: all pictures of one size, and within the limit.

    Asks the headers of a few pictures first, and stops at the first picture of another size after that.

    Returns:
      (images uint8 [n, h, w, c], used int32 [n]: the id whose picture is taken for each, its own unless it is bad), or
      None.

    Raises:
      BadPicture: a picture can not be used, and `bad` is None or says so.
      DataError: too many can not be used.
    """
    bad = bad or BadPictures("error")
    n = len(source)
    used = np.arange(n, dtype=np.int32)
    if isinstance(source, ArraySource):
        return (source.images, used) if source.images.nbytes <= limit_bytes else None
    sizes = {_size(source, int(i), bad) for i in np.linspace(0, n - 1, min(n, 64))} - {None}
    if len(sizes) != 1:
        return None
    height, width = sizes.pop()
    if n * height * width * source.channels > limit_bytes:
        return None
    images = np.empty((n, height, width, source.channels), np.uint8)

    def fill(indices: range) -> list[Bad] | None:
        found: list[Bad] = []
        for i in indices:
            image, taken = usable(source, i, bad.policy, found, lambda j: (source.image(j), j))
            if image.shape != images.shape[1:]:
                return None
            images[i], used[i] = image, taken
        return found

    with ThreadPoolExecutor(threads()) as pool:
        pending = [pool.submit(fill, range(start, min(start + BLOCK, n))) for start in range(0, n, BLOCK)]
        try:
            for block in pending:
                if (found := block.result()) is None:
                    return None
                bad.note(source, found)
            return images, used
        finally:
            for block in pending:
                block.cancel()


def _size(source: Source, index: int, bad: BadPictures) -> tuple[int, int] | None:
    try:
        return source.size(index)
    except BadPicture:
        if bad.policy == "error":
            raise
        return None
