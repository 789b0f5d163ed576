"""Zip archives written by others: the directory is checked before a member is read, and members are read into memory.

The standard library's reader builds an object for every entry that a directory claims and follows each to wherever it
points. This one knows what PyTorch and NumPy write and refuses the rest, so that time and memory stay within a small
multiple of the file's own size, whatever its directory declares.

Source: PKWARE, APPNOTE.TXT 6.3.10, sections 4.3 to 4.5.
"""

import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from struct import error as StructError
from typing import BinaryIO

from maect_jax.errors import CheckpointError

MAGIC = b"PK\x03\x04"

MAX_FILE = 1 << 36  # bytes of a weights file of any kind; a training checkpoint of a ViT-H has 8e9

_MAX_DIRECTORY = 1 << 24  # bytes
_MAX_MEMBERS = 100_000
_MAX_NAME = 1_000  # bytes
_MAX_RATIO = 3  # unpacked to packed, of the whole file: float32 has 1.1, bfloat16 saved as float32 2.1
_SMALL = 1 << 20  # bytes that any file may unpack to

_LOCAL = Struct("<4s5H3L2H")  # before each member
_ENTRY = Struct("<4s6H3L5H2L")  # in the directory
_END = Struct("<4s4H2LH")
_END_64 = Struct("<4sQ2H2L4Q")
_LOCATOR_64 = Struct("<4sLQL")

_ENCRYPTED = 0x1 | 0x40 | 0x2000  # bits of the flags
_STORED, _DEFLATED = 0, 8
_IN_64 = 0xFFFFFFFF  # says that the number is in the extra field, or in the second end of the directory


@dataclass(frozen=True, slots=True)
class _Member:
    name: bytes
    method: int
    checksum: int
    packed: int  # bytes in the file
    size: int  # bytes unpacked
    start: int  # of its local header, in the file


