"""What a loader does: the pictures of one place in a host's stream of chunks, written to where they belong in a batch.

A chunk is some rows of one batch that one thread or process loads: fine enough to spread a batch over all of them,
coarse enough that handing it over costs little. What it holds is a function of (seed, place) alone.

No JAX here: it is what loader processes run.
"""

import hashlib
import time
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from maect_jax.data.batches.slots import Column, Columns
from maect_jax.data.host import counters
from maect_jax.data.host.crops import central_crop, training_crops
from maect_jax.data.host.decode import decode, open_picture
from maect_jax.data.sources.base import Source
from maect_jax.errors import BadPicture, DataError, MaectError

CHUNK = 32  # pictures in a chunk, at most
TRIES = 16  # neighbours that are tried in place of a bad picture


@dataclass(frozen=True)
class Bad:
    """A picture that could not be used: its id, where it lies, why, and whose id took its place (-1 = none)."""

    sample_id: int
    where: str
    reason: str
    replaced_by: int


@dataclass
class Notes:
    """What is said of a chunk, beside its columns.

    Attributes:
      bad: pictures that were replaced or left out.
      bytes: of the encoded pictures that were read.
      seconds: that this took, in one thread.
      error: what ended the chunk, to be raised by whoever asked for it; None when it is complete.
    """

    bad: list[Bad] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0
    error: MaectError | None = None


@dataclass(frozen=True)
class Rows:
    """Which pictures a host loads: `rows` of each global batch, in chunks of equal size.

    Attributes:
      rows: int [local], rows of a global batch.
      batch: size of a global batch.
    """

    rows: np.ndarray
    batch: int

    @property
    def chunk(self) -> int:
        """Rows in a chunk: the largest divisor of the host's rows up to CHUNK."""
        return next(c for c in range(min(CHUNK, len(self.rows)), 0, -1) if len(self.rows) % c == 0)

    @property
    def chunks(self) -> int:
        """Chunks in a batch."""
        return len(self.rows) // self.chunk

    def of(self, place: int) -> tuple[int, range]:
        """(step, which of the host's rows of that step) of the chunk at `place` in the stream."""
        step, part = divmod(place, self.chunks)
        return step, range(part * self.chunk, (part + 1) * self.chunk)


@dataclass(frozen=True)
class TrainingChunks:
    """Random-resized crops: 'image' uint8 [rows, v, size, size, c], 'id' and 'label' int32 [rows].

    A picture that can not be used gives its place to the next one by id that can (the classes of a folder lie
    together, so it is mostly of the same class), under that one's id and label; `bad` 'error' ends the chunk instead.
    """

    source: Source
    rows: Rows
    seed: int
    views: int
    image_size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    bad: str

    def layout(self) -> dict[str, Column]:
        """What a host's batch holds."""
        n, size = len(self.rows.rows), self.image_size
        image = Column((n, self.views, size, size, self.source.channels), "uint8")
        return {"image": image, "id": Column((n,), "int32"), "label": Column((n,), "int32")}

    def __call__(self, place: int, columns: Columns) -> Notes:
        """Writes the chunk at `place` into its rows of a batch of this `layout`."""
        step, rows = self.rows.of(place)
        n = len(self.source)
        ids = counters.step_ids(self.seed, step, self.rows.batch, n)[self.rows.rows]
        epoch = step // (n // self.rows.batch)
        notes = Notes()
        began = time.perf_counter()
        try:
            for row in rows:
                load = partial(self._crops, out=columns["image"][row], epoch=epoch, notes=notes)
                found = usable(self.source, int(ids[row]), self.bad, notes.bad, load)
                columns["id"][row], columns["label"][row] = found
        except MaectError as error:
            notes.error = error
        notes.seconds = time.perf_counter() - began
        return notes

    def _crops(self, sample_id: int, out: np.ndarray, epoch: int, notes: Notes) -> tuple[int, int]:
        encoded, label = self.source.read(sample_id)
        where = self.source.where(sample_id)
        notes.bytes += len(encoded) if isinstance(encoded, bytes) else encoded.nbytes
        picture = open_picture(encoded, self.source.channels, where)
        boxes = [
            counters.crop_box(
                picture.height,
                picture.width,
                seed=self.seed,
                epoch=epoch,
                sample_id=sample_id,
                view=view,
                scale=self.crop_scale,
                ratio=self.crop_ratio,
            )
            for view in range(self.views)
        ]
        training_crops(picture, boxes, self.image_size, out)
        return sample_id, label


