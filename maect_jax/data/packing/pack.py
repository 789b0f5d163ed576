"""Packs a data set: shards in parallel, then the manifest."""

import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maect_jax.data.packing import manifest, plan
from maect_jax.data.packing.plan import Settings
from maect_jax.data.packing.pool import work_on
from maect_jax.data.packing.shard import (
    Description,
    Shard,
    description_path,
    read_description,
    remove_unfinished,
    write_shard,
)
from maect_jax.data.sources.base import Source
from maect_jax.errors import BadPicture, DataError

_LOCK = "packing.lock"


@dataclass(frozen=True)
class Result:
    """What a packing did: pictures in the folder, their bytes before and those of the shards, bad ones, seconds."""

    pictures: int
    bytes_before: int
    bytes_after: int
    bad: int
    seconds: float

    def __str__(self) -> str:
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        return (
            f"{self.pictures} pictures, {before:.1f} MB -> {after:.1f} MB in {self.seconds:.1f} s, "
            f"{self.bad or 'none'} bad" + (f" and left out (see {manifest.FILE})" if self.bad else "")
        )


def pack(
    name: str, sources: dict[str, Source], folder: Path, settings: Settings, *, skip: bool = True, workers: int = 0
) -> Result:
    """Writes the pictures of `sources` to `folder`; goes on where an earlier call with the same arguments stopped.

    The result is the same, to the byte, whatever the workers and however often it was stopped.

    Args:
      name: of the data set, for the manifest.
      sources: by split.
      folder: new, empty, or of the same packing.
      settings: how to pack.
      skip: leave bad pictures out and list them in the manifest; otherwise the first one is an error.
      workers: processes; 0 = this one alone.

    Raises:
      BadPicture: see `skip`.
      DataError: the folder holds something else, or the packing of other pictures or settings; pictures have several
        labels or different numbers of channels; a disk is full; no picture of a split is good.
    """
    began = time.perf_counter()
    _check_folder(folder)
    for source in sources.values():
        if source.label_sets() is not None:
            raise DataError(
                f"{source.name!r}: its pictures have several labels each and a record holds one; not packed"
            )
    origin, facts = plan.source_facts(sources), settings.facts()
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if (folder / manifest.FILE).exists():
            content = _finished(folder, origin | facts)
        else:
            remove_unfinished(folder)
            starts = plan.begin(folder, sources, settings, origin | facts)
            shards = _shards(folder, sources, starts, settings, skip)
            described = _write(sources, shards, skip, workers)
            content = _manifest(name, sources, origin, facts, shards, described, folder)
            text = json.dumps(content, indent=1).encode()
            manifest.write_atomically(folder / manifest.FILE, text)
        _clear(folder, content)
    return _result(content, time.perf_counter() - began)


def _finished(folder: Path, facts: dict) -> dict:
    """The content of the manifest of a packing that was done before.

    Raises:
      DataError: it is damaged, or of other pictures or settings; a file of it is missing or has another size.
    """
    path = folder / manifest.FILE
    found = manifest.read_manifest(folder)
    try:
        content = json.loads(path.read_bytes())
        there = _facts_of(content)
        _result(content, 0)
    except KeyError as error:
        raise DataError(f"{path}: damaged (no {error.args[0]!r}); {manifest.MEND}") from error
    except (TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); {manifest.MEND}") from error
    plan.refuse_others(folder, there, facts)
    for split in found.splits.values():
        for file in (*split.shards, split.labels, split.names):
            manifest.check_size(folder, file)
    return content


