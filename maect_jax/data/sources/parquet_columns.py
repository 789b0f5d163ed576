"""What Parquet files hold: which column has the pictures, which the labels, what the classes are called.

Source: Apache Parquet's format; Hugging Face's `datasets` writes its features as JSON to the schema's metadata.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maect_jax.data.host.decode import threads
from maect_jax.errors import DataError

MAX_GROUP_BYTES = 1 << 31  # of the pictures in a row group

_IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "class", "cls", "target", "category", "fine_label")
_ERRORS = (OSError, pa.ArrowException, ValueError, KeyError)  # what pyarrow raises for damaged files


@dataclass(frozen=True)
class Group:
    """A row group: number of its file, its number in that, its first id, and its rows."""

    file: int
    number: int
    first: int
    rows: int


@dataclass(frozen=True)
class Columns:
    """Paths in the schema.

    Attributes:
      image: of the encoded bytes.
      names: of the pictures' file names, or None.
      label: or None.
      classes: what the schema calls them; () when it does not.
    """

    image: str
    names: str | None
    label: str | None
    classes: tuple[str, ...]


def open_file(path: str | Path) -> pq.ParquetFile:
    """Without reading ahead, and with the checksums of pages where there are any."""
    return pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)


def reason(error: Exception) -> str:
    """What a library says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def find_columns(path: Path, key: str) -> Columns:
    """Which columns of a file are taken.

    Raises:
      DataError: not readable, no column of pictures, several.
    """
    try:
        with open_file(path) as file:
            schema = file.schema_arrow
    except _ERRORS as error:
        raise unreadable(path, error) from error
    features = _features(schema)
    pictures = {field.name: leaf for field in schema if (leaf := _bytes_of(field))}
    said = [name for name, feature in features.items() if feature.get("_type") == "Image" and name in pictures]
    named = [name for name in _IMAGE_NAMES if name in pictures]
    if not pictures:
        raise DataError(
            f"{key}: {path} has no column of encoded pictures (bytes, or a struct with bytes), only "
            f"{', '.join(schema.names)}; write one called 'image'"
        )
    chosen = next(iter([*(["image"] if "image" in pictures else []), *said, *named, *pictures]))
    if chosen not in said + named and len(pictures) > 1:
        raise DataError(f"{key}: {path} has the columns {', '.join(pictures)} of bytes; call that of pictures 'image'")
    names = f"{chosen}.path" if _has_path(schema.field(chosen)) else None
    label = _label_column(schema, features)
    named_classes = features.get(label, {}).get("names") if label else None
    good = isinstance(named_classes, list) and all(isinstance(name, str) for name in named_classes)
    return Columns(pictures[chosen], names, label, tuple(named_classes) if good else ())


def find_groups(paths: list[Path], columns: Columns) -> tuple[list[Group], int]:
    """The row groups of all files, and the mean bytes in one.

    Raises:
      DataError: a file is not readable or has other columns; a group is too large.
    """
    with ThreadPoolExecutor(threads()) as pool:
        by_file = list(pool.map(lambda path: _groups_of(path, columns), paths))
    flat = [(file, number, rows) for file, groups in enumerate(by_file) for number, (rows, _) in enumerate(groups)]
    firsts = accumulate((rows for _, _, rows in flat), initial=0)
    groups = [Group(file, number, first, rows) for (file, number, rows), first in zip(flat, firsts) if rows]
    sizes = [size for found in by_file for _, size in found]
    return groups, sum(sizes) // max(len(groups), 1)


