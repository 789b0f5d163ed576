"""Counts of a data set: pictures, sizes, forms, mean and standard deviation of the channels, duplicates."""

import io
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from maect_jax.data.batches.samples import content_hash
from maect_jax.data.host.decode import decode
from maect_jax.data.packing.pool import work_on
from maect_jax.data.packing.verify import chunks
from maect_jax.data.sources.base import Source
from maect_jax.errors import BadPicture

_ROWS = 1 << 15  # of a picture at a time, so that sums of squares of 8-bit values fit 32 bits
_PIXELS = 1 << 20  # at a time, so that the squares of a large picture need little memory
_NPY, _PNG = b"\x93NUMPY", b"\x89PNG"


@dataclass
class Part:
    """What was counted over some pictures of one split; sums are whole numbers, so their order changes nothing.

    Attributes:
      split: the pictures are of.
      pixels: counted.
      sums, squares: of the 8-bit values of each channel, and of their squares.
      forms: pictures by what encodes them and mode, as 'JPEG RGB'.
      deep: pictures with 16-bit values.
      rows: id, label, height, width and bytes of each good picture.
      hashes: of their pixels, 64 bits.
      bad: split, id, path and reason of each that can not be used.
    """

    split: str
    pixels: int = 0
    sums: list[int] = field(default_factory=list)
    squares: list[int] = field(default_factory=list)
    forms: Counter = field(default_factory=Counter)
    deep: int = 0
    rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    bad: list[dict] = field(default_factory=list)


def statistics(sources: dict[str, Source], workers: int) -> dict:
    """Everything there is to count, ready for JSON.

    Args:
      sources: by split.
      workers: processes; 0 = this one alone.

    Returns:
      splits.<split>: pictures, classes (pictures by class name), empty_classes, unlabelled, height, width and bytes
      (min, median, max; of bytes also the sum), forms (pictures by form and mode), sixteen_bit, channels, mean and std
      (a channel, over all pixels, of values in 0..1), bad.
      duplicates: groups of pictures with the same pixels: split, id, path and label of each.
      duplicate_counts: superfluous pictures within each split, and pictures of the test split that are also in the
      training split.

    Raises:
      DataError: the pictures have another number of channels than the source.
    """
    total = sum(map(len, sources.values()))
    parts = work_on(sources, count, chunks(sources), workers=workers, what="stats", total=total)
    of_split = {split: [part for part in parts if part.split == split] for split in sources}
    groups, counts = _duplicates(sources, of_split)
    return {
        "splits": {split: _summary(sources[split], found) for split, found in of_split.items()},
        "duplicate_counts": counts,
        "duplicates": groups,
    }


def count(sources: dict[str, Source], task: tuple[str, range], tick: Callable[[], None]) -> Part:
    """Counts some pictures; a unit of work of `pool.work_on`."""
    split, ids = task
    source, part = sources[split], Part(split)
    sums = np.zeros((2, source.channels), np.int64)
    for index in ids:
        tick()
        try:
            picture, label = source.read(index)
            where = source.where(index)
            image = decode(picture, source.channels, where)
        except BadPicture as error:
            part.bad.append({"split": split, "id": index, "path": error.where, "reason": error.reason})
            continue
        encoded = isinstance(picture, bytes)
        form, deep = form_of(picture) if encoded else ("pixels", False)
        part.forms[form] += 1
        part.deep += deep
        height, width = image.shape[:2]
        part.pixels += height * width
        sums += channel_sums(image)
        part.rows.append((index, int(label), height, width, len(picture) if encoded else picture.nbytes))
        part.hashes.append(int.from_bytes(content_hash(image).tobytes(), "little"))
    part.sums, part.squares = sums.tolist()
    return part


