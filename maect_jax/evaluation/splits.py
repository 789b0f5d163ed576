"""Which train rows a low-shot protocol may use, and what a number over several such choices is.

Drawn splits are a function of (labels, seed, hash of the data). Every row is given a random number by a counter; a
class's rows in the order of these numbers are its permutation, and every split takes the first rows of each. So the
splits of one seed are nested: 1 in 2 in 5 pictures a class, 1 % in 10 %.

Official splits are lists of file names. SimCLR's for 1 % and 10 % of ImageNet are also TFDS data sets:
'imagenet2012_subset/1pct' and 'imagenet2012_subset/10pct'. 'imagenet2012_fewshot/1shot', '/5shot' and '/10shot' have
lists of their own, which are not those of MSN (Assran et al. 2022) that MAE-CT reports on. Such data sets are opened by
their name, and the whole of one is the split; the MSN lists are read with `read_list`.
"""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from maect_jax.errors import ConfigError, DataError

SHOWN = 5  # names in a message


@dataclasses.dataclass(frozen=True)
class SplitScores:
    """Accuracy over several splits or seeds.

    Attributes:
      accuracy: mean over the splits, in [0, 1].
      std: standard deviation over the splits (divisor: their number), 0 for a single one.
      accuracies: of each split.
      correct: of each test picture the share of splits in which it was right, float32 [test]; its mean is `accuracy`.
      protocol: every setting, for the record.
      found: what was chosen or came out of each split.
    """

    accuracy: float
    std: float
    accuracies: list[float]
    correct: np.ndarray = dataclasses.field(repr=False)
    protocol: dict = dataclasses.field(repr=False)
    found: dict = dataclasses.field(repr=False)


def score_splits(prediction_st: np.ndarray, label_t: np.ndarray, protocol: dict, found: dict) -> SplitScores:
    """Scores of predictions [splits, test] against labels [test]."""
    correct_st = prediction_st == label_t
    accuracy_s = correct_st.mean(axis=1)
    correct_t = correct_st.mean(axis=0, dtype=np.float32)
    return SplitScores(
        float(accuracy_s.mean()), float(accuracy_s.std()), accuracy_s.tolist(), correct_t, protocol, found
    )


def generate(labels, per_class: int, seed: int, data_hash: str) -> np.ndarray:
    """Rows of a class-balanced split.

    Args:
      labels: integers [rows]; rows with a negative label are never taken.
      per_class: rows of each class, at least 1.
      seed, data_hash: other rows for another of either.

    Returns:
      int64 [classes * per_class], ascending.

    Raises:
      ConfigError: per_class below 1. DataError: a class has fewer rows.
    """
    if per_class < 1:
        raise ConfigError(f"low-shot: {per_class} pictures per class; at least 1 is needed")
    labels = _labels(labels)
    count_c = np.bincount(labels[labels >= 0])
    short = np.flatnonzero((count_c > 0) & (count_c < per_class))
    if short.size:
        found = f"class {short[0]} has {count_c[short[0]]}, {short.size} of {np.sum(count_c > 0)} classes have too few"
        raise DataError(f"low-shot: {per_class} pictures per class asked for, but {found}; ask for fewer")
    return _first(labels, np.minimum(count_c, per_class), seed, data_hash)


