"""Feature rows on their way to the devices: checked, held out, padded, split.

Every process holds the same rows on its host; each device is given only its own part.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maect_jax.errors import DataError

HELD_OUT = 10  # one train row in so many


def check_rows(what: str, features, labels=None, classes: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Features as float32 [rows, width] and labels as int32 [rows] on the host.

    Args:
      what: name of the rows in the message, such as 'test'.
      features: NumPy or fully addressable jax array [rows, width].
      labels: integers [rows] in 0..classes-1, or None.
      classes: number of classes, needed with labels.

    Raises:
      DataError: wrong shape, no rows, or a label out of range.
    """
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or not features.size:
        raise DataError(f"{what} features: shape {features.shape}, expected [rows, width] with at least one row")
    if labels is None:
        return features, None
    labels = np.asarray(labels)
    if labels.shape != features.shape[:1]:
        raise DataError(f"{what} labels: shape {labels.shape} for {features.shape[0]} rows of features")
    if labels.min() < 0 or labels.max() >= classes:
        found = f"{what} labels: values {labels.min()}..{labels.max()}"
        raise DataError(f"{found}, expected 0..{classes - 1}; leave out rows without label")
    return features, labels.astype(np.int32)


def hold_out(labels, seed: int, one_in: int = HELD_OUT) -> tuple[np.ndarray, np.ndarray]:
    """Splits the train rows: a tenth, of each class its share to within one row, is held out to choose settings on.

    A function of its arguments alone: rows shuffled, sorted by class, every tenth taken.

    Args:
      labels: integers [rows].
      one_in: one row in so many is held out.

    Returns:
      row indices, ascending: (kept, held out).

    Raises:
      DataError: fewer than `one_in` rows.
    """
    labels = np.asarray(labels)
    if labels.size < one_in:
        raise DataError(f"train features: {labels.size} rows; at least {one_in} are needed to hold out one in {one_in}")
    shuffled = np.random.default_rng(seed).permutation(labels.size)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    held_out = np.sort(by_class[one_in - 1 :: one_in])
    return np.setdiff1d(by_class, held_out), held_out


def pad_rows(rows: np.ndarray, length: int, fill=0) -> np.ndarray:
    """The rows followed by rows of `fill` up to `length`; the same array where nothing is missing."""
    missing = length - rows.shape[0]
    return rows if not missing else np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), constant_values=fill)


def round_up(number: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def split(mesh: Mesh, array: np.ndarray, axis: int = 0) -> jax.Array:
    """The array split along `axis` over all devices, which must divide it."""
    return _put(array, NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names)))


def copy(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """The whole array on each device."""
    return _put(array, NamedSharding(mesh, PartitionSpec()))


def _put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
