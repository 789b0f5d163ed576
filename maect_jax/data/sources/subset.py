"""Some pictures of a source as a source of their own: labelled shares, held-out tenths, few-shot splits."""

import hashlib
from functools import cached_property

import numpy as np

from maect_jax.data.sources.base import Source
from maect_jax.errors import DataError


class SubsetSource(Source):
    """The pictures `rows` of `source`, in that order; sample id i is picture `rows[i]`, read only when asked for.

    Args:
      source: any source, a subset too.
      rows: integers [n], each of 0..len(source)-1 at most once.

    Raises:
      DataError: no rows, a row that the source does not have, or one that is given twice.
    """

    def __init__(self, source: Source, rows):
        rows = np.asarray(rows)
        pictures = len(source)
        if rows.ndim != 1 or not rows.size or not np.issubdtype(rows.dtype, np.integer):
            raise DataError(
                f"subset of {source.name!r}: rows {rows.dtype} {list(rows.shape)}; give integers, at least one"
            )
        if rows.min() < 0 or rows.max() >= pictures:
            found = f"rows {rows.min()}..{rows.max()} of {pictures} pictures"
            raise DataError(f"subset of {source.name!r}: {found}; give rows of 0..{pictures - 1}")
        if np.unique(rows).size != rows.size:
            raise DataError(
                f"subset of {source.name!r}: {rows.size - np.unique(rows).size} rows are given twice; give each once"
            )
        self.source, self.rows = source, rows.astype(np.int64)
        self.name, self.classes, self.channels = source.name, source.classes, source.channels

    @cached_property
    def labels(self) -> np.ndarray:
        return self.source.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int):
        return self.source.read(int(self.rows[index]))

    def where(self, index: int) -> str:
        return self.source.where(int(self.rows[index]))

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size(int(self.rows[index]))

    def digest(self) -> str:
        return f"{len(self)} rows {self._hash()[:16]} of {self.source.digest()}"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.source.fingerprint()} rows {self._hash()}".encode()).hexdigest()

    def file_names(self) -> list[str]:
        names = self.source.file_names()
        return [names[row] for row in self.rows]

    def label_sets(self) -> list[np.ndarray] | None:
        sets = self.source.label_sets()
        return None if sets is None else [sets[row] for row in self.rows]

    def _hash(self) -> str:
        return hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()
