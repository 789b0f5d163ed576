"""Augmentations against PIL and SciPy, and views as pure functions of seed, epoch, sample and view."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy import ndimage

from maect_jax.data.device import augment
from maect_jax.data.device.augment import IMAGENET_MEAN, IMAGENET_STD, make_views
from maect_jax.randomness import sample_keys


@pytest.fixture(scope="module")
def picture():
    """Smooth coloured noise, uint8 [48, 64, 3], with values over the whole range."""
    noise = np.random.default_rng(0).standard_normal((48, 64, 3))
    smooth = ndimage.gaussian_filter(noise, (2, 2, 0))
    low, high = smooth.min((0, 1)), smooth.max((0, 1))
    return np.round(255 * (smooth - low) / (high - low)).astype(np.uint8)


def error(found, expected) -> tuple[float, float]:
    """Mean and largest absolute difference, in 0..255."""
    gap = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    return gap.mean(), gap.max()


# ---------------------------------------------------------------------------------------------------------- against PIL


@pytest.mark.parametrize(("size", "name"), [(24, "smaller"), (56, "larger and smaller"), (96, "larger")])
def test_a_resized_box_is_pils_crop_and_bicubic_resize(picture, size, name):
    boxes = np.array([[5, 10, 40, 33], [0, 0, 48, 64], [20, 31, 17, 20]], np.float32)
    found = augment.resize_boxes(jnp.asarray(np.stack([picture] * 3)), jnp.asarray(boxes), size)
    for result, (top, left, height, width) in zip(found, boxes.astype(int)):
        crop = Image.fromarray(picture[top : top + height, left : left + width])
        expected = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC), np.float64)
        mean, largest = error(result, expected)
        assert mean < 0.5
        # PIL rounds and clips between the two passes: a few values at the ends of the range differ by more.
        assert largest <= 2.0 and np.mean(np.abs(result - expected) > 1.0) < 2e-3


def test_grey_is_pils_luma(picture):
    grey = augment.to_grey(jnp.asarray(picture, jnp.float32))[..., 0]
    mean, largest = error(grey, Image.fromarray(picture).convert("L"))
    assert mean < 0.5 and largest < 1.0


@pytest.mark.parametrize("shift", [-0.1, 0.03, 0.5])
def test_hue_shift_is_pils_up_to_the_rounding_of_its_hsv(picture, shift):
    hue, saturation, value = Image.fromarray(picture).convert("HSV").split()
    turned = ((np.asarray(hue, np.int32) + round(shift * 255)) % 256).astype(np.uint8)
    expected = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
    mean, largest = error(augment.shift_hue(jnp.asarray(picture, jnp.float32), round(shift * 255) / 256), expected)
    assert mean < 1.0 and largest < 8


def test_hue_keeps_grey_pixels_and_a_whole_turn_keeps_all(picture):
    x = jnp.asarray(picture, jnp.float32)
    np.testing.assert_allclose(augment.shift_hue(x, 1.0), x, atol=1e-3)
    grey = jnp.broadcast_to(x[..., :1], x.shape)
    np.testing.assert_array_equal(augment.shift_hue(grey, 0.3), grey)


def test_solarise_is_pils(picture):
    found = augment.solarise(jnp.asarray(picture, jnp.float32))
    np.testing.assert_array_equal(found, np.asarray(ImageOps.solarize(Image.fromarray(picture), 128)))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_scipys_gaussian_with_repeated_border(picture, sigma):
    x = picture[:, :48].astype(np.float64)
    expected = ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", radius=(6, 6, 0))
    np.testing.assert_allclose(augment.gaussian_blur(jnp.asarray(x, jnp.float32), sigma), expected, atol=2e-3)


# --------------------------------------------------------------------------------------------------------- random parts


@pytest.mark.parametrize("shape", [(48, 64), (300, 200), (20, 200)])
def test_crops_lie_in_the_picture_and_in_the_asked_ranges(shape):
    height, width = shape
    keys = jax.random.split(jax.random.key(0), 2000)
    boxes = np.asarray(jax.jit(jax.vmap(lambda key: augment.crop_box(key, height, width, (0.08, 1.0))))(keys))
    top, left, h, w = boxes.T
    assert np.all(boxes == np.round(boxes))
    assert np.all((top >= 0) & (left >= 0) & (h >= 1) & (w >= 1) & (top + h <= height) & (left + w <= width))
    slack = 1.5 / np.minimum(h, w)  # sides are whole pixels
    assert np.all((w / h > 3 / 4 * (1 - slack)) & (w / h < 4 / 3 * (1 + slack)))
    if shape == (300, 200):
        share = h * w / (height * width)
        assert share.min() >= 0.075 and share.max() <= 1.01
        assert share.mean() == pytest.approx(0.43, abs=0.05)  # large crops of an unlike aspect are drawn again
    assert len(np.unique(boxes, axis=0)) > 100


def test_half_of_the_pictures_are_mirrored(picture):
    keys = jax.random.split(jax.random.key(1), 1000)
    tiny = jnp.asarray(picture[:2, :2], jnp.float32)
    flipped = augment.random_flip(keys, jnp.broadcast_to(tiny, (1000, *tiny.shape)))
    mirrored = np.all(np.asarray(flipped) == np.asarray(tiny)[:, ::-1], axis=(1, 2, 3))
    same = np.all(np.asarray(flipped) == np.asarray(tiny), axis=(1, 2, 3))
    assert np.all(mirrored ^ same)
    assert mirrored.mean() == pytest.approx(0.5, abs=0.08)


def test_jitter_stays_in_range_and_differs_between_samples(picture):
    keys = jax.random.split(jax.random.key(2), 16)
    x = jnp.asarray(picture, jnp.float32)
    found = np.asarray(jax.jit(jax.vmap(lambda key: augment.colour_jitter(key, x)))(keys))
    assert found.min() >= 0 and found.max() <= 255.001
    assert len({round(float(y.mean()), 3) for y in found}) == 16


@pytest.fixture(scope="module")
def batch(picture):
    rng = np.random.default_rng(3)
    return {
        "image": np.stack([picture, picture[::-1], rng.integers(0, 256, picture.shape, np.uint8), picture]),
        "id": np.array([11, 5, 7_000_000, 12], np.int32),
    }


@pytest.fixture(scope="module")
def strong_views():
    def views(batch, seed, epoch):
        return make_views(
            batch,
            seed=seed,
            epoch=epoch,
            views=2,
            size=32,
            scale=(0.08, 1.0),
            augmentation="strong",
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )

    return jax.jit(views, static_argnums=1)


def test_a_view_depends_on_seed_epoch_sample_and_view_only(batch, strong_views):
    views = np.asarray(strong_views(batch, 0, jnp.int32(3)))
    assert views.shape == (2, 4, 32, 32, 3) and views.dtype == np.float32
    order = [2, 0, 3, 1]
    turned = strong_views({name: x[order] for name, x in batch.items()}, 0, jnp.int32(3))
    np.testing.assert_allclose(turned, views[:, order], atol=1e-5)
    for seed, epoch in ((0, 4), (1, 3)):
        other = np.asarray(strong_views(batch, seed, jnp.int32(epoch)))
        assert np.abs(other - views).mean(axis=(2, 3, 4)).min() > 1e-2
    assert np.abs(views[0] - views[1]).mean(axis=(1, 2, 3)).min() > 1e-2
    assert np.abs(views[:, 0] - views[:, 3]).mean() > 1e-2, "same picture, other id"


def test_crops_made_by_the_host_are_flipped_and_normalised_only(batch):
    crops = np.stack([batch["image"][:, :32, :32], batch["image"][:, 8:40, 8:40]], axis=1)
    views = make_views(
        {"image": crops, "id": batch["id"]},
        seed=0,
        epoch=jnp.int32(0),
        views=2,
        size=32,
        scale=(0.2, 1.0),
        augmentation="minimal",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    pixels = np.asarray(views) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    expected = np.moveaxis(crops, 1, 0) / 255
    straight, mirrored = (np.abs(pixels - x).max(axis=(2, 3, 4)) < 1e-5 for x in (expected, expected[:, :, :, ::-1]))
    assert np.all(straight ^ mirrored)


def test_strong_views_change_as_often_as_the_recipe_says():
    """Colours of a flat grey-free picture tell which operations ran: frequencies within four standard errors."""
    n = 2000
    image = jnp.broadcast_to(jnp.asarray([200.0, 120.0, 40.0]), (n, 8, 8, 3))
    ids = jnp.arange(n, dtype=jnp.int32)
    for view, recipe in enumerate(augment.STRONG):
        keys = {p: sample_keys(0, p, jnp.int32(0), ids, view) for p in ("colour", "blur", "grey", "solarise")}
        out = np.asarray(augment.change_colours(keys, image, recipe))[:, 0, 0]
        grey = np.ptp(out, axis=1) < 1e-3
        no_jitter = [np.array([200.0, 120.0, 40.0]), np.full(3, 0.299 * 200 + 0.587 * 120 + 0.114 * 40)]
        still = [np.where(c >= 128, 255 - c, c) for c in no_jitter] + no_jitter
        untouched = np.min([np.abs(out - s).max(axis=1) for s in still], axis=0) < 1e-2
        for found, wanted in ((grey.mean(), recipe.grey), (untouched.mean(), 1 - recipe.jitter)):
            assert abs(found - wanted) < 4 * (wanted * (1 - wanted) / n) ** 0.5 + 1e-9
        white = jnp.full((n, 8, 8, 3), 255.0)
        no_colour = dataclasses.replace(recipe, jitter=0.0)
        inverted = np.asarray(augment.change_colours(keys, white, no_colour))[:, 0, 0, 0] < 1
        assert abs(inverted.mean() - recipe.solarise) < 4 * (recipe.solarise * (1 - recipe.solarise) / n) ** 0.5 + 1e-9


def test_views_of_the_strong_recipe_are_asymmetric_as_published():
    first, second = augment.STRONG
    assert (first.jitter, first.blur, first.grey, first.solarise) == (0.8, 1.0, 0.2, 0.0)
    assert (second.jitter, second.blur, second.grey, second.solarise) == (0.8, 0.1, 0.2, 0.2)


def test_blur_comes_before_solarise():
    """A black and white edge: blurred first, greys below 128 survive; solarised first, everything would be black."""
    edge = jnp.broadcast_to(jnp.where(jnp.arange(224) < 112, 0.0, 255.0)[None, :, None], (224, 224, 3))
    recipe = augment.ViewAugmentation(blur=1.0, solarise=1.0)
    keys = {name: jax.random.split(jax.random.key(1), 1) for name in ("colour", "blur", "grey", "solarise")}
    assert float(augment.change_colours(keys, edge[None], recipe).max()) > 20


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
def test_single_changes_equal_pillow(operation):
    from PIL import ImageEnhance

    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    enhance = {"brightness": "Brightness", "contrast": "Contrast", "saturation": "Color"}[operation]
    only = {name: 0.0 for name in ("brightness", "contrast", "saturation", "hue")} | {operation: 0.4}
    for seed in range(5):
        key = jax.random.key(seed)
        found = np.asarray(augment.colour_jitter(key, jnp.asarray(pixels, jnp.float32), **only))
        place = ["brightness", "contrast", "saturation"].index(operation)
        _, factor_key, _ = jax.random.split(key, 3)
        factor = 1 + 0.4 * float(jax.random.uniform(factor_key, (3,), minval=-1.0, maxval=1.0)[place])
        wanted = np.asarray(getattr(ImageEnhance, enhance)(Image.fromarray(pixels)).enhance(factor), np.float32)
        assert np.abs(found - wanted).max() < 1.6  # Pillow rounds
