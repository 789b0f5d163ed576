"""Random crops and mirrored pictures on the device, to the bit the same on any number and kind of devices.

Floating-point sums and exponentials differ in their last bits with the order of terms, with fused multiply-add, and
so with the size of a device's share of the batch. Here nothing is rounded in a way that depends on that: filter
weights are computed in integers and are multiples of 2^-15, so that their sums with 8-bit pixels are exact in float32;
pixels are whole numbers after each of the two passes, as they are in Pillow; areas and aspects are drawn from tables.

`jax.image.scale_and_translate` has the same kernel, but resamples the whole picture: pixels beside the box bleed into
the crop, nothing is rounded between its passes, and its result depends on the batch in the last bits.
"""

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.randomness import below

_BITS = 15  # of a filter weight: with 8 of a pixel and 1 for the filter's overshoot they fill float32's 24
_ONE = 1 << _BITS
_QUANTILES = 4096  # of area and aspect, each
_TRIES = 10
_RATIO = (3 / 4, 4 / 3)  # width by height


def to_whole(x: jax.Array) -> jax.Array:
    """Pixels cut to 0..255 and rounded, halves up, as Pillow does; same type."""
    return jnp.floor(jnp.clip(x, 0, 255) + 0.5)


def _bicubic(x: jax.Array) -> jax.Array:
    """Pillow's bicubic kernel (Keys, a = -0.5) in units of 2^-15: 0 <= x <= 2 to its value, int32."""
    u = jnp.where(x < _ONE, x, 2 * _ONE - x)
    square = u * u >> _BITS
    near = _ONE - (square * ((5 * _ONE - 3 * u) // 2) >> _BITS)
    far = -(square * (_ONE - u) >> _BITS + 1)
    return jnp.where(x < _ONE, near, far)


def resize_weights(start: jax.Array, length: jax.Array, source: int, target: int) -> jax.Array:
    """Matrix that resizes pixels start..start+length of a line to `target` pixels.

    Antialiased bicubic: the kernel is stretched when the line shrinks; pixels outside the interval have no weight.

    Args:
      start, length: int32 scalars.
      source, target: pixels of the line and of the result, below 2^14.

    Returns:
      float32 [target, source], multiples of 2^-15, within 1.5e-4 of the exact weights.
    """
    pixel, place = jnp.arange(source) - start, jnp.arange(target)[:, None]
    longer = jnp.maximum(length, target)
    # Between centres, as a share of the kernel's half width of 2: distance / (4 longer).
    distance = jnp.minimum(jnp.abs((2 * pixel + 1) * target - (2 * place + 1) * length), 4 * longer)
    x = jnp.round(distance.astype(jnp.float32) / longer.astype(jnp.float32) * (_ONE // 2)).astype(jnp.int32)
    weight = jnp.where((pixel >= 0) & (pixel < length), _bicubic(x), 0)
    total = weight.sum(axis=1, keepdims=True)
    # Quotients of float32 are rounded correctly, and division of integers is several times slower.
    return jnp.round(weight.astype(jnp.float32) / total.astype(jnp.float32) * _ONE) / _ONE


def crop_box(key: jax.Array, height: int, width: int, scale: tuple[float, float]) -> jax.Array:
    """Random crop as (top, left, height, width), int32 [4].

    torchvision's RandomResizedCrop: area fraction uniform in `scale`, aspect log-uniform in 3/4..4/3, ten tries, then
    the largest central crop of such an aspect.
    """
    quantile = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    low, high = np.log(_RATIO)
    side = jnp.asarray(np.sqrt(height * width * (scale[0] + quantile * (scale[1] - scale[0]))), jnp.float32)
    stretch = np.exp((low + quantile * (high - low)) / 2)

    words = jax.random.bits(key, (2 * _TRIES + 2,))
    side = side[below(words[:_TRIES], _QUANTILES)]
    aspect = below(words[_TRIES : 2 * _TRIES], _QUANTILES)
    w = jnp.round(side * jnp.asarray(stretch, jnp.float32)[aspect]).astype(jnp.int32)
    h = jnp.round(side * jnp.asarray(1 / stretch, jnp.float32)[aspect]).astype(jnp.int32)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = jnp.argmax(fits)
    h, w = h[first], w[first]
    top, left = below(words[-2], height - h + 1), below(words[-1], width - w + 1)
    return jnp.where(fits.any(), jnp.stack([top, left, h, w]), jnp.asarray(_central_box(height, width), jnp.int32))


def _central_box(height: int, width: int) -> tuple[int, int, int, int]:
    """The largest central box of an allowed aspect."""
    h = max(1, min(height, round(width / _RATIO[0])))
    w = max(1, min(width, round(height * _RATIO[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def resize_boxes(images_bhwc: jax.Array, boxes_b4: jax.Array, size: int) -> jax.Array:
    """The boxes of the pictures, cut out and resized as Pillow does: nothing outside a box has a weight.

    Args:
      images_bhwc: uint8 [batch, height, width, channels], or whole numbers of another type.
      boxes_b4: int32 [batch, 4], top, left, height, width.
      size: side of the results, pixels.

    Returns:
      float32 [batch, size, size, channels], whole numbers in 0..255. One value in about a hundred is one grey level
      from Pillow's, whose weights have 22 bits (tested).
    """
    _, height, width, _ = images_bhwc.shape
    rows = jax.vmap(lambda box: resize_weights(box[0], box[2], height, size))(boxes_b4)
    columns = jax.vmap(lambda box: resize_weights(box[1], box[3], width, size))(boxes_b4)
    exact = jax.lax.Precision.HIGHEST  # the default of accelerators drops bits of the weights
    x = to_whole(jnp.einsum("bpw,bhwc->bhpc", columns, images_bhwc.astype(jnp.float32), precision=exact))
    return to_whole(jnp.einsum("boh,bhpc->bopc", rows, x, precision=exact))


def random_resized_crop(keys_b: jax.Array, images_bhwc: jax.Array, size: int, scale: tuple[float, float]) -> jax.Array:
    """A random crop of each picture resized to `size`; see `crop_box` and `resize_boxes`."""
    _, height, width, _ = images_bhwc.shape
    boxes = jax.vmap(lambda key: crop_box(key, height, width, scale))(keys_b)
    return resize_boxes(images_bhwc, boxes, size)


def random_flip(keys_b: jax.Array, images_bhwc: jax.Array) -> jax.Array:
    """Each picture mirrored left-right with probability one half."""
    flip_b = jax.vmap(jax.random.bernoulli)(keys_b)
    return jnp.where(flip_b[:, None, None, None], images_bhwc[:, :, ::-1], images_bhwc)
