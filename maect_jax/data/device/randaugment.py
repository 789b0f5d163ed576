"""RandAugment on the device, as fine-tuning recipes write it: `rand-m9-mstd0.5-inc1`.

Each picture goes through a few operations drawn uniformly with replacement, each carried out with some probability at
a strength near 9 of 10. 'Increasing' means that a higher level always changes the picture more. Pictures are 8-bit
between operations, as they are in PIL, whose arithmetic is followed down to where it truncates and where it rounds.

Under `vmap` a `lax.switch` computes every branch, so the operations are gathered into three kinds, and every layer
computes each kind once, with parameters that leave the picture as it is unless one of its operations is carried out:

  table   AutoContrast, Equalize, Invert, Posterize, Solarize, SolarizeAdd, Contrast, Brightness: 256 values a channel
  blend   Color, Sharpness: with the grey or the smoothed picture
  warp    Rotate, ShearX, ShearY, TranslateX, TranslateY: one affine map, bicubic

Differences from PIL: AutoContrast is one value brighter where its exact result is a whole number and PIL's product in
double precision falls just below it. Single values of blends and warps differ by one, where float32 and PIL's
arithmetic fall on two sides of a whole number. A pixel whose centre is mapped onto the picture's border itself may be
filled in one and not in the other. Newer versions of PIL refuse the zero bits of Posterize at level 10; older ones, and
this, return black.

Sources: RandAugment (Cubuk et al. 2020), section 3; ranges of the increasing set as in the timm library; MAE (He et al.
2022), appendix A.1.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

OPERATIONS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"),
)
NOTHING = len(OPERATIONS)  # index of the operation that leaves the picture as it is
LARGEST = 10.0  # level at which every range below ends

_ROTATE = 30.0  # degrees
_SHEAR = 0.3
_TRANSLATE = 0.45  # of the side
_ENHANCE = 0.9  # change of the factor of Color, Contrast, Brightness and Sharpness, either way
_LEAST_FACTOR = 0.1
_POSTERIZE = 4  # bits taken from the four that level 0 keeps
_SOLARIZE_ADD = 110
_LUMA = (19595, 38470, 7471)  # of 65536: ITU-R 601 as PIL's convert("L") has it


@dataclass(frozen=True)
class RandAugment:
    """Settings of RandAugment.

    Attributes:
      operations: drawn for each picture, one after another.
      magnitude: mean level, 0..10.
      deviation: standard deviation of the level, which is cut to 0..10.
      probability: with which a drawn operation is carried out.
    """

    operations: int = 2
    magnitude: float = 9.0
    deviation: float = 0.5
    probability: float = 0.5


def _choose(choices: dict[str, jax.Array], otherwise: jax.Array, operation: jax.Array) -> jax.Array:
    """The choice of the operation's name, or `otherwise` where it has none."""
    named = [jnp.broadcast_to(choices.get(name, otherwise), otherwise.shape) for name in OPERATIONS]
    return jnp.stack([*named, otherwise])[operation]


