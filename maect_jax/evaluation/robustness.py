"""A classifier applied unchanged to other test sets of the same classes: ImageNet-V2, -A, -R, -Sketch, ReaL labels.

Classes are matched by name, so that a set may lack some or have them in another order. Where it lacks some (ImageNet-A
and -R hold 200 of 1,000), only its classes may be predicted, as their authors evaluate. Where pictures have several
right labels (ReaL), any of them counts and pictures without one are left out.

Sources: Recht et al. 2019 (V2); Hendrycks et al. 2021 (A, R); Wang et al. 2019 (Sketch); Beyer et al. 2020 (ReaL).
"""

from dataclasses import dataclass

import numpy as np

from maect_jax.data.sources.base import Source
from maect_jax.errors import DataError


@dataclass(frozen=True)
class Target:
    """What counts as right on another test set.

    Attributes:
      right_nc: bool [n, classes of the training set], the labels of each picture.
      present_c: bool [classes of the training set], what may be predicted.
      rows_n: bool [n], pictures that count.
    """

    right_nc: np.ndarray
    present_c: np.ndarray
    rows_n: np.ndarray


def match(classes: tuple[str, ...], source: Source, labels: np.ndarray) -> Target:
    """The labels of `source` as classes of the training set.

    Args:
      classes: names of the training set.
      labels: int [n] of the source's pictures, in its own classes.

    Raises:
      DataError: unlabelled, or a class that the training set does not have.
    """
    if not source.classes:
        raise DataError(f"--robustness: '{source.name}' has no labels; give a set with the classes of the training set")
    index = {name: i for i, name in enumerate(classes)}
    place = np.array([index.get(name, -1) for name in source.classes])
    sets = source.label_sets()
    several = [np.asarray(one, np.int64) for one in sets] if sets is not None else [[x] for x in labels.tolist()]
    used = np.unique(np.concatenate([np.asarray(one, np.int64) for one in several if len(one)]))
    missing = [source.classes[i] for i in used[used >= 0] if place[i] < 0]
    if missing or (used < 0).any():
        what = f"class {', '.join(map(repr, missing[:5]))}" if missing else "a picture without label"
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(f"--robustness: '{source.name}' has {what}{more}, which the training set does not know")
    right_nc = np.zeros((len(several), len(classes)), bool)
    for row, one in enumerate(several):
        right_nc[row, place[one]] = True
    return Target(right_nc, right_nc.any(axis=0), right_nc.any(axis=1))


def correct(logits_nc: np.ndarray, target: Target) -> np.ndarray:
    """Whether the most likely of the present classes is right, of the pictures that count; bool [counted]."""
    chosen = np.where(target.present_c, logits_nc, -np.inf).argmax(axis=1)
    return target.right_nc[np.arange(len(chosen)), chosen][target.rows_n]
