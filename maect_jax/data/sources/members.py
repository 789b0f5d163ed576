"""Pictures inside tar and zip archives: a list of where they lie, made once, and each read by itself.

Nothing is extracted: names never become paths, links and devices are left out, and what a member may unpack to is
bounded before it is unpacked.
"""

import io
import logging
import os
import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

import numpy as np

from maect_jax.data.host.decode import MAX_BYTES
from maect_jax.data.sources import tar
from maect_jax.data.sources.index_cache import Table, cached
from maect_jax.data.sources.layout import is_picture, is_unread
from maect_jax.data.sources.names import HIDDEN, shown
from maect_jax.errors import BadPicture, DataError

_LOG = logging.getLogger(__name__)

ARCHIVES = (".tar", ".zip")
PLAIN, STORED, DEFLATED = 0, 1, 2  # bytes in a tar; in a zip as they are; in a zip, deflated

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_METHODS = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # bits of a member's flags
_MAX_DIRECTORY = 1 << 28  # bytes of a zip's list of members: more than a million
_LOCAL = Struct("<4s22xHH")  # before each member of a zip: …, length of its name and of what is extra
_SLACK = 512  # bytes read beyond a member, in which name and extra find room


@dataclass(frozen=True)
class Members:
    """Pictures of one archive, sorted by name.

    Attributes:
      names: path inside the archive.
      offset: where the bytes begin in the archive; in a zip, those of the header before them; int64 [n].
      packed: bytes in the archive, int64 [n].
      size: bytes of the picture, int64 [n].
      method: PLAIN, STORED or DEFLATED, uint8 [n].
      checksum: CRC-32 of the picture, in a zip, uint32 [n].
      unread: paths of pictures of kinds that are not read, sorted; of the archive as it is listed, no rows.
    """

    names: list[str]
    offset: np.ndarray
    packed: np.ndarray
    size: np.ndarray
    method: np.ndarray
    checksum: np.ndarray
    unread: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, rows: list[int]) -> "Members":
        """Some of them, in that order."""
        columns = (self.offset, self.packed, self.size, self.method, self.checksum)
        at = np.asarray(rows, np.int64)
        return Members([self.names[row] for row in rows], *(column[at] for column in columns))


def index(path: Path) -> Members:
    """The pictures in an archive.

    Raises:
      DataError: not readable as what its ending says, damaged, cut off, compressed as a whole, encrypted, a name that
        leaves the archive, or archives in it instead of pictures.
    """
    try:
        return _zip_index(path) if path.name.lower().endswith(".zip") else _tar_index(path)
    except OSError as error:
        raise DataError(f"{path}: can not be read ({error})") from error


def in_tar(names: list[str], numbers: np.ndarray, unread: tuple[str, ...] = ()) -> Members:
    """Members of a tar from names and int64 [n, 2 or more]: offset, size."""
    n, size = len(names), numbers[:, 1]
    return Members(names, numbers[:, 0], size, size, np.full(n, PLAIN, np.uint8), np.zeros(n, np.uint32), unread)


def refuse_compressed(path: Path) -> None:
    """Raises DataError for the names that compressed tars have."""
    if path.name.lower().endswith(_COMPRESSED):
        with open(path, "rb") as file:
            tar.refuse_compressed(file.read(8), path)
        raise DataError(f"{path}: ends as a compressed tar does, but is none; get it anew")


