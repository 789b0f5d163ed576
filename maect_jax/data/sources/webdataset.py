"""WebDataset: tars of numbered shards, in which the files of one sample have one name and different endings.

    train-000000.tar:  0001.jpg 0001.cls 0002.jpg 0002.cls …

A picture is the member with a picture's ending; its label the number in `.cls`, or 'label' or 'cls' of `.json`. Class
names are the lines of `classes.txt` beside the shards. Ids follow the shards, and in a shard the pictures' order.

Source: the WebDataset format, https://github.com/webdataset/webdataset (README, "The WebDataset Format").
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from maect_jax.data.host.decode import threads
from maect_jax.data.sources import tar
from maect_jax.data.sources.archives import ArchiveSource, Part
from maect_jax.data.sources.index_cache import Table, cached
from maect_jax.data.sources.layout import EXTENSIONS, SPLIT_FOLDERS, numbered
from maect_jax.data.sources.members import in_tar, inside
from maect_jax.data.sources.names import shown
from maect_jax.data.sources.split_files import files_in, split_of, training_files
from maect_jax.data.sources.trees import holds_pictures
from maect_jax.errors import DataError

_LOG = logging.getLogger(__name__)

CLASSES = "classes.txt"

_PEEK = 256  # members by which a tar is told from one that holds a class
_MAX_CLS, _MAX_JSON = 64, 1 << 20  # bytes of a label; longer JSON is taken for something else
_MAX_NAMES = 1 << 24  # bytes of classes.txt
_FIELDS = tuple(ending[1:] for ending in EXTENSIONS)

Sample = dict[str, tar.Entry]  # fields of one key: 'jpg', 'cls', …


def is_webdataset(folder: Path) -> bool:
    """Whether a folder, or the folder of one of its splits, holds shards."""
    for at in (folder, *(folder / name for names in SPLIT_FOLDERS.values() for name in names)):
        tars = files_in(at, ".tar") if at.is_dir() else []
        if tars and not holds_pictures(at) and are_shards(tars):
            return True
    return False


def are_shards(tars: list[Path]) -> bool:
    """Whether tars are shards, and not one for each class: by their labels, or where there are none by their names."""
    with_label, with_text = _fields_beside(tars[0])
    stems = [file.name[: -len(".tar")] for file in tars]
    if with_label or not all(re.search(r"\d$", stem) for stem in stems):
        return with_label
    if all(split_of(file) for file in tars):
        return True
    if all(re.fullmatch(r"\d{5,}", stem) for stem in stems):  # classes have such names, too
        return with_text
    before = {re.sub(r"[-_.]\d{5,}(-of-\d+)?$", "", stem) for stem in stems}
    return not before & set(stems) and (len(before) == 1 or any(map(split_of, tars)))


def open_webdataset(
    name: str, shards: list[Path], split: str, channels: int, classes: tuple[str, ...] | None, key: str
) -> ArchiveSource:
    """The pictures of some shards; arguments and errors as `open.open_source`."""
    tables = _tables(shards)
    parts = [Part(path, in_tar(*table), folder=f"{path.stem}/") for path, table in zip(shards, tables)]
    labels = np.concatenate([numbers[:, 2] for _, numbers in tables])
    if not len(labels):
        raise DataError(f"{key}: no pictures in the {len(shards)} shards of {name!r}, such as {shards[0].name}")
    if labels.max() >= 0 and labels.min() < 0:
        number = int(np.argmax(labels < 0))
        member = ArchiveSource(name, parts, labels, (), channels).where(number)
        raise DataError(f"{key}: {member} has no label and others have; add its .cls, or take it out")
    own = class_names(shards)
    if split == "test" and classes is None and not own and (training := training_files(shards[0].parent, ".tar")):
        most = max(int(numbers[:, 2].max(initial=-1)) for _, numbers in _tables(training))
        classes = tuple(map(str, range(most + 1))) or None
    labels, classes = numbered(labels, own, classes, split, name, key)
    _LOG.info("%s: WebDataset, %d shards, %d pictures, %d classes", key, len(shards), len(labels), len(classes))
    return ArchiveSource(name, parts, labels, classes, channels)


def class_names(shards: list[Path]) -> tuple[str, ...]:
    """The lines of `classes.txt` beside the shards, or beside their folder where that is a split's; () without one.

    Raises:
      DataError: it names no or two equal classes.
    """
    folder = shards[0].parent
    is_split = any(folder.name in names for names in SPLIT_FOLDERS.values())
    for path in (folder / CLASSES, *([folder.parent / CLASSES] if is_split else [])):
        if path.is_file():
            with open(path, errors="replace") as file:
                names = tuple(line.strip() for line in file.read(_MAX_NAMES).splitlines())
            while names and not names[-1]:
                names = names[:-1]
            if not names or "" in names or len(set(names)) < len(names):
                raise DataError(f"{path}: needs one name a class, each once; mend it")
            return names
    return ()


def _tables(shards: list[Path]) -> list[Table]:
    with ThreadPoolExecutor(threads()) as pool:
        return list(pool.map(lambda path: cached(path, "webdataset", 3, _shard_table), shards))


def _shard_table(path: Path) -> Table:
    """Names of the pictures, and for each offset, size, label (-1 = none)."""
    samples: dict[str, Sample] = {}
    for key, field, entry in _members(path):
        sample = samples.setdefault(key, {})
        if field in sample:
            raise DataError(f"{path}: {shown(entry.name)} is there twice; pack the shard anew, each key once")
        sample[field] = entry
    names, numbers = [], []
    with open(path, "rb") as file:
        for key, sample in samples.items():
            if picture := _picture(sample, key, path):
                names.append(picture.name)
                numbers.append((picture.offset, picture.size, _label(sample, file.fileno(), path)))
    if len(names) < sum("cls" in sample for sample in samples.values()):
        _LOG.warning("%s: some of its %d keys have a label and no picture, and are left out", path, len(samples))
    return names, np.array(numbers, np.int64).reshape(-1, 3)


def _members(path: Path) -> Iterator[tuple[str, str, tar.Entry]]:
    """(key, field, entry) of the members that matter; the key ends at the first dot of the file's name."""
    for entry in tar.entries(path):
        name = inside(entry.name, path)
        if name is None or entry.offset < 0:
            continue
        folder, slash, base = name.rpartition("/")
        stem, _, field = base.partition(".")
        field = field.lower()
        if field in ("cls", "json", "txt") or field.rpartition(".")[2] in _FIELDS:
            yield f"{folder}{slash}{stem}", field, entry._replace(name=name)