def channel_sums(image_hwc: np.ndarray) -> np.ndarray:
    """Sum of the values of each channel, and of their squares; exact, int64 [2, c]."""
    height, width, channels = image_hwc.shape
    sums = np.zeros((2, channels), np.int64)
    step = min(_ROWS, max(1, _PIXELS // width))
    for start in range(0, height, step):
        rows = image_hwc[start : start + step].reshape(-1, width * channels)
        for kind, values in enumerate((rows, np.square(rows, dtype=np.uint16))):
            columns = values.sum(0, dtype=np.uint32)  # along the long axis: many times as fast as pixel by pixel
            sums[kind] += columns.reshape(-1, channels).sum(0, dtype=np.int64)
    return sums


def form_of(encoded: bytes) -> tuple[str, bool]:
    """(form and mode of a picture that decodes, as 'JPEG RGB'; whether its values have 16 bits)."""
    if encoded.startswith(_NPY):
        deep = b"u2'" in encoded[:128]
        return f"npy {'uint16' if deep else 'uint8'}", deep
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            form, mode = image.format, image.mode
    except Exception:  # a header that only libjpeg-turbo takes
        return "JPEG", False
    deep = mode.startswith("I") or (encoded.startswith(_PNG) and encoded[24] == 16)
    return f"{form} {mode}", deep


def _summary(source: Source, parts: list[Part]) -> dict:
    rows = np.array([row for part in parts for row in part.rows], np.int64).reshape(-1, 5)
    _, labels, heights, widths, sizes = rows.T
    forms = sum((part.forms for part in parts), Counter())
    counts = np.bincount(labels[labels >= 0], minlength=len(source.classes)).tolist()
    mean, std = _moments(parts, source.channels)
    return {
        "pictures": len(source),
        "classes": dict(zip(source.classes, counts)),
        "empty_classes": [name for name, n in zip(source.classes, counts) if not n],
        "unlabelled": int((labels < 0).sum()),
        "height": _spread(heights),
        "width": _spread(widths),
        "bytes": _spread(sizes) | {"sum": int(sizes.sum())},
        "forms": dict(forms.most_common()),
        "sixteen_bit": sum(part.deep for part in parts),
        "channels": source.channels,
        "mean": mean,
        "std": std,
        "bad": [bad for part in parts for bad in part.bad],
    }


def _moments(parts: list[Part], channels: int) -> tuple[list[float] | None, list[float] | None]:
    """Mean and standard deviation of each channel, of values in 0..1; exact until the last division."""
    pixels = sum(part.pixels for part in parts)
    if not pixels:
        return None, None
    mean, std = [], []
    for channel in range(channels):
        total = sum(part.sums[channel] for part in parts)
        squares = sum(part.squares[channel] for part in parts)
        mean.append(total / (255 * pixels))
        std.append(math.sqrt((pixels * squares - total * total) / (pixels * pixels)) / 255)
    return mean, std


def _spread(values: np.ndarray) -> dict:
    if not len(values):
        return {"min": None, "median": None, "max": None}
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def _duplicates(sources: dict[str, Source], of_split: dict[str, list[Part]]) -> tuple[list[list[dict]], dict]:
    """Groups of pictures with equal pixels, and how many are superfluous in a split or lie in both."""
    hashes = np.array([h for parts in of_split.values() for part in parts for h in part.hashes], np.uint64)
    again, times = np.unique(hashes, return_counts=True)
    again = set(again[times > 1].tolist())
    groups = defaultdict(list)
    for split, parts in of_split.items():
        for part in parts:
            for (index, label, *_), content in zip(part.rows, part.hashes):
                if content in again:
                    entry = {"split": split, "id": index, "path": sources[split].where(index), "label": label}
                    groups[content].append(entry)
    found = list(groups.values())
    counts = {split: sum(max(0, _of(group, split) - 1) for group in found) for split in sources}
    if len(sources) > 1:
        counts["between"] = sum(_of(group, "test") for group in found if _of(group, "train"))
    return found, counts


def _of(group: list[dict], split: str) -> int:
    return sum(entry["split"] == split for entry in group)
