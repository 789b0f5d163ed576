"""Parquet files with a column of encoded pictures, as Hugging Face has them: `data/train-00000-of-00002.parquet`.

Pictures are read by row group, the least that the format lets one read; a few row groups are kept by each process.
In another order than the files' that reads a whole group for a picture, so large groups are slow to train from.
"""

import functools
import hashlib
import logging
import os
import shlex
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa

from maect_jax.data.host.decode import MAX_BYTES
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.layout import SPLIT_FOLDERS, numbered
from maect_jax.data.sources.names import file_facts
from maect_jax.data.sources.parquet_columns import (
    MAX_GROUP_BYTES,
    Group,
    find_columns,
    find_groups,
    open_file,
    read_labels,
    reason,
    texts,
)
from maect_jax.data.sources.split_files import files_in, training_files
from maect_jax.data.sources.trees import holds_pictures
from maect_jax.errors import BadPicture, DataError

_LOG = logging.getLogger(__name__)

KEPT_BYTES = 1 << 28  # of row groups, in each process
SLOW_BYTES = 4 << 20  # of a row group, from which on reading in another order is slow
_AT_ONCE = 8  # rows that are unpacked at once: a damaged file may say that many are one large picture


class ParquetSource(Source):
    """Rows of Parquet files, in the order of the ids.

    Args:
      name: what the user called it.
      paths: the files.
      groups: their row groups, in order.
      column: path of the bytes in the schema: 'image.bytes' or 'image'.
      names: path of the pictures' file names in the schema, None where there are none.
      labels, classes, channels: as `Source`.
    """

    def __init__(
        self,
        name: str,
        paths: list[Path],
        groups: list[Group],
        column: str,
        names: str | None,
        labels: np.ndarray,
        classes: tuple[str, ...],
        channels: int,
    ):
        self.name, self.classes, self.channels = name, classes, channels
        self.labels = np.asarray(labels, np.int32)
        self._paths, self._groups, self._column, self._names = [str(p) for p in paths], groups, column, names
        self._firsts = np.array([group.first for group in groups])
        self._first_of_file = {group.file: group.first for group in reversed(groups)}
        self._kept = _RowGroups()

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    def __setstate__(self, state):
        self.__dict__.update(state, _kept=_RowGroups())

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, index: int) -> str:
        file = self._group(index).file
        return f"{self._paths[file]}:row {index - self._first_of_file[file]}"

    def read(self, index: int) -> tuple[bytes, int]:
        group = self._group(index)
        try:
            pictures = self._kept.get(group, self._paths[group.file], self._column)
        except (OSError, pa.ArrowException) as error:
            why = f"its row group can not be read ({reason(error)})"
            raise BadPicture(self.where(index), why, "get the file anew") from error
        picture = pictures[index - group.first].as_buffer()
        if picture is None:
            raise BadPicture(self.where(index), "holds no bytes of a picture", "write them into the file")
        if picture.size > MAX_BYTES:
            raise BadPicture(self.where(index), f"more than {MAX_BYTES} bytes", "scale the picture down")
        return picture.to_pybytes(), int(self.labels[index])

    def digest(self) -> str:
        facts = [f"{os.path.basename(self._paths[group.file])}\0{group.first}" for group in self._groups]
        return f"{len(self)} pictures, files {hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"

    def fingerprint(self) -> str:
        facts = [f"{os.path.basename(path)}\0{file_facts(path)}" for path in self._paths]
        digest = hashlib.sha256(repr((self._column, facts)).encode())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def file_names(self) -> list[str]:
        """What the files say; of pictures without a name, or where two have one, file and row."""
        files = [Path(path).stem for path in self._paths]
        own = [
            f"{files[group.file]}/{group.first - self._first_of_file[group.file] + row}"
            for group in self._groups
            for row in range(group.rows)
        ]
        if self._names is None:
            return own
        said = [name for path in self._paths for name in texts(path, self._names)]
        return [a or b for a, b in zip(said, own)] if len(set(said)) == len(own) == len(said) else own

    def _group(self, index: int) -> Group:
        return self._groups[int(np.searchsorted(self._firsts, index, "right")) - 1]


