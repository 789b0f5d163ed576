"""The 'maect-linear' probe on cached features: one linear layer a base rate, all of them trained in one pass.

Recipe of MAE-CT's released probe (Lehner et al. 2023): batch normalisation without affine, then linear heads; SGD with
momentum; the rate rises linearly from exactly 0 over the first tenth of the updates, then falls along a cosine to
exactly 0. The heads see the same batches and share the running statistics; nothing else connects them.

Head and epoch are chosen on a tenth of the train rows that no head is trained on. The published protocol chooses them
on the reported split itself; that number stands beside ours, under its own name.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maect_jax.errors import ConfigError
from maect_jax.evaluation.rows import check_rows, copy, hold_out, pad_rows, round_up, split
from maect_jax.models.nnclr import BatchNorm
from maect_jax.parallel.mesh import make_mesh, replicated

PRESET = "maect-linear"
BASE_RATES = (0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01)
MOMENTUM = 0.9
INIT_STD = 0.01  # PyTorch's trunc_normal_ cuts at +-2, 200 deviations away: a plain normal
CHUNK = 1024  # rows evaluated at a time

_NORM = BatchNorm(affine=False, epsilon=1e-5, momentum=0.9)


@struct.dataclass
class LinearProbe:
    """Heads that are ready to be applied to features.

    Attributes:
      kernel_hdc, bias_hc: float32 [heads, width, classes] and [heads, classes].
      mean_d, var_d: running statistics of the train features, [width]; the variance is the unbiased one.
    """

    kernel_hdc: jax.Array
    bias_hc: jax.Array
    mean_d: jax.Array
    var_d: jax.Array

    def logits(self, features_bd: jax.Array) -> jax.Array:
        """Features [batch, width] -> logits [heads, batch, classes]."""
        return _logits(self.kernel_hdc, self.bias_hc, _NORM.apply(self._statistics(), features_bd, train=False))

    def head(self, index: int) -> "LinearProbe":
        """The probe with one of the heads alone."""
        return self.replace(kernel_hdc=self.kernel_hdc[index, None], bias_hc=self.bias_hc[index, None])

    def _statistics(self) -> dict:
        return {"batch_stats": {"mean": self.mean_d, "var": self.var_d}}


@struct.dataclass
class ProbeState:
    """What the training of a probe knows between two updates.

    Attributes:
      step: int32 scalar, number of updates done.
      probe: the heads as they stand.
      velocity: momentum of (kernel_hdc, bias_hc), zero at the start.
    """

    step: jax.Array
    probe: LinearProbe
    velocity: tuple[jax.Array, jax.Array]


def create_state(kernel_hdc: jax.Array, bias_hc: jax.Array) -> ProbeState:
    """State at step 0 from initial weights [heads, width, classes] and [heads, classes]."""
    width = kernel_hdc.shape[1]
    probe = LinearProbe(kernel_hdc, bias_hc, jnp.zeros(width), jnp.ones(width))
    return ProbeState(jnp.int32(0), probe, (jnp.zeros_like(kernel_hdc), jnp.zeros_like(bias_hc)))


def learning_rate_factor(step, updates: int, xp=jnp):
    """Share of the peak rate for update `step` (0-based) of a probe, in [0, 1].

    With w = updates // 10: step / (w - 1) for the first w updates (a single one has factor 0), then
    (1 + cos(pi * s / (n - 1))) / 2 for s = 0..n-1 over the other n = updates - w (a single one has factor 1).
    `xp` is the array library: `jnp` inside a jitted step, `numpy` for float64.
    """
    warmup = updates // 10
    ramp = step / max(warmup - 1, 1)
    decay = (1 + xp.cos(xp.pi * (step - warmup) / max(updates - warmup - 1, 1))) / 2
    return xp.where(step < warmup, ramp, decay)


def probe_step(
    state: ProbeState, features_bd: jax.Array, label_b: jax.Array, peak_h: jax.Array, updates: int
) -> tuple[ProbeState, jax.Array]:
    """One SGD update of all heads.

    Args:
      state: before the update.
      features_bd, label_b: a batch, float32 [batch, width] and int32 [batch].
      peak_h: peak learning rate of each head, float32 [heads]: base rate * batch / 256.
      updates: number of updates of the whole training.

    Returns:
      the state after the update, and each head's mean cross-entropy before it, nats [heads].
    """
    probe = state.probe
    normal_bd, new = _NORM.apply(probe._statistics(), features_bd, train=True, mutable=["batch_stats"])
    weights = (probe.kernel_hdc, probe.bias_hc)

    def total(weights):
        loss_h = _cross_entropy(_logits(*weights, normal_bd), label_b).mean(axis=1)
        return loss_h.sum(), loss_h  # a head's gradient is that of its own loss

    gradient, loss_h = jax.grad(total, has_aux=True)(weights)
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, state.velocity, gradient)
    rate_h = peak_h * learning_rate_factor(state.step, updates)
    kernel_hdc = weights[0] - rate_h[:, None, None] * velocity[0]
    bias_hc = weights[1] - rate_h[:, None] * velocity[1]
    statistics = new["batch_stats"]
    probe = LinearProbe(kernel_hdc, bias_hc, statistics["mean"], statistics["var"])
    return ProbeState(state.step + 1, probe, velocity), loss_h


def train_epochs(
    features,
    labels,
    classes: int,
    *,
    epochs: int = 50,
    batch: int = 1024,
    seed: int = 0,
    base_rates: tuple[float, ...] = BASE_RATES,
    mesh: Mesh | None = None,
) -> Iterator[tuple[LinearProbe, np.ndarray]]:
    """Trains the heads and hands them out after each epoch.

    Args:
      features, labels: float32 [rows, width], integers [rows] in 0..classes-1; NumPy or jax arrays.
      epochs, batch: length; the batch is at most the number of rows, and each epoch drops what does not fill one.
      seed: of the initial weights and of the order of each epoch, a function of (seed, epoch) alone.
      base_rates: one head each; the peak rate is base rate * batch / 256.
      mesh: devices over which the rows, and the batch where divisible, are split; None = one local device.

    Yields:
      the heads after the epoch, and their mean train loss over it, nats [heads].

    Raises:
      ConfigError: no epoch, no batch or no rate. DataError: shapes do not fit, or a label is out of range.
    """
    features, labels = check_rows("train", features, labels, classes)
    if epochs < 1 or batch < 1 or not base_rates:
        raise ConfigError(f"linear probe: epochs {epochs}, batch {batch}, {len(base_rates)} rates; each must be >= 1")
    mesh = _mesh(mesh)
    rows, width = features.shape
    batch = min(batch, rows)
    padded = round_up(rows, mesh.size)
    features_nd, label_n = split(mesh, pad_rows(features, padded)), split(mesh, pad_rows(labels, padded))
    init_key, order_key = jax.random.split(jax.random.key(seed))
    heads = len(base_rates)
    kernel_hdc = INIT_STD * jax.random.normal(init_key, (heads, width, classes))
    state = create_state(kernel_hdc, jnp.zeros((heads, classes)))
    state = jax.tree.map(lambda leaf: copy(mesh, np.asarray(leaf)), state)
    peak_h = copy(mesh, np.array(base_rates, np.float32) * batch / 256)
    for epoch in range(epochs):
        key = copy(mesh, np.asarray(jax.random.key_data(jax.random.fold_in(order_key, epoch))))
        state, loss_h = _epoch(
            state, features_nd, label_n, key, peak_h, mesh=mesh, rows=rows, batch=batch, epochs=epochs
        )
        yield state.probe, np.asarray(loss_h)


def train_probe(features, labels, classes: int, **settings) -> LinearProbe:
    """The heads after the last epoch; arguments and errors of `train_epochs`."""
    for probe, _ in train_epochs(features, labels, classes, **settings):
        last = probe
    return last


@dataclasses.dataclass(frozen=True)
class LinearResult:
    """What the probe measured; accuracies are shares in [0, 1], epochs count from 1.

    Attributes:
      accuracy: on the test rows, of the head and epoch chosen on the held-out rows. The number to report.
      held_out_accuracy: on the held-out rows, of the same; above the truth, as it was chosen for being high.
      base_rate, epoch: of the choice.
      last_epoch_accuracy: on the test rows, of the chosen head after the last epoch.
      selected_on_test: {'accuracy', 'base_rate', 'epoch'} chosen on the test rows, as published; too high.
      table: a dict a head: base_rate, and lists over the epochs: loss (nats), held_out, test.
      protocol: every setting, with the rows and the number of candidates tried.
      probe: the chosen head's weights, `probe.logits(features)[0]`.
    """

    accuracy: float
    held_out_accuracy: float
    base_rate: float
    epoch: int
    last_epoch_accuracy: float
    selected_on_test: dict[str, float]
    table: list[dict] = dataclasses.field(repr=False)
    protocol: dict = dataclasses.field(repr=False)
    probe: LinearProbe = dataclasses.field(repr=False)


def evaluate_linear(
    train_features,
    train_labels,
    test_features,
    test_labels,
    classes: int,
    *,
    epochs: int = 50,
    batch: int = 1024,
    seed: int = 0,
    base_rates: tuple[float, ...] = BASE_RATES,
    mesh: Mesh | None = None,
    check: Callable[[], None] = lambda: None,
) -> LinearResult:
    """Trains on nine tenths of the train rows, chooses head and epoch on the tenth, measures on the test rows.

    The reported weights are those that were chosen; they are not trained again on all train rows. Arguments and errors
    as in `train_epochs`; at least ten train rows. `check` is called after every epoch and may raise to stop.
    """
    train_features, train_labels = check_rows("train", train_features, train_labels, classes)
    test_features, test_labels = check_rows("test", test_features, test_labels, classes)
    kept, held_out = hold_out(train_labels, seed)
    mesh = _mesh(mesh)
    held_out_rows = _chunks(mesh, train_features[held_out], train_labels[held_out])
    test_rows = _chunks(mesh, test_features, test_labels)
    settings = {"epochs": epochs, "batch": batch, "seed": seed, "base_rates": base_rates, "mesh": mesh}
    losses, on_held_out, on_test = [], [], []
    for probe, loss_h in train_epochs(train_features[kept], train_labels[kept], classes, **settings):
        check()
        losses.append(loss_h)
        on_held_out.append(_measure(mesh, probe, held_out_rows))
        on_test.append(_measure(mesh, probe, test_rows))
        epoch, head = _best(on_held_out)
        if epoch == len(on_held_out) - 1:
            chosen = probe.head(head)
    test_epoch, test_head = _best(on_test)
    held_out_eh, test_eh = (np.stack([accuracy_h for accuracy_h, _ in measured]) for measured in (on_held_out, on_test))
    batch = min(batch, kept.size)
    updates = epochs * (kept.size // batch)
    return LinearResult(
        accuracy=float(test_eh[epoch, head]),
        held_out_accuracy=float(held_out_eh[epoch, head]),
        base_rate=base_rates[head],
        epoch=epoch + 1,
        last_epoch_accuracy=float(test_eh[-1, head]),
        selected_on_test={
            "accuracy": float(test_eh[test_epoch, test_head]),
            "base_rate": base_rates[test_head],
            "epoch": test_epoch + 1,
        },
        table=[
            {
                "base_rate": rate,
                "loss": [float(loss_h[h]) for loss_h in losses],
                "held_out": held_out_eh[:, h].tolist(),
                "test": test_eh[:, h].tolist(),
            }
            for h, rate in enumerate(base_rates)
        ],
        protocol={
            "preset": PRESET,
            "epochs": epochs,
            "batch": batch,
            "updates": updates,
            "warmup_updates": updates // 10,
            "base_rates": list(base_rates),
            "peak_rate": "base_rate * batch / 256",
            "optimiser": f"SGD, momentum {MOMENTUM}, no Nesterov",
            "weight_decay": 0.0,
            "normalisation": f"batch norm without affine, epsilon {_NORM.epsilon}, momentum {1 - _NORM.momentum:.1g}",
            "augmentation": "none, cached features",
            "seed": seed,
            "selection": "heldout",
            "selection_rule": "highest accuracy, then lowest cross-entropy, then the earlier epoch and higher rate",
            "reported_weights": "the chosen head at the chosen epoch, trained on the kept rows only",
            "candidates": epochs * len(base_rates),
            "train_rows": int(kept.size),
            "held_out_rows": int(held_out.size),
            "test_rows": int(test_labels.size),
        },
        probe=chosen,
    )


def _mesh(mesh: Mesh | None) -> Mesh:
    return make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh


def _logits(kernel_hdc: jax.Array, bias_hc: jax.Array, normal_bd: jax.Array) -> jax.Array:
    product_hbc = jnp.einsum("bd,hdc->hbc", normal_bd, kernel_hdc, precision=jax.lax.Precision.HIGHEST)
    return product_hbc + bias_hc[:, None, :]


def _cross_entropy(logits_hbc: jax.Array, label_b: jax.Array) -> jax.Array:
    """Nats [heads, batch]."""
    own_hb = jnp.take_along_axis(logits_hbc, label_b[None, :, None], axis=2)[:, :, 0]
    return jax.nn.logsumexp(logits_hbc, axis=2) - own_hb


@partial(jax.jit, static_argnames=("mesh", "rows", "batch", "epochs"))
def _epoch(state, features_nd, label_n, key_data, peak_h, *, mesh: Mesh, rows: int, batch: int, epochs: int):
    """One pass over the first `rows` rows in an order drawn from the key; the mean loss of each head."""
    steps = rows // batch
    order_n = jax.random.permutation(jax.random.wrap_key_data(key_data), rows)
    by_rows = PartitionSpec(mesh.axis_names if batch % mesh.size == 0 else None)

    def body(state, index_b):
        features_bd = jax.lax.with_sharding_constraint(features_nd[index_b], NamedSharding(mesh, by_rows))
        return probe_step(state, features_bd, label_n[index_b], peak_h, epochs * steps)

    state, loss_sh = jax.lax.scan(body, state, order_n[: steps * batch].reshape(steps, batch))
    return jax.lax.with_sharding_constraint((state, loss_sh.mean(axis=0)), replicated(mesh))


def _chunks(mesh: Mesh, features: np.ndarray, labels: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Rows as [chunks, rows, width] and labels [chunks, rows], split by rows; label -1 marks padding."""
    rows = round_up(min(CHUNK, labels.size), mesh.size)
    padded = round_up(labels.size, rows)
    features_crd = pad_rows(features, padded).reshape(-1, rows, features.shape[1])
    label_cr = pad_rows(labels, padded, fill=-1).reshape(-1, rows)
    return split(mesh, features_crd, axis=1), split(mesh, label_cr, axis=1)