def inside(name: str, path: Path) -> str | None:
    """The name of a member without what says nothing, such as './'; None for hidden ones.

    Raises:
      DataError: it leads out of the archive.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise DataError(f"{path}: {shown(name)} leads out of the archive; pack it anew, without ..")
    return None if any(part.startswith(HIDDEN) for part in parts) else "/".join(parts)


# -------------------------------------------------------------------------------------------------------------- lists


def _tar_index(path: Path) -> Members:
    names, numbers = cached(path, "tar", 2, _tar_table)
    pictures = len(names)
    while pictures and is_unread(names[pictures - 1].rpartition("/")[2]):
        pictures -= 1
    return in_tar(names[:pictures], numbers[:pictures], tuple(names[pictures:]))


def _tar_table(path: Path) -> Table:
    """Offset and size of the pictures; after them the names of those of kinds that are not read, with zeros."""
    found: dict[str, tuple[int, int]] = {}
    names = _Names(path)
    for name, offset, size in tar.entries(path):
        if picture := names.picture(name, link=offset < 0):
            found[picture] = offset, size  # of several with one name the last, as when it is unpacked
    names.check(len(found))
    ordered = sorted(found)
    numbers = [found[name] for name in ordered] + [(0, 0)] * len(names.unread)
    return ordered + sorted(names.unread), np.array(numbers, np.int64).reshape(-1, 2)


class _Names:
    """Which members are pictures, and what is said of the others."""

    def __init__(self, path: Path):
        self._path, self._links, self._archive = path, 0, ""
        self.unread: set[str] = set()

    def picture(self, name: str, link: bool) -> str | None:
        """The name of a picture inside the archive, None for anything else."""
        name = inside(name, self._path)
        if name is None or not is_picture(name.rpartition("/")[2]):
            if name and name.lower().endswith(ARCHIVES + _COMPRESSED):
                self._archive = self._archive or name
            elif name and is_unread(name.rpartition("/")[2]):
                self.unread.add(name)
            return None
        self._links += link
        return None if link else name

    def check(self, pictures: int) -> None:
        if self._archive and not pictures:
            raise DataError(
                f"{self._path}: holds archives ({shown(self._archive)}, …) and no pictures; unpack it once into a "
                "folder, and give that"
            )
        if self._links:
            message = "%s: %d links to pictures are left out; pack it with the files themselves"
            _LOG.warning(message, self._path, self._links)


class _Bounded(io.FileIO):
    """A file of which no more is read at once than the list of members of a large zip."""

    def read(self, size: int = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its list of members has {size} bytes, more than {_MAX_DIRECTORY}")
        return super().read(size)


def _zip_index(path: Path) -> Members:
    with _Bounded(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                listed = archive.infolist()
        except OSError:
            raise
        except Exception as error:  # BadZipFile, struct.error, NotImplementedError, ValueError, UnicodeDecodeError …
            reason = str(error) or type(error).__name__
            raise DataError(f"{path}: is no zip, or is damaged or cut off ({shown(reason)}); get it anew") from error
    found: dict[str, zipfile.ZipInfo] = {}
    names, length = _Names(path), os.path.getsize(path)
    for info in listed:
        name = info.filename.replace("\\", "/")
        if info.is_dir() or not (picture := names.picture(name, stat.S_ISLNK(info.external_attr >> 16))):
            continue
        if info.flag_bits & _ENCRYPTED:
            raise DataError(f"{path}: {shown(name)} is encrypted; unpack it, and give the folder or pack it without")
        if info.compress_type not in _METHODS:
            method = zipfile.compressor_names.get(info.compress_type, info.compress_type)
            raise DataError(f"{path}: {shown(name)} is packed by {method}; pack it anew with deflate or store (zip -0)")
        if not 0 <= info.header_offset <= length - _LOCAL.size - info.compress_size:
            raise DataError(f"{path}: is damaged: {shown(name)} lies beyond its end; get it anew")
        found[picture] = info
    names.check(len(found))
    ordered = sorted(found)
    infos = [found[name] for name in ordered]

    def column(values, kind):
        return np.array(list(values), kind)

    return Members(
        ordered,
        column((i.header_offset for i in infos), np.int64),
        column((i.compress_size for i in infos), np.int64),
        column((min(i.file_size, 1 << 62) for i in infos), np.int64),
        column((_METHODS[i.compress_type] for i in infos), np.uint8),
        column((i.CRC for i in infos), np.uint32),
        tuple(sorted(names.unread)),
    )


# ----------------------------------------------------------------------------------------------------------- reading


def read_member(descriptor: int, offset: int, packed: int, size: int, method: int, checksum: int, where: str) -> bytes:
    """The bytes of one picture; arguments as the columns of `Members`.

    Raises:
      BadPicture: too large, cut off, or not what its checksum says.
    """
    if max(packed, size) > MAX_BYTES:
        raise BadPicture(where, f"{max(packed, size)} bytes are more than {MAX_BYTES}", "scale the picture down")
    if method == PLAIN:
        content = _read_at(descriptor, size, offset)
        if len(content) < size:
            raise BadPicture(where, f"is cut off after {len(content)} of {size} bytes", "get the archive anew")
        return content
    content = _read_at(descriptor, _LOCAL.size + packed + _SLACK, offset)
    start = _start(content, where)
    if start + packed > len(content):
        content = _read_at(descriptor, start + packed, offset)
        if start + packed > len(content):
            raise BadPicture(where, f"is cut off at byte {offset + len(content)}", "get the archive anew")
    content = content[start : start + packed]
    if method == DEFLATED:
        content = _inflated(content, size, where)
    if len(content) != size or zlib.crc32(content) != checksum:
        raise BadPicture(where, "is damaged: its CRC is not the one it was packed with", "get the archive anew")
    return content


def _start(content: bytes, where: str) -> int:
    """Where the bytes of a zip's member begin after its header."""
    if len(content) < _LOCAL.size or not content.startswith(b"PK\x03\x04"):
        raise BadPicture(where, "is not where the zip's list of members says", "get the archive anew")
    _, name, extra = _LOCAL.unpack_from(content)
    return _LOCAL.size + name + extra


def _inflated(packed: bytes, size: int, where: str) -> bytes:
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = stream.decompress(packed, size + 1)
    except zlib.error as error:
        raise BadPicture(where, f"can not be unpacked ({error})", "get the archive anew") from error
    if len(content) != size or not stream.eof:
        raise BadPicture(where, f"does not unpack to the {size} bytes that are declared", "get the archive anew")
    return content


def _read_at(descriptor: int, count: int, offset: int) -> bytes:
    """`count` bytes, or as many as there are."""
    content = os.pread(descriptor, count, offset)
    while len(content) < count and (more := os.pread(descriptor, count - len(content), offset + len(content))):
        content += more
    return content
