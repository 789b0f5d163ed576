"""Batches for training: order, decode, crop, transfer.

Everything is a function of (seed, global step): which samples a step sees, and how they are cut. So a run resumes by
its step number, nothing about the loader is saved, and the numbers of hosts, devices and workers change nothing.

Two paths with one interface, chosen by `training_batches`:

  resident  the whole set lies on the devices as uint8 and a step gathers its rows there (small sets, one picture size)
  streamed  Grain reads, decodes and crops ahead in threads or worker processes; each host only its own rows
"""

from jax.sharding import NamedSharding

from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.batches.placement import local_rows, to_devices
from maect_jax.data.batches.reading import Reader
from maect_jax.data.batches.resident import ResidentBatches, load_resident
from maect_jax.data.batches.samples import Rows, TrainingChunks
from maect_jax.data.sources.base import Source
from maect_jax.errors import DataError

ASPECT = (3 / 4, 4 / 3)


class StreamedBatches(Reader):
    """Batches of random-resized crops, made on the host ahead of time.

    Yields {'image': uint8 [b, v, size, size, c], 'id': int32 [b], 'label': int32 [b]}; the v crops of a picture come
    from one decode.
    """

    resident = False

    def __init__(self, load: TrainingChunks, start_step: int, sharding: NamedSharding, workers: int, bad: BadPictures):
        rows = load.rows
        self.steps_per_epoch = len(load.source) // rows.batch

        def place(local):
            return to_devices(local, rows.rows, rows.batch, sharding)

        super().__init__(load, (start_step, 0), workers, place, bad)


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
    bad: BadPictures | None = None,
) -> ResidentBatches | StreamedBatches:
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
      bad: what is done about pictures that can not be used; by default the first one is an error.

    Returns:
      `ResidentBatches` or `StreamedBatches`; both have `steps_per_epoch`, `resident`, `telemetry` and `close()`.

    Raises:
      DataError: fewer pictures than one batch; pictures that can not be used.
      ConfigError: the batch does not divide over the devices.
    """
    n = len(source)
    if n < batch:
        raise DataError(
            f"data.train: {source.name!r} has {n} pictures, fewer than one batch of {batch}; "
            f"set batch to at most {n}, or add pictures"
        )
    bad = bad or BadPictures("error")
    rows = Rows(local_rows(sharding, batch), batch)
    if resident_limit and (held := load_resident(source, resident_limit, bad)):
        images, used = held
        settings = {"batch": batch, "seed": seed, "start_step": start_step, "sharding": sharding}
        return ResidentBatches(images, source.labels, used, **settings)
    scale, ratio = tuple(crop_scale), tuple(crop_ratio)
    load = TrainingChunks(source, rows, seed, views, image_size, scale, ratio, bad.policy)
    return StreamedBatches(load, start_step, sharding, workers, bad)
