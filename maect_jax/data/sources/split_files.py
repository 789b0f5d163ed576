"""Sets that come as numbered files, all classes in each: which files belong to a split, and patterns for their names.

A split is a folder (`train/`, `test/`, `val/`, `validation/`) or how the names begin (`train-00000-of-00002.parquet`,
`val-000000.tar`).
"""

import glob
import logging
import os
import re
from pathlib import Path

from maect_jax.data.sources.layout import SPLIT_FOLDERS
from maect_jax.data.sources.names import HIDDEN
from maect_jax.errors import DataError

_LOG = logging.getLogger(__name__)

_MAX_FILES = 100_000  # that a pattern may stand for
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")


def is_pattern(name: str) -> bool:
    """Whether a name stands for several files."""
    return any(sign in name for sign in "*?[{")


def matching(name: str, key: str) -> list[Path]:
    """The files of a pattern: `*`, `?` and `[…]` as in a shell, and numbers `{000..123}`.

    Raises:
      DataError: none, too many, or one of a range is missing.
    """
    expanded = [str(Path(name).expanduser())]
    while found := _RANGE.search(expanded[0]):
        first, last = found.groups()
        if int(last) < int(first) or (int(last) - int(first) + 1) * len(expanded) > _MAX_FILES:
            raise DataError(f"{key}: {found[0]} in {name!r} stands for 1 to {_MAX_FILES} files; mend the numbers")
        numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
        expanded = [_RANGE.sub(number, each, count=1) for each in expanded for number in numbers]
    files: list[Path] = []
    for each in expanded:
        hits = sorted(glob.glob(each)) if glob.has_magic(each) else [each] if os.path.isfile(each) else []
        if not hits:
            raise DataError(f"{key}: no file {each!r}, for which {name!r} stands; check the pattern")
        files += map(Path, hits)
    return files


def files_in(folder: Path, ending: str) -> list[Path]:
    """The files of that ending directly in a folder, sorted."""
    return sorted(
        Path(e.path)
        for e in os.scandir(folder)
        if e.name.lower().endswith(ending) and not e.name.startswith(HIDDEN) and e.is_file()
    )


def split_of(path: Path) -> str | None:
    """The split that the name of a file begins with: 'train', 'test', 'val', 'validation' or None."""
    found = re.match(r"(train|test|validation|val)(?![a-z])", path.name.lower())
    return found and found[1]


def candidates(
    name: str, folder: Path, ending: str, split: str, classes: tuple[str, ...] | None, key: str
) -> list[list[Path]]:
    """The files of a split, as one or several lists of which the first that fits is to be taken.

    Args:
      name, split, classes, key: as `open.open_source`.
      folder: that holds the files, or folders of splits.
      ending: of their names.

    Raises:
      DataError: no files of that split.
    """
    spelled = SPLIT_FOLDERS[split]
    found = [files for s in spelled if (folder / s).is_dir() and (files := files_in(folder / s, ending))]
    if found:
        return found
    files = files_in(folder, ending)
    by_split = {s: [file for file in files if split_of(file) == s] for s in map(split_of, files)}
    if found := [by_split[s] for s in spelled if s in by_split]:
        if others := by_split.get(None):
            _LOG.warning("%s: %d files of %s whose names begin with no split are left out", key, len(others), folder)
        return found
    named = sorted(s for s in by_split if s)
    folders = [s for s in SPLIT_FOLDERS["train"] + SPLIT_FOLDERS["test"] if (folder / s).is_dir()]
    own = named == [] and not folders and files
    if own and (split == "train" or classes is not None or folder.name in SPLIT_FOLDERS["test"]):
        return [files]
    have = ", ".join([f"{s}-*{ending}" for s in named] + [f"{s}/" for s in folders]) or f"*{ending}"
    want = " or ".join(f"{s}-*{ending}" for s in spelled)
    raise DataError(f"{key}: {name!r} has {have}, but no {split} split; add {want}, or give another folder")


def training_files(folder: Path, ending: str) -> list[Path]:
    """The training files that belong to a test split in `folder`; none where there are none."""
    beside = [folder.parent] if folder.name in SPLIT_FOLDERS["test"] else []
    for at in [folder, *beside]:
        try:
            return candidates(str(at), at, ending, "train", None, "")[0]
        except DataError:
            continue
    return []
