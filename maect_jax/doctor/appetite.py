"""How many pictures a second the model eats: operations a picture, and what the accelerator does in a second."""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from maect_jax.assemble import flops_per_update
from maect_jax.config import TRAINED

SHARE = 0.5  # of its peak that an accelerator reaches in training at best; published runs reach 0.1 to 0.5
# Dense bfloat16 peaks in operations a second, of one chip, by a part of JAX's name of the device.
PEAKS = {
    "h200": 989e12,
    "h100": 989e12,
    "a100": 312e12,
    "v6e": 918e12,
    "v5p": 459e12,
    "v5e": 197e12,
    "v4": 275e12,
}
# What else JAX calls them; the first that is part of the name counts.
_NAMES = {"v5 lite": "v5e", "v5litepod": "v5e", "v6 lite": "v6e"} | {key: key for key in PEAKS} | {"tpu v5": "v5p"}


@dataclass(frozen=True)
class Accelerator:
    """What eats.

    Attributes:
      name: 'h200', …, or JAX's name of the device.
      count: of them, fed by this host.
      peak: operations a second of one.
      measured: the peak is that of a large matrix product here, not its maker's.
    """

    name: str
    count: int
    peak: float
    measured: bool


def accelerator(name: str | None, count: int | None) -> Accelerator:
    """The asked-for accelerator (a key of `PEAKS`), or the devices of this process."""
    if name:
        return Accelerator(name, count or 1, PEAKS[name], False)
    devices = jax.local_devices()
    kind = devices[0].device_kind.lower()
    found = next((key for name, key in _NAMES.items() if name in kind), None)
    if found:
        return Accelerator(found, count or len(devices), PEAKS[found], False)
    return Accelerator(devices[0].device_kind, count or len(devices), _matmul_peak(devices[0]), True)


def _matmul_peak(device: jax.Device) -> float:
    """Operations a second of a matrix product in the type that is fast there."""
    cpu = device.platform == "cpu"
    side, dtype = (1024, jnp.float32) if cpu else (8192, jnp.bfloat16)
    x = jax.device_put(jnp.ones((side, side), dtype), device)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    # devices simulated on one CPU share its cores
    return 2 * side**3 / best / (len(jax.local_devices()) if cpu else 1)


def images_per_second(config: ConfigDict, eater: Accelerator) -> dict[str, float]:
    """Pictures (not views) a second that each training stage of the run eats at `SHARE` of the peak."""
    stages = [stage for stage in config.stages if stage in TRAINED]
    work = {stage: flops_per_update(config, stage) / _batch(config, stage) for stage in stages}
    return {stage: SHARE * eater.peak * eater.count / flops for stage, flops in work.items()}


def _batch(config: ConfigDict, stage: str) -> int:
    return config.pretrain.batch if stage in ("pretrain", "control") else config[stage].batch
