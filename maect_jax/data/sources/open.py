"""Finds the pictures that a name stands for: the embedded digits, files in one of several forms, or a TFDS data set."""

import difflib
from pathlib import Path

import numpy as np

from maect_jax.data.sources.base import ArraySource, Source
from maect_jax.data.sources.layout import SPLIT_FOLDERS, open_tree
from maect_jax.data.sources.members import ARCHIVES
from maect_jax.data.sources.parquet import open_parquet, parquet_folder
from maect_jax.data.sources.records import is_packed, open_records
from maect_jax.data.sources.split_files import candidates, is_pattern, matching, split_of
from maect_jax.data.sources.trees import tree_at
from maect_jax.data.sources.webdataset import are_shards, is_webdataset, open_webdataset
from maect_jax.errors import DataError

_ENDINGS = (*ARCHIVES, ".parquet")


def open_source(
    name: str,
    split: str,
    *,
    channels: int = 3,
    classes: tuple[str, ...] | None = None,
    data_dir: str | None = None,
    key: str | None = None,
) -> Source:
    """Finds the pictures that `name` stands for.

    Args:
      name: one of
        'digits', the embedded set;
        a folder of pictures: `train/<class>/…` with `test/`, `val/` or `validation/` beside it; class folders
          directly; or, for training without labels, pictures directly;
        a folder of archives, `<class>.tar` or `<class>.zip`, with or without folders of splits;
        a .zip or .tar that holds a folder of pictures as above; or `train.zip` and `val.zip` in a folder;
        a folder of WebDataset shards, by folders of splits or as `train-000000.tar`, …; or one such .tar; or a
          pattern such as 'shards/train-{000000..000146}.tar' or 'shards/train-*.tar';
        a folder of Parquet files with a column of pictures, such as `data/train-00000-of-00002.parquet`; one such
          file; or a pattern;
        a folder that `python -m maect_jax data pack` wrote;
        a TFDS name such as 'cifar10'.
      split: 'train' or 'test'.
      channels: 1 (grey) or 3 (RGB), of the decoded pictures; of .npy files as many as they have.
      classes: class names by index of the training set, where the test set is one of its own without splits.
        Otherwise they are read from the training split beside it.
      data_dir: of TFDS; its own default is TFDS_DATA_DIR or ~/tensorflow_datasets.
      key: the setting that errors name; 'data.<split>' by default.

    Raises:
      DataError: nothing of that name; empty; damaged or cut off; only one class; a test class that training does not
        know; a TFDS data set that is not prepared. Pictures are not decoded here.
    """
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split: {split!r} is neither 'train' nor 'test'")
    key = key or f"data.{split}"
    if name == "digits":
        from maect_jax.data.sources import digits

        images, labels, digit_classes = digits.load(split)
        return ArraySource(name, _as_channels(images, channels, key), labels, digit_classes)
    path = Path(name).expanduser()
    found = (name, split, channels, classes, key)
    if path.is_dir():
        return _open_folder(path, *found)
    if path.is_file():
        return _open_file(path, *found)
    if is_pattern(name):
        return _open_files(matching(name, key), *found)
    is_path = name.startswith(("/", ".", "~")) or name.endswith(("/", *_ENDINGS)) or "://" in name or "\\" in name
    if is_path:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        hint = f"; did you mean {str(path.parent / near[0])!r}?" if near else "; check the path"
        what = "file" if name.endswith(_ENDINGS) else "folder"
        raise DataError(f"{key}: no {what} {name!r} on this machine{hint}")
    from maect_jax.data.sources import tfds  # imports tensorflow_datasets, which takes seconds

    return tfds.open_tfds(name, split, channels, data_dir, key)


def _open_folder(folder: Path, name: str, split: str, channels: int, classes, key: str) -> Source:
    if is_packed(folder):
        return open_records(name, folder, split, channels, classes, key)
    if at := parquet_folder(folder):
        return open_parquet(name, candidates(name, at, ".parquet", split, classes, key), split, channels, classes, key)
    if is_webdataset(folder):
        shards = candidates(name, folder, ".tar", split, classes, key)[0]
        return open_webdataset(name, shards, split, channels, classes, key)
    return open_tree(name, tree_at(folder), split, channels, classes, key)


def _open_file(path: Path, name: str, split: str, channels: int, classes, key: str) -> Source:
    ending = path.suffix.lower()
    if ending == ".parquet" or (ending == ".tar" and are_shards([path])):
        return _open_files([path], name, split, channels, classes, key)
    if tree := tree_at(path):
        return open_tree(name, tree, split, channels, classes, key)
    raise DataError(f"{key}: {name!r} is a file; give the folder that holds the pictures, or a .zip, .tar or .parquet")


def _open_files(paths: list[Path], name: str, split: str, channels: int, classes, key: str) -> Source:
    """Shards that are named one by one, all of them of the split that is asked for."""
    tests = SPLIT_FOLDERS["test"]
    if split == "test" and classes is None and not all(split_of(path) in tests for path in paths):
        raise DataError(
            f"{key}: {name!r} may be the training pictures themselves; name the files of a test split, such as "
            f"'val-*{paths[0].suffix}'"
        )
    endings = {path.suffix.lower() for path in paths}
    if endings == {".tar"}:
        return open_webdataset(name, paths, split, channels, classes, key)
    if endings == {".parquet"}:
        return open_parquet(name, [paths], split, channels, classes, key)
    raise DataError(
        f"{key}: {name!r} stands for {paths[0].name!r}; a pattern is for .tar (WebDataset) or .parquet files"
    )


def _as_channels(images: np.ndarray, channels: int, key: str) -> np.ndarray:
    """uint8 [n, h, w, c] with c as asked: grey is repeated, RGB weighted as Pillow does (ITU-R 601)."""
    have = images.shape[3]
    if have == channels:
        return images
    if have == 1 and channels == 3:
        return np.repeat(images, 3, axis=3)
    if have == 3 and channels == 1:
        red, green, blue = np.moveaxis(images.astype(np.uint32), 3, 0)
        return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)[..., None]
    raise DataError(f"{key}: pictures have {have} channels, {channels} are asked for; set channels to {have}")
