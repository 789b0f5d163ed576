"""Which training pictures a protocol with few labels may use: an official list, the set as it is, or generated ones."""

from dataclasses import dataclass

import numpy as np

from maect_jax.errors import ConfigError
from maect_jax.evaluation import splits
from maect_jax.evaluation.task import SEED, Task, data_hash
from maect_jax.training.checkpoint import absolute

SHOTS, SPLITS = (1, 2, 5), 3
WHOLE = {  # TFDS sets that are themselves a split, by what of it
    "imagenet2012_subset/1pct": "1pct",
    "imagenet2012_subset/10pct": "10pct",
    "imagenet2012_fewshot/1shot": "1shot",
    "imagenet2012_fewshot/5shot": "5shot",
    "imagenet2012_fewshot/10shot": "10shot",
}
SHARES = {"1pct": 0.01, "10pct": 0.1, "100pct": 1.0}


@dataclass(frozen=True)
class Split:
    """Some rows of the training set: and where they come from: 'whole set', 'list …' or 'generated, seed …'."""

    origin: str
    rows: np.ndarray

    @property
    def record(self) -> dict:
        return {"origin": self.origin, "rows": len(self.rows), "hash": splits.list_hash(self.rows)}


def share(task: Task, name: str) -> Split | None:
    """The rows for '1pct', '10pct' or '100pct' of the labels; None where the set is itself another share.

    Raises:
      ConfigError, DataError: see `_listed`.
    """
    whole = _whole(task)
    if whole == name or (name == "100pct" and not whole):
        return Split("whole set", np.arange(len(task.train)))
    if whole:
        return None
    if found := _listed(task, [f"{name}.txt"]):
        return found[0]
    seed, labels = SEED, _labels(task)
    return Split(f"generated, seed {seed}", splits.generate_share(labels, SHARES[name], seed, key(task)))


def shots(task: Task, per_class: int) -> list[Split]:
    """Three splits of `per_class` pictures a class; a set that is itself a split of that size is the only one.

    None, and a line that says so, where a class has fewer pictures.

    Raises:
      ConfigError, DataError: see `_listed`.
    """
    if _whole(task).endswith("shot"):
        own = _whole(task) == f"{per_class}shot"
        return [Split("whole set", np.arange(len(task.train)))] if own else []
    if found := _listed(task, [f"{per_class}shot-{i}.txt" for i in range(1, SPLITS + 1)]):
        return found
    if not enough(task, f"{per_class} per class", per_class):
        return []
    labels, drawn_from = _labels(task), key(task)
    return [Split(f"generated, seed {i}", splits.generate(labels, per_class, i, drawn_from)) for i in range(SPLITS)]


def enough(task: Task, what: str, per_class: int) -> bool:
    """Whether every class has so many training pictures; says what is left out where one has not."""
    count = np.bincount(_labels(task), minlength=len(task.classes))
    fewest = int(count.argmin())
    if count[fewest] < per_class:
        found = f"class {task.classes[fewest]!r} has {count[fewest]} training pictures, {per_class} are needed"
        task.say(f"evaluate {task.weights.stage:9} {what} is left out: {found}")
    return count[fewest] >= per_class


def _whole(task: Task) -> str:
    """What of ImageNet the training set itself is; '' for any other set. A version (':5.1.0') plays no part."""
    return WHOLE.get(task.train.name.partition(":")[0], "")


def _listed(task: Task, names: list[str]) -> list[Split]:
    """The splits of those files in the folder of lists; none without such a folder.

    Raises:
      ConfigError: the folder lacks one. DataError: see `splits.read_list`.
    """
    if not task.settings.lists:
        return []
    paths = [absolute(task.settings.lists) / name for name in names]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ConfigError(f"--lists: '{task.settings.lists}' lacks {', '.join(missing)}; add it, or leave --lists out")
    files = task.train.file_names()
    return [Split(f"list {path.name}", splits.read_list(path, files)) for path in paths]


def _labels(task: Task) -> np.ndarray:
    return task.features_of(task.train, [task.weights.pooling]).labels


def key(task: Task) -> str:
    """What generated splits are drawn from beside labels and seed: the hash of the training data."""
    return data_hash(task.features_of(task.train, [task.weights.pooling]))
