"""Names of files and of members of archives, as users and hashes see them."""

import hashlib
import os
from pathlib import Path

HIDDEN = (".", "__MACOSX")  # how the names of files begin that systems keep for themselves


def shown(name: str) -> str:
    """A name as part of one line of text, whatever is in it."""
    return name if name.isprintable() else ascii(name)


def names_hash(names: list[str]) -> str:
    """SHA-256 of names in their order, hexadecimal."""
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def file_facts(path: str | Path) -> str:
    """A text that is another whenever the file may have been changed."""
    found = os.stat(path)
    return f"{found.st_size}\0{found.st_mtime_ns}\0{found.st_ctime_ns}"  # the last can not be set back
