"""Crops on the device against Pillow, exact weights and torchvision's boxes; and why they are not JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats
from torchvision.transforms import RandomResizedCrop

from maect_jax.data.device import crops

SCALE = (0.08, 1.0)


def pictures(n: int, height: int, width: int, smooth: float) -> np.ndarray:
    """Coloured noise, uint8 [n, height, width, 3], over the whole range; `smooth` 0 is white noise, the worst case."""
    noise = np.random.default_rng(0).standard_normal((n, height, width, 3))
    noise = ndimage.gaussian_filter(noise, (0, smooth, smooth, 0))
    return np.clip(np.round(128 + 70 * noise / noise.std()), 0, 255).astype(np.uint8)


_boxes = jax.jit(jax.vmap(crops.crop_box, in_axes=(0, None, None, None)), static_argnums=(1, 2, 3))
_resized = jax.jit(crops.resize_boxes, static_argnums=2)


def drawn_boxes(n: int, height: int, width: int, scale=SCALE, seed=1) -> np.ndarray:
    return np.asarray(_boxes(jax.random.split(jax.random.key(seed), n), height, width, scale))


def pillow(images: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    def resized(image, box):
        top, left, height, width = box
        cut = Image.fromarray(image[top : top + height, left : left + width])
        return np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC), np.float64)

    return np.stack([resized(image, box) for image, box in zip(images, boxes)])


# ------------------------------------------------------------------------------------------------------------- resizing


def exact_weights(start: int, length: int, source: int, target: int) -> np.ndarray:
    """Antialiased bicubic weights of the interval in float64."""
    scale = length / target
    centre, pixel = (np.arange(target)[:, None] + 0.5) * scale, np.arange(source) - start
    x = np.abs(pixel + 0.5 - centre) / max(scale, 1)
    weight = np.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))
    weight = np.where((pixel >= 0) & (pixel < length), weight, 0)
    return weight / weight.sum(1, keepdims=True)


@pytest.mark.parametrize(("source", "target"), [(32, 32), (96, 64), (48, 224), (3000, 224)])
def test_weights_are_the_exact_ones_in_15_bits(source, target):
    weights = jax.jit(crops.resize_weights, static_argnums=(2, 3))
    for length in sorted({1, 2, 5, source // 3, source // 2 + 1, source - 1, source}):
        start = (source - length) // 2
        found = np.asarray(weights(start, length, source, target), np.float64)
        assert np.abs(found - exact_weights(start, length, source, target)).max() < 1.5e-4
        assert np.all(found * 2**15 == np.round(found * 2**15))
        assert np.abs(found).sum(1).max() * 255 * 2**15 < 2**24, "or sums of products would not be exact"


@pytest.mark.parametrize(("side", "size"), [(32, 32), (40, 96), (64, 224)])
@pytest.mark.parametrize("smooth", [0, 1.5], ids=["white noise", "smooth"])
def test_enlarged_boxes_are_pillows_but_for_single_grey_levels(side, size, smooth):
    images = pictures(8, side, side, smooth)
    boxes = drawn_boxes(8, side, side)
    gap = np.abs(_resized(images, boxes, size) - pillow(images, boxes, size))
    assert gap.mean() < 0.02 and (gap > 0).mean() < 0.02 and gap.max() <= 2


@pytest.mark.parametrize(("smooth", "most"), [(0, 0.5), (1.5, 0.3)], ids=["white noise", "smooth"])
def test_shrunken_boxes_are_pillows_up_to_the_order_of_its_passes(smooth, most):
    """Where a box shrinks, some versions of Pillow go down the columns first, and then round other values."""
    images = pictures(12, 96, 128, smooth)
    boxes = drawn_boxes(12, 96, 128, (0.3, 1.0))
    found, size = np.asarray(_resized(images, boxes, 40)), 40
    turned = np.swapaxes(pillow(np.swapaxes(images, 1, 2), boxes[:, [1, 0, 3, 2]], size), 1, 2)
    straight = pillow(images, boxes, size)
    assert np.abs(found - straight).mean() < most
    nearer = np.minimum(*(np.abs(found - x).mean((1, 2, 3)) for x in (straight, turned)))
    assert nearer.max() < 0.05


def test_results_are_whole_numbers_in_range_and_flat_pictures_stay_flat():
    flat = np.broadcast_to(np.asarray([0, 1, 127, 200, 254, 255], np.uint8)[:, None, None, None], (6, 48, 48, 3))
    found = np.asarray(_resized(flat, drawn_boxes(6, 48, 48), 31))
    np.testing.assert_array_equal(found, np.broadcast_to(flat[:, :1, :1], found.shape))
    noise = pictures(4, 48, 48, 0)
    found = np.asarray(_resized(noise, drawn_boxes(4, 48, 48), 31))
    assert found.min() >= 0 and found.max() <= 255 and np.all(found == np.round(found))


def test_whole_pictures_are_as_jax_scales_them_but_beside_a_box_jax_bleeds():
    """The same kernel; what lies outside a box has a weight in `scale_and_translate`, and none here or in Pillow."""
    images, size = pictures(2, 40, 40, 1.5), 32
    images[:, :, 20:] = 255

    def by_jax(image, box):
        top, left, height, width = box.astype(jnp.float32)
        scale = jnp.stack([size / height, size / width])
        x = jax.image.scale_and_translate(
            image.astype(jnp.float32), (size, size, 3), (0, 1), scale, -jnp.stack([top, left]) * scale, "cubic"
        )
        return jnp.clip(x, 0, 255)

    def both(box):
        boxes = jnp.asarray([box] * 2, jnp.int32)
        return np.asarray(jax.vmap(by_jax)(images, boxes)), np.asarray(_resized(images, boxes, size))

    jaxs, ours = both((0, 0, 40, 40))
    assert np.abs(jaxs - ours).mean() < 0.5 and np.abs(jaxs - ours).max() < 10  # ours is rounded between the passes
    jaxs, ours = both((0, 0, 20, 20))  # beside it all is white
    assert (jaxs - ours)[:, :, -1].mean() > 5 and np.abs(jaxs - ours)[:, 4:-4, 4:-4].mean() < 0.5


# ---------------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("shape", [(48, 64), (300, 200), (20, 200)])
def test_boxes_are_distributed_as_torchvisions(shape):
    n, (height, width) = 2000, shape
    top, left, h, w = drawn_boxes(n, height, width).T
    assert np.all((top >= 0) & (left >= 0) & (h >= 1) & (w >= 1) & (top + h <= height) & (left + w <= width))
    blank = Image.new("L", (width, height))
    drawn = [RandomResizedCrop.get_params(blank, list(SCALE), [3 / 4, 4 / 3]) for _ in range(n)]
    expected_top, expected_left, expected_h, expected_w = np.asarray(drawn).T
    pairs = {
        "area": (h * w, expected_h * expected_w),
        "aspect": (w / h, expected_w / expected_h),
        "top": (top / (height - h + 1), expected_top / (height - expected_h + 1)),
        "left": (left / (width - w + 1), expected_left / (width - expected_w + 1)),
    }
    for name, (found, expected) in pairs.items():
        assert stats.ks_2samp(found, expected).pvalue > 1e-4, name
    assert len(np.unique(np.stack([top, left, h, w]), axis=1).T) > 100


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (1, 1, (0, 0, 1, 1))]
)
def test_box_is_the_largest_central_one_when_no_try_fits(height, width, expected):
    assert drawn_boxes(1, height, width, (1.0, 1.0))[0].tolist() == list(expected)


def test_half_of_the_pictures_are_mirrored():
    tiny = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    flipped = np.asarray(crops.random_flip(jax.random.split(jax.random.key(1), 2000), np.stack([tiny] * 2000)))
    mirrored, same = (np.all(flipped == x, axis=(1, 2, 3)) for x in (tiny[:, ::-1], tiny))
    assert np.all(mirrored ^ same)
    assert mirrored.mean() == pytest.approx(0.5, abs=4 * (0.25 / 2000) ** 0.5)
