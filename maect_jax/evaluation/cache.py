"""Extracted features on disk, so that a second protocol, or a second call, reads them instead of the pictures.

A folder for each (weights, pictures, transform, type); in it `key.json`, `rows.safetensors` (labels, ids, content
hashes) and one file for each elementary feature. What is missing is extracted in one pass and added. bfloat16 vectors
are kept as their 16 bits, `bits` in the file's metadata.
"""

import hashlib
import json
import os
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath
from jax.experimental import multihost_utils

from maect_jax.evaluation.features import Features

VERSION = 1  # of what the files hold; another one is another key
_COLUMNS = ("labels", "ids", "content")


class FeatureCache:
    """Features below `folder`; only the process that is `leader` writes.

    In a run with several processes all of them must see the folder.
    """

    def __init__(self, folder: epath.Path, leader: bool = True):
        self.folder, self.leader = folder, leader

    def features(
        self, key: dict, parts: tuple[str, ...], depth: int, extract: Callable[[tuple[str, ...]], Features]
    ) -> tuple[Features, bool]:
        """The elementary features `parts`, read where they are there and extracted where they are not.

        Args:
          key: everything that they depend on, as JSON values; see `task`.
          parts: elementary names.
          depth: number of blocks of the encoder.
          extract: (missing parts) -> their features; called again for all parts where the pictures have changed.

        Returns:
          the features, and whether all of them were read.
        """
        key = {"version": VERSION} | key
        folder = self.folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
        found, columns = self._read(folder, parts)
        missing = tuple(part for part in parts if part not in found)
        if not missing:
            return Features(found, *(columns[name] for name in _COLUMNS), depth), True
        new = extract(missing)
        if found and any(not np.array_equal(getattr(new, name), columns[name]) for name in _COLUMNS):
            new, found = extract(parts), {}  # the pictures changed behind an equal fingerprint
            if self.leader:
                folder.rmtree()
        if self.leader:
            self._write(folder, key, new)
        return Features(found | new.parts, new.labels, new.ids, new.content, depth), False

    def _read(self, folder: epath.Path, parts: tuple[str, ...]) -> tuple[dict, dict]:
        """What can be read: (part -> vectors, column -> values); unreadable files count as missing."""
        rows = _load(folder / "rows.safetensors")
        if not set(_COLUMNS) <= rows.keys():
            rows = {}
        n = len(rows["ids"]) if rows else -1
        loaded = {part: _load(_file(folder, part)).get("vectors") for part in parts} if rows else {}
        found = {part: x for part, x in loaded.items() if x is not None and x.ndim == 2 and len(x) == n}
        if jax.process_count() > 1:  # every process must take the same way
            seen = np.array([part in found for part in parts])
            everywhere = multihost_utils.process_allgather(seen).all(axis=0)
            found = {part: found[part] for part, here in zip(parts, everywhere) if here}
        return found, rows

    def _write(self, folder: epath.Path, key: dict, features: Features) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for part, vectors in features.parts.items():
            _save(_file(folder, part), {"vectors": vectors})
        _save(folder / "rows.safetensors", {name: getattr(features, name) for name in _COLUMNS})
        (folder / "key.json").write_text(json.dumps(key, indent=1, sort_keys=True) + "\n")


def _file(folder: epath.Path, part: str) -> epath.Path:
    return folder / f"{part.replace('@', '_at_')}.safetensors"


def _save(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    narrow = [name for name, x in arrays.items() if x.dtype == ml_dtypes.bfloat16]
    arrays = {name: np.ascontiguousarray(x.view(np.uint16) if name in narrow else x) for name, x in arrays.items()}
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    temporary.write_bytes(safetensors.numpy.save(arrays, {"bits": ",".join(narrow)}))
    temporary.replace(path)


def _load(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of a file, or {} where there is none or it is damaged."""
    try:
        content = path.read_bytes()
        arrays = safetensors.numpy.load(content)
        length = int.from_bytes(content[:8], "little")
        narrow = json.loads(content[8 : 8 + length]).get("__metadata__", {}).get("bits", "").split(",")
    except (OSError, ValueError, KeyError, safetensors.SafetensorError):
        return {}
    return {name: x.view(ml_dtypes.bfloat16) if name in narrow else x for name, x in arrays.items()}
