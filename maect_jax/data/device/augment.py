"""What happens to a picture on the device: crop, flip, colour, blur, grey, solarise, normalise.

Pictures are float32 [batch, height, width, channels] in 0..255 until `normalise`. Every random number comes from one
key a sample, so a view does not depend on the batch or the device it is computed on.

Sources: MAE (He et al. 2022), appendix A; MAE-CT (Lehner et al. 2023), released recipes. Crops follow torchvision's
RandomResizedCrop with PIL's antialiased bicubic kernel (without its rounding between the two passes); colours follow
torchvision's ColorJitter in float arithmetic; the blur is a true Gaussian where PIL approximates one by boxes.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from maect_jax.randomness import sample_keys

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as PIL's convert("L")
_BLUR_SIGMA = (0.1, 2.0)  # pixels of a picture of 224 x 224; smaller pictures are blurred in proportion
_BLUR_SIZE = 224


@dataclass(frozen=True)
class ViewAugmentation:
    """Probabilities of one view's colour operations; all zero is the minimal augmentation (crop and flip)."""

    jitter: float = 0.0
    blur: float = 0.0
    grey: float = 0.0
    solarise: float = 0.0


MINIMAL = (ViewAugmentation(), ViewAugmentation())
STRONG = (
    ViewAugmentation(jitter=0.8, blur=1.0, grey=0.2),
    ViewAugmentation(jitter=0.8, blur=0.1, grey=0.2, solarise=0.2),
)
AUGMENTATIONS = {"minimal": MINIMAL, "strong": STRONG}


