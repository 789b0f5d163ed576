"""Where pictures come from: the embedded digits, a folder, or a TFDS data set; all as one indexable `Source`.

The sample id is the index. It is stable (a folder is sorted by class, then by file name), because the random crops,
the support queue and the evaluators know a picture by it.
"""

import difflib
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from maect_jax.data import decode
from maect_jax.errors import DataError

_LOG = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}


class Source:
    """Pictures by index. Subclasses are picklable, so that loader processes can hold one.

    Attributes:
      name: what the user called it.
      classes: class names by index; () when unlabelled.
      labels: int32 [n]; -1 when unlabelled.
      channels: of every picture.
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray
    channels: int

    def __len__(self) -> int:
        raise NotImplementedError

    def image(self, index: int) -> np.ndarray:
        """Pixels, uint8 [h, w, c]. Raises DataError when the picture can not be decoded."""
        raise NotImplementedError

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels, without decoding where the format has a header."""
        return self.image(index).shape[:2]

    def digest(self) -> str:
        """What the sample ids depend on, as a short text: another digest, other pictures behind the ids."""
        return f"{len(self)} pictures"

    def fingerprint(self) -> str:
        """Another text whenever a picture or label may have changed; found without decoding, for what is cached."""
        raise NotImplementedError

    def file_names(self) -> list[str]:
        """A name for each picture, in the order of the ids: its file where it has one, else '<set>/<id>'."""
        return [f"{self.name}/{index}" for index in range(len(self))]

    def label_sets(self) -> list[np.ndarray] | None:
        """All right labels of each picture, where a picture may have several or none; None where it has just one."""
        return None

    def sample(self, index: int) -> tuple[np.ndarray, int]:
        """(pixels uint8 [h, w, c], label), by one read."""
        return self.image(index), int(self.labels[index])


class ArraySource(Source):
    """Pictures that are in memory already: images uint8 [n, h, w, c], labels int32 [n] or None."""

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray | None = None, classes=()):
        self.name, self.images, self.classes = name, images, tuple(classes)
        self.labels = np.full(len(images), -1, np.int32) if labels is None else np.asarray(labels, np.int32)
        self.channels = images.shape[3]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> np.ndarray:
        return self.images[index]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.images.shape}".encode())
        digest.update(np.ascontiguousarray(self.images))
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()


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

    def image(self, index: int) -> np.ndarray:
        return decode.decode(self.path(index), self.channels, self.path(index))

    def size(self, index: int) -> tuple[int, int]:
        return decode.header_size(self.path(index), self.path(index))

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
        from maect_jax.data import digits

        images, labels, digit_classes = digits.load(split)
        return ArraySource(name, _as_channels(images, channels, key), labels, digit_classes)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _open_folder(name, folder, split, channels, classes, key)
    if folder.exists():
        raise DataError(f"{key}: {name!r} is a file; give the folder that holds the pictures")
    if name.startswith(("/", ".", "~")) or name.endswith("/") or "://" in name or "\\" in name:
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, beside, 1)
        hint = f"; did you mean {str(folder.parent / near[0])!r}?" if near else "; check the path"
        raise DataError(f"{key}: no folder {name!r} on this machine{hint}")
    from maect_jax.data import tfds_source  # imports tensorflow_datasets, and builds on this file

    return tfds_source.open_tfds(name, split, channels, data_dir, key)


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


# ---------------------------------------------------------------------------------------------------------- folders


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


def _open_folder(name, folder: Path, split, channels, classes, key) -> FolderSource:
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


# --------------------------------------------------------------------------------------------------------- resident


def load_resident(source: Source, limit_bytes: int = 2 << 30) -> np.ndarray | None:
    """The whole set in memory, where that is possible: all pictures of one size, and within the limit.

    Asks the headers of a few pictures first, and stops at the first picture of another size after that.

    Returns:
      uint8 [n, h, w, c], or None.

    Raises:
      DataError: a picture can not be decoded.
    """
    n = len(source)
    height, width = source.size(0)
    if n * height * width * source.channels > limit_bytes:
        return None
    if isinstance(source, ArraySource):
        return source.images
    if any(source.size(int(i)) != (height, width) for i in np.linspace(0, n - 1, min(n, 64))):
        return None
    images = np.empty((n, height, width, source.channels), np.uint8)

    def fill(indices: range) -> bool:
        for i in indices:
            image = source.image(i)
            if image.shape != images.shape[1:]:
                return False
            images[i] = image
        return True

    with ThreadPoolExecutor(decode.threads()) as pool:
        pending = [pool.submit(fill, range(start, min(start + 256, n))) for start in range(0, n, 256)]
        try:
            return images if all(chunk.result() for chunk in pending) else None
        finally:
            for chunk in pending:
                chunk.cancel()
