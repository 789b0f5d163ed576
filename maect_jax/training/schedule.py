"""Learning rate over the updates of a stage.

Source: MAE-CT (Lehner et al. 2023), released recipes: linear warm-up that never is zero, then half a cosine that starts
exactly at the peak and never reaches zero.
"""

import jax.numpy as jnp


def peak_learning_rate(base: float, batch: int, views: int) -> float:
    """Linear scaling rule: base * views * batch / 256, `batch` in pictures."""
    return base * views * batch / 256


def learning_rate_factor(step, updates: int, warmup: int, xp=jnp):
    """Share of the peak learning rate for update `step` (0-based), in (0, 1].

    (step + 1) / (warmup + 1) during the `warmup` first updates, then (1 + cos(pi * s / n)) / 2 for s = 0..n-1 over the
    remaining n = updates - warmup. `xp` is the array library: `jnp` inside a jitted step, `numpy` for float64.
    """
    step = xp.asarray(step, float)
    ramp = (step + 1) / (warmup + 1)
    decay = (1 + xp.cos(xp.pi * (step - warmup) / max(updates - warmup, 1))) / 2
    return xp.where(step < warmup, ramp, decay)


def mae_learning_rate_factor(step, updates: int, warmup: int, floor: float, xp=jnp):
    """Share of the peak learning rate for update `step` (0-based) of MAE's fine-tuning, in [0, 1].

    step / warmup during the `warmup` first updates, then from 1 along half a cosine towards `floor`, the least share.

    Source: MAE (He et al. 2022), released fine-tuning code; there in fractional epochs, which is the same.
    """
    step = xp.asarray(step, float)
    ramp = step / max(warmup, 1)
    decay = (1 + xp.cos(xp.pi * (step - warmup) / max(updates - warmup, 1))) / 2
    return xp.where(step < warmup, ramp, floor + (1 - floor) * decay)
