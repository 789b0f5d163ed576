"""Lists of what is in large archives, kept in the user's cache folder: making one goes through the archive to its end.

A list is used for the file of which it was made alone: its name in the cache is a hash of path, size and times.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from maect_jax.data.sources.kept import Arrays, cache_folder, kept
from maect_jax.data.sources.names import file_facts

LARGE = 1 << 24  # bytes of an archive from which on its list is kept
_VERSION = 2

Table = tuple[list[str], np.ndarray]  # names, and for each a row of numbers, int64 [n, columns]


def cached(path: Path, kind: str, columns: int, build: Callable[[Path], Table]) -> Table:
    """build(path), or what it gave before for the same file.

    Args:
      path: the archive.
      kind: what `build` makes; another kind, another list.
      columns: numbers in a row; the first two are where bytes begin in the archive and how many they are.
      build: makes the table; its errors are passed on.
    """
    length = os.path.getsize(path)
    if length < LARGE:
        return build(path)
    identity = f"{_VERSION}\0{kind}\0{os.path.realpath(path)}\0{file_facts(path)}"
    name = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()

    def fits(arrays: Arrays) -> bool:
        return _fits(arrays, columns, length)

    return _table(kept(cache_folder() / "index" / f"{name}.npz", lambda: _arrays(build(path)), fits))


def _arrays(table: Table) -> Arrays:
    names, numbers = table
    return {"names": np.frombuffer(_joined(names), np.uint8), "numbers": numbers}


def _table(arrays: Arrays) -> Table:
    names = arrays["names"].tobytes().decode(errors="surrogateescape")
    return names.split("\0")[:-1], arrays["numbers"]


def _joined(names: list[str]) -> bytes:
    return "".join(f"{name}\0" for name in names).encode(errors="surrogateescape")


def _fits(arrays: Arrays, columns: int, length: int) -> bool:
    """Whether arrays can be the list of an archive of `length` bytes."""
    names, numbers = arrays.get("names"), arrays.get("numbers")
    if names is None or numbers is None or names.dtype != np.uint8 or numbers.dtype != np.int64:
        return False
    if numbers.shape != (np.count_nonzero(names == 0), columns):
        return False
    begin, size = numbers[:, 0], numbers[:, 1]
    return bool(((begin >= 0) & (size >= 0) & (size <= length) & (begin <= length - size)).all())
