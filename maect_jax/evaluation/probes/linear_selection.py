"""Which head, and which epoch, of a linear probe is reported: measured on held-out rows and on the test rows, apart.

Head and epoch are chosen on a tenth of the train rows that no head is trained on. The published protocols choose them
on the reported split itself; that number stands beside ours, under its own name.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maect_jax.errors import ConfigError
from maect_jax.evaluation.probes.linear_heads import (
    INIT_STD,
    MOMENTUM,
    PRESETS,
    RATE_BATCH,
    TRUST,
    LinearPreset,
    LinearProbe,
    cross_entropy,
)
from maect_jax.evaluation.rows import check_rows, pad_rows, round_up, split
from maect_jax.parallel.mesh import make_mesh, replicated

CHUNK = 1024  # rows measured at a time

Probes = dict[str, LinearProbe]


@dataclasses.dataclass(frozen=True)
class LinearResult:
    """What the probe measured; accuracies are shares in [0, 1], epochs count from 1.

    Attributes:
      accuracy: on the test rows, of the head and epoch chosen on the held-out rows. The number to report.
      correct: bool [test rows], which of them that head gets right; its mean is `accuracy`.
      held_out_accuracy: on the held-out rows, of the same; above the truth, as it was chosen for being high.
      feature, base_rate, epoch: of the choice.
      last_epoch_accuracy: on the test rows, of the chosen head after the last epoch.
      selected_on_test: {'accuracy', 'correct', 'feature', 'base_rate', 'epoch'} chosen on the test rows, as published;
        too high.
      table: a dict a head: feature, base_rate, and lists over the epochs: loss (nats), held_out, test.
      protocol: every setting, with the rows and the number of candidates tried.
      probe: the chosen head's weights; `probe.logits(features)[:, 0]` are its logits.
    """

    accuracy: float
    correct: np.ndarray = dataclasses.field(repr=False)
    held_out_accuracy: float
    feature: str
    base_rate: float
    epoch: int
    last_epoch_accuracy: float
    selected_on_test: dict
    table: list[dict] = dataclasses.field(repr=False)
    protocol: dict = dataclasses.field(repr=False)
    probe: LinearProbe = dataclasses.field(repr=False)


def check_features(
    what: str, features: dict, labels, classes: int, preset: LinearPreset
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The preset's features as float32 [rows, width] and the labels as int32 [rows], on the host.

    Raises:
      ConfigError: a feature is not there. DataError: shapes do not fit, or a label is out of range.
    """
    missing = [name for name in preset.features if name not in features]
    if missing:
        there = ", ".join(map(repr, features)) or "none"
        raise ConfigError(f"linear probe '{preset.name}': no {what} feature {missing[0]!r}; given are {there}")
    checked = {name: check_rows(what, features[name], labels, classes) for name in preset.features}
    return {name: x for name, (x, _) in checked.items()}, checked[preset.features[0]][1]


