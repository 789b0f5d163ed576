"""What all train steps share: pure functions (state, batch) -> (state, metrics, embedding).

A batch is {'image': uint8, 'id': int32 [batch], 'label': int32 [batch]}; see `device.augment.make_views`. Metrics are
device scalars, read by the loop one step late; the embedding [batch, width] feeds the health figures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maect_jax.training import optimizer
from maect_jax.training.schedule import learning_rate_factor
from maect_jax.training.state import TrainState, keep_if_finite

Step = Callable[[TrainState, dict], tuple[TrainState, dict, jax.Array]]


@dataclass(frozen=True)
class Clock:
    """Lengths of a stage in updates: total, warm-up, and updates an epoch; and the stage's seed."""

    updates: int
    warmup: int
    updates_per_epoch: int
    seed: int

    def factor(self, step: jax.Array) -> jax.Array:
        return learning_rate_factor(step, self.updates, self.warmup)

    def epoch(self, step: jax.Array) -> jax.Array:
        return step // self.updates_per_epoch


def join_views(x_vb: jax.Array) -> jax.Array:
    """[views, batch, ...] -> [batch * views, ...], the views of a picture side by side.

    With the views outside, the joined axis could not stay split over the devices: the compiler would gather all
    pictures on each of them.
    """
    return x_vb.swapaxes(0, 1).reshape(-1, *x_vb.shape[2:])


def apply_gradients(
    state: TrainState,
    gradients: dict,
    groups: dict[str, optimizer.Group],
    depth: int,
    clock: Clock,
    betas: tuple[float, float] = optimizer.BETAS,
) -> tuple[dict, Any, dict]:
    """New parameters, new moments, and the metrics that every stage shares."""
    peaks, decays = optimizer.plan(state.params, groups, depth)
    factor = clock.factor(state.step)
    params, moments = optimizer.update(gradients, state.moments, state.params, peaks, decays, factor, betas)
    learning_rate = factor * max(group.peak for group in groups.values())
    metrics = {"gradient_norm": optax.tree.norm(gradients), "parameter_norm": optax.tree.norm(params)}
    return params, moments, metrics | {"learning_rate": learning_rate}


def finish(old: TrainState, new: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    """Guard against a non-finite loss, gradient or update, which must change nothing but the clocks."""
    finite = jnp.isfinite(jnp.stack([metrics[name] for name in ("loss", "gradient_norm", "parameter_norm")])).all()
    state = keep_if_finite(finite, old, new)
    return state, metrics | {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