def _picture(sample: Sample, key: str, path: Path) -> tar.Entry | None:
    """The picture of a sample: the field that is a picture's ending and no more; else an array; else as 'seg.png'."""
    pictures = [field for field in sample if field.rpartition(".")[2] in _FIELDS]
    plain = [field for field in pictures if "." not in field]
    chosen = [field for field in plain if field != "npy"] or plain or pictures
    if len(chosen) > 1:
        raise DataError(f"{path}: {shown(key)} has several pictures ({', '.join(chosen)}); leave one a key")
    return sample[chosen[0]] if chosen else None


def _label(sample: Sample, descriptor: int, path: Path) -> int:
    if entry := sample.get("cls"):
        text = os.pread(descriptor, min(entry.size, _MAX_CLS), entry.offset).strip()
        if not re.fullmatch(rb"\d{1,9}", text):
            words = shown(text[:40].decode(errors="replace"))
            raise DataError(f"{path}:{shown(entry.name)}: {words!r} is no class; write its number: 0, 1, 2, …")
        return int(text)
    entry = sample.get("json")
    return _json_label(os.pread(descriptor, entry.size, entry.offset)) if entry and entry.size <= _MAX_JSON else -1


def _json_label(text: bytes) -> int:
    """'label' or 'cls' of an object where it is a number, else -1: JSON beside a picture may be about other things."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return -1
    found = [facts.get(key) for key in ("label", "cls")] if isinstance(facts, dict) else []
    return next((v for v in found if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 10**9), -1)


def _fields_beside(path: Path) -> tuple[bool, bool]:
    """Whether the first members are pictures with a label of the same key; and with any text of the same key."""
    samples: dict[str, Sample] = {}
    for key, field, entry in islice(_members(path), _PEEK):
        samples.setdefault(key, {})[field] = entry
    pictures = [s for s in samples.values() if any(field.rpartition(".")[2] in _FIELDS for field in s)]
    with open(path, "rb") as file:
        labelled = any("cls" in s or ("json" in s and _label(s, file.fileno(), path) >= 0) for s in pictures)
    return labelled, labelled or any(s.keys() & {"json", "txt"} for s in pictures)
