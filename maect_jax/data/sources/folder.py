"""A folder of pictures: class folders in a split, class folders directly, or pictures without labels."""

import hashlib
import logging
import os
from pathlib import Path

import numpy as np

from maect_jax.data.host.decode import MAX_BYTES
from maect_jax.data.sources.base import Source
from maect_jax.errors import BadPicture, DataError

_LOG = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".npy")
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}


class FolderSource(Source):
    """Files below `root`, decoded when asked for. `files` are relative to it, in the order of the ids."""

    def __init__(self, name: str, root: Path, files: list[str], labels, classes: tuple[str, ...], channels: int):
        self.name, self.root, self.files, self.classes, self.channels = name, str(root), files, classes, channels
        self.labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """The file of a sample id."""
        return os.path.join(self.root, self.files[index])

    where = path

    def read(self, index: int) -> tuple[bytes, int]:
        try:
            with open(self.path(index), "rb") as file:
                encoded = file.read(MAX_BYTES + 1)  # longer ones are refused when they are opened
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
            raise BadPicture(self.path(index), f"not a readable picture ({reason})") from error
        return encoded, int(self.labels[index])

    def digest(self) -> str:
        names = "\n".join(self.files).encode(errors="surrogateescape")
        return f"{len(self)} pictures, names {hashlib.sha256(names).hexdigest()[:16]}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self.labels))
        for index, name in enumerate(self.files):
            found = os.stat(self.path(index))
            times = f"{found.st_mtime_ns}\0{found.st_ctime_ns}"  # the second can not be set back
            digest.update(f"{name}\0{found.st_size}\0{times}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def file_names(self) -> list[str]:
        return list(self.files)


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def _subfolders(folder: Path) -> list[str]:
    hidden = (".", "__MACOSX")
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(hidden))


def _pictures_below(root: Path, class_name: str) -> list[str]:
    """Relative paths of the pictures of one class, sorted; nested folders and links are followed, once each."""
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root / class_name, followlinks=True):
        real = os.path.realpath(folder)
        subfolders[:] = [] if real in seen else [s for s in subfolders if not s.startswith(".")]
        files = [] if real in seen else files
        seen.add(real)
        found += [os.path.relpath(os.path.join(folder, f), root) for f in files if _is_picture(f)]
    return sorted(found)


def _split_folder(folder: Path, split: str) -> Path | None:
    return next((folder / s for s in SPLIT_FOLDERS[split] if (folder / s).is_dir()), None)


def open_folder(
    name: str, folder: Path, split: str, channels: int, classes: tuple[str, ...] | None, key: str
) -> FolderSource:
    """The pictures of a split of `folder`; arguments and errors as `open.open_source`."""
    known = _split_folder(folder, "train") or folder
    root = _split_folder(folder, split)
    test_names = SPLIT_FOLDERS["test"]
    if split == "train":
        root = root or folder
        if root == folder and _subfolders(folder) and set(_subfolders(folder)) <= set(test_names):
            raise DataError(
                f"{key}: {name!r} has {', '.join(f'{s}/' for s in _subfolders(folder))} but no train/; add it"
            )
    elif root is None:
        if classes is None and folder.name in test_names and (folder.parent / "train").is_dir():
            root, known = folder, folder.parent / "train"
        elif classes is not None:
            root = folder
        else:  # the same pictures as for training would be a test set that says nothing
            raise DataError(f"{key}: {name!r} has none of {', '.join(f'{s}/' for s in test_names)}; add one of them")
    found = _subfolders(root)
    loose = sorted(e.name for e in os.scandir(root) if e.is_file() and _is_picture(e.name))
    if not found or (loose and not any(_pictures_below(root, c) for c in found)):
        if not loose:
            kinds = ", ".join(e[1:] for e in EXTENSIONS)
            raise DataError(f"{key}: no pictures in {str(root)!r}; they must lie in class folders and be {kinds}")
        if split == "test":
            raise DataError(f"{key}: {str(root)!r} holds pictures but no class folders; sort them into <class>/")
        return FolderSource(name, root, loose, np.full(len(loose), -1), (), channels)
    if loose:
        _LOG.warning("%s: %d pictures beside the class folders of %s are left out", key, len(loose), root)

    if split == "train":
        classes = tuple(found)
    elif classes is None:  # a flat train/ has no class folders: then the test split names its own
        classes = tuple(_subfolders(known)) or tuple(found)
    unknown = [c for c in found if c not in classes]
    if unknown:
        raise DataError(
            f"{key}: class {', '.join(map(repr, unknown))} of {str(root)!r} is not in the training set "
            f"({len(classes)} classes); add it there or take it out here"
        )
    if len(classes) == 1:
        raise DataError(
            f"{key}: {str(root)!r} has only one class, {classes[0]!r}, and one class can not be evaluated; "
            "put the pictures directly into the folder to train without labels, or add more classes"
        )
    files, labels = [], []
    for class_name in found:
        pictures = _pictures_below(root, class_name)
        if not pictures and split == "train":
            raise DataError(f"{key}: class folder {str(root / class_name)!r} holds no pictures; fill or remove it")
        files += pictures
        labels += [classes.index(class_name)] * len(pictures)
    if not files:
        raise DataError(f"{key}: no pictures in {str(root)!r}")
    return FolderSource(name, root, files, labels, classes, channels)
