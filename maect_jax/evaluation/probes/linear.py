"""Linear probes on cached features: a grid of heads, all of them trained in one pass over the same batches.

`linear_heads` has the recipes and the update, `linear_selection` what is reported, `linear_images` the same training
from augmented pictures. The batches of update s are those of the pictures' pipeline (docs/design.md, decision 5): a
function of (seed, s), whatever the heads, devices or preset.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maect_jax.data.host.counters import step_ids
from maect_jax.evaluation.probes.linear_heads import PRESETS, LinearPreset, create_state, initial_kernels, probe_step
from maect_jax.evaluation.probes.linear_selection import (
    LinearResult,
    MeasuredRows,
    Probes,
    check_features,
    choose,
    default_mesh,
)
from maect_jax.evaluation.rows import copy, hold_out, pad_rows, round_up, split
from maect_jax.parallel.mesh import replicated


def evaluate_linear(
    train: dict[str, np.ndarray],
    train_labels,
    test: dict[str, np.ndarray],
    test_labels,
    classes: int,
    *,
    preset: LinearPreset = PRESETS["maect-linear"],
    epochs: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    check: Callable[[], None] = lambda: None,
) -> LinearResult:
    """Trains on nine tenths of the train rows, chooses head and epoch on the tenth, measures on the test rows.

    Args:
      train, test: name -> float32 [rows, width], for each of `preset.features`.
      train_labels, test_labels: integers [rows] in 0..classes-1.
      classes: number of classes.
      preset: one of `PRESETS`, or another; `preset.on(pooling)` names the model's own feature.
      epochs, batch: instead of the preset's; no batch is larger than the kept rows.
      seed: of the held-out tenth, the initial weights and the order.
      mesh: devices over which the rows, and the batch where divisible, are split; None = one local device.
      check: called after every epoch; may raise to stop.

    Raises:
      ConfigError: a feature is not given; no epoch, batch, feature or rate.
      DataError: shapes do not fit, a label is out of range, or fewer than ten train rows.
    """
    train, train_labels = check_features("train", train, train_labels, classes, preset)
    test, test_labels = check_features("test", test, test_labels, classes, preset)
    kept, held_out = hold_out(train_labels, seed)
    preset, mesh = preset.fit(kept.size, epochs, batch), default_mesh(mesh)

    def rows(index: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return {name: x[index] for name, x in train.items()}, train_labels[index]

    return choose(
        train_epochs(*rows(kept), classes, preset, seed=seed, mesh=mesh),
        preset,
        MeasuredRows(mesh, *rows(held_out)),
        MeasuredRows(mesh, test, test_labels),
        check,
        {"augmentation": "none, cached features", "train_rows": int(kept.size), "seed": seed},
    )


def train_epochs(
    features: dict[str, np.ndarray],
    labels,
    classes: int,
    preset: LinearPreset,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Iterator[tuple[Probes, np.ndarray]]:
    """Trains the heads on all rows and hands them out after each epoch.

    Arguments and errors as in `evaluate_linear`.

    Yields:
      feature -> its heads after the epoch, and their mean train loss over it, nats [features, heads].
    """
    features, labels = check_features("train", features, labels, classes, preset)
    mesh, rows = default_mesh(mesh), labels.size
    preset = preset.fit(rows)
    state = first_state(preset, {name: x.shape[1] for name, x in features.items()}, classes, seed, mesh)
    padded = round_up(rows, mesh.size)
    on_devices = {name: split(mesh, pad_rows(x, padded)) for name, x in features.items()}
    label_n = split(mesh, pad_rows(labels, padded))
    for epoch in range(preset.epochs):
        steps = range(epoch * preset.epoch_updates, (epoch + 1) * preset.epoch_updates)
        order_sb = copy(mesh, np.stack([step_ids(seed, step, preset.batch, rows) for step in steps]))
        state, loss_fh = _epoch(state, on_devices, label_n, order_sb, preset=preset, mesh=mesh)
        yield state.probes, np.asarray(loss_fh)


def first_state(preset: LinearPreset, widths: dict[str, int], classes: int, seed: int, mesh: Mesh):
    """State at step 0, the same on each device."""
    state = create_state(preset, initial_kernels(preset, widths, classes, jax.random.key(seed)))
    return jax.tree.map(lambda leaf: copy(mesh, np.asarray(leaf)), state)


@partial(jax.jit, static_argnames=("preset", "mesh"))
def _epoch(state, features, label_n, order_sb, *, preset: LinearPreset, mesh: Mesh):
    """One update for each row of `order_sb`; the state after them and each head's mean loss."""
    by_rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names if preset.batch % mesh.size == 0 else None))

    def body(state, index_b):
        batch = {name: jax.lax.with_sharding_constraint(x_nd[index_b], by_rows) for name, x_nd in features.items()}
        return probe_step(state, batch, label_n[index_b], preset)

    state, loss_sfh = jax.lax.scan(body, state, order_sb)
    return jax.lax.with_sharding_constraint((state, loss_sfh.mean(axis=0)), replicated(mesh))
