"""Finds the pictures that a name stands for: the embedded digits, a folder, or a TFDS data set."""

import difflib
from pathlib import Path

import numpy as np

from maect_jax.data.sources.base import ArraySource, Source
from maect_jax.data.sources.folder import SPLIT_FOLDERS, open_folder
from maect_jax.data.sources.records import is_packed, open_records
from maect_jax.errors import DataError


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
      name: 'digits'; a folder (`train/<class>/…` with `test/`, `val/` or `validation/` beside it; class folders
        directly; or, for training without labels, pictures directly); or a TFDS name such as 'cifar10'.
      split: 'train' or 'test'.
      channels: 1 (grey) or 3 (RGB), of the decoded pictures.
      classes: class names by index of the training set, where the test set is a folder of its own that holds class
        folders directly. Otherwise they are read from `train/` beside it.
      data_dir: of TFDS; its own default is TFDS_DATA_DIR or ~/tensorflow_datasets.
      key: the setting that errors name; 'data.<split>' by default.

    Raises:
      DataError: nothing of that name; empty; only one class; a test class that training does not know; a TFDS
        data set that is not prepared. Pictures are not decoded here.
    """
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split: {split!r} is neither 'train' nor 'test'")
    key = key or f"data.{split}"
    if name == "digits":
        from maect_jax.data.sources import digits

        images, labels, digit_classes = digits.load(split)
        return ArraySource(name, _as_channels(images, channels, key), labels, digit_classes)
    folder = Path(name).expanduser()
    if is_packed(folder):
        return open_records(name, folder, split, channels, classes, key)
    if folder.is_dir():
        return open_folder(name, folder, split, channels, classes, key)
    if folder.exists():
        raise DataError(f"{key}: {name!r} is a file; give the folder that holds the pictures")
    if name.startswith(("/", ".", "~")) or name.endswith("/") or "://" in name or "\\" in name:
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, beside, 1)
        hint = f"; did you mean {str(folder.parent / near[0])!r}?" if near else "; check the path"
        raise DataError(f"{key}: no folder {name!r} on this machine{hint}")
    from maect_jax.data.sources import tfds  # imports tensorflow_datasets, which takes seconds

    return tfds.open_tfds(name, split, channels, data_dir, key)


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
