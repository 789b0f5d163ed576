"""One shard of a packed folder: written under a temporary name, checked, renamed, and described by a file beside it.

Only what has its description is complete; so a packing that is stopped at any time loses the shards it is writing.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from maect_jax.data.packing.manifest import write_atomically
from maect_jax.data.packing.record import pack_record
from maect_jax.data.packing.reencode import packed
from maect_jax.data.sources.base import Source
from maect_jax.errors import BadPicture, DataError

_WRITER = "group_size:1,uncompressed,max_parallelism:1"  # the same bytes from the same records
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Shard:
    """A unit of work.

    Attributes:
      path: of the file.
      split: the pictures are of.
      ids: of the pictures that go into it.
      names: of these pictures.
      short_side, quality: see `reencode.packed`.
      skip: bad pictures are left out; otherwise the first one is an error.
    """

    path: Path
    split: str
    ids: range
    names: tuple[str, ...]
    short_side: int | None
    quality: int
    skip: bool


@dataclass
class Description:
    """What was written to a shard, as `<shard>.json` says it.

    Attributes:
      bytes, sha256: of the file.
      source_bytes: of the pictures before.
      labels, names: of the records.
      bad: path and reason of each picture that was left out.
      picture_channels: that encoded pictures have (1 = grey, 3).
      npy_channels: that .npy pictures have.
    """

    bytes: int = 0
    sha256: str = ""
    source_bytes: int = 0
    labels: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    bad: list[dict[str, str]] = field(default_factory=list)
    picture_channels: list[int] = field(default_factory=list)
    npy_channels: list[int] = field(default_factory=list)


def description_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def read_description(shard: Path) -> Description | None:
    """The description of a complete shard; None where the shard is to be written (anew)."""
    try:
        found = Description(**json.loads(description_path(shard).read_bytes()))
        complete = os.stat(shard).st_size == found.bytes and _records(shard) == len(found.labels)
    except (OSError, ValueError, TypeError):
        return None
    return found if complete else None


def write_shard(sources: dict[str, Source], shard: Shard, tick: Callable[[], None]) -> Description:
    """Writes a shard and its description; a unit of work of `pool.work_on`.

    Raises:
      BadPicture: a picture is bad, and bad ones are not to be skipped.
      DataError: it can not be written, for want of space say.
    """
    description_path(shard.path).unlink(missing_ok=True)
    temporary = shard.path.with_name(shard.path.name + _UNFINISHED)
    try:
        description = _write_records(sources[shard.split], shard, temporary, tick)
        with open(temporary, "rb") as file:
            description.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            description.bytes = file.tell()
            os.fsync(file.fileno())
        if _records(temporary) != len(description.labels):
            raise DataError(f"{shard.path}: could not be read back as it was written; check the disk")
        os.replace(temporary, shard.path)
        write_atomically(description_path(shard.path), json.dumps(asdict(description)).encode())
    finally:
        temporary.unlink(missing_ok=True)
    return description


def _write_records(source: Source, shard: Shard, temporary: Path, tick: Callable[[], None]) -> Description:
    description = Description()
    pictures, arrays = set(), set()
    writer = ArrayRecordWriter(str(temporary), _WRITER)
    try:
        for index, name in zip(shard.ids, shard.names):
            tick()
            try:
                picture, label = source.read(index)
                found = packed(picture, source.where(index), shard.short_side, shard.quality)
            except BadPicture as error:
                if not shard.skip:
                    raise
                description.bad.append({"path": error.where, "reason": error.reason})
                continue
            _checked(shard.path, writer.write, pack_record(label, name, found.encoded))
            description.labels.append(int(label))
            description.names.append(name)
            description.source_bytes += found.source_bytes
            (arrays if found.npy else pictures).add(found.channels)
    except BaseException:
        _close_quietly(writer)
        raise
    _checked(shard.path, writer.close)
    description.picture_channels, description.npy_channels = sorted(pictures), sorted(arrays)
    return description


def _checked(path: Path, action: Callable, *arguments) -> None:
    """What array_record's writer raises, when the disk is full above all, as an error that names the shard."""
    try:
        action(*arguments)
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"{path}: can not be written ({' '.join(str(error).split())[:200]}); make room there"
        ) from error


def _close_quietly(writer: ArrayRecordWriter) -> None:
    with suppress(RuntimeError, ValueError):  # the error that brought us here is the one to tell
        writer.close()


def _records(path: Path) -> int:
    """How many records a file says that it holds; 0 when its footer can not be read."""
    return ArrayRecordReader(str(path), options="readahead_buffer_size:0,max_parallelism:0").num_records()


def remove_unfinished(folder: Path) -> None:
    """Takes away what a killed process has left."""
    for path in folder.glob(f"*{_UNFINISHED}"):
        path.unlink(missing_ok=True)