def _measure(mesh: Mesh, probe: LinearProbe, rows: tuple[jax.Array, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy [heads] and mean cross-entropy in nats [heads], float64."""
    right_h, loss_h, count = (np.asarray(total) for total in _score(probe, *rows, mesh=mesh))
    return right_h / count, loss_h.astype(np.float64) / count


@partial(jax.jit, static_argnames="mesh")
def _score(probe: LinearProbe, features_crd, label_cr, *, mesh: Mesh):
    """Right answers and summed cross-entropy of each head, and the number of rows that are no padding."""

    def body(totals, chunk):
        features_rd, label_r = chunk
        logits_hrc, valid_r = probe.logits(features_rd), label_r >= 0
        right_h = (valid_r & (logits_hrc.argmax(axis=2) == label_r)).sum(axis=1)
        loss_h = jnp.where(valid_r, _cross_entropy(logits_hrc, jnp.maximum(label_r, 0)), 0).sum(axis=1)
        return (totals[0] + right_h, totals[1] + loss_h), None

    heads = probe.bias_hc.shape[0]
    totals, _ = jax.lax.scan(body, (jnp.zeros(heads, jnp.int32), jnp.zeros(heads)), (features_crd, label_cr))
    return jax.lax.with_sharding_constraint((*totals, (label_cr >= 0).sum()), replicated(mesh))


def _best(measured: list[tuple[np.ndarray, np.ndarray]]) -> tuple[int, int]:
    """(epoch, head), both from 0: highest accuracy, then lowest cross-entropy, then the first in the table."""
    accuracy_eh, loss_eh = (np.stack(part) for part in zip(*measured))
    order = np.lexsort((np.nan_to_num(loss_eh, nan=np.inf).ravel(), -accuracy_eh.ravel()))
    epoch, head = np.unravel_index(order[0], accuracy_eh.shape)
    return int(epoch), int(head)