class MeasuredRows:
    """Rows with labels on the devices, in chunks, on which all heads are measured.

    Args:
      mesh: devices over which the rows of a chunk are split.
      features, labels: name -> float32 [rows, width], int32 [rows].
    """

    def __init__(self, mesh: Mesh, features: dict[str, np.ndarray], labels: np.ndarray):
        self.mesh, self.rows = mesh, labels.size
        chunk = round_up(min(CHUNK, labels.size), mesh.size)
        padded = round_up(labels.size, chunk)

        def chunks(x: np.ndarray, fill=0) -> jax.Array:
            return split(mesh, pad_rows(x, padded, fill).reshape(-1, chunk, *x.shape[1:]), axis=1)

        self._features = {name: chunks(x) for name, x in features.items()}
        self._labels = chunks(labels, fill=-1)

    def measure(self, probes: Probes, names: tuple[str, ...]) -> "Measured":
        """Every head on every row, once."""
        features = {name: self._features[name] for name in names}
        right, loss_fh = _score({name: probes[name] for name in names}, features, self._labels, names, mesh=self.mesh)
        right_fhn = np.asarray(right)[..., : self.rows]
        return Measured(right_fhn, right_fhn.mean(axis=2), np.asarray(loss_fh, np.float64) / self.rows)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of each head: right answers bool [features, heads, rows], their share, and the mean cross-entropy in nats."""

    right_fhn: np.ndarray
    accuracy_fh: np.ndarray
    loss_fh: np.ndarray


class Best:
    """The best candidate so far: highest accuracy, then lowest cross-entropy, then the earliest, then table order.

    Attributes:
      epoch: from 0. place: (feature, head) in the order of the table.
    """

    def __init__(self):
        self.epoch, self.place, self._worth = -1, (0, 0), (-1.0, 0.0)

    def offer(self, epoch: int, measured: Measured) -> bool:
        """Looks at the heads after one more epoch; True where one of them is the best now."""
        loss_fh = np.nan_to_num(measured.loss_fh, nan=np.inf)
        order = np.lexsort((loss_fh.ravel(), -measured.accuracy_fh.ravel()))
        place = tuple(map(int, np.unravel_index(order[0], loss_fh.shape)))
        worth = (float(measured.accuracy_fh[place]), -float(loss_fh[place]))
        better = worth > self._worth
        if better:
            self.epoch, self.place, self._worth = epoch, place, worth
        return better


def choose(
    epochs: Iterable[tuple[Probes, np.ndarray]],
    preset: LinearPreset,
    held_out: MeasuredRows,
    test: MeasuredRows,
    check: Callable[[], None],
    protocol: dict,
) -> LinearResult:
    """Runs a training, chooses head and epoch on the held-out rows alone, and measures the choice on the test rows.

    The reported weights are those that were chosen; they are not trained again on all train rows.

    Args:
      epochs: yields (probes, loss [features, heads]) after each epoch.
      preset: after `fit`.
      held_out, test: rows.
      check: called after every epoch; may raise to stop.
      protocol: what to add to the record.
    """
    names = preset.features
    by_held_out, by_test = Best(), Best()
    losses, held_out_efh, test_efh = [], [], []
    for epoch, (probes, loss_fh) in enumerate(epochs):
        check()
        on_held_out, on_test = held_out.measure(probes, names), test.measure(probes, names)
        if by_held_out.offer(epoch, on_held_out):
            feature, head = by_held_out.place
            chosen, correct = probes[names[feature]].head(head), on_test.right_fhn[feature, head].copy()
        if by_test.offer(epoch, on_test):
            correct_on_test = on_test.right_fhn[by_test.place].copy()
        losses.append(loss_fh)
        held_out_efh.append(on_held_out.accuracy_fh)
        test_efh.append(on_test.accuracy_fh)

    def identity(best: Best) -> dict:
        feature, head = best.place
        return {"feature": names[feature], "base_rate": preset.base_rates[head], "epoch": best.epoch + 1}

    losses, held_out_efh, test_efh = map(np.stack, (losses, held_out_efh, test_efh))
    return LinearResult(
        accuracy=float(correct.mean()),
        correct=correct,
        held_out_accuracy=float(held_out_efh[by_held_out.epoch][by_held_out.place]),
        **identity(by_held_out),
        last_epoch_accuracy=float(test_efh[-1][by_held_out.place]),
        selected_on_test={"accuracy": float(correct_on_test.mean()), "correct": correct_on_test} | identity(by_test),
        table=[
            {
                "feature": name,
                "base_rate": rate,
                "loss": losses[:, f, h].tolist(),
                "held_out": held_out_efh[:, f, h].tolist(),
                "test": test_efh[:, f, h].tolist(),
            }
            for f, name in enumerate(names)
            for h, rate in enumerate(preset.base_rates)
        ],
        protocol=_settings(preset) | {"held_out_rows": held_out.rows, "test_rows": test.rows} | protocol,
        probe=chosen,
    )


def default_mesh(mesh: Mesh | None) -> Mesh:
    """The mesh, or one of a single local device."""
    return make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh


@partial(jax.jit, static_argnames=("names", "mesh"))
def _score(probes: Probes, features, label_cr, names: tuple[str, ...], *, mesh: Mesh):
    """Right answers bool [features, heads, rows with padding], and the summed cross-entropy [features, heads]."""

    def body(loss_fh, chunk):
        features, label_r = chunk
        valid_r, rights = label_r >= 0, []
        for f, name in enumerate(names):
            logits_hcr = probes[name].logits_hcb(features[name])
            rights.append(logits_hcr.argmax(axis=1) == label_r)
            nats_hr = cross_entropy(logits_hcr, jnp.maximum(label_r, 0))
            loss_fh = loss_fh.at[f].add(jnp.where(valid_r, nats_hr, 0).sum(axis=1))
        return loss_fh, jnp.stack(rights)

    heads = probes[names[0]].bias_hc.shape[0]
    loss_fh, right_kfhr = jax.lax.scan(body, jnp.zeros((len(names), heads)), (features, label_cr))
    right_fhn = right_kfhr.transpose(1, 2, 0, 3).reshape(len(names), heads, -1)
    return jax.lax.with_sharding_constraint((right_fhn, loss_fh), replicated(mesh))


def _settings(preset: LinearPreset) -> dict:
    published = PRESETS.get(preset.name, preset)
    norm = "none"
    if preset.norm_epsilon is not None:
        norm = f"batch norm without affine, epsilon {preset.norm_epsilon}, momentum 0.1"
    rise = "linear from 0, then " if preset.warmup else ""
    trust = f", trust {TRUST} for weights, none for biases" if preset.optimiser == "lars" else ", no Nesterov"
    return {
        "preset": preset.name,
        "features": list(preset.features),
        "epochs": preset.epochs,
        "batch": preset.batch,
        "preset_epochs": published.epochs,
        "preset_batch": published.batch,
        "updates": preset.updates,
        "warmup_updates": preset.warmup_updates,
        "base_rates": list(preset.base_rates),
        "peak_rate": f"base_rate * batch / {RATE_BATCH}",
        "schedule": f"{rise}cosine to 0{', both ends reached' if preset.closed else ''}",
        "optimiser": f"{preset.optimiser.upper()}, momentum {MOMENTUM}{trust}",
        "weight_decay": 0.0,
        "normalisation": norm,
        "initial_std": INIT_STD,
        "selection": "heldout",
        "selection_rule": "highest accuracy, then lowest cross-entropy, then the earlier epoch, then the table's order",
        "reported_weights": "the chosen head at the chosen epoch, trained on the kept rows only",
        "candidates": preset.epochs * len(preset.features) * len(preset.base_rates),
    }