def _bicubic(x: jax.Array) -> jax.Array:
    """PIL's bicubic kernel (a = -0.5), zero beyond 2."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def resize_weights(start: jax.Array, length: jax.Array, source: int, target: int) -> jax.Array:
    """Matrix [target, source] that resizes pixels start..start+length of a line to `target` pixels.

    Antialiased bicubic: the kernel is stretched when the line shrinks; pixels outside the interval have no weight.
    """
    scale = length / target
    stretch = jnp.maximum(scale, 1.0)
    centre = (jnp.arange(target) + 0.5) * scale
    pixel = jnp.arange(source) - start
    weight = _bicubic((pixel[None, :] + 0.5 - centre[:, None]) / stretch)
    weight = jnp.where((pixel >= 0) & (pixel < length), weight, 0.0)
    return weight / weight.sum(axis=1, keepdims=True)


def crop_box(key: jax.Array, height: int, width: int, scale: tuple[float, float], ratio=(3 / 4, 4 / 3)) -> jax.Array:
    """Random crop as (top, left, height, width), float32 [4] holding whole pixels.

    torchvision's RandomResizedCrop: area fraction uniform in `scale`, aspect log-uniform in `ratio`, ten tries, then
    the largest central crop whose aspect lies in `ratio`.
    """
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    area = height * width * jax.random.uniform(area_key, (10,), minval=scale[0], maxval=scale[1])
    low, high = jnp.log(ratio[0]), jnp.log(ratio[1])
    aspect = jnp.exp(jax.random.uniform(ratio_key, (10,), minval=low, maxval=high))
    w = jnp.round(jnp.sqrt(area * aspect))
    h = jnp.round(jnp.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = jnp.argmax(fits)
    whole = width / height
    fallback_w = round(min(width, height * ratio[1])) if whole > ratio[1] else width
    fallback_h = round(min(height, width / ratio[0])) if whole < ratio[0] else height
    any_fits = fits.any()
    w = jnp.where(any_fits, w[first], fallback_w)
    h = jnp.where(any_fits, h[first], fallback_h)
    top = jnp.floor(jax.random.uniform(top_key) * (height - h + 1))
    left = jnp.floor(jax.random.uniform(left_key) * (width - w + 1))
    top = jnp.where(any_fits, top, (height - fallback_h) // 2)
    left = jnp.where(any_fits, left, (width - fallback_w) // 2)
    return jnp.stack([top, left, h, w])


def resize_boxes(images_bhwc: jax.Array, boxes_b4: jax.Array, size: int) -> jax.Array:
    """The boxes (top, left, height, width) of the pictures resized to [batch, size, size, channels], within 0..255."""
    _, height, width, _ = images_bhwc.shape
    rows = jax.vmap(lambda box: resize_weights(box[0], box[2], height, size))(boxes_b4)
    columns = jax.vmap(lambda box: resize_weights(box[1], box[3], width, size))(boxes_b4)
    x = jnp.einsum("boi,biwc,bpw->bopc", rows, images_bhwc.astype(jnp.float32), columns)
    return jnp.clip(x, 0.0, 255.0)


def random_resized_crop(keys_b: jax.Array, images_bhwc: jax.Array, size: int, scale: tuple[float, float]) -> jax.Array:
    """A random crop of each picture resized to `size`; see `crop_box`."""
    _, height, width, _ = images_bhwc.shape
    boxes = jax.vmap(lambda key: crop_box(key, height, width, scale))(keys_b)
    return resize_boxes(images_bhwc, boxes, size)


def random_flip(keys_b: jax.Array, images_bhwc: jax.Array) -> jax.Array:
    """Each picture mirrored left-right with probability one half."""
    flip_b = jax.vmap(jax.random.bernoulli)(keys_b)
    return jnp.where(flip_b[:, None, None, None], images_bhwc[:, :, ::-1], images_bhwc)


def to_grey(x: jax.Array) -> jax.Array:
    """Luma of [..., 3] pictures as [..., 1]."""
    return (x * jnp.asarray(_GREY)).sum(axis=-1, keepdims=True)


def shift_hue(x_hwc: jax.Array, shift: jax.Array) -> jax.Array:
    """Hue turned by `shift` (in turns, -0.5..0.5) at equal HSV saturation and value."""
    high = x_hwc.max(axis=-1)
    chroma = high - x_hwc.min(axis=-1)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    r, g, b = x_hwc[..., 0], x_hwc[..., 1], x_hwc[..., 2]
    sextant = jnp.where(high == r, (g - b) / safe, jnp.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    sextant = sextant + 6 * shift
    offsets = jnp.asarray([5.0, 3.0, 1.0])
    k = (offsets + sextant[..., None]) % 6
    return high[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def colour_jitter(key: jax.Array, x_hwc: jax.Array, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1) -> jax.Array:
    """Brightness, contrast, saturation and hue changes in random order on one picture in 0..255."""
    order_key, factor_key, hue_key = jax.random.split(key, 3)
    order = jax.random.permutation(order_key, 4)
    spread = jnp.asarray([brightness, contrast, saturation])
    factor = 1 + spread * jax.random.uniform(factor_key, (3,), minval=-1.0, maxval=1.0)
    shift = hue * jax.random.uniform(hue_key, minval=-1.0, maxval=1.0)

    def apply(x, operation):
        grey = to_grey(x)
        other = jnp.where(operation == 0, 0.0, jnp.where(operation == 1, jnp.round(grey.mean()), grey))
        strength = factor[jnp.minimum(operation, 2)]
        blended = jnp.clip(strength * x + (1 - strength) * other, 0.0, 255.0)
        return jnp.where(operation == 3, shift_hue(x, shift), blended), None

    return jax.lax.scan(apply, x_hwc, order)[0]


def blur_weights(sigma: jax.Array, size: int) -> jax.Array:
    """Matrix [size, size] of a Gaussian blur with standard deviation `sigma` pixels; the border pixel is repeated."""
    reach = int(3 * _BLUR_SIGMA[1] + 0.5)
    offset = jnp.arange(-reach, size + reach)[None, :] - jnp.arange(size)[:, None]
    weight = jnp.where(jnp.abs(offset) <= reach, jnp.exp(-0.5 * (offset / sigma) ** 2), 0.0)
    weight = weight / weight.sum(axis=1, keepdims=True)
    inside = weight[:, reach:-reach]
    inside = inside.at[:, 0].add(weight[:, :reach].sum(axis=1))
    return inside.at[:, -1].add(weight[:, -reach:].sum(axis=1))


def gaussian_blur(x_hwc: jax.Array, sigma: jax.Array) -> jax.Array:
    """Square picture blurred by a Gaussian of `sigma` pixels (at most 2)."""
    weights = blur_weights(sigma, x_hwc.shape[0])
    return jnp.einsum("oi,iwc,pw->opc", weights, x_hwc, weights)


def solarise(x_hwc: jax.Array, threshold: float = 128.0) -> jax.Array:
    """Values at or above the threshold inverted."""
    return jnp.where(x_hwc < threshold, x_hwc, 255.0 - x_hwc)


def _sometimes(key: jax.Array, probability: float, operation, x_hwc: jax.Array) -> jax.Array:
    """`operation(key, x)` with the given probability; not computed at all when it is 0."""
    if probability == 0:
        return x_hwc
    choice_key, operation_key = jax.random.split(key)
    changed = operation(operation_key, x_hwc)
    return changed if probability == 1 else jnp.where(jax.random.bernoulli(choice_key, probability), changed, x_hwc)


def _random_blur(key: jax.Array, x_hwc: jax.Array) -> jax.Array:
    low, high = (sigma * min(1.0, x_hwc.shape[0] / _BLUR_SIZE) for sigma in _BLUR_SIGMA)
    return gaussian_blur(x_hwc, jax.random.uniform(key, minval=low, maxval=high))


def change_colours(keys: dict[str, jax.Array], images_bhwc: jax.Array, recipe: ViewAugmentation) -> jax.Array:
    """Jitter, blur, grey, solarise, in this order, on RGB pictures in 0..255; `keys` holds one key a sample each."""

    def one(x, colour, blur, grey, solar):
        x = _sometimes(colour, recipe.jitter, colour_jitter, x)
        x = _sometimes(blur, recipe.blur, _random_blur, x)
        x = _sometimes(grey, recipe.grey, lambda _, y: jnp.broadcast_to(to_grey(y), y.shape), x)
        return _sometimes(solar, recipe.solarise, lambda _, y: solarise(y), x)

    return jax.vmap(one)(images_bhwc, *(keys[name] for name in ("colour", "blur", "grey", "solarise")))


def normalise(images_bhwc: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Pictures in 0..255 to zero mean and unit deviation of the data; `mean` and `std` are given for 0..1."""
    return (images_bhwc / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)


