"""manifest.json: what a packed folder holds. Written last, so a folder that has one is complete.

    format, version        'maect_jax records', 1
    source                 name and, of each split, fingerprint of what was packed
    settings               with which it was packed
    classes                class names by label
    channels               of the pictures: 1 (all grey), 3, or those of the .npy files
    splits.<split>         records; shards (file, records, bytes, sha256) in the order of the ids; labels (.npy, int32)
                           and names (.json, a list) of all records (file, bytes, sha256); class_counts; unlabelled;
                           bytes_before (of the encoded pictures); bad (path and reason of each that was left out)

What is read here may come from anywhere: every value that is used is checked first.
"""

import io
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maect_jax.errors import DataError

FILE = "manifest.json"
PLAN = "packing.json"  # there until the manifest is (see plan.py)
FORMAT, VERSION = "maect_jax records", 1
SPLITS = ("train", "test")
_LONGEST = 1 << 28  # bytes of a manifest
_MOST_RECORDS = 1 << 28  # of a split
_HEADER = 1 << 12  # bytes of a .npy before its values, at most
_LONGEST_NAME = 6 * 0xFFFF + 4  # bytes in JSON: each byte as \uXXXX, quotes, comma, new line
_LONGEST_NAMES = 1 << 31  # bytes of the names of a split
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
MEND = "copy the folder anew, or delete the folder and pack anew"


@dataclass(frozen=True)
class File:
    """A file of a packed folder: its name there, its bytes, their SHA-256 and, of a shard, how many records it has."""

    file: str
    bytes: int
    sha256: str
    records: int = 0


@dataclass(frozen=True)
class Split:
    """What the manifest says of a split."""

    records: int
    shards: tuple[File, ...]
    labels: File
    names: File


@dataclass(frozen=True)
class Manifest:
    """What a reader needs of a manifest."""

    classes: tuple[str, ...]
    channels: int
    splits: dict[str, Split]


def is_packed(folder: Path) -> bool:
    """Whether `folder` holds packed records: a manifest of this format; a damaged one, or a plan, beside shards."""
    path = folder / FILE
    if os.path.isfile(path):  # a FIFO of that name would be waited for
        with suppress(OSError), open(path, "rb") as file:
            if FORMAT.encode() in file.read(200):  # it is the first entry
                return True
    elif not os.path.lexists(path) and not os.path.exists(folder / PLAN):
        return False
    return any(entry.name.endswith(".array_record") for entry in os.scandir(folder))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a packed folder.

    Raises:
      DataError: it is damaged, of a newer version, or names files outside of the folder.
    """
    path = folder / FILE
    if not path.exists() and (folder / PLAN).exists():
        raise DataError(f"{folder} is not packed to the end; start the same `data pack` again")
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")
        with open(path, "rb") as file:
            text = file.read(_LONGEST + 1)
        if len(text) > _LONGEST:
            raise ValueError(f"more than {_LONGEST} bytes")
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError("not written by `data pack`")
        if content["version"] != VERSION:
            raise DataError(f"{path}: version {content['version']!r}, only {VERSION} is known; update maect_jax")
        splits = {name: _split(entry) for name, entry in content["splits"].items() if name in SPLITS}
        classes = tuple(_of(str, name) for name in _of(list, content["classes"]))
        return Manifest(classes, _count(content["channels"]), splits)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {MEND}") from error
    except KeyError as error:
        raise DataError(f"{path}: damaged (no {error.args[0]!r}); {MEND}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({str(error)[:200]}); {MEND}") from error


def _split(entry: dict) -> Split:
    shards = tuple(_file(shard, _count(shard["records"])) for shard in _of(list, entry["shards"]))
    records = _count(entry["records"])
    if not shards or sum(shard.records for shard in shards) != records:
        raise ValueError(f"{sum(shard.records for shard in shards)} records in the shards, {records} in the split")
    if records > _MOST_RECORDS:
        raise ValueError(f"{records} records in a split, more than {_MOST_RECORDS}")
    labels, names = _file(entry["labels"]), _file(entry["names"])
    longest = 4 * records + _HEADER, min(_LONGEST_NAME * records + _HEADER, _LONGEST_NAMES)
    for file, most in zip((labels, names), longest):
        if file.bytes > most:  # a sparse file may have as many
            raise ValueError(f"{file.file} has {file.bytes} bytes, more than the {most} there can be")
    return Split(records, shards, labels, names)


def _file(entry: dict, records: int = 0) -> File:
    name = _of(str, entry["file"])
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:100]!r} is no name of a file in the folder")
    return File(name, _count(entry["bytes"]), _of(str, entry["sha256"]), records)


def _count(value) -> int:
    if type(value) is not int or not 0 < value < 1 << 62:
        raise ValueError(f"{str(value)[:100]!r} is no number of things")
    return value


def _of(kind: type, value):
    if type(value) is not kind:
        raise ValueError(f"{str(value)[:100]!r} is no {kind.__name__}")
    return value


def read_labels(folder: Path, split: Split, classes: int) -> np.ndarray:
    """Labels int32 [records], each -1 or below `classes`. Raises DataError when they are not that."""
    data = _read_sized(folder, split.labels)
    path = folder / split.labels.file
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of .npy")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if shape != (split.records,) or dtype != np.dtype("<i4") or len(data) - file.tell() != 4 * split.records:
            raise ValueError(f"{dtype} {list(shape)} in {len(data)} bytes, not int32 [{split.records}]")
    except Exception as error:  # NumPy's reader of headers raises whatever its parser does
        raise DataError(f"{path}: damaged ({str(error)[:200]}); {MEND}") from error
    labels = np.frombuffer(data, "<i4", offset=file.tell()).astype(np.int32)
    if labels.min() < -1 or labels.max() >= max(classes, 1) or (not classes and labels.max() >= 0):
        raise DataError(f"{path}: labels {labels.min()}..{labels.max()} for {classes} classes; {MEND}")
    return labels


def read_names(folder: Path, split: Split) -> list[str]:
    """Names of the records, in their order. Raises DataError when the file is not that."""
    path = folder / split.names.file
    try:
        names = json.loads(_read_sized(folder, split.names))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({str(error)[:200]}); {MEND}") from error
    if type(names) is not list or len(names) != split.records or not all(type(name) is str for name in names):
        raise DataError(f"{path}: not a list of {split.records} names; {MEND}")
    return names


def check_size(folder: Path, file: File) -> None:
    """Raises DataError where a file is missing or has another size than the manifest says."""
    path = folder / file.file
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, {FILE} says {file.bytes} bytes; {MEND}") from error
    if size != file.bytes:
        what = f"truncated at byte {size}" if size < file.bytes else "it is another file"
        raise DataError(f"{path}: {size} bytes, {FILE} says {file.bytes}: {what}; {MEND}")


def _read_sized(folder: Path, file: File) -> bytes:
    check_size(folder, file)
    return (folder / file.file).read_bytes()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that is there as a whole or not at all, whenever the machine goes down. Raises DataError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: can not be written ({error.strerror}); make room there") from error
