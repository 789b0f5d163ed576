"""What people look at: reconstructions, and queries with their nearest neighbours, as uint8 arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.data.device.augment import normalise
from maect_jax.models.mae import MaskedAutoencoder
from maect_jax.models.patches import gather_rows, patchify, unpatchify
from maect_jax.objectives.masking import mask_noise, patches_to_keep, shuffle

GREY = 0.5  # shown where a patch was removed, as a share of full brightness


def reconstruct(
    model: MaskedAutoencoder,
    params: dict,
    images_bhwc: np.ndarray,
    *,
    mask_ratio: float,
    normalised_pixels: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
) -> dict[str, np.ndarray]:
    """Pictures as the autoencoder sees and completes them.

    Args:
      model, params: autoencoder and its parameters {'encoder', 'decoder'}.
      images_bhwc: uint8 [n, size, size, c].
      normalised_pixels: the model predicts patches of zero mean and unit variance; each patch's own mean and deviation
        are put back, as in the MAE paper's figures.

    Returns:
      'original', 'masked', 'reconstructed', uint8 [n, size, size, c]; visible patches are the originals.
    """
    patch, channels = model.encoder.patch, images_bhwc.shape[-1]
    n = model.encoder.grid**2
    keep = patches_to_keep(n, mask_ratio)

    @jax.jit
    def run(params, images_bhwc):
        pixels_bnp = patchify(normalise(images_bhwc.astype(jnp.float32), mean, std), patch)
        shuffle_bn = shuffle(mask_noise(jax.random.split(jax.random.key(seed), images_bhwc.shape[0]), n))
        visible_blp = gather_rows(pixels_bnp, shuffle_bn[:, :keep])
        predicted, _ = model.apply({"params": params}, visible_blp, shuffle_bn, only_removed=False)
        order_bn = jnp.argsort(shuffle_bn, axis=1)
        predicted_bnp = jnp.take_along_axis(predicted, order_bn[..., None], axis=1).astype(jnp.float32)
        if normalised_pixels:
            deviation = jnp.sqrt(pixels_bnp.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
            predicted_bnp = predicted_bnp * deviation + pixels_bnp.mean(axis=-1, keepdims=True)
        visible = (order_bn < keep)[..., None]
        grey_bnp = jnp.zeros_like(pixels_bnp) + patchify(
            normalise(jnp.full_like(images_bhwc, GREY * 255), mean, std), patch
        )
        return [jnp.where(visible, pixels_bnp, grey_bnp), jnp.where(visible, pixels_bnp, predicted_bnp)]

    masked, completed = (
        np.asarray(unpatchify(x, patch, channels)) for x in run(params, jnp.asarray(images_bhwc, jnp.float32))
    )

    def to_uint8(x):
        return np.clip(np.round((x * np.asarray(std) + np.asarray(mean)) * 255), 0, 255).astype(np.uint8)

    return {"original": images_bhwc, "masked": to_uint8(masked), "reconstructed": to_uint8(completed)}


def choose_queries(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` queries: the first of each class in turn, so that the choice favours nobody; int [count]."""
    rank = np.zeros(len(labels), np.int64)
    seen: dict[int, int] = {}
    for i, label in enumerate(labels.tolist()):
        rank[i] = seen.get(label, 0)
        seen[label] = rank[i] + 1
    return np.lexsort((labels, rank))[:count]
