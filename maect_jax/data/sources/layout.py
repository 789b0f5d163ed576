"""How pictures lie in folders, on disk or in an archive: which belong to a split, and which class each has."""

import logging
from dataclasses import dataclass

import numpy as np

from maect_jax.data.sources.base import Source
from maect_jax.data.sources.names import shown
from maect_jax.errors import DataError

_LOG = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".npy")
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".raw", ".dng", ".cr2", ".nef")
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}
MAX_CLASSES = 1_000_000


def is_picture(name: str) -> bool:
    """Whether a file of that name, without its folder, is taken for a picture."""
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def is_unread(name: str) -> bool:
    """Whether a file of that name, without its folder, is a picture of a kind that is not read."""
    return not name.startswith(".") and name.lower().endswith(UNREAD)


class Tree:
    """A folder of pictures, or what stands for one. Its pictures are known by handles of its own.

    Attributes:
      path: what errors call it.
    """

    path: str

    def folders(self) -> list[str]:
        """Names of the folders directly in it, sorted."""
        raise NotImplementedError

    def loose(self) -> list:
        """Handles of the pictures directly in it, sorted by name."""
        raise NotImplementedError

    def below(self, folder: str) -> list:
        """Handles of the pictures anywhere below one of its folders, sorted by name."""
        raise NotImplementedError

    def folder(self, name: str) -> "Tree | None":
        """One of its folders, where there is one of that name."""
        raise NotImplementedError

    def unread(self) -> list[str]:
        """Names of pictures of kinds that are not read, among all that `loose` and `below` have looked at; sorted."""
        raise NotImplementedError

    def training_set(self) -> "Tree | None":
        """The training pictures beside it, where it is called as a test split is."""
        return None

    def explain_empty(self) -> None:
        """Raises DataError where there is something in it that would hold pictures if it were unpacked."""

    def source(self, name: str, handles: list, labels, classes: tuple[str, ...], channels: int) -> Source:
        """Some of its pictures, in that order."""
        raise NotImplementedError

    def split(self, split: str) -> "Tree | None":
        """The folder of a split, where there is one."""
        return next(filter(None, map(self.folder, SPLIT_FOLDERS[split])), None)


@dataclass(frozen=True)
class _Split:
    """Where the pictures of a split lie, and where the classes are named."""

    root: Tree
    known: Tree


def open_tree(name: str, tree: Tree, split: str, channels: int, classes: tuple[str, ...] | None, key: str) -> Source:
    """The pictures of a split of `tree`; arguments and errors as `open.open_source`."""
    found = _find_split(name, tree, split, classes, key)
    root = found.root
    folders, loose = root.folders(), root.loose()
    below = {folder: root.below(folder) for folder in folders}
    if unread := root.unread():
        message = (
            "%s: %d pictures of %s are left out, since their kind is not read; the first is %s; convert them to JPEG"
        )
        _LOG.warning(message, key, len(unread), shown(root.path), shown(unread[0]))
    if not folders or (loose and not any(below.values())):
        if not loose:
            root.explain_empty()
            kinds = ", ".join(e[1:] for e in EXTENSIONS)
            raise DataError(f"{key}: no pictures in {root.path!r}; they must lie in class folders and be {kinds}")
        if split == "test":
            raise DataError(f"{key}: {root.path!r} holds pictures but no class folders; sort them into <class>/")
        return root.source(name, loose, np.full(len(loose), -1), (), channels)
    if loose:
        _LOG.warning("%s: %d pictures beside the class folders of %s are left out", key, len(loose), root.path)
    if split == "train":
        classes = tuple(folders)
    elif classes is None:  # a flat train/ has no class folders: then the test split names its own
        classes = tuple(found.known.folders()) or tuple(folders)
    labels_of = as_trained(tuple(folders), classes, root.path, key)
    check_several(classes, root.path, key)
    handles, labels = [], []
    for folder, label in zip(folders, labels_of.tolist()):
        pictures = below[folder]
        if not pictures and split == "train":
            raise DataError(f"{key}: class folder {f'{root.path}/{folder}'!r} holds no pictures; fill or remove it")
        handles += pictures
        labels += [label] * len(pictures)
    if not handles:
        raise DataError(f"{key}: no pictures in {root.path!r}")
    return root.source(name, handles, labels, classes, channels)


