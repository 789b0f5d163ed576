"""What a stage knows between two updates. Everything a resume needs is here and nowhere else.

"step n" means: n batches were seen, batch n is next. Order, crops, masks, schedules follow from it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from maect_jax.neighbors.queue import SupportQueue
from maect_jax.training import optimizer


@struct.dataclass
class TrainState:
    """State of one stage; parts a stage does not have are empty.

    Attributes:
      step: int32 scalar, number of batches seen.
      params: trained parameters, float32, by part: 'encoder', 'decoder', 'projector', 'predictor'.
      frozen: parameters that never change in this stage: {'encoder': ...}; no gradient, no moments.
      moments: Adam's first and second moments of `params`.
      batch_stats: running statistics of the head's batch normalisations.
      target: EMA projector of stage 3, {'params', 'batch_stats'}.
      queue: support queue of stages 2 and 3.
      ema: moving average of the trained encoder parameters of stage 3; with `frozen` it is what is evaluated.
      skipped: int32 scalar, batches whose loss or gradient was not finite.
      skipped_in_a_row: int32 scalar.
    """

    step: jax.Array
    params: dict[str, Any]
    frozen: dict[str, Any]
    moments: optax.OptState
    batch_stats: dict[str, Any]
    target: dict[str, Any]
    queue: SupportQueue | None
    ema: dict[str, Any]
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def create_state(
    params: dict,
    frozen: dict | None = None,
    batch_stats: dict | None = None,
    target: dict | None = None,
    queue: SupportQueue | None = None,
    ema: dict | None = None,
) -> TrainState:
    """State at step 0 of a stage."""
    zero = jnp.int32(0)
    return TrainState(
        step=zero,
        params=params,
        frozen=frozen or {},
        moments=optimizer.init(params),
        batch_stats=batch_stats or {},
        target=target or {},
        queue=queue,
        ema=ema or {},
        skipped=jnp.int32(0),
        skipped_in_a_row=jnp.int32(0),
    )


def merge(a: dict, b: dict) -> dict:
    """Two parameter trees as one; where both have a dict under a name, these are merged as well."""
    both = {name: merge(a[name], b[name]) for name in a.keys() & b.keys()}
    return {**a, **b, **both}


def keep_if_finite(finite: jax.Array, old: TrainState, new: TrainState) -> TrainState:
    """`new` when the batch was finite, else `old` with its clocks moved on: seen, skipped, counted."""
    kept = jax.tree.map(lambda o, n: jnp.where(finite, n, o), old, new)
    bad = 1 - finite.astype(jnp.int32)
    return kept.replace(
        step=old.step + 1,
        skipped=old.skipped + bad,
        skipped_in_a_row=jnp.where(finite, 0, old.skipped_in_a_row + 1),
    )
