"""How much faster pictures would load if they were packed smaller: some are, in memory, and both are timed."""

import time

import numpy as np
from ml_collections import ConfigDict

from maect_jax.data.batches.samples import Rows, TrainingChunks
from maect_jax.data.batches.slots import room
from maect_jax.data.host.counters import epoch_order
from maect_jax.data.packing.reencode import packed
from maect_jax.data.sources.base import Source
from maect_jax.errors import BadPicture

SHORT_SIDE, QUALITY = 256, 92
COUNT = 64  # pictures


class _InMemory(Source):
    """Encoded pictures in memory."""

    def __init__(self, encoded: list[bytes], channels: int):
        self.name, self.classes, self.channels = "sample", (), channels
        self.encoded, self.labels = encoded, np.full(len(encoded), -1, np.int32)

    def __len__(self) -> int:
        return len(self.encoded)

    def read(self, index: int) -> tuple[bytes, int]:
        return self.encoded[index], -1


def packed_gain(source: Source, config: ConfigDict, short_side: float, seconds: float) -> float | None:
    """Time a picture now, by its time when packed with short side 256; None where packing would not shrink it."""
    if short_side <= SHORT_SIDE:
        return None
    before, after = [], []
    for index in epoch_order(config.seed, 0, len(source))[:COUNT].tolist():
        try:
            encoded = source.read(index)[0]
            after.append(packed(encoded, source.where(index), SHORT_SIDE, QUALITY).encoded)
            before.append(encoded)
        except BadPicture:
            continue
    if not before:
        return None
    loads = [_loading(pictures, source.channels, config) for pictures in (before, after)]
    columns = room(loads[0].layout())
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not times[1]:
        for load, taken in zip(loads, times):
            began = time.perf_counter()
            load(len(taken), columns)
            taken.append(time.perf_counter() - began)
    return float(np.median(times[0]) / np.median(times[1]))


def _loading(pictures: list[bytes], channels: int, config: ConfigDict) -> TrainingChunks:
    n = len(pictures)
    return TrainingChunks(
        _InMemory(pictures, channels),
        Rows(np.arange(n), n),
        config.seed,
        config.pretrain.views,
        config.model.image_size,
        tuple(config.tune.crop_scale),
        (3 / 4, 4 / 3),
        "skip",
    )
