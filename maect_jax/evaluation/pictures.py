"""What people look at: reconstructions, and queries with their nearest neighbours, as uint8 arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.data.device.augment import normalise
from maect_jax.models.mae import MaskedAutoencoder
from maect_jax.models.patches import gather_rows, patchify, unpatchify
from maect_jax.objectives import emae
from maect_jax.objectives.mae import deviation, pixel_targets
from maect_jax.objectives.masking import Masks, mask_noise, parallel_masks, random_mask, shuffle

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
    masks = random_mask(model.encoder.grid**2, mask_ratio)

    @jax.jit
    def run(params, images_bhwc):
        return _complete(model, params, images_bhwc, masks, normalised_pixels, mean, std, seed)[:2]

    masked, completed = (_to_uint8(x_bknp[:, 0], model, mean, std) for x_bknp in run(params, images_bhwc))
    return {"original": images_bhwc, "masked": masked, "reconstructed": completed}


def reconstruct_parts(
    model: MaskedAutoencoder,
    params: dict,
    images_bhwc: np.ndarray,
    *,
    parts: int,
    normalised_pixels: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
) -> dict[str, np.ndarray]:
    """Pictures as each of EMAE's parts sees and completes them, and how far the parts are apart.

    Args:
      model, params, images_bhwc, normalised_pixels: as `reconstruct`.
      parts: K, a divisor of the patches. All hidden patches are predicted, also where training predicts a share.
      seed: of the shuffled order of each picture's patches; one seed gives one order, whatever the weights.

    Returns:
      'original': uint8 [n, size, size, c].
      'seen', 'completed': uint8 [n, parts, size, size, c]; hidden patches are grey, and the part's predictions.
      'disagreement': float32 [n, grid, grid], for each patch the mean of |prediction_i - prediction_j| over the pairs
        of parts that it is hidden from and over its values, in the space of the targets; 0 for two parts.
      'mean_disagreement', 'error': float32 scalars in the same space, the mean of the map, and the root of the mean
        squared error over parts, hidden patches and values.

    Raises:
      ValueError: the parts do not divide the patches.
    """
    grid = model.encoder.grid
    masks = parallel_masks(grid**2, parts)

    @jax.jit
    def run(params, images_bhwc):
        seen, completed, predicted_bknp, hidden_bkn, target_bnp = _complete(
            model, params, images_bhwc, masks, normalised_pixels, mean, std, seed
        )
        blind = jnp.argsort(~hidden_bkn, axis=1)[:, : parts - 1, :, None]  # the K - 1 parts that do not see a patch
        predicted_bonp = jnp.take_along_axis(predicted_bknp, blind, axis=1)
        of_patch = jax.vmap(lambda x_op: emae.disagreement(x_op[None, None, :, None]))
        apart_bn = jax.vmap(of_patch)(predicted_bonp.swapaxes(1, 2))
        error = jnp.sqrt(jnp.square(predicted_bonp - target_bnp[:, None]).mean())
        return seen, completed, apart_bn, error

    seen, completed, apart_bn, error = run(params, images_bhwc)
    return {
        "original": images_bhwc,
        "seen": _to_uint8(seen, model, mean, std),
        "completed": _to_uint8(completed, model, mean, std),
        "disagreement": np.asarray(apart_bn).reshape(-1, grid, grid),
        "mean_disagreement": np.asarray(apart_bn).mean(),
        "error": np.asarray(error),
    }


def _complete(
    model: MaskedAutoencoder,
    params: dict,
    images_bhwc: jax.Array,
    masks: Masks,
    normalised_pixels: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
) -> tuple[jax.Array, ...]:
    """What each part of each picture sees and predicts, patches in row-major order.

    Args:
      images_bhwc: 0..255.
      masks: every patch is seen or predicted by every part.

    Returns:
      what is seen and what is completed, normalised pixels float32 [n, parts, patches, values]; predictions in the
      space of the targets, of the same shape; hidden, bool [n, parts, patches]; targets [n, patches, values].
    """
    images_bhwc = images_bhwc.astype(jnp.float32)
    pixels_bnp = patchify(normalise(images_bhwc, mean, std), model.encoder.patch)
    grey_bnp = patchify(normalise(jnp.full_like(images_bhwc, GREY * 255), mean, std), model.encoder.patch)
    b, n, p = pixels_bnp.shape
    k, keep = masks.parts, masks.keep
    order_bkn = shuffle(mask_noise(jax.random.split(jax.random.key(seed), b), n))[:, masks.places_km]
    visible_blp = gather_rows(pixels_bnp, order_bkn[:, :, :keep].reshape(b, -1)).reshape(b * k, keep, p)
    given, _ = model.apply({"params": params}, visible_blp, order_bkn.reshape(b * k, n), only_removed=False)
    place_bkn = jnp.argsort(order_bkn, axis=-1)
    predicted_bknp = jnp.take_along_axis(given.reshape(b, k, n, p), place_bkn[..., None], axis=2).astype(jnp.float32)
    hidden_bkn = place_bkn >= keep
    shown_bknp = predicted_bknp
    if normalised_pixels:
        own_bnp, mean_bn1 = deviation(pixels_bnp), pixels_bnp.mean(axis=-1, keepdims=True)
        shown_bknp = predicted_bknp * own_bnp[:, None] + mean_bn1[:, None]
    seen_bknp, completed_bknp = (
        jnp.where(hidden_bkn[..., None], x, pixels_bnp[:, None]) for x in (grey_bnp[:, None], shown_bknp)
    )
    return seen_bknp, completed_bknp, predicted_bknp, hidden_bkn, pixel_targets(pixels_bnp, normalised_pixels)


def _to_uint8(
    patches: jax.Array, model: MaskedAutoencoder, mean: tuple[float, ...], std: tuple[float, ...]
) -> np.ndarray:
    """Patches of normalised pixels [..., patches, values] as pictures uint8 [..., size, size, c]."""
    *axes, n, p = patches.shape
    patch = model.encoder.patch
    x = np.asarray(unpatchify(patches.reshape(-1, n, p), patch, p // patch**2))
    x = np.clip(np.round((x * np.asarray(std) + np.asarray(mean)) * 255), 0, 255).astype(np.uint8)
    return x.reshape(*axes, *x.shape[1:])


def choose_queries(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` queries: the first of each class in turn, so that the choice favours nobody; int [count]."""
    rank = np.zeros(len(labels), np.int64)
    seen: dict[int, int] = {}
    for i, label in enumerate(labels.tolist()):
        rank[i] = seen.get(label, 0)
        seen[label] = rank[i] + 1
    return np.lexsort((labels, rank))[:count]
