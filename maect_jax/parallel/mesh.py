"""Where arrays live: one mesh with the axes 'replica' and 'fsdp'.

The batch is split over both axes. Parameters and optimiser state are split over 'fsdp' by one size rule and copied
over 'replica'. Everything else is replicated.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("replica", "fsdp")
SHARD_FROM = 2**16  # smaller arrays are copied: splitting them costs more in latency than it saves in memory


def make_mesh(fsdp: int = 1, devices: list | None = None) -> Mesh:
    """Mesh over all devices, `fsdp` of them holding one copy of the parameters together.

    `fsdp` must divide the number of devices (checked by the caller, see `config.check_devices`).
    """
    devices = jax.devices() if devices is None else devices
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The size rule: a large array is split over 'fsdp' along its longest divisible axis, else copied.

    The first axis of a stack of blocks is never the longest of a large one, so a scan always sees whole blocks' slices.
    """
    fsdp = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or np.prod(shape, dtype=np.int64) < SHARD_FROM or not divisible:
        return replicated(mesh)
    longest = max(divisible, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*(("fsdp" if axis == longest else None) for axis in range(len(shape)))))


def state_sharding(mesh: Mesh, state):
    """Shardings for a whole train state (a tree of arrays or shapes): parameters by the rule, the queue replicated."""

    def rule(path, leaf):
        in_queue = any(getattr(part, "name", None) == "queue" for part in path)
        return replicated(mesh) if in_queue else parameter_sharding(mesh, leaf.shape)

    return jax.tree_util.tree_map_with_path(rule, state)
