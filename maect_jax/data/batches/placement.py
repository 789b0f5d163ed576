"""A host's rows of a batch, and how they become a global array: each device takes its own from its own host."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding

from maect_jax.errors import ConfigError


def local_rows(sharding: NamedSharding, batch: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, sorted, int [rows].

    Raises:
      ConfigError: the batch does not divide over the devices.
    """
    try:
        indices = sharding.addressable_devices_indices_map((batch,))
    except ValueError:
        raise ConfigError(
            f"batch: {batch} does not divide over the {sharding.mesh.size} devices; set it to a multiple"
        ) from None
    return np.unique(np.concatenate([np.arange(batch)[index] for index in indices.values()]))


def place(sharding: NamedSharding, shape: tuple[int, ...], rows: Callable[[int, int], np.ndarray]) -> jax.Array:
    """A global array of `shape`, each device's part of axis 0 taken from rows(start, stop) on its own host."""

    def part(index):
        start, stop, _ = index[0].indices(shape[0])
        return rows(start, stop)

    return jax.make_array_from_callback(shape, sharding, part)


def to_devices(
    local: dict[str, np.ndarray], rows: np.ndarray, batch: int, sharding: NamedSharding
) -> dict[str, jax.Array]:
    """Global arrays [batch, …] of this host's `local` rows, which may be overwritten once they are ready.

    `rows` as from `local_rows`.
    """
    shared = sharding.mesh.devices.flat[0].platform == "cpu"  # there JAX may take the memory of an array as its own

    def slicing(array):
        def take(start, stop):
            first = int(np.searchsorted(rows, start))
            part = array[first : first + stop - start]
            return part.copy() if shared else part

        return take

    return {key: place(sharding, (batch, *a.shape[1:]), slicing(a)) for key, a in local.items()}