def crop_and_flip(
    batch: dict[str, jax.Array], *, seed: int, epoch: jax.Array, view: int, size: int, scale: tuple[float, float]
) -> jax.Array:
    """What every view starts from: random crops, mirrored or not, float32 [batch, size, size, channels] in 0..255.

    Arguments as in `make_views`; `view` is the index of the view.
    """

    def keys(purpose):
        return sample_keys(seed, purpose, epoch, batch["id"], view)

    if batch["image"].ndim == 5:
        x = batch["image"][:, view].astype(jnp.float32)
    else:
        x = random_resized_crop(keys("crop"), batch["image"], size, scale)
    return random_flip(keys("flip"), x)


def make_views(
    batch: dict[str, jax.Array],
    *,
    seed: int,
    epoch: jax.Array,
    views: int,
    size: int,
    scale: tuple[float, float],
    augmentation: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> jax.Array:
    """Augmented, normalised views, float32 [views, batch, size, size, channels].

    Args:
      batch: 'image' uint8, either whole pictures [batch, h, w, c], cropped here, or crops made by the host
        [batch, views, size, size, c]; and 'id' int32 [batch].
      seed, epoch: with the ids they determine every random choice.
      scale: range of the crop's share of the picture's area.
      augmentation: 'minimal' or 'strong'.
      mean, std: of the data, for pixel values in 0..1, one a channel.
    """
    recipes = AUGMENTATIONS[augmentation]

    def one_view(view):
        x = crop_and_flip(batch, seed=seed, epoch=epoch, view=view, size=size, scale=scale)
        recipe = recipes[view % len(recipes)]
        if recipe != ViewAugmentation():
            purposes = ("colour", "blur", "grey", "solarise")
            x = change_colours({p: sample_keys(seed, p, epoch, batch["id"], view) for p in purposes}, x, recipe)
        return normalise(x, mean, std)

    return jnp.stack([one_view(view) for view in range(views)])