def usable(source: Source, sample_id: int, policy: str, bad: list[Bad], load):
    """load(sample_id), or with the policy 'skip' that of the first neighbour by id that is not bad.

    Args:
      source: the set.
      sample_id: of the picture that is wanted.
      policy: 'error' or 'skip'.
      bad: what was bad is appended here.
      load: raises BadPicture.

    Raises:
      BadPicture: with the policy 'error'.
      DataError: all neighbours that were tried are bad too.
    """
    failed = []
    for candidate in range(sample_id, sample_id + min(TRIES, len(source))):
        candidate %= len(source)
        try:
            found = load(candidate)
        except BadPicture as error:
            if policy == "error":
                raise
            failed.append((candidate, error))
            continue
        bad += [Bad(i, error.where, error.reason, candidate) for i, error in failed]
        return found
    bad += [Bad(i, error.where, error.reason, -1) for i, error in failed]
    raise DataError(f"{len(failed)} pictures in a row can not be used, the last is {failed[-1][1]}")


_NOTHING = {"image": 0, "content": 0, "id": -1, "label": -1, "valid": False}


@dataclass(frozen=True)
class EvaluationChunks:
    """Central crops: 'image' uint8 [rows, size, size, c], 'id', 'label', 'content' (uint32 [rows, 2]) and 'valid'.

    Rows beyond the last picture, and pictures that can not be used where `bad` is 'skip', are zeros with id and label
    -1 and valid False.
    """

    source: Source
    ids: np.ndarray
    rows: Rows
    image_size: int
    resize_ratio: float
    bad: str

    def layout(self) -> dict[str, Column]:
        """What a host's batch holds."""
        n, size = len(self.rows.rows), self.image_size
        numbers = {"content": Column((n, 2), "uint32"), "id": Column((n,), "int32"), "label": Column((n,), "int32")}
        image = Column((n, size, size, self.source.channels), "uint8")
        return {"image": image, "valid": Column((n,), "bool")} | numbers

    def __call__(self, place: int, columns: Columns) -> Notes:
        """Writes the chunk at `place` into its rows of a batch of this `layout`."""
        step, rows = self.rows.of(place)
        notes = Notes()
        began = time.perf_counter()
        try:
            for row in rows:
                for name, nothing in _NOTHING.items():
                    columns[name][row] = nothing
                position = step * self.rows.batch + int(self.rows.rows[row])
                if position < len(self.ids):
                    self._load(int(self.ids[position]), row, columns, notes)
        except MaectError as error:
            notes.error = error
        notes.seconds = time.perf_counter() - began
        return notes

    def _load(self, sample_id: int, row: int, columns: Columns, notes: Notes) -> None:
        try:
            encoded, label = self.source.read(sample_id)
            notes.bytes += len(encoded) if isinstance(encoded, bytes) else encoded.nbytes
            image = decode(encoded, self.source.channels, self.source.where(sample_id))
        except BadPicture as error:
            if self.bad == "error":
                raise
            notes.bad.append(Bad(sample_id, error.where, error.reason, -1))
            return
        columns["image"][row] = central_crop(image, self.image_size, self.resize_ratio)
        columns["content"][row] = content_hash(image)
        columns["id"][row], columns["label"][row], columns["valid"][row] = sample_id, label, True


def content_hash(image_hwc: np.ndarray) -> np.ndarray:
    """64 bits of BLAKE2 of a picture's size and pixels, uint32 [2]: equal pixels, equal hash, whatever the file."""
    digest = hashlib.blake2b(repr(image_hwc.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(image_hwc))
    return np.frombuffer(digest.digest(), np.uint32)
