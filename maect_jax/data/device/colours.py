"""Colour operations of strong views: jitter, blur, grey, solarise.

Pictures are float32 [height, width, 3] that hold whole numbers in 0..255 before and after each operation, as pictures
of 8 bits do in Pillow, on whose operations torchvision's are built. Factors are multiples of 2^-12 and weights of
2^-15, so that every product and sum is exact in float32: the results do not depend on the order of sums, on fused
multiply-add, or on how the batch is split.

Brightness, contrast, saturation, grey and solarise equal Pillow's. Hue is turned without Pillow's rounding of hue and
saturation to 8 bits; the blur is a Gaussian where Pillow approximates one by boxes (both bounds are tested).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.data.device.crops import to_whole
from maect_jax.randomness import below

FINE = 1 << 12  # parts of one in which factors and turns are drawn
SIGMAS = 1024  # standard deviations that a blur is drawn from
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_ORDERS = np.asarray(list(itertools.permutations(range(4))), np.int32)
_LUMA = (19595, 38470, 7471)  # of 65536: ITU-R 601 as Pillow's convert("L") has it
_SIGMA = (0.1, 2.0)  # pixels of a picture of 224 x 224; smaller pictures are blurred in proportion
_SIGMA_SIZE = 224
_WEIGHT = 1 << 15


def to_grey(x_hwc: jax.Array) -> jax.Array:
    """Luma of [..., 3] pictures as [..., 1]."""
    weighted = sum(weight * x_hwc[..., channel] for channel, weight in enumerate(_LUMA))
    return jnp.floor((weighted + 2**15) / 2**16)[..., None]


def blend(x: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
    """other + factor (x - other), cut to 0..255 and truncated; factor 1 gives x, 0 the other one."""
    return jnp.floor(jnp.clip(other + factor * (x - other), 0, 255))


def shift_hue(x_hwc: jax.Array, turn: jax.Array) -> jax.Array:
    """Hue turned by `turn`, a multiple of 1 / FINE in -0.5..0.5 turns, at equal HSV saturation and value."""
    high = x_hwc.max(axis=-1)
    chroma = high - x_hwc.min(axis=-1)
    r, g, b = x_hwc[..., 0], x_hwc[..., 1], x_hwc[..., 2]
    # Sextants of the colour circle times the chroma: so nothing is divided, and all is exact.
    hue = jnp.where(high == r, g - b, jnp.where(high == g, 2 * chroma + b - r, 4 * chroma + r - g))
    hue, chroma = hue[..., None], chroma[..., None]
    place = hue + chroma * (6 * turn + jnp.asarray([5.0, 3.0, 1.0]))  # -3..13 chroma
    place = place + 6 * chroma * ((place < 0) * 1.0 - (place >= 6 * chroma) - (place >= 12 * chroma))
    return to_whole(high[..., None] - jnp.clip(jnp.minimum(place, 4 * chroma - place), 0, chroma))


def draw_jitter(
    key: jax.Array, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choices for one picture, for `colour_jitter`.

    Returns:
      order: int32 [4], a permutation, each as likely.
      factors: float32 [3] of brightness, contrast and saturation, uniform in 1 - x..1 + x.
      turn: float32 scalar, uniform in -hue..hue.
    """
    most = np.asarray([int(FINE * spread) for spread in (brightness, contrast, saturation, hue)])
    words = jax.random.bits(key, (5,))
    changes = (below(words[:4], 2 * most + 1) - most) / FINE
    return jnp.asarray(_ORDERS)[below(words[4], len(_ORDERS))], 1 + changes[:3], changes[3]


def colour_jitter(x_hwc: jax.Array, order: jax.Array, factors: jax.Array, turn: jax.Array) -> jax.Array:
    """Brightness, contrast, saturation and hue changes in the given order on one picture; see `draw_jitter`."""

    def apply(x, operation):
        grey = to_grey(x)
        mean = ((grey.astype(jnp.int32).sum() + grey.size // 2) // grey.size).astype(jnp.float32)
        other = jnp.where(operation == BRIGHTNESS, 0.0, jnp.where(operation == CONTRAST, mean, grey))
        blended = blend(x, other, factors[jnp.minimum(operation, SATURATION)])
        return jnp.where(operation == HUE, shift_hue(x, turn), blended), None

    return jax.lax.scan(apply, x_hwc, order)[0]


def sigmas(size: int) -> np.ndarray:
    """Standard deviations in pixels that a picture of that side is blurred with, float64 [SIGMAS], uniform."""
    low, high = (sigma * min(1.0, size / _SIGMA_SIZE) for sigma in _SIGMA)
    return low + (np.arange(SIGMAS) + 0.5) / SIGMAS * (high - low)


def blur_weights(size: int) -> np.ndarray:
    """Gaussians of `sigmas(size)` over whole pixels up to three of the largest deviation, float32 [SIGMAS, taps]."""
    sigma = sigmas(size)[:, None]
    reach = max(1, int(3 * sigma[-1, 0] + 0.5))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = np.round(weights / weights.sum(axis=1, keepdims=True) * _WEIGHT)
    weights[:, reach] += _WEIGHT - weights.sum(axis=1)
    return (weights / _WEIGHT).astype(np.float32)


def gaussian_blur(x_hwc: jax.Array, weights_t: jax.Array) -> jax.Array:
    """Picture blurred by a row of `blur_weights`, rounded after each pass; the border pixel is repeated."""
    reach = weights_t.shape[0] // 2
    for axis in (0, 1):
        padded = jnp.pad(x_hwc, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="edge")
        near = (jax.lax.slice_in_dim(padded, k, k + x_hwc.shape[axis], axis=axis) for k in range(2 * reach + 1))
        x_hwc = to_whole(sum(weight * x for weight, x in zip(weights_t, near)))
    return x_hwc


def solarise(x_hwc: jax.Array, threshold: float = 128.0) -> jax.Array:
    """Values at or above the threshold inverted."""
    return jnp.where(x_hwc < threshold, x_hwc, 255.0 - x_hwc)
