"""What fine-tuning does to normalised pictures and their labels: random erasing, mixup, cutmix, label smoothing.

Sources: random erasing (Zhong et al. 2020), section 3; mixup (Zhang et al. 2018), section 2; cutmix (Yun et al. 2019),
section 3.1; label smoothing (Szegedy et al. 2016), section 7; settings and details that the papers leave open as in
the timm library, which MAE (He et al. 2022, appendix A.1) fine-tunes with.
"""

from functools import partial

import jax
import jax.numpy as jnp

_AREA = (0.02, 1 / 3)  # of the picture
_ASPECT = (0.3, 1 / 0.3)  # height by width
_TRIES = 10


def _erased_box(key: jax.Array, height: int, width: int) -> jax.Array:
    """Random box as (top, left, height, width), int32 [4]; without area where none of the tries fits.

    Area uniform in `_AREA`, aspect log-uniform in `_ASPECT`; a box must be smaller than the picture both ways.
    """
    area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
    area = height * width * jax.random.uniform(area_key, (_TRIES,), minval=_AREA[0], maxval=_AREA[1])
    low, high = jnp.log(_ASPECT[0]), jnp.log(_ASPECT[1])
    aspect = jnp.exp(jax.random.uniform(aspect_key, (_TRIES,), minval=low, maxval=high))
    h = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits)
    h, w = jnp.where(fits.any(), jnp.stack([h[first], w[first]]), 0)
    top = jax.random.randint(top_key, (), 0, height - h + 1)
    left = jax.random.randint(left_key, (), 0, width - w + 1)
    return jnp.stack([top, left, h, w])


def _in_box(top: jax.Array, left: jax.Array, bottom: jax.Array, right: jax.Array, height: int, width: int) -> jax.Array:
    """Which pixels of a picture lie in the box, bool [height, width]; bottom and right are just outside."""
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


@jax.jit
def random_erasing(keys_b: jax.Array, images_bhwc: jax.Array, probability: float = 0.25) -> jax.Array:
    """With the given probability, one box of a picture is replaced by normal noise, each value drawn by itself.

    Args:
      keys_b: one key a picture [batch]; a picture depends on its own key alone.
      images_bhwc: float [batch, height, width, channels], normalised, so that the noise is distributed as they are.
      probability: of erasing anything.

    Returns:
      float [batch, height, width, channels]. The box covers 2 to 33 % of the picture at an aspect of 0.3 to 3.3.

    Source: random erasing (Zhong et al. 2020), section 3, with its noise drawn from N(0, 1).
    """
    _, height, width, channels = images_bhwc.shape

    def one(key, x_hwc):
        use_key, box_key, noise_key = jax.random.split(key, 3)
        top, left, h, w = _erased_box(box_key, height, width)
        erased = _in_box(top, left, top + h, left + w, height, width) & jax.random.bernoulli(use_key, probability)
        noise = jax.random.normal(noise_key, (height, width, channels), x_hwc.dtype)
        return jnp.where(erased[:, :, None], noise, x_hwc)

    return jax.vmap(one)(keys_b, images_bhwc)


def _cut_box(key: jax.Array, alpha: float, height: int, width: int) -> jax.Array:
    """Pixels of a box of area 1 - lambda, lambda ~ Beta(alpha, alpha), bool [height, width].

    The box has the picture's aspect and a uniform centre; what lies beyond the border is cut off.
    """
    share_key, row_key, column_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))
    half_h, half_w = (height * side).astype(jnp.int32) // 2, (width * side).astype(jnp.int32) // 2
    row, column = jax.random.randint(row_key, (), 0, height), jax.random.randint(column_key, (), 0, width)
    return _in_box(row - half_h, column - half_w, row + half_h, column + half_w, height, width)


@partial(jax.jit, static_argnames=("mixup_alpha", "cutmix_alpha", "switch_probability"))
def mixup_cutmix(
    key: jax.Array,
    images_bhwc: jax.Array,
    targets_bc: jax.Array,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    switch_probability: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
    """Each picture mixed with its partner, the batch in reverse order; one share and one box for the whole batch.

    Args:
      key: of the batch.
      images_bhwc: float [batch, height, width, channels].
      targets_bc: float32 [batch, classes], class probabilities.
      mixup_alpha, cutmix_alpha: of Beta(alpha, alpha), from which the kept share is drawn; 0 = never this one, and
        where both are 0 nothing is mixed.
      switch_probability: of cutmix, where both are above 0.

    Returns:
      mixed pictures and targets, of the shapes given. Targets are mixed by the share of pixel values that is kept:
      for cutmix one minus the area of the box inside the picture.

    Source: mixup (Zhang et al. 2018), section 2; cutmix (Yun et al. 2019), section 3.1.
    """
    if not mixup_alpha and not cutmix_alpha:
        return images_bhwc, targets_bc
    _, height, width, _ = images_bhwc.shape
    switch_key, mixup_key, cutmix_key = jax.random.split(key, 3)
    if mixup_alpha and cutmix_alpha:
        is_cutmix = jax.random.bernoulli(switch_key, switch_probability)
    else:
        is_cutmix = jnp.asarray(cutmix_alpha > 0)
    mixup_share = jax.random.beta(mixup_key, mixup_alpha or 1.0, mixup_alpha or 1.0)
    box_hw = _cut_box(cutmix_key, cutmix_alpha or 1.0, height, width)
    share = jnp.where(is_cutmix, 1 - box_hw.mean(), mixup_share)
    kept_hw1 = jnp.where(is_cutmix, 1 - box_hw, mixup_share)[:, :, None].astype(images_bhwc.dtype)
    mixed_bhwc = kept_hw1 * images_bhwc + (1 - kept_hw1) * images_bhwc[::-1]
    return mixed_bhwc, share * targets_bc + (1 - share) * targets_bc[::-1]


def smooth_labels(labels_b: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """Target distributions: `smoothing` is spread evenly over all classes, the rest goes to the label's own.

    Args:
      labels_b: int32 [batch] in 0..classes-1.
      classes: number of classes.
      smoothing: 0..1.

    Returns:
      float32 [batch, classes], each row summing to 1.

    Source: label smoothing (Szegedy et al. 2016), section 7.
    """
    return (1 - smoothing) * jax.nn.one_hot(labels_b, classes) + smoothing / classes


def soft_cross_entropy(logits_bc: jax.Array, targets_bc: jax.Array) -> jax.Array:
    """Cross-entropy -sum_c target log softmax(logits) of each picture, in nats.

    Args:
      logits_bc: float [batch, classes], computed on in float32.
      targets_bc: float32 [batch, classes], class probabilities.

    Returns:
      float32 [batch].
    """
    return -(targets_bc * jax.nn.log_softmax(logits_bc.astype(jnp.float32))).sum(axis=-1)
