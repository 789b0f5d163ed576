"""Zip archives written by others: members are checked before one is read, and are read into memory only.

Memory stays within a small multiple of the file's own size, whatever its directory declares.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from struct import error as StructError
from typing import BinaryIO

from maect_jax.errors import CheckpointError

MAGIC = b"PK\x03\x04"

_MAX_MEMBERS = 100_000
_MAX_RATIO = 20  # weights barely shrink when packed; a bomb grows a thousandfold
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    StructError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    OverflowError,
)


class Archive:
    """A checked zip archive.

    Args:
      file: open for binary reading, and seekable; stays the caller's to close.

    Attributes:
      sizes: name -> unpacked bytes of every member.

    Raises:
      CheckpointError: no zip archive, damaged, encrypted, packed otherwise than stored or deflated, two members of one
        name, a name that leaves its folder, or more content than the file can honestly hold.
    """

    def __init__(self, file: BinaryIO):
        length = file.seek(0, 2)
        with _damage_reported():
            self._zip = zipfile.ZipFile(file)
        members = [member for member in self._zip.infolist() if not member.filename.endswith("/")]
        if len(members) > _MAX_MEMBERS:
            raise CheckpointError(f"has {len(members)} members, more than the {_MAX_MEMBERS} that are read")
        if sum(member.compress_size for member in members) > length:
            raise CheckpointError("has members that overlap or end after the file")
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            _check(member)
            if member.filename in self._members:
                raise CheckpointError(f"has two members named {member.filename!a}")
            self._members[member.filename] = member
        self.sizes = {name: member.file_size for name, member in self._members.items()}

    def read(self, name: str) -> bytes:
        """Content of a member, `sizes[name]` bytes, its checksum verified.

        Raises:
          CheckpointError: no such member, or it is damaged.
        """
        if name not in self._members:
            raise CheckpointError(f"has no member {name!a}")
        member = self._members[name]
        with _damage_reported(), self._zip.open(member) as stream:
            content = stream.read(member.file_size)  # a bound: the stream may unpack to more than is declared
        if len(content) != member.file_size:
            raise CheckpointError(f"is damaged: {name!a} holds {len(content)} of {member.file_size} bytes")
        return content


def _check(member: zipfile.ZipInfo) -> None:
    name = f"{member.filename!a}"
    if member.flag_bits & _ENCRYPTED:
        raise CheckpointError(f"has an encrypted member, {name}")
    if any(part in ("", "..") for part in member.filename.replace("\\", "/").split("/")):
        raise CheckpointError(f"has a member whose name leaves its folder, {name}")
    if member.compress_type == zipfile.ZIP_STORED:
        fits = member.file_size == member.compress_size
    elif member.compress_type == zipfile.ZIP_DEFLATED:
        fits = member.file_size <= _MAX_RATIO * member.compress_size
    else:
        raise CheckpointError(f"packs {name} by method {member.compress_type}; only stored and deflated are read")
    if not fits:
        raise CheckpointError(f"declares {member.file_size} bytes for {name}, which has {member.compress_size} packed")


@contextmanager
def _damage_reported() -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise CheckpointError(f"is damaged or incomplete ({str(error) or 'it ends too early'})") from None