def _luma(x_hwc: jax.Array) -> jax.Array:
    """Grey picture, int32 [h, w, 1]."""
    if x_hwc.shape[-1] == 1:
        return x_hwc
    weighted = sum(weight * x_hwc[..., channel] for channel, weight in enumerate(_LUMA))
    return ((weighted + 2**15) // 2**16)[..., None]


def _blend(other: jax.Array, x: jax.Array, factor: jax.Array) -> jax.Array:
    """other + factor * (x - other), cut to 0..255 and truncated as PIL does."""
    mixed = other.astype(jnp.float32) + factor * (x - other).astype(jnp.float32)
    return jnp.clip(mixed, 0.0, 255.0).astype(jnp.int32)


def _tables(x_hwc: jax.Array, level: jax.Array, factor: jax.Array) -> dict[str, jax.Array]:
    """What the operations on single values make of 0..255: for each of them int32 [channels or 1, 256]."""
    value = jnp.arange(256)
    pixels_nc = x_hwc.reshape(-1, x_hwc.shape[-1])
    low, high = pixels_nc.min(axis=0)[:, None], pixels_nc.max(axis=0)[:, None]
    stretched = (value - low) * 255 // jnp.maximum(high - low, 1)

    channel = jnp.arange(pixels_nc.shape[1])
    counts = jnp.zeros((channel.size, 256), jnp.int32).at[channel, pixels_nc].add(1)
    below = jnp.cumsum(counts, axis=1) - counts  # pixels darker than each value
    step = jnp.take_along_axis(below, high, axis=1) // 255
    equalized = (step // 2 + below) // jnp.maximum(step, 1)

    bits = 4 - (_POSTERIZE * level / LARGEST).astype(jnp.int32)
    threshold = 256 - (256 * level / LARGEST).astype(jnp.int32)
    add = (_SOLARIZE_ADD * level / LARGEST).astype(jnp.int32)
    grey = _luma(x_hwc)
    mean = (grey.sum() + grey.size // 2) // grey.size
    tables = {
        "AutoContrast": jnp.where(high > low, stretched, value),
        "Equalize": jnp.where(step > 0, equalized, value),
        "Invert": 255 - value,
        "Posterize": value & (256 - (1 << (8 - bits))),
        "Solarize": jnp.where(value < threshold, value, 255 - value),
        "SolarizeAdd": jnp.where(value < 128, value + add, value),
        "Contrast": _blend(mean, value, factor),
        "Brightness": _blend(jnp.int32(0), value, factor),
    }
    return {name: jnp.clip(table, 0, 255) for name, table in tables.items()}


def _smooth(x_hwc: jax.Array) -> jax.Array:
    """3 x 3 means in which the pixel itself counts five times; the border stays."""
    rows = x_hwc[:-2] + x_hwc[1:-1] + x_hwc[2:]
    box = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    mean = (2 * (box + 4 * x_hwc[1:-1, 1:-1]) + 13) // 26
    return x_hwc.at[1:-1, 1:-1].set(mean)


def _matrices(height: int, width: int, level: jax.Array, sign: jax.Array) -> dict[str, jax.Array]:
    """For each geometric operation (a, b, c, d, e, f): output (x, y) is read at (ax + by + c, dx + ey + f)."""
    share = sign * level / LARGEST
    angle = jnp.deg2rad(_ROTATE * share)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2
    return {
        "Rotate": jnp.stack([cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y]),
        "ShearX": jnp.asarray([1.0, _SHEAR * share, 0.0, 0.0, 1.0, 0.0]),
        "ShearY": jnp.asarray([1.0, 0.0, 0.0, _SHEAR * share, 1.0, 0.0]),
        "TranslateX": jnp.asarray([1.0, 0.0, _TRANSLATE * share * width, 0.0, 1.0, 0.0]),
        "TranslateY": jnp.asarray([1.0, 0.0, 0.0, 0.0, 1.0, _TRANSLATE * share * height]),
    }


def _cubic(before: jax.Array, left: jax.Array, right: jax.Array, after: jax.Array, t: jax.Array) -> jax.Array:
    """Cubic convolution with a = -1, the kernel of PIL's transforms (its resizing has a = -0.5).

    In this form equal neighbours give exactly their value, so that truncation does not darken flat regions.
    """
    square = 2 * (before - left) + right - after
    cube = left - before + after - right
    return left + t * (right - before + t * (square + t * cube))


def _warp(x_hwc: jax.Array, matrix: jax.Array, fill_c: jax.Array) -> jax.Array:
    """The picture read at the mapped centres of its pixels, bicubic, truncated; `fill_c` where that is outside."""
    height, width, _ = x_hwc.shape
    row, column = jnp.arange(height)[:, None] + 0.5, jnp.arange(width) + 0.5
    u = matrix[0] * column + matrix[1] * row + matrix[2]
    v = matrix[3] * column + matrix[4] * row + matrix[5]
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    left, top = jnp.floor(u - 0.5), jnp.floor(v - 0.5)
    right_by, down_by = (u - 0.5 - left)[..., None], (v - 0.5 - top)[..., None]
    rows = [jnp.clip(top.astype(jnp.int32) + i, 0, height - 1) for i in (-1, 0, 1, 2)]
    columns = [jnp.clip(left.astype(jnp.int32) + i, 0, width - 1) for i in (-1, 0, 1, 2)]
    lines = [_cubic(*(x_hwc[i, j].astype(jnp.float32) for j in columns), right_by) for i in rows]
    value = jnp.clip(_cubic(*lines, down_by), 0.0, 255.0)
    return jnp.where(inside[..., None], value.astype(jnp.uint8), fill_c)


def apply_operation(
    x_hwc: jax.Array, operation: jax.Array, level: jax.Array, sign: jax.Array, fill_c: jax.Array
) -> jax.Array:
    """One operation on one picture.

    Args:
      x_hwc: uint8 [height, width, channels], 1 or 3 channels; Color leaves pictures of one channel as they are.
      operation: int32 scalar, index into `OPERATIONS`, or `NOTHING`.
      level: float32 scalar, 0..10. AutoContrast, Equalize and Invert have no levels.
      sign: float32 scalar, 1 or -1: direction of a geometric operation; whether Color, Contrast, Brightness and
        Sharpness grow or shrink.
      fill_c: uint8 [channels], colour of what a geometric operation brings in from outside.

    Returns:
      uint8 [height, width, channels].
    """
    height, width, channels = x_hwc.shape
    factor = jnp.maximum(1 + sign * (_ENHANCE * level / LARGEST), _LEAST_FACTOR)
    x = x_hwc.astype(jnp.int32)
    same = jnp.broadcast_to(jnp.arange(256), (channels, 256))
    table_cv = _choose(_tables(x, level, factor), same, operation)
    x = table_cv[jnp.arange(channels), x]
    is_color, is_sharpness = (operation == OPERATIONS.index(name) for name in ("Color", "Sharpness"))
    other = jnp.where(is_color, _luma(x), jnp.where(is_sharpness, _smooth(x), x))
    x = _blend(other, x, factor)
    matrix = _choose(_matrices(height, width, level, sign), jnp.asarray([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]), operation)
    return _warp(x.astype(jnp.uint8), matrix, fill_c)


@partial(jax.jit, static_argnames=("recipe", "mean"))
def rand_augment(keys_b: jax.Array, images_bhwc: jax.Array, recipe: RandAugment, mean: tuple[float, ...]) -> jax.Array:
    """Pictures changed by RandAugment, each by its own key alone.

    Args:
      keys_b: one key a picture [batch].
      images_bhwc: float32 [batch, height, width, channels] in 0..255, 1 or 3 channels; rounded to whole numbers first.
      recipe: see `RandAugment`.
      mean: of the data for pixel values in 0..1, one a channel: the colour that geometric operations fill in.

    Returns:
      float32 [batch, height, width, channels], whole numbers in 0..255.
    """
    fill_c = jnp.asarray([min(255, round(255 * value)) for value in mean], jnp.uint8)

    def layer(x_hwc, key):
        choice_key, use_key, level_key, sign_key = jax.random.split(key, 4)
        operation = jax.random.randint(choice_key, (), 0, len(OPERATIONS))
        operation = jnp.where(jax.random.bernoulli(use_key, recipe.probability), operation, NOTHING)
        level = jnp.clip(recipe.magnitude + recipe.deviation * jax.random.normal(level_key), 0.0, LARGEST)
        sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
        return apply_operation(x_hwc, operation, level, sign, fill_c), None

    def one(key, x_hwc):
        return jax.lax.scan(layer, x_hwc, jax.random.split(key, recipe.operations))[0]

    pixels_bhwc = jnp.round(jnp.clip(images_bhwc, 0.0, 255.0)).astype(jnp.uint8)
    return jax.vmap(one)(keys_b, pixels_bhwc).astype(jnp.float32)
