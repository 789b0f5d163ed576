"""The recipes of linear probes, and one update of all heads of a recipe's grid.

A grid has one head for each base rate on each feature. Heads on the same feature share its batch normalisation and are
one matrix [heads * classes, width], so that an update is two matrix products a feature, however many rates there are.
Nothing else connects the heads: a head trains as it would alone.

Sources: MAE (He et al. 2022), appendix A.2; MAE-CT (Lehner et al. 2023), released recipe; DINOv2 (Oquab et al. 2023),
released evaluation; MIM-Refiner (Alkin et al. 2024), released evaluation; LARS (You et al. 2017), as MAE applies it.
"""

import dataclasses
import zlib
from fractions import Fraction

import jax
import jax.numpy as jnp
from flax import struct

from maect_jax.errors import ConfigError
from maect_jax.models.nnclr import BatchNorm

MOMENTUM = 0.9
TRUST = 0.001  # of LARS
INIT_STD = 0.01  # of the weights; biases start at 0
RATE_BATCH = 256  # the peak rate is base rate * batch / 256


@dataclasses.dataclass(frozen=True)
class LinearPreset:
    """Every setting of a protocol; numbers of different presets do not compare.

    Attributes:
      name: of the protocol.
      features: names as in `evaluation.features`; 'configured' is the model's own pooling after the final norm.
      base_rates: one head each, on each feature; the peak rate is base rate * batch / 256.
      optimiser: 'sgd' or 'lars'; both with momentum 0.9 and without weight decay.
      norm_epsilon: of the batch norm without affine that the features pass; None = no norm.
      batch, epochs: length.
      warmup: share of the updates in which the rate rises linearly from 0; then it falls along a cosine.
      closed: whether rise and fall contain both their ends: the last update of the rise has the peak rate, that of the
        fall exactly 0. Otherwise each ends one update later, as in PyTorch's cosine.
      epoch_updates: updates between two measurements; None = one pass over the train rows.
    """

    name: str
    features: tuple[str, ...]
    base_rates: tuple[float, ...]
    optimiser: str
    norm_epsilon: float | None
    batch: int
    epochs: int
    warmup: Fraction
    closed: bool
    epoch_updates: int | None = None

    def on(self, pooling: str) -> "LinearPreset":
        """The preset for a model whose own pooling is 'cls' or 'mean': no feature is 'configured' any more."""
        return dataclasses.replace(self, features=tuple(name.replace("configured", pooling) for name in self.features))

    def fit(self, rows: int, epochs: int | None = None, batch: int | None = None, multiple: int = 1) -> "LinearPreset":
        """The preset for so many train rows: no batch is larger than they are, and `epoch_updates` is a number.

        Args:
          rows: train rows, at least 1.
          epochs, batch: instead of the preset's.
          multiple: the batch becomes a multiple of it where there are so many rows.

        Raises:
          ConfigError: no epoch, no batch, no feature or no rate.
        """
        epochs = self.epochs if epochs is None else epochs
        batch = self.batch if batch is None else batch
        if epochs < 1 or batch < 1 or not self.base_rates or not self.features:
            given = f"epochs {epochs}, batch {batch}, {len(self.features)} features, {len(self.base_rates)} rates"
            raise ConfigError(f"linear probe '{self.name}': {given}; each must be at least 1")
        batch = max(min(batch, rows) // multiple, 1) * multiple
        updates = self.epoch_updates or max(rows // batch, 1)
        return dataclasses.replace(self, epochs=epochs, batch=batch, epoch_updates=updates)

    @property
    def updates(self) -> int:
        """Of the whole training, after `fit`."""
        return self.epochs * self.epoch_updates

    @property
    def warmup_updates(self) -> int:
        return int(self.updates * self.warmup)


_CLOSED_TENTH = {"warmup": Fraction(1, 10), "closed": True}

PRESETS = {
    preset.name: preset
    for preset in (
        LinearPreset(
            "maect-linear",
            features=("configured",),
            base_rates=(0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01),
            optimiser="sgd",
            norm_epsilon=1e-5,
            batch=1024,
            epochs=50,
            **_CLOSED_TENTH,
        ),
        LinearPreset(  # LARS needs ImageNet's 7,000 updates: with few rows, give some thousand epochs
            "mae-linear",
            features=("cls",),
            base_rates=(0.1,),
            optimiser="lars",
            norm_epsilon=1e-6,
            batch=16384,
            epochs=90,
            warmup=Fraction(10, 90),
            closed=False,
        ),
        LinearPreset(
            "dinov2-linear",
            features=("cls", "cls+mean", "cls@norm4", "cls@norm4+mean"),
            base_rates=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
            optimiser="sgd",
            norm_epsilon=None,
            batch=1024,  # 128 on each of eight devices
            epochs=10,
            warmup=Fraction(0),
            closed=False,
            epoch_updates=1250,
        ),
        LinearPreset(
            "mimrefiner-linear",
            features=("cls@last", "cls@last+mean@last", "cls@last4", "cls@last4+mean@last4"),
            base_rates=(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5),
            optimiser="sgd",
            norm_epsilon=1e-5,
            batch=1024,
            epochs=50,
            **_CLOSED_TENTH,
        ),
    )
}


def learning_rate_factor(step, preset: LinearPreset, xp=jnp):
    """Share of the peak rate for update `step` (0-based) of a preset that was fit, in [0, 1].

    With n updates, w of them warm-up, and c = 1 for a closed schedule, else 0: step / (w - c) in the warm-up (a single
    update has 0), then (1 + cos(pi * s / (n - w - c))) / 2 with s = step - w (a single one has 1). `xp` is the array
    library: `jnp` inside a jitted step, `numpy` for float64.
    """
    warmup, end = preset.warmup_updates, int(preset.closed)
    ramp = step / max(warmup - end, 1)
    decay = (1 + xp.cos(xp.pi * (step - warmup) / max(preset.updates - warmup - end, 1))) / 2
    return xp.where(step < warmup, ramp, decay)


@struct.dataclass
class LinearProbe:
    """Heads on one feature, ready to be applied.

    Attributes:
      kernel_hcd, bias_hc: float32 [heads, classes, width] and [heads, classes].
      mean_d, var_d: running statistics of the train features, [width]; the variance is the unbiased one.
      epsilon: of the batch norm; None = the features are taken as they are.
    """

    kernel_hcd: jax.Array
    bias_hc: jax.Array
    mean_d: jax.Array
    var_d: jax.Array
    epsilon: float | None = struct.field(pytree_node=False)

    def logits(self, features_bd: jax.Array) -> jax.Array:
        """Features [batch, width] -> logits [batch, heads, classes], by the running statistics."""
        return self.logits_hcb(features_bd).transpose(2, 0, 1)

    def logits_hcb(self, features_bd: jax.Array) -> jax.Array:
        """The same as [heads, classes, batch], as they are computed: sums over classes then run along the batch."""
        return _logits(self.kernel_hcd, self.bias_hc, self.normalise(features_bd, train=False)[0])

    def normalise(self, features_bd: jax.Array, train: bool) -> tuple[jax.Array, "LinearProbe"]:
        """Normalised features, and the probe with the running statistics that this batch leaves when training."""
        if self.epsilon is None:
            return features_bd, self
        norm = BatchNorm(affine=False, epsilon=self.epsilon, momentum=0.9)
        statistics = {"batch_stats": {"mean": self.mean_d, "var": self.var_d}}
        normal_bd, new = norm.apply(statistics, features_bd, train=train, mutable=["batch_stats"])
        return normal_bd, self.replace(mean_d=new["batch_stats"]["mean"], var_d=new["batch_stats"]["var"])

    def head(self, index: int) -> "LinearProbe":
        """The probe with one of the heads alone."""
        return self.replace(kernel_hcd=self.kernel_hcd[index, None], bias_hc=self.bias_hc[index, None])


@struct.dataclass
class ProbeState:
    """What the training of a probe knows between two updates.

    Attributes:
      step: int32 scalar, number of updates done.
      probes: feature -> its heads as they stand.
      velocity: feature -> momentum of (kernel_hcd, bias_hc), zero at the start.
    """

    step: jax.Array
    probes: dict[str, LinearProbe]
    velocity: dict[str, tuple[jax.Array, jax.Array]]


def initial_kernels(preset: LinearPreset, widths: dict[str, int], classes: int, key: jax.Array) -> dict[str, jax.Array]:
    """Normal weights [heads, classes, width] of each feature.

    PyTorch's trunc_normal_ cuts at +-2, 200 deviations away: a plain normal. They are a function of the key and the
    feature's name, whatever other features there are.
    """

    def kernel(name: str) -> jax.Array:
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return INIT_STD * jax.random.normal(own, (len(preset.base_rates), classes, widths[name]))

    return {name: kernel(name) for name in preset.features}


def create_state(preset: LinearPreset, kernels: dict[str, jax.Array]) -> ProbeState:
    """State at step 0 from weights [heads, classes, width] of each feature; biases are zero."""

    def probe(kernel_hcd: jax.Array) -> LinearProbe:
        heads, classes, width = kernel_hcd.shape
        bias_hc = jnp.zeros((heads, classes))
        return LinearProbe(kernel_hcd, bias_hc, jnp.zeros(width), jnp.ones(width), preset.norm_epsilon)

    probes = {name: probe(kernel_hcd) for name, kernel_hcd in kernels.items()}
    velocity = {name: jax.tree.map(jnp.zeros_like, (p.kernel_hcd, p.bias_hc)) for name, p in probes.items()}
    return ProbeState(jnp.int32(0), probes, velocity)


def probe_step(
    state: ProbeState, features: dict[str, jax.Array], label_b: jax.Array, preset: LinearPreset
) -> tuple[ProbeState, jax.Array]:
    """One update of all heads. Pure; `preset` is static.

    Args:
      state: before the update.
      features: name -> a batch of it, float32 [batch, width].
      label_b: int32 [batch].
      preset: after `fit`.

    Returns:
      the state after the update, and each head's mean cross-entropy before it, nats [features, heads].
    """
    peak_h = jnp.asarray(preset.base_rates, jnp.float32) * (preset.batch / RATE_BATCH)
    rate_h = peak_h * learning_rate_factor(state.step, preset)
    probes, velocity, losses = {}, {}, []
    for name in preset.features:
        normal_bd, probe = state.probes[name].normalise(features[name], train=True)
        weights = (probe.kernel_hcd, probe.bias_hc)
        gradient, loss_h = _gradient(*weights, normal_bd, label_b)
        if preset.optimiser == "lars":
            gradient = (_trust(weights[0], gradient[0]), gradient[1])
        velocity[name] = jax.tree.map(lambda v, g: MOMENTUM * v + g, state.velocity[name], gradient)
        kernel_hcd = weights[0] - rate_h[:, None, None] * velocity[name][0]
        bias_hc = weights[1] - rate_h[:, None] * velocity[name][1]
        probes[name] = probe.replace(kernel_hcd=kernel_hcd, bias_hc=bias_hc)
        losses.append(loss_h)
    return ProbeState(state.step + 1, probes, velocity), jnp.stack(losses)


def cross_entropy(logits_hcb: jax.Array, label_b: jax.Array) -> jax.Array:
    """Nats [heads, batch]."""
    own_hb = jnp.take_along_axis(logits_hcb, label_b[None, None, :], axis=1)[:, 0]
    return jax.nn.logsumexp(logits_hcb, axis=1) - own_hb


def _logits(kernel_hcd: jax.Array, bias_hc: jax.Array, normal_bd: jax.Array) -> jax.Array:
    product_hcb = jnp.einsum("hcd,bd->hcb", kernel_hcd, normal_bd, precision=jax.lax.Precision.HIGHEST)
    return product_hcb + bias_hc[:, :, None]


def _gradient(kernel_hcd, bias_hc, normal_bd, label_b) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Gradients of (kernel, bias), each head's that of its own loss, and the losses [heads]."""

    def total(weights):
        loss_h = cross_entropy(_logits(*weights, normal_bd), label_b).mean(axis=1)
        return loss_h.sum(), loss_h

    return jax.grad(total, has_aux=True)((kernel_hcd, bias_hc))


def _trust(kernel_hcd: jax.Array, gradient_hcd: jax.Array) -> jax.Array:
    """LARS: each head's gradient at a thousandth of its weights' length; as it is where either length is 0."""
    weight_h, gradient_h = (jnp.sqrt(jnp.square(x).sum(axis=(1, 2))) for x in (kernel_hcd, gradient_hcd))
    both_h = (weight_h > 0) & (gradient_h > 0)
    ratio_h = jnp.where(both_h, TRUST * weight_h / jnp.where(both_h, gradient_h, 1.0), 1.0)
    return ratio_h[:, None, None] * gradient_hcd