def _check_folder(folder: Path) -> None:
    """Refuses a folder that holds something else than (part of) a packing."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; give a new folder")
    known = manifest.is_packed(folder) if (folder / manifest.FILE).exists() else (folder / manifest.PLAN).exists()
    others = [entry.name for entry in os.scandir(folder) if entry.name not in (_LOCK, manifest.PLAN + ".tmp")]
    if others and not known:
        raise DataError(f"{folder} holds {sorted(others)[0]!r}, which is no packing; give a new folder")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second packing out; the lock goes with the process that holds it."""
    with open(folder / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another `data pack` is writing to it; wait for it or stop it") from None
        try:
            yield
        finally:
            os.unlink(file.name)


def _shards(
    folder: Path, sources: dict[str, Source], starts: dict[str, list[int]], settings: Settings, skip: bool
) -> list[Shard]:
    shards = []
    for split, source in sources.items():
        names, firsts = source.file_names(), starts[split]
        for number, (start, stop) in enumerate(zip(firsts, [*firsts[1:], len(source)])):
            path = folder / f"{split}-{number:05}-of-{len(firsts):05}.array_record"
            ids, size = range(start, stop), (settings.short_side, settings.quality)
            shards.append(Shard(path, split, ids, tuple(names[start:stop]), *size, skip))
    return shards


def _write(sources: dict[str, Source], shards: list[Shard], skip: bool, workers: int) -> list[Description]:
    """Descriptions of all shards, of which those that are not complete are written first."""
    found = {shard.path: read_description(shard.path) for shard in shards}
    for description in found.values():
        if description and description.bad and not skip:
            raise BadPicture(description.bad[0]["path"], description.bad[0]["reason"])
    missing = [shard for shard in shards if found[shard.path] is None]
    total = sum(len(shard.ids) for shard in missing)
    written = work_on(sources, write_shard, missing, workers=workers, what="pack", total=total)
    found |= {shard.path: description for shard, description in zip(missing, written)}
    return [found[shard.path] for shard in shards]


def _manifest(name, sources, origin, facts, shards, described, folder: Path) -> dict:
    """The content of manifest.json; writes the files of labels and names."""
    splits = {}
    for split, source in sources.items():
        parts = [(shard, text) for shard, text in zip(shards, described) if shard.split == split]
        splits[split] = _split(folder, source, split, parts)
    classes = next((source.classes for source in sources.values() if source.classes), ())
    return {
        "format": manifest.FORMAT,
        "version": manifest.VERSION,
        "source": {"name": name, **origin},
        "settings": facts,
        "classes": list(classes),
        "channels": _channels(name, described),
        "splits": splits,
    }


def _split(folder: Path, source: Source, split: str, parts: list[tuple[Shard, Description]]) -> dict:
    labels = np.array([label for _, text in parts for label in text.labels], "<i4")
    if not len(labels):
        raise DataError(f"{source.name!r}: not one picture of {split} is good; the first is {parts[0][1].bad[0]}")
    bad = [picture for _, text in parts for picture in text.bad]
    files = {
        "labels": (f"{split}-labels.npy", _npy(labels)),
        "names": (f"{split}-names.json", json.dumps([n for _, text in parts for n in text.names], indent=0).encode()),
    }
    entries = {}
    for key, (file, data) in files.items():
        manifest.write_atomically(folder / file, data)
        entries[key] = {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {
        "records": len(labels),
        "shards": [
            {"file": shard.path.name, "records": len(text.labels), "bytes": text.bytes, "sha256": text.sha256}
            for shard, text in parts
            if text.labels
        ],
        **entries,
        "class_counts": np.bincount(labels[labels >= 0], minlength=len(source.classes)).tolist(),
        "unlabelled": int((labels < 0).sum()),
        "bytes_before": sum(text.source_bytes for _, text in parts),
        "bad": {"count": len(bad), "pictures": bad},
    }


def _channels(name: str, described: list[Description]) -> int:
    arrays = sorted({c for text in described for c in text.npy_channels})
    pictures = sorted({c for text in described for c in text.picture_channels})
    if len(arrays) > 1 or (arrays and pictures and arrays[0] not in (1, 3)):
        raise DataError(
            f"{name!r}: pictures of {', '.join(map(str, arrays + pictures))} channels; pack them by themselves"
        )
    return arrays[0] if arrays else max(pictures)


def _npy(labels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, labels, allow_pickle=False)
    return file.getvalue()


def _facts_of(content: dict) -> dict:
    return {k: v for k, v in content["source"].items() if k != "name"} | content["settings"]


def _clear(folder: Path, content: dict) -> None:
    """Takes away what was needed until the manifest was written."""
    listed = {shard["file"] for split in content["splits"].values() for shard in split["shards"]}
    for shard in folder.glob("*.array_record"):
        description_path(shard).unlink(missing_ok=True)
        if shard.name not in listed:  # not one of its pictures was good
            shard.unlink()
    (folder / manifest.PLAN).unlink(missing_ok=True)


def _result(content: dict, seconds: float) -> Result:
    splits = content["splits"].values()
    return Result(
        pictures=sum(split["records"] for split in splits),
        bytes_before=sum(split["bytes_before"] for split in splits),
        bytes_after=sum(shard["bytes"] for split in splits for shard in split["shards"]),
        bad=sum(split["bad"]["count"] for split in splits),
        seconds=seconds,
    )
