"""Which files keep a data set from being opened: each archive or shard is tried by itself, so that all are named."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maect_jax.data.host.decode import threads
from maect_jax.data.packing.manifest import is_packed
from maect_jax.data.packing.verify import bad_files
from maect_jax.data.sources.layout import SPLIT_FOLDERS
from maect_jax.data.sources.members import ARCHIVES
from maect_jax.data.sources.open import open_source
from maect_jax.data.sources.split_files import files_in, is_pattern, matching, split_of
from maect_jax.errors import DataError

_SPELLED = [folder for folders in SPLIT_FOLDERS.values() for folder in folders]


def damaged_files(name: str, split: str | None, failed: dict[str, DataError]) -> list[dict]:
    """Files of a data set that are damaged, and splits that do not open for another reason.

    Args:
      name: as `open_source` takes it.
      split: only files of this one.
      failed: why splits could not be opened, by split.

    Returns:
      split, id (None), path and reason of each. Files of a packed folder are compared with its manifest in any case,
      others are looked at where `failed` has something.
    """
    folder = Path(name).expanduser()
    if is_packed(folder):
        try:
            found = bad_files(folder, split)
        except DataError:  # of the manifest, which is in `failed`
            found = []
    else:
        found = _damaged(_files(name, split)) if failed else []
    named = tuple(f"{bad['path']}:" for bad in found)
    for failing, error in failed.items():
        if not str(error).startswith(named):
            path, _, reason = str(error).partition(": ")
            if not os.path.isfile(path):
                path, reason = name, str(error)
            found.append({"split": failing, "id": None, "path": path, "reason": reason})
    return found


def _files(name: str, split: str | None) -> list[tuple[str, Path]]:
    """(split, path) of the archives and shards that a name may stand for; those of no split count as training files."""
    path = Path(name).expanduser()
    if path.is_dir():
        places = [at / below for at in (path, path / "data") for below in ("", *_SPELLED)]
        files = [f for at in places if at.is_dir() for ending in (*ARCHIVES, ".parquet") for f in files_in(at, ending)]
    elif path.is_file():
        files = [path]
    else:
        try:
            files = matching(name, "") if is_pattern(name) else []
        except DataError:
            files = []
    found = [(_split(file), file) for file in files]
    return [(of, file) for of, file in found if split in (None, of)]


def _split(file: Path) -> str:
    """By its folder, where that is a split's, or else by its name."""
    said = file.parent.name if file.parent.name in _SPELLED else split_of(file)
    return "test" if said in SPLIT_FOLDERS["test"] else "train"


def _damaged(files: list[tuple[str, Path]]) -> list[dict]:
    with ThreadPoolExecutor(threads()) as pool:
        reasons = pool.map(lambda entry: _damage(entry[1]), files)
        return [
            {"split": split, "id": None, "path": str(file), "reason": reason}
            for (split, file), reason in zip(files, reasons)
            if reason
        ]


def _damage(file: Path) -> str | None:
    """What is wrong with an archive or shard by itself. That it is no data set by itself does not count."""
    try:
        open_source(str(file), "train")
    except DataError as error:
        start = f"{file}:"  # others begin with the key of a setting
        return str(error).removeprefix(start).strip() if str(error).startswith(start) else None
    except OSError as error:
        return f"can not be read ({error.strerror})"
    return None