class _RowGroups:
    """The row groups that were used last, up to KEPT_BYTES; one is read at a time, so that memory is bounded."""

    def __init__(self):
        self._kept: OrderedDict[Group, pa.ChunkedArray] = OrderedDict()
        self._lock, self._reading = threading.Lock(), threading.Lock()

    def get(self, group: Group, path: str, column: str) -> pa.ChunkedArray:
        """The encoded pictures of a row group."""
        if (found := self._find(group)) is not None:
            return found
        with self._reading:
            if (found := self._find(group)) is not None:  # another thread was reading it
                return found
            pictures = _read_group(group, path, column)
            with self._lock:
                self._kept[group] = pictures
                while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > KEPT_BYTES:
                    self._kept.popitem(last=False)
            return pictures

    def _find(self, group: Group) -> pa.ChunkedArray | None:
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
            return self._kept.get(group)


def _read_group(group: Group, path: str, column: str) -> pa.ChunkedArray:
    parts, size = [], 0
    with open_file(path) as file:
        for batch in file.iter_batches(_AT_ONCE, row_groups=[group.number], columns=[column], use_threads=False):
            (part,) = batch.column(0).flatten() if pa.types.is_struct(batch.schema.types[0]) else batch.columns
            parts.append(part)
            size += part.nbytes
            if size > MAX_GROUP_BYTES:
                raise pa.ArrowInvalid(f"it unpacks to more than {MAX_GROUP_BYTES} bytes")
    if sum(map(len, parts)) != group.rows:
        raise pa.ArrowInvalid(f"it has {sum(map(len, parts))} rows, not {group.rows}")
    return pa.chunked_array(parts)


def parquet_folder(folder: Path) -> Path | None:
    """Where a folder holds Parquet files: in itself, in folders of splits, or in `data/`; None for nowhere."""
    splits = [name for names in SPLIT_FOLDERS.values() for name in names]
    for at in (folder, folder / "data"):
        if any(each.is_dir() and files_in(each, ".parquet") for each in (at, *(at / name for name in splits))):
            return None if holds_pictures(at) else at  # a table beside pictures is about them
    return None


def open_parquet(
    name: str, lists: list[list[Path]], split: str, channels: int, classes: tuple[str, ...] | None, key: str
) -> ParquetSource:
    """The pictures of the first list of files that has labels, else of the first; arguments as `open.open_source`."""
    read = [_read_list(name, paths, channels, key) for paths in lists[:1]]
    for paths in lists[1:]:  # a test split whose labels are not published says -1
        if read[-1].labels.max(initial=-1) >= 0:
            break
        read.append(_read_list(name, paths, channels, key))
    source = next((each for each in read if each.labels.max(initial=-1) >= 0), read[0])
    labels = source.labels
    if not len(labels):
        raise DataError(f"{key}: no rows in the {len(lists[0])} Parquet files of {name!r}, such as {lists[0][0].name}")
    if labels.max() >= 0 and labels.min() < 0:
        row = int(np.argmax(labels < 0))
        raise DataError(f"{key}: {source.where(row)} has no label and others have; add it, or take the row out")
    if split == "test" and classes is None and (training := training_files(lists[0][0].parent, ".parquet")):
        classes = open_parquet(name, [training], "train", channels, None, key).classes or None
    source.labels, source.classes = numbered(labels, source.classes, classes, split, name, key)
    return source


def _read_list(name: str, paths: list[Path], channels: int, key: str) -> ParquetSource:
    columns = find_columns(paths[0], key)
    groups, size = find_groups(paths, columns)
    rows = sum(group.rows for group in groups)
    labels, classes = np.full(rows, -1), ()
    if columns.label:
        labels, classes = read_labels(paths, columns, key)
    if len(labels) != rows:
        raise DataError(f"{key}: {name!r} has {rows} rows and {len(labels)} labels; get the files anew")
    if size > SLOW_BYTES and size * len(groups) > KEPT_BYTES:
        _warn_of_slow(name, size >> 20)
    return ParquetSource(name, paths, groups, columns.image, columns.names, labels, classes, channels)


@functools.cache  # once a process, though training, evaluation and class names all open the set
def _warn_of_slow(name: str, mebibytes: int) -> None:
    _LOG.warning(
        "%s: a row group has %d MiB, and all of it is read for one picture in another order, as training does; "
        "`python -m maect_jax data pack %s DST` once makes that fast",
        *(name, mebibytes, shlex.quote(name)),
    )
