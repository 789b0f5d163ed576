"""Picture files in folders on disk."""

import hashlib
import os
import stat
from pathlib import Path

import numpy as np

from maect_jax.data.host.limits import MAX_BYTES, unreadable
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.names import file_facts, names_hash
from maect_jax.errors import BadPicture


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for somebody to write, where the file is a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


class FolderSource(Source):
    """Files below `root`, decoded when asked for. `files` are relative to it, in the order of the ids."""

    def __init__(self, name: str, root: Path, files: list[str], labels, classes: tuple[str, ...], channels: int):
        self.name, self.root, self.files, self.classes, self.channels = name, str(root), files, classes, channels
        self.labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """The file of a sample id."""
        return os.path.join(self.root, self.files[index])

    where = path

    def read(self, index: int) -> tuple[bytes, int]:
        path = self.path(index)
        try:
            # without a buffer, which would be a second copy, and without a bound, for which room would be made
            with open(path, "rb", buffering=0, opener=_open_at_once) as file:
                facts = os.fstat(file.fileno())
                if not stat.S_ISREG(facts.st_mode):
                    raise unreadable(path, "it is a pipe or a device")
                if facts.st_size > MAX_BYTES:
                    raise BadPicture(path, f"more than {MAX_BYTES} bytes", "scale the picture down")
                return file.read(), int(self.labels[index])
        except OSError as error:
            raise unreadable(path, "no such file" if isinstance(error, FileNotFoundError) else str(error)) from error

    def digest(self) -> str:
        return f"{len(self)} pictures, names {names_hash(self.files)[:16]}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self.labels))
        for index, name in enumerate(self.files):
            try:
                facts = file_facts(self.path(index))
            except OSError as error:  # it is gone, or a link to nowhere: a bad picture, no reason to stop
                facts = f"none {error.errno}"
            digest.update(f"{name}\0{facts}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def file_names(self) -> list[str]:
        return list(self.files)