def generate_share(labels, share: float, seed: int, data_hash: str) -> np.ndarray:
    """Rows of a split that takes the same share of every class.

    Largest remainders: each class gets its share rounded down, but at least one row, and the classes that lost most by
    it one more, until there are round(share * rows) in all. At least one row a class may make it more than that.

    Args:
      labels: integers [rows]; rows with a negative label are never taken and do not count.
      share: in (0, 1], such as 0.01. A share is nested in any that is at least ten times as large.
      seed, data_hash: as in `generate`, with which it shares the order of the rows.

    Returns:
      int64 [rows of the split], ascending.

    Raises:
      ConfigError: share out of range. DataError: no labels.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"low-shot: a share of {share}; it must lie in (0, 1]")
    labels = _labels(labels)
    count_c = np.bincount(labels[labels >= 0])
    exact_c = share * count_c
    taken_c = np.maximum(np.floor(exact_c + 1e-6).astype(np.int64), count_c > 0)  # 0.29 * 100 is 28.999999999999996
    missing = max(round(share * int(count_c.sum())) - int(taken_c.sum()), 0)
    taken_c[np.argsort(np.round(taken_c - exact_c, 6), kind="stable")[:missing]] += 1
    return _first(labels, taken_c, seed, data_hash)


def read_list(path: str | epath.Path, names: Sequence[str]) -> np.ndarray:
    """Rows of an official split list.

    A line of the file names a picture: 'n01440764_10026.JPEG' or 'n01440764/n01440764_10026.JPEG', whatever its
    extension. Blank lines do not count, nor does what follows a '#'.

    Args:
      path: text file.
      names: file names of the pictures, in row order; folders and extensions play no part in the match.

    Returns:
      int64 [lines], ascending.

    Raises:
      DataError: the file is absent or empty, lists a picture twice, or one that `names` does not have exactly once.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise DataError(f"split list: no file '{path}'")
    text = path.read_text().splitlines()
    listed = [stem(line) for line in (line.partition("#")[0].strip() for line in text) if line]
    if not listed:
        raise DataError(f"split list: '{path}' names no picture; one file name a line is expected")
    stems = [stem(name) for name in names]
    row_of, times = {name: row for row, name in enumerate(stems)}, Counter(stems)
    for problem, wrong in {
        "lists more than once": [name for name, lines in Counter(listed).items() if lines > 1],
        "lists, but the data set has not": [name for name in listed if name not in row_of],
        "lists, but the data set has several of": [name for name in listed if times[name] > 1],
    }.items():
        if wrong:
            shown = ", ".join(wrong[:SHOWN]) + (", …" if len(wrong) > SHOWN else "")
            raise DataError(f"split list: '{path}' {problem} {len(wrong)} of {len(listed)} pictures: {shown}")
    return np.sort(np.array([row_of[name] for name in listed], np.int64))


def list_hash(names_or_rows: Iterable) -> str:
    """SHA-256 by which a record names a split: of its sorted file names (as matched by `read_list`) or row indices."""
    entries = list(names_or_rows)
    by_name = bool(entries) and isinstance(entries[0], str)
    text = sorted(map(stem, entries)) if by_name else map(str, sorted(map(int, entries)))
    return hashlib.sha256("\n".join(text).encode(errors="surrogateescape")).hexdigest()


def stem(name: str) -> str:
    """'n01440764_10026' of 'n01440764/n01440764_10026.JPEG'."""
    return os.path.splitext(os.path.basename(name.strip()))[0]


def in_class_rank(labels: np.ndarray, seed: int, data_hash: str) -> np.ndarray:
    """Place of each row in its class's permutation, from 0; int64 [rows]."""
    # The raw stream of a counter-based generator is the same in every version of NumPy; its permutations need not be.
    key = hashlib.sha256(f"low-shot/{seed}/{data_hash}".encode()).digest()[:16]
    random_n = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(labels.size)
    order_n = np.lexsort((random_n, labels))
    first_n = np.searchsorted(labels[order_n], labels[order_n])  # where the row's class begins
    rank_n = np.empty(labels.size, np.int64)
    rank_n[order_n] = np.arange(labels.size) - first_n
    return rank_n


def _labels(labels) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not (labels >= 0).any():
        raise DataError(
            f"low-shot: labels {labels.dtype} of shape {labels.shape}; integers [rows], some >= 0, expected"
        )
    return labels


def _first(labels: np.ndarray, taken_c: np.ndarray, seed: int, data_hash: str) -> np.ndarray:
    """The first so many rows of each class's permutation, ascending."""
    rank_n = in_class_rank(labels, seed, data_hash)
    return np.flatnonzero((labels >= 0) & (rank_n < taken_c[labels]))
