"""Every picture of a set once, in the order of the ids, each host its own share."""

from collections.abc import Iterator

import jax
from jax.sharding import NamedSharding

from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.batches.placement import local_rows, to_devices
from maect_jax.data.batches.reading import Reader
from maect_jax.data.batches.samples import EvaluationChunks, Rows
from maect_jax.data.host.counters import subset_ids
from maect_jax.data.sources.base import Source


class EvaluationBatches:
    """Batches of central crops; each `iter` is a new pass, and `len` is the number of batches.

    Yields {'image': uint8 [b, size, size, c], 'id': int32 [b], 'label': int32 [b], 'content': uint32 [b, 2], 'valid':
    bool [b]}. 'content' is a hash of the whole decoded picture. The last batch is padded; rows of padding, and of
    pictures that can not be used, have id and label -1 and valid False, so that every picture counts exactly once.

    Args:
      source: pictures.
      batch: global batch size.
      image_size: side of the central crop, pixels.
      sharding: of axis 0 of every array that is yielded.
      resize_ratio: the shorter side becomes round(image_size * resize_ratio) before the crop; with 1 a picture of
        exactly image_size x image_size is left as it is.
      limit: use only that many pictures: always the same ones, drawn over the whole set.
      workers: loader processes; 0 loads in threads of this one.
      bad: what is done about pictures that can not be used; by default the first one is an error.

    Attributes:
      ids: the sample ids in the order they come, int32 [n].

    Raises:
      ConfigError: the batch does not divide over the devices.
      DataError (while iterating): a picture that can not be used, see `bad`.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch: int,
        image_size: int,
        sharding: NamedSharding,
        resize_ratio: float = 256 / 224,
        limit: int | None = None,
        workers: int = 0,
        bad: BadPictures | None = None,
    ):
        if resize_ratio < 1:
            raise ValueError(
                f"resize_ratio: {resize_ratio} would make pictures smaller than their crop; give 1 or more"
            )
        self.ids = subset_ids(len(source), limit)
        self._batch, self._sharding, self._workers = batch, sharding, workers
        self._bad = bad or BadPictures("error")
        self._rows = Rows(local_rows(sharding, batch), batch)
        self._load = EvaluationChunks(source, self.ids, self._rows, image_size, resize_ratio, self._bad.policy)

    def __len__(self) -> int:
        return -(-len(self.ids) // self._batch)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        def place(local):
            return to_devices(local, self._rows.rows, self._batch, self._sharding)

        reader = Reader(self._load, (0, len(self)), self._workers, place, self._bad)
        try:
            yield from reader
        finally:
            reader.close()