def _find_split(name: str, tree: Tree, split: str, classes: tuple[str, ...] | None, key: str) -> _Split:
    known, root = tree.split("train") or tree, tree.split(split)
    tests = SPLIT_FOLDERS["test"]
    if split == "train":
        folders = [] if root else tree.folders()
        if folders and set(folders) <= set(tests):
            raise DataError(f"{key}: {name!r} has {', '.join(f'{s}/' for s in folders)} but no train/; add it")
        return _Split(root or tree, known)
    if root:
        return _Split(root, known)
    if classes is not None:
        return _Split(tree, known)
    if beside := tree.training_set():
        return _Split(tree, beside)
    # the same pictures as for training would be a test set that says nothing
    splits = ", ".join(f"{s}/" for s in tests)
    raise DataError(f"{key}: {name!r} has none of {splits}; add one of them, or name a test set of its own")


def as_trained(found: tuple[str, ...], classes: tuple[str, ...], where: str, key: str) -> np.ndarray:
    """For each class of a test set its index in the training set's, int32 [found].

    Raises:
      DataError: the training set does not know one.
    """
    index = {name: i for i, name in enumerate(classes)}
    if unknown := [name for name in found if name not in index]:
        named = ", ".join(map(repr, unknown[:3])) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise DataError(
            f"{key}: class {named} of {where!r} is not in the training set ({len(classes)} classes); "
            "add it there or take it out here"
        )
    return np.array([index[name] for name in found], np.int32)


def check_several(classes: tuple[str, ...], where: str, key: str) -> None:
    """Raises DataError for a single class."""
    if len(classes) == 1:
        raise DataError(
            f"{key}: {where!r} has only one class, {classes[0]!r}, and one class can not be evaluated; "
            "put the pictures directly into the folder to train without labels, or add more classes"
        )


def numbered(
    labels: np.ndarray, own: tuple[str, ...], classes: tuple[str, ...] | None, split: str, where: str, key: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and classes of a set whose labels are numbers.

    Args:
      labels: int [n]; all -1 where there are none.
      own: what the set calls its classes; () = by their numbers.
      classes: of the training set, for a test split; None = its own.
      split: 'train' or 'test'.
      where, key: as errors call it.

    Returns:
      labels int32 [n] that are indices of the classes, and the classes; () when unlabelled.

    Raises:
      DataError: a number without a class, one class only, a class that training does not know, a test split without
        labels.
    """
    if labels.max() < 0:
        if split == "test":
            raise DataError(f"{key}: the pictures of {where!r} have no labels, and can not be tested with; add labels")
        return labels.astype(np.int32), ()
    most = int(labels.max())
    if own and most >= len(own):
        raise DataError(f"{key}: {where!r} names {len(own)} classes, but has the label {most}; name that one, too")
    if most >= MAX_CLASSES:
        raise DataError(f"{key}: {where!r} has the label {most}; number the classes 0, 1, 2, …")
    names = own or tuple(map(str, range(most + 1)))
    if classes is not None and classes != names:
        if not own and not all(name.isdigit() for name in classes):
            raise DataError(
                f"{key}: {where!r} has numbers for labels, the training set has names, such as {classes[0]!r}; "
                "name the classes here, too (classes.txt, one a line, or the columns' ClassLabel)"
            )
        used = np.unique(labels)
        index = np.full(most + 1, -1, np.int32)
        index[used] = as_trained(tuple(names[label] for label in used), classes, where, key)
        return index[labels], classes
    check_several(names, where, key)
    return labels.astype(np.int32), names
