"""The list of a tar's members: names and where their bytes lie. Nothing is extracted, and no member is read.

The standard library's reader takes a damaged header for the end of the archive, so that pictures would be missing
without a word, and reads what an extended header claims to hold, whatever its size. This one follows headers only,
names what is wrong, and needs some KiB.

Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; the GNU tar manual, "Basic Tar Format".
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from maect_jax.data.sources.names import shown
from maect_jax.errors import DataError

BLOCK = 512

_REGULAR = (b"0", b"\0", b"7")
_LINKS = (b"1", b"2")
_WITHOUT_BYTES = (*_LINKS, b"3", b"4", b"5", b"6")  # also devices and folders
_PAX, _PAX_OF_ALL, _LONG_NAME, _LONG_LINK = (b"x", b"X"), b"g", b"L", b"K"
_MAX_EXTENDED = 1 << 20  # bytes of an extended header
_TAIL = 1 << 20  # bytes after the end mark that are looked at; writers fill up a record of 10 KiB
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


class Entry(NamedTuple):
    """A regular file, or a link, in a tar; `offset` of its bytes in the file, -1 for a link."""

    name: str
    offset: int
    size: int


def entries(path: Path) -> Iterator[Entry]:
    """The files and links of a tar, in its order.

    Raises:
      DataError: no tar, compressed, sparse, damaged, cut off, or several tars joined.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield from _entries(descriptor, os.fstat(descriptor).st_size, path)
    finally:
        os.close(descriptor)


def _entries(descriptor: int, length: int, path: Path) -> Iterator[Entry]:
    at, extended = 0, {}
    while True:
        header = os.pread(descriptor, BLOCK, at)
        if at == 0:
            refuse_compressed(header, path)
        if len(header) < BLOCK:
            raise DataError(f"{path}: is cut off: it ends at byte {length} without the end mark of a tar; get it anew")
        if header.count(0) == BLOCK:
            return _check_end(descriptor, at + BLOCK, path)
        kind, size = header[156:157], _checked(header, at, path)
        if kind in _WITHOUT_BYTES:
            size = 0
        offset = at + BLOCK
        if kind in _PAX or kind in (_PAX_OF_ALL, _LONG_NAME, _LONG_LINK):
            if size > _MAX_EXTENDED:
                raise DataError(f"{path}: has an extended header of {size} bytes at byte {at}; pack it anew")
            content = os.pread(descriptor, size, offset)
            if len(content) < size:
                raise DataError(f"{path}: is cut off within a header at byte {length}; get it anew")
            if kind in _PAX:
                extended |= _pax(content, at, path)
            elif kind == _LONG_NAME:
                extended[b"path"] = content.partition(b"\0")[0]
        else:
            name = _text(extended.get(b"path", _name(header)))
            if b"size" in extended and kind not in _WITHOUT_BYTES:
                size = _decimal(extended[b"size"], at, path)
            if kind == b"S" or b"sparse" in extended:
                raise DataError(f"{path}: {shown(name)} is a sparse file; pack it anew, without --sparse")
            if offset + size > length:
                raise DataError(
                    f"{path}: is cut off at byte {length}, within {shown(name)}, which ends at byte {offset + size}; "
                    "get it anew"
                )
            if kind in _LINKS:
                yield Entry(name, -1, 0)
            elif kind in _REGULAR and not name.endswith("/"):
                yield Entry(name, offset, size)
            extended = {}
        at = offset + -(-size // BLOCK) * BLOCK


def refuse_compressed(begin: bytes, path: Path) -> None:
    """Raises DataError where a file begins as compressed ones do: a member of it can not be read by itself."""
    for magic, (name, command) in _COMPRESSED.items():
        if begin.startswith(magic):
            raise DataError(
                f"{path}: is compressed with {name}, and so can not be read from the middle; unpack it once: "
                f"{command} {shown(path.name)} (pictures are compressed already)"
            )


def _check_end(descriptor: int, at: int, path: Path) -> None:
    if os.pread(descriptor, _TAIL, at).strip(b"\0"):
        raise DataError(f"{path}: goes on after its end mark at byte {at}, as joined tars do; pack it anew as one")


def _checked(header: bytes, at: int, path: Path) -> int:
    """The size that a header says. Raises DataError when it is no header."""
    checksum, field = _octal(header[148:156]), header[124:136]
    size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" ") or size is None:
        raise DataError(f"{path}: " + ("is no tar" if at == 0 else f"is damaged: no header at byte {at}; get it anew"))
    return size


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else None


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(content: bytes, at: int, path: Path) -> dict[bytes, bytes]:
    """Of the records `length key=value` of an extended header those that are needed."""
    records = {}
    while content.strip(b"\0"):
        length, space, _ = content[:12].partition(b" ")
        count = int(length) if length.isdigit() else 0
        key, equals, value = content[len(length) + 1 : count - 1].partition(b"=")
        if not (space and equals and count <= len(content) and content[count - 1 : count] == b"\n"):
            raise DataError(f"{path}: is damaged: broken extended header at byte {at}; get it anew")
        content = content[count:]
        if key in (b"path", b"size"):
            records[key] = value
        elif key.startswith(b"GNU.sparse"):
            records[b"sparse"] = value
    return records


def _decimal(digits: bytes, at: int, path: Path) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise DataError(f"{path}: is damaged: broken extended header at byte {at}; get it anew")
    return int(digits)


def _text(name: bytes) -> str:
    return name.partition(b"\0")[0].decode(errors="surrogateescape")