def read_labels(paths: list[Path], columns: Columns, key: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int64 [n], -1 where the files say so, and class names: the schema's, or the texts in the column, sorted.

    Raises:
      DataError: not readable; neither numbers nor texts; some rows have none.
    """
    with ThreadPoolExecutor(threads()) as pool:
        arrays = list(pool.map(lambda path: _column(path, columns.label), paths))
    for path, array in zip(paths, arrays):
        if array.type != arrays[0].type:
            raise DataError(
                f"{path}: {columns.label!r} is {array.type}, not {arrays[0].type}; write it as in the others"
            )
        if array.null_count:
            row = int(np.argmax(array.is_null().to_numpy()))
            raise DataError(f"{key}: {path}:row {row} has no {columns.label!r} and others have; add it, or take it out")
    if pa.types.is_integer(arrays[0].type):
        labels = np.concatenate([array.to_numpy().astype(np.int64) for array in arrays])
        return np.where(labels < -1, -1, labels), columns.classes
    words = [word for array in arrays for word in _decoded(array)]
    classes = tuple(sorted(set(words)))
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[word] for word in words], np.int64), classes


def texts(path: str | Path, column: str) -> list[str | None]:
    """A column of texts; the last part of a path in the schema may lie in a struct."""
    return _decoded(_column(Path(path), column))


def _decoded(array: pa.ChunkedArray) -> list[str | None]:
    """Texts, which a damaged file may hold as bytes that are none."""
    return [
        None if text is None else text.decode(errors="replace") for text in array.cast(pa.large_binary()).to_pylist()
    ]


def unreadable(path: Path, error: Exception) -> DataError:
    """What to raise for a damaged file."""
    return DataError(f"{path}: is no Parquet file, or is damaged or cut off ({reason(error)}); get it anew")


def _groups_of(path: Path, columns: Columns) -> list[tuple[int, int]]:
    """(rows, bytes) of each row group."""
    try:
        with open_file(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
            # not more: of damaged metadata of a column, which lie deeper, pyarrow may end the process
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            found = [(group.num_rows, group.total_byte_size) for group in groups]
    except _ERRORS as error:
        raise unreadable(path, error) from error
    for wanted in filter(None, (columns.image, columns.label)):
        if wanted not in _leaves(schema):
            raise DataError(f"{path}: has no column {wanted!r}, which other files have; write them alike")
    if sum(rows for rows, _ in found) > os.path.getsize(path) or any(rows < 0 for rows, _ in found):
        raise DataError(f"{path}: is damaged: it claims more rows than it has bytes; get it anew")
    if (most := max((size for _, size in found), default=0)) > MAX_GROUP_BYTES:
        raise DataError(f"{path}: has {most} bytes in one row group; write it with row_group_size=100")
    return found


def _column(path: Path, column: str) -> pa.ChunkedArray:
    """A leaf of the schema; in a struct its parent's nulls are its own."""
    try:
        with open_file(path) as file:
            array = file.read(columns=[column], use_threads=False).column(0)
    except _ERRORS as error:
        raise unreadable(path, error) from error
    return array.flatten()[0] if pa.types.is_struct(array.type) else array


def _bytes_of(field: pa.Field) -> str | None:
    """The path of a field's encoded bytes, if it has any."""
    if _is_bytes(field.type):
        return field.name
    if pa.types.is_struct(field.type):
        index = field.type.get_field_index("bytes")
        if index >= 0 and _is_bytes(field.type.field(index).type):
            return f"{field.name}.bytes"
    return None


def _leaves(schema: pa.Schema) -> set[str]:
    """Paths of the columns that are taken from: of pictures, and all that is in no struct."""
    return {*schema.names, *filter(None, map(_bytes_of, schema))}


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _has_path(field: pa.Field) -> bool:
    index = field.type.get_field_index("path") if pa.types.is_struct(field.type) else -1
    return index >= 0 and _is_text(field.type.field(index).type)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _label_column(schema: pa.Schema, features: dict) -> str | None:
    """'label', else the first that is said to be a class label, else one that is called as labels are."""
    kinds = {field.name: field.type for field in schema}
    fit = [name for name, kind in kinds.items() if pa.types.is_integer(kind) or _is_text(kind)]
    said = [name for name in fit if features.get(name, {}).get("_type") == "ClassLabel"]
    return next(iter([*(["label"] if "label" in fit else []), *said, *(n for n in _LABEL_NAMES if n in fit)]), None)


def _features(schema: pa.Schema) -> dict[str, dict]:
    """Hugging Face's features by column; {} when there are none that can be read."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