class Archive:
    """A checked zip archive.

    Args:
      file: open for binary reading, and seekable; stays the caller's to close.

    Attributes:
      sizes: name -> unpacked bytes of every member, in the order of the directory.
      packed: names of the members that are not stored as they are.

    Raises:
      CheckpointError: no zip archive, damaged, encrypted, packed otherwise than stored or deflated, two members of one
        name or in one place, a link, a name that leaves its folder, or more content than the file can honestly hold.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        length = file.seek(0, 2)
        if length > MAX_FILE:
            raise CheckpointError(f"has {length} bytes; at most {MAX_FILE} are read")
        count, size, start = self._end(length)
        if count > _MAX_MEMBERS or size > _MAX_DIRECTORY:
            raise CheckpointError(
                f"has {count} members, listed in {size} bytes; at most {_MAX_MEMBERS} in {_MAX_DIRECTORY} are read"
            )
        self._members: dict[str, _Member] = {}
        for member in _listed(self._bytes(start, size), count):
            if (name := _checked(member)) in self._members:
                raise CheckpointError(f"has two members named {name!a}")
            self._members[name] = member
        self._ends: dict[str, int] = {}  # where the next member starts, or their list
        end = start
        for name, member in sorted(self._members.items(), key=lambda item: item[1].start, reverse=True):
            if member.start + _LOCAL.size + len(member.name) + member.packed > end:
                raise CheckpointError(f"has members that overlap: {_shown(member)} runs into what follows it")
            self._ends[name] = end
            end = member.start
        self.sizes = {name: member.size for name, member in self._members.items()}
        self.packed = {name for name, member in self._members.items() if member.method == _DEFLATED}
        if (content := sum(self.sizes.values())) > _MAX_RATIO * length + _SMALL:
            raise CheckpointError(
                f"declares {content} bytes of content in a file of {length}, which is too many to be weights; where "
                "you trust it, save it unpacked"
            )

    def read(self, name: str) -> bytes:
        """Content of a member, `sizes[name]` bytes, its checksum verified.

        Raises:
          CheckpointError: no such member, or it is damaged.
        """
        if name not in self._members:
            raise CheckpointError(f"has no member {name!a}")
        member = self._members[name]
        magic, *_, name_bytes, extra_bytes = _LOCAL.unpack(self._bytes(member.start, _LOCAL.size))
        start = member.start + _LOCAL.size
        same = magic == MAGIC and self._bytes(start, name_bytes) == member.name
        start += name_bytes + extra_bytes
        if not same or start + member.packed > self._ends[name]:
            raise CheckpointError(f"is damaged: {_shown(member)} is not where the list of members says")
        content = self._bytes(start, member.packed)
        if member.method == _DEFLATED:
            content = _inflated(content, member)
        if zlib.crc32(content) != member.checksum:
            raise CheckpointError(f"is damaged: {_shown(member)} does not have the CRC that was saved with it")
        return content

    def _bytes(self, start: int, count: int) -> bytes:
        self._file.seek(start)
        content = self._file.read(count)
        if len(content) != count:
            raise CheckpointError("is damaged or incomplete: it ends too early")
        return content

    def _end(self, length: int) -> tuple[int, int, int]:
        """Number of members, and bytes and start of their list, which must end where the records of the end begin."""
        at = length - _END.size
        if at < 0 or (record := _END.unpack(self._bytes(at, _END.size)))[0] != b"PK\x05\x06":
            raise CheckpointError("is damaged or incomplete: it does not end as a zip archive does")
        _, disk, first_disk, _, count, size, start, _ = record
        before = at - _LOCATOR_64.size
        if before >= _END_64.size:
            magic, _, record_start, _ = _LOCATOR_64.unpack(self._bytes(before, _LOCATOR_64.size))
            if magic == b"PK\x06\x07":
                at = before - _END_64.size
                record = _END_64.unpack(self._bytes(at, _END_64.size))
                magic, _, _, _, disk, first_disk, _, count, size, start = record
                if magic != b"PK\x06\x06" or record_start != at:
                    raise CheckpointError("is damaged: the records at its end do not agree")
        if disk or first_disk or start + size != at:
            raise CheckpointError("is damaged: its list of members is not where its end says")
        return count, size, start


def _listed(directory: bytes, count: int) -> Iterator[_Member]:
    """The members that a directory lists.

    Raises:
      CheckpointError: they are not `count` members, from its first byte to its last.
    """
    at = 0
    for _ in range(count):
        entry = _unpacked(_ENTRY, directory[at : at + _ENTRY.size])
        magic, _, _, flags, method, _, _, checksum, packed, size, name, extra, comment, _, _, attributes, start = entry
        at += _ENTRY.size + name + extra + comment
        if magic != b"PK\x01\x02" or at > len(directory):
            raise CheckpointError("is damaged: its list of members breaks off")
        name_bytes = directory[at - comment - extra - name : at - comment - extra]
        size, packed, start = _in_64((size, packed, start), directory[at - comment - extra : at - comment])
        member = _Member(name_bytes, method, checksum, packed, size, start)
        if flags & _ENCRYPTED:
            raise CheckpointError(f"has an encrypted member, {_shown(member)}")
        if stat.S_ISLNK(attributes >> 16):
            raise CheckpointError(f"has a link among its members, {_shown(member)}")
        if not name_bytes.endswith(b"/"):  # else a folder
            yield member
    if at != len(directory):
        raise CheckpointError(f"is damaged: its list of members goes on after the {count} that it declares")


def _in_64(numbers: tuple[int, int, int], extra: bytes) -> tuple[int, ...]:
    """The numbers of an entry; those that need more than 32 bits stand in its extra field, in the same order."""
    if _IN_64 not in numbers:
        return numbers
    while extra:
        kind, length = _unpacked(Struct("<2H"), extra[:4])
        if kind == 1:
            wide = iter(_unpacked(Struct(f"<{length // 8}Q"), extra[4 : 4 + length // 8 * 8]))
            return tuple(next(wide, number) if number == _IN_64 else number for number in numbers)
        extra = extra[4 + length :]
    return numbers


def _checked(member: _Member) -> str:
    """The name of a member that may be read.

    Raises:
      CheckpointError: it may not.
    """
    shown = _shown(member)
    if len(member.name) > _MAX_NAME:
        raise CheckpointError(f"has a member with a name of {len(member.name)} bytes, {shown}")
    try:
        name = member.name.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"has a member whose name is no text, {shown}") from None
    if any(part in ("", "..") for part in name.replace("\\", "/").split("/")):
        raise CheckpointError(f"has a member whose name leaves its folder, {shown}")
    if member.method not in (_STORED, _DEFLATED):
        raise CheckpointError(f"packs {shown} by method {member.method}; only stored and deflated are read")
    if member.method == _STORED and member.size != member.packed:
        raise CheckpointError(f"declares {member.size} bytes for {shown}, which has {member.packed}")
    return name


def _shown(member: _Member) -> str:
    return ascii(member.name[:200].decode(errors="replace"))


def _unpacked(struct: Struct, content: bytes) -> tuple:
    try:
        return struct.unpack(content)
    except StructError:
        raise CheckpointError("is damaged: its list of members breaks off") from None


def _inflated(packed: bytes, member: _Member) -> bytes:
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = stream.decompress(packed, member.size + 1)  # a bound: there may be more than is declared
    except zlib.error as error:
        raise CheckpointError(f"is damaged: {_shown(member)} can not be unpacked ({error})") from None
    if len(content) != member.size or not stream.eof or stream.unused_data:
        raise CheckpointError(f"is damaged: {_shown(member)} does not unpack to the {member.size} bytes declared")
    return content
