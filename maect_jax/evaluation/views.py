"""What an encoder keeps and what it ignores: two views of a picture compared, and its colours read from its features.

Both look at a limited number of pictures, always the same ones, without labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maect_jax.data.device.augment import make_views, normalise
from maect_jax.data.sources.base import Source
from maect_jax.evaluation.features import elementary, forward
from maect_jax.evaluation.health import alignment
from maect_jax.evaluation.task import Task
from maect_jax.models.patches import patchify
from maect_jax.objectives.nnclr import unit
from maect_jax.parallel.mesh import replicated

BINS = 64  # of a channel's histogram
CROP_SCALE = (0.2, 1.0)


@jax.jit
def histogram(images_bhwc: jax.Array) -> jax.Array:
    """Share of pixels in each of 64 equal bins of each channel; uint8 [b, h, w, c] -> float32 [b, c, 64]."""
    bins_bhwc = images_bhwc.astype(jnp.int32) * BINS // 256
    b, _, _, c = images_bhwc.shape

    def count(bins_p):
        return jnp.zeros(BINS).at[bins_p].add(1.0)

    bins_bcp = bins_bhwc.transpose(0, 3, 1, 2).reshape(b, c, -1)
    return jax.vmap(jax.vmap(count))(bins_bcp) / bins_bcp.shape[-1]


def histograms(task: Task, source: Source, limit: int) -> np.ndarray:
    """Histograms of at most `limit` pictures as the encoder sees them, float32 [n, channels, 64]."""
    found = []
    for batch in task.batches(source, limit):
        task.check()
        histogram_bcn = jax.device_put(histogram(batch["image"]), replicated(task.mesh))
        valid_b = jax.device_put(batch["valid"], replicated(task.mesh))
        found.append(np.asarray(histogram_bcn)[np.asarray(valid_b)])
    return np.concatenate(found)


def two_views(task: Task, source: Source, feature: str, augmentation: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Features, float32 [n, width] each, of two augmented views of at most `limit` pictures.

    Views are crops of 0.2 to 1 of the area with 'minimal' or 'strong' augmentation; see `data.device.augment`.
    """
    weights = task.weights
    parts = elementary(feature, task.depth)

    @partial(jax.jit, out_shardings=replicated(task.mesh))
    def see(params, batch):
        views_vbhwc = make_views(
            batch,
            seed=0,
            epoch=jnp.int32(0),
            views=2,
            size=weights.encoder.image_size,
            scale=CROP_SCALE,
            augmentation=augmentation,
            mean=weights.mean,
            std=weights.std,
        )

        def features(images):
            found = forward(weights.encoder, parts, params, images)
            return jnp.concatenate([found[part] for part in parts], axis=1)

        return *(features(view) for view in views_vbhwc), batch["valid"]

    found = []
    for batch in task.batches(source, limit):
        task.check()
        found.append([np.asarray(x) for x in see(task.params, batch)])
    first, second, valid = (np.concatenate(column) for column in zip(*found))
    return first[valid], second[valid]


@jax.jit
def invariance(first_bd: jax.Array, second_bd: jax.Array) -> dict[str, jax.Array]:
    """How alike two views of a picture are, and how unlike two pictures.

    Returns:
      'alignment': see `health.alignment`; 'cosine_invariance': mean cosine of the two views;
      'cosine_of_others': the same of views of different pictures, what an encoder that ignores all would also reach.
    """
    cosine_b = (unit(first_bd) * unit(second_bd)).sum(axis=1)
    others_b = (unit(first_bd) * unit(jnp.roll(second_bd, 1, axis=0))).sum(axis=1)
    return {
        "alignment": alignment(first_bd, second_bd),
        "cosine_invariance": cosine_b.mean(),
        "cosine_of_others": others_b.mean(),
    }


@dataclass(frozen=True)
class ColourProbe:
    """How well colour histograms of test pictures are predicted: mean absolute error a bin.

    Attributes:
      error: of the linear probe, by picture, float32 [test].
      baseline: of predicting every picture by the mean training histogram.
      protocol: every setting.
    """

    error: np.ndarray
    baseline: float
    protocol: dict


UPDATES, RATE = 500, 1e-2


def probe_colours(
    train_nd: np.ndarray, train_nch: np.ndarray, test_nd: np.ndarray, test_nch: np.ndarray, check: Callable
) -> ColourProbe:
    """A linear map from a picture's feature to its histogram, softmax over the bins of each channel.

    What a contrastively tuned encoder ignores, colour first of all, this probe can no longer read. Features are
    standardised by the training rows; full-batch Adam on the cross-entropy, which is convex.

    Args:
      train_nd, test_nd: float32 [rows, width]; train_nch, test_nch: float32 [rows, channels, 64].

    Source: the probe of MAE-CT's released code (Lehner et al. 2023).
    """
    mean_d, scale_d = train_nd.mean(axis=0), train_nd.std(axis=0) + 1e-6
    train_nd, test_nd = ((x - mean_d) / scale_d for x in (train_nd, test_nd))
    check()
    error_n = np.asarray(_fit_colours(train_nd, train_nch, test_nd, test_nch))
    baseline = float(np.abs(test_nch - train_nch.mean(axis=0)).mean())
    protocol = {
        "bins": BINS,
        "loss": "cross-entropy, softmax over the bins of a channel",
        "error": "mean absolute difference a bin",
        "optimiser": f"Adam, rate {RATE} with cosine to 0, {UPDATES} updates of all rows",
        "standardise": "by the training rows",
    }
    return ColourProbe(error_n, baseline, protocol)


@jax.jit
def _fit_colours(train_nd, train_nch, test_nd, test_nch):
    channels = train_nch.shape[1]
    start = jnp.log(train_nch.mean(axis=0) + 1e-6).reshape(-1)
    weights = jnp.zeros((train_nd.shape[1], channels * BINS)), start
    adam = optax.adam(optax.cosine_decay_schedule(RATE, UPDATES))

    def logits_of(weights, x_nd):
        return (x_nd @ weights[0] + weights[1]).reshape(-1, channels, BINS)

    def loss(weights):
        return optax.losses.safe_softmax_cross_entropy(logits_of(weights, train_nd), train_nch).mean()

    def update(carry, _):
        weights, moments = carry
        gradient = jax.grad(loss)(weights)
        change, moments = adam.update(gradient, moments)
        return (optax.apply_updates(weights, change), moments), None

    (weights, _), _ = jax.lax.scan(update, (weights, adam.init(weights)), length=UPDATES)
    return jnp.abs(jax.nn.softmax(logits_of(weights, test_nd)) - test_nch).mean(axis=(1, 2))


def attention(task: Task, images_bhwc: np.ndarray) -> np.ndarray:
    """Where the CLS token of the last block looks: float32 [batch, heads, grid, grid], summing to less than 1.

    What is missing to 1 is its attention to itself.
    """
    encoder, weights = task.weights.encoder, task.weights

    @jax.jit
    def maps(params, images):
        images = normalise(images.astype(jnp.float32), weights.mean, weights.std)
        _, found = encoder.apply({"params": params}, patchify(images, encoder.patch), mutable=["intermediates"])
        last_bhn = found["intermediates"]["blocks"]["attn"]["cls_attention_bhn"][0][-1]
        return last_bhn[:, :, 1:].reshape(*last_bhn.shape[:2], encoder.grid, encoder.grid)

    return np.asarray(maps(task.params, jnp.asarray(images_bhwc)), np.float32)
