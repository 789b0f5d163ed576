"""Pictures in tar and zip archives, read one by one from where they lie."""

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maect_jax.data.sources.base import Source
from maect_jax.data.sources.members import Members, read_member
from maect_jax.data.sources.names import file_facts, names_hash, shown
from maect_jax.errors import BadPicture

OPEN = 128  # archives that a process keeps open


@dataclass(frozen=True)
class Part:
    """Pictures of one archive.

    Attributes:
      path: of the archive.
      members: the pictures.
      folder: goes before their names in `file_names`, such as 'cat/'.
      inside: folder in the archive that is no part of their names, such as 'photos/train/'.
    """

    path: Path
    members: Members
    folder: str = ""
    inside: str = ""


class ArchiveSource(Source):
    """Members of archives, in the order of the ids; their names are those they have in a folder after unpacking.

    Args:
      name: what the user called it.
      parts: the pictures of each archive.
      labels: int [n], over all parts.
      classes, channels: as `Source`.
    """

    def __init__(self, name: str, parts: list[Part], labels, classes: tuple[str, ...], channels: int):
        self.name, self.classes, self.channels = name, classes, channels
        self.labels = np.asarray(labels, np.int32)
        self._paths = [str(part.path) for part in parts]
        self._prefixes = [(part.folder, len(part.inside)) for part in parts]
        self._names = [member for part in parts for member in part.members.names]
        self._archive = np.repeat(np.arange(len(parts)), [len(part.members) for part in parts])
        self._columns = [
            np.concatenate([getattr(part.members, column) for part in parts])
            for column in ("offset", "packed", "size", "method", "checksum")
        ]
        self._open = _opener()

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_open"}

    def __setstate__(self, state):
        self.__dict__.update(state, _open=_opener())

    def __len__(self) -> int:
        return len(self._names)

    def where(self, index: int) -> str:
        return f"{self._paths[self._archive[index]]}:{shown(self._names[index])}"

    def read(self, index: int) -> tuple[bytes, int]:
        where = self.where(index)
        try:
            archive = self._open(self._paths[self._archive[index]])
            content = read_member(archive.descriptor, *(int(column[index]) for column in self._columns), where)
        except OSError as error:
            raise BadPicture(where, f"the archive can not be read ({error.strerror})", "mend the disk") from error
        return content, int(self.labels[index])

    def digest(self) -> str:
        return f"{len(self)} pictures, names {names_hash(self.file_names())[:16]}"

    def fingerprint(self) -> str:
        facts = [f"{os.path.basename(path)}\0{file_facts(path)}" for path in self._paths]
        digest = hashlib.sha256("\n".join(facts).encode(errors="surrogateescape"))
        digest.update(names_hash(self.file_names()).encode())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def file_names(self) -> list[str]:
        prefixes = [self._prefixes[archive] for archive in self._archive.tolist()]
        return [folder + name[inside:] for (folder, inside), name in zip(prefixes, self._names)]


class _Open:
    """A file that stays open for as long as somebody reads from it."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):  # bound here, because modules may be gone when the interpreter ends
        if hasattr(self, "descriptor"):
            close(self.descriptor)


def _opener():
    """path -> _Open, the ones used last kept; one a process, because descriptors do not travel."""
    return functools.lru_cache(OPEN)(_Open)
