"""Picture files in folders on disk."""

import hashlib
import os
from pathlib import Path

import numpy as np

from maect_jax.data.host.decode import MAX_BYTES
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.names import file_facts, names_hash
from maect_jax.errors import BadPicture


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
        try:
            with open(self.path(index), "rb") as file:
                encoded = file.read(MAX_BYTES + 1)  # longer ones are refused when they are opened
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
            raise BadPicture(self.path(index), f"not a readable picture ({reason})") from error
        return encoded, int(self.labels[index])

    def digest(self) -> str:
        return f"{len(self)} pictures, names {names_hash(self.files)[:16]}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self.labels))
        for index, name in enumerate(self.files):
            digest.update(f"{name}\0{file_facts(self.path(index))}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def file_names(self) -> list[str]:
        return list(self.files)
