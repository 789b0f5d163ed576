"""Views of a picture on the device: crop, flip, colour, blur, grey, solarise, normalise.

Pictures are float32 [batch, height, width, channels] and hold whole numbers in 0..255 until `normalise`. Every random
number comes from one key a sample and all arithmetic before `normalise` is exact, so a view is the same to the bit
whatever the batch and the devices it is computed on.

Sources: MAE (He et al. 2022), appendix A; MAE-CT (Lehner et al. 2023), released recipes; BYOL (Grill et al. 2020),
appendix B, for the two unlike views.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from maect_jax.data.device.colours import (
    SIGMAS,
    blur_weights,
    colour_jitter,
    draw_jitter,
    gaussian_blur,
    solarise,
    to_grey,
)
from maect_jax.data.device.crops import random_flip, random_resized_crop
from maect_jax.randomness import below, sample_keys

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


def _sometimes(key: jax.Array, probability: float, operation, x_hwc: jax.Array) -> jax.Array:
    """`operation(key, x)` with the given probability; not computed at all when it is 0."""
    if probability == 0:
        return x_hwc
    choice_key, operation_key = jax.random.split(key)
    changed = operation(operation_key, x_hwc)
    return changed if probability == 1 else jnp.where(jax.random.bernoulli(choice_key, probability), changed, x_hwc)


def change_colours(keys: dict[str, jax.Array], images_bhwc: jax.Array, recipe: ViewAugmentation) -> jax.Array:
    """Jitter, blur, grey, solarise, in this order, on RGB pictures; see `colours`.

    Args:
      keys: 'colour', 'blur', 'grey' and 'solarise', one key a sample each.
      images_bhwc: float32 [batch, height, width, 3], whole numbers in 0..255.
      recipe: with which probability each is done.
    """
    weights_st = jnp.asarray(blur_weights(min(images_bhwc.shape[1:3])))

    def jitter(key, x):
        return colour_jitter(x, *draw_jitter(key))

    def blur(key, x):
        return gaussian_blur(x, weights_st[below(jax.random.bits(key), SIGMAS)])

    def one(x, colour_key, blur_key, grey_key, solarise_key):
        x = _sometimes(colour_key, recipe.jitter, jitter, x)
        x = _sometimes(blur_key, recipe.blur, blur, x)
        x = _sometimes(grey_key, recipe.grey, lambda _, y: jnp.broadcast_to(to_grey(y), y.shape), x)
        return _sometimes(solarise_key, recipe.solarise, lambda _, y: solarise(y), x)

    return jax.vmap(one)(images_bhwc, *(keys[name] for name in ("colour", "blur", "grey", "solarise")))


def normalise(images_bhwc: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Pictures in 0..255 to zero mean and unit deviation of the data; `mean` and `std` are given for 0..1.

    The difference comes first, because compilers fuse a product and a sum, one time and not another.
    """
    return (images_bhwc - 255 * jnp.asarray(mean)) / (255 * jnp.asarray(std))


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
