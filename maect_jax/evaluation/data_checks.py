"""Whether training and test pictures are fit for an evaluation; errors name the data and the class."""

import numpy as np

from maect_jax.data.sources.base import Source
from maect_jax.errors import DataError
from maect_jax.evaluation.features import Features

SHOWN = 5  # names in a message


def check_classes(train: Source, test: Source) -> None:
    """Both sets are labelled, with the same classes in the same order.

    Raises:
      DataError: which set is unlabelled, or which classes differ.
    """
    for what, source in (("train", train), ("test", test)):
        if not source.classes:
            raise DataError(
                f"data.{what}: '{source.name}' has no labels, and an evaluation needs them; sort its pictures into "
                "class folders"
            )
    if tuple(train.classes) != tuple(test.classes):
        unknown = [name for name in test.classes if name not in train.classes]
        which = f"class {_some(unknown)} is not in" if unknown else "its classes are in another order than those of"
        raise DataError(f"data.test: '{test.name}': {which} the training set '{train.name}'")


def check_labels(what: str, source: Source, labels: np.ndarray) -> None:
    """Every picture has a label and every class a picture.

    Args:
      what: 'train' or 'test', for the message.
      labels: int [n] of all its pictures.

    Raises:
      DataError: with the pictures or classes.
    """
    missing = np.flatnonzero(labels < 0)
    if missing.size:
        raise DataError(f"data.{what}: {missing.size} of {len(labels)} pictures of '{source.name}' have no label")
    count = np.bincount(labels, minlength=len(source.classes))
    empty = [source.classes[i] for i in np.flatnonzero(count == 0)]
    if empty:
        raise DataError(
            f"data.{what}: class {_some(empty)} of '{source.name}' has no {what} picture; add one, or take the class "
            "out of both sets"
        )


def shared_pictures(train: Features, test: Features) -> np.ndarray:
    """Rows (test, train) of every test picture whose pixels are also a training picture's; int [shared, 2]."""
    train_hash, test_hash = (np.ascontiguousarray(f.content).view(np.uint64).ravel() for f in (train, test))
    distinct, first = np.unique(train_hash, return_index=True)
    place = np.minimum(np.searchsorted(distinct, test_hash), len(distinct) - 1)
    rows = np.flatnonzero(distinct[place] == test_hash)
    return np.stack([rows, first[place[rows]]], axis=1)


def describe_shared(train: Source, test: Source, found: np.ndarray, ids: tuple[np.ndarray, np.ndarray]) -> str:
    """One sentence about shared pictures, with the names of the first; `ids` of the rows of (train, test)."""
    names = test.file_names(), train.file_names()
    pairs = [f"{names[0][ids[1][a]]} = {names[1][ids[0][b]]}" for a, b in found[:SHOWN].tolist()]
    return (
        f"data.test: {len(found)} of {len(ids[1])} test pictures of '{test.name}' are also training pictures of "
        f"'{train.name}' (equal pixels), so its numbers are too high: {'; '.join(pairs)}"
        + ("; …" * (len(found) > SHOWN))
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:SHOWN]))
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
