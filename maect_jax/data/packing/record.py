"""One record of a packed data set: an encoded picture with its label and its name, and a checksum over all of it.

    offset  type       what
    0       uint8      version of this layout, 1
    1       uint32     CRC32 (zlib) of everything after it
    5       int32      label; -1 = none
    9       uint16     k, length of the name
    11      k bytes    name: what the picture's file was called, UTF-8 (bytes that are none are kept as they are)
    11 + k  the rest   the picture as its file held it: JPEG, PNG, .npy …

Integers are little-endian. Records lie in ArrayRecord files written with `group_size:1,uncompressed`: a record can be
read without its neighbours, and a picture is not compressed again.
"""

import struct
import zlib

from maect_jax.errors import BadPicture, DataError

VERSION = 1
_HEADER = struct.Struct("<BIiH")
_CHECKED = 5  # the CRC is of everything from here on
_TAIL = struct.Struct("<iH")
_MEND = "copy the shard anew or pack the set anew"


def pack_record(label: int, name: str, picture: bytes) -> bytes:
    """The bytes of a record.

    Raises:
      DataError: the name is longer than 65,535 bytes.
    """
    key = name.encode(errors="surrogateescape")
    if len(key) > 0xFFFF:
        raise DataError(f"{name[:100]!r}…: a name of {len(key)} bytes is longer than {0xFFFF}; shorten it")
    tail = _TAIL.pack(label, len(key)) + key
    return struct.pack("<BI", VERSION, zlib.crc32(picture, zlib.crc32(tail))) + tail + picture


def unpack_record(record: bytes, where: str) -> tuple[bytes, int]:
    """(picture, label) of a record.

    Args:
      record: its bytes.
      where: what an error calls it.

    Raises:
      BadPicture: it is damaged, or of another layout.
    """
    if len(record) < _HEADER.size:
        raise BadPicture(where, f"damaged ({len(record)} bytes are no record)", _MEND)
    version, checksum, label, length = _HEADER.unpack_from(record)
    if version != VERSION:
        raise BadPicture(where, f"layout {version} of a record, only {VERSION} is known", "pack the set anew")
    found = zlib.crc32(memoryview(record)[_CHECKED:])
    if found != checksum:
        raise BadPicture(where, f"damaged (CRC32 is {found:08x}, the record says {checksum:08x})", _MEND)
    if len(record) < _HEADER.size + length:
        raise BadPicture(where, f"damaged (a name of {length} bytes in a record of {len(record)})", _MEND)
    return record[_HEADER.size + length :], label


def record_name(record: bytes) -> str:
    """The name in a record that `unpack_record` takes."""
    length = _HEADER.unpack_from(record)[3]
    return record[_HEADER.size : _HEADER.size + length].decode(errors="surrogateescape")
