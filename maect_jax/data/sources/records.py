"""Packed records as a `Source`: what `python -m maect_jax data pack` wrote (docs/data.md, data/packing/record.py)."""

import hashlib
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from maect_jax.data.packing.manifest import (
    MEND,
    Split,
    check_size,
    is_packed,
    read_labels,
    read_manifest,
    read_names,
)
from maect_jax.data.packing.record import unpack_record
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.shards import Shards
from maect_jax.errors import BadPicture, DataError

__all__ = ["RecordSource", "is_packed", "open_intact", "open_records"]


class _PlainShards(Shards):
    """Shards whose records are as long in memory as on the disk: others could unpack to any size."""

    def _reader(self, shard: int):
        reader = super()._reader(shard)
        if "uncompressed" not in (reader.writer_options_string() or "").split(","):
            raise DataError(f"{self.paths[shard]}: compressed, so not written by `data pack`; pack the set anew")
        return reader


class RecordSource(Source):
    """One split of a packed folder; labels are known without reading a picture, names are read when asked for.

    Args:
      name: what the user called the folder.
      folder: that holds it.
      split: what the manifest says of the split.
      stored: labels as the records hold them, int32 [n].
      labels: the same by index into `classes`.
      classes: class names by index.
      channels: of the decoded pictures.

    Raises:
      DataError: a shard is missing, has another size than the manifest says, or can not be opened.
    """

    def __init__(self, name: str, folder: Path, split: Split, stored, labels, classes: tuple[str, ...], channels: int):
        self.name, self.classes, self.channels = name, classes, channels
        self.folder, self.split, self.stored, self.labels = folder, split, stored, labels
        for shard in split.shards:
            check_size(folder, shard)
        paths = [str(folder / shard.file) for shard in split.shards]
        self.shards = _PlainShards(paths, [shard.records for shard in split.shards])

    def __len__(self) -> int:
        return self.split.records

    def where(self, index: int) -> str:
        return self.shards.where(index)

    def read(self, index: int) -> tuple[bytes, int]:
        record = self.shards.read(index)
        picture, label = unpack_record(record, self.where(index))
        if label != self.stored[index]:
            reason = f"label {label}, {self.split.labels.file} says {self.stored[index]}"
            raise BadPicture(self.where(index), reason, MEND)
        return picture, int(self.labels[index])

    def digest(self) -> str:
        return f"{len(self)} records {self._hash[:16]}"

    def fingerprint(self) -> str:
        return self._hash

    @cached_property
    def _hash(self) -> str:
        digest = hashlib.sha256("\n".join(shard.sha256 for shard in self.split.shards).encode())
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()

    def file_names(self) -> list[str]:
        return read_names(self.folder, self.split)


def open_records(
    name: str, folder: Path, split: str, channels: int, classes: tuple[str, ...] | None, key: str
) -> RecordSource:
    """The records of a split of `folder`; arguments and errors as `open.open_source`."""
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        have = ", ".join(manifest.splits) or "none"
        raise DataError(f"{key}: {name!r} has no {split} split, only {have}; pack a set that has one")
    if manifest.channels not in (1, 3) and manifest.channels != channels:
        raise DataError(
            f"{key}: pictures of {name!r} have {manifest.channels} channels, {channels} are asked for; "
            f"set channels to {manifest.channels}"
        )
    found = manifest.splits[split]
    stored = read_labels(folder, found, len(manifest.classes))
    own = manifest.classes if stored.max() >= 0 else ()  # a split without labels has no classes
    labels = stored
    if classes and own and classes != own:
        unknown = sorted(set(own) - set(classes))
        if unknown:
            raise DataError(
                f"{key}: class {', '.join(map(repr, unknown[:5]))} of {name!r} is not in the training set "
                f"({len(classes)} classes); add it there or take it out here"
            )
        known = {c: i for i, c in enumerate(classes)}
        labels = np.array([*(known[c] for c in own), -1], np.int32)[stored]  # -1 takes the last
    return RecordSource(name, folder, found, stored, labels, classes or own, channels)


def open_intact(folder: Path, split: str, channels: int | None) -> tuple[RecordSource, np.ndarray]:
    """The records in those shards of a split that open, and the ids they have in it, int64 [n].

    Raises:
      DataError: no such split; manifest or labels are damaged; no shard opens.
    """
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        raise DataError(f"{folder}: has no {split} split")
    found, classes = manifest.splits[split], manifest.classes
    labels = read_labels(folder, found, len(classes))
    shards, ids, stop = [], [], 0
    for shard in found.shards:
        start, stop = stop, stop + shard.records
        try:
            check_size(folder, shard)
            _PlainShards([str(folder / shard.file)], [shard.records])
        except DataError:
            continue
        shards.append(shard)
        ids.append(np.arange(start, stop))
    if not shards:
        raise DataError(f"{folder}: no shard of {split} opens; {MEND}")
    of_shards = np.concatenate(ids)
    intact, labels = replace(found, records=len(of_shards), shards=tuple(shards)), labels[of_shards]
    channels = channels or (manifest.channels if manifest.channels not in (1, 3) else 3)
    return RecordSource(str(folder), folder, intact, labels, labels, classes, channels), of_shards
