"""Views: the recipe's operations in its order, as often as it says; functions of seed, epoch, sample and view alone."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax.data.device import augment, colours
from maect_jax.data.device.augment import IMAGENET_MEAN, IMAGENET_STD, ViewAugmentation, make_views
from maect_jax.parallel.mesh import batch_sharding, make_mesh
from maect_jax.randomness import below, sample_keys

PURPOSES = ("colour", "blur", "grey", "solarise")
SIZE = 32


def views_of(batch, seed=0, epoch=0, augmentation="strong", views=2):
    return _views(batch, jnp.int32(epoch), jnp.int32(seed), augmentation, views)


@partial(jax.jit, static_argnums=(3, 4))
def _views(batch, epoch, seed, augmentation, views):
    settings = {"size": SIZE, "scale": (0.08, 1.0), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return make_views(batch, seed=seed, epoch=epoch, views=views, augmentation=augmentation, **settings)


@pytest.fixture(scope="module")
def batch():
    """Sixteen whole pictures [48, 64, 3], the first and the last alike, with unlike ids."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (16, 48, 64, 3), np.uint8)
    images[-1] = images[0]
    return {"image": images, "id": (1 + 7919 * np.arange(16)).astype(np.int32)}


@pytest.fixture(scope="module")
def crops():
    """Sixteen pictures cropped by the host, two views each."""
    images = np.random.default_rng(4).integers(0, 256, (16, 2, SIZE, SIZE, 3), np.uint8)
    return {"image": images, "id": (5 + 104729 * np.arange(16)).astype(np.int32)}


# ----------------------------------------------------------------------------------------- what a view may depend on


def test_a_view_depends_on_seed_epoch_sample_and_view_only(batch):
    views = np.asarray(views_of(batch, 0, 3))
    assert views.shape == (2, 16, SIZE, SIZE, 3) and views.dtype == np.float32
    order = np.random.default_rng(0).permutation(16)
    turned = views_of({name: x[order] for name, x in batch.items()}, 0, 3)
    np.testing.assert_array_equal(turned, views[:, order])
    for seed, epoch in ((0, 4), (1, 3)):
        other = np.asarray(views_of(batch, seed, epoch))
        assert np.abs(other - views).mean(axis=(2, 3, 4)).min() > 1e-2
    assert np.abs(views[0] - views[1]).mean(axis=(1, 2, 3)).min() > 1e-2
    assert np.abs(views[:, 0] - views[:, 15]).mean() > 1e-2, "same picture, other id"


@pytest.mark.parametrize("path", ["batch", "crops"])
def test_devices_see_the_same_pixels_exchange_none_and_compile_once(path, request):
    """Shares of 16 and 2 pictures a device; another epoch, seed or batch of equal shapes is no other program."""
    data = request.getfixturevalue(path)
    expected = np.asarray(views_of(data, 2, 3))
    placed = jax.device_put(data, batch_sharding(make_mesh()))
    program = _views.lower(placed, jnp.int32(3), jnp.int32(2), "strong", 2).compile().as_text()
    assert not any(word in program for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    found = views_of(placed, 2, 3)
    assert len(found.sharding.device_set) == 8
    np.testing.assert_array_equal(found, expected)
    compiled = _views._cache_size()
    views_of(placed | {"id": placed["id"] + 1}, 5, 4)
    assert _views._cache_size() == compiled > 0


def test_crops_made_by_the_host_are_flipped_and_normalised_only(crops):
    views = views_of(crops, augmentation="minimal")
    pixels = np.asarray(views, np.float64) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    expected = np.moveaxis(crops["image"], 1, 0) / 255
    straight, mirrored = (np.abs(pixels - x).max(axis=(2, 3, 4)) < 1e-6 for x in (expected, expected[:, :, :, ::-1]))
    assert np.all(straight ^ mirrored) and straight.any() and mirrored.any()


def test_minimal_views_take_any_number_of_channels():
    images = np.random.default_rng(5).integers(0, 256, (4, 20, 24, 5), np.uint8)
    data = {"image": images, "id": np.arange(4, dtype=np.int32)}
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 0.4, 0.3, 0.2, 0.1)
    settings = {"seed": 0, "epoch": 0, "size": 12, "scale": (0.2, 1.0), "augmentation": "minimal"}
    views = jax.jit(partial(make_views, views=2, mean=mean, std=std, **settings))(data)
    pixels = np.asarray(views) * std + np.asarray(mean)
    assert pixels.shape == (2, 4, 12, 12, 5)
    np.testing.assert_allclose(pixels * 255, np.round(pixels * 255), atol=1e-3)


# ----------------------------------------------------------------------------------------------------------- the recipe


def test_views_of_the_strong_recipe_are_asymmetric_as_published():
    first, second = augment.STRONG
    assert (first.jitter, first.blur, first.grey, first.solarise) == (0.8, 1.0, 0.2, 0.0)
    assert (second.jitter, second.blur, second.grey, second.solarise) == (0.8, 0.1, 0.2, 0.2)
    for recipe in augment.MINIMAL:
        assert not any(dataclasses.astuple(recipe))


def keys_of(n: int, view: int = 0) -> dict:
    ids = jnp.arange(n, dtype=jnp.int32)
    return {p: sample_keys(0, p, jnp.int32(0), ids, view) for p in PURPOSES}


_changed = jax.jit(augment.change_colours, static_argnums=2)


def assert_share(found: np.ndarray, wanted: float):
    """Within four standard errors."""
    assert abs(found.mean() - wanted) <= 4 * (wanted * (1 - wanted) / found.size) ** 0.5


@pytest.mark.parametrize("view", [0, 1])
def test_operations_are_done_as_often_as_the_recipe_says_and_independently(view):
    """Pictures on which each operation leaves its mark: a coloured one, a grey edge, white."""
    n, recipe, keys = 3000, augment.STRONG[view], keys_of(3000, view)
    mark = {}
    colour = jnp.broadcast_to(jnp.asarray([200.0, 120.0, 40.0]), (n, 6, 6, 3))
    plain = np.asarray(_changed(keys, colour, dataclasses.replace(recipe, blur=0.0, solarise=0.0)))[:, 0, 0]
    mark["grey"] = np.ptp(plain, axis=1) == 0
    unchanged = [(200, 120, 40), (135, 135, 135)]  # Pillow's luma of it
    mark["jitter"] = ~np.any([np.all(plain == x, axis=1) for x in unchanged], axis=0)
    white = jnp.full((n, 6, 6, 3), 255.0)
    whites = np.asarray(_changed(keys, white, dataclasses.replace(recipe, jitter=0.0)))[:, 0, 0, 0]
    assert set(np.unique(whites)) <= {0.0, 255.0}
    mark["solarise"] = whites == 0
    for name, found in mark.items():
        assert_share(found, getattr(recipe, name))
    together = np.corrcoef(np.stack([x for x in mark.values() if x.any()]))
    assert np.abs(together - np.eye(len(together))).max() < 5 / n**0.5


@pytest.mark.parametrize(("view", "share"), [(0, 1.0), (1, 0.1)])
def test_the_first_view_is_always_blurred_and_the_second_one_in_ten(view, share):
    """A white dot on a picture of 96 pixels: its value tells the deviation, which is uniform."""
    n, size = 400, 96
    dot = jnp.zeros((size, size, 3)).at[48, 48].set(255.0)
    keys = keys_of(n, view)
    blur_only = ViewAugmentation(blur=augment.STRONG[view].blur)
    centre = jax.jit(lambda keys: jax.lax.map(lambda k: one_blur(k, dot, blur_only), keys, batch_size=50))(keys)
    weights = colours.blur_weights(size)
    peaks = np.floor(np.floor(255 * weights[:, weights.shape[1] // 2] + 0.5) * weights[:, weights.shape[1] // 2] + 0.5)
    blurred = np.asarray(centre) < 255
    assert set(np.unique(centre)) <= {*peaks, 255.0}
    visible = (peaks < 255).mean()  # the smallest deviations move less than half a grey level
    assert_share(blurred, share * visible)
    if share == 1:
        wide = np.asarray(centre) < np.median(peaks)
        assert_share(wide, (peaks < np.median(peaks)).mean())


def one_blur(keys, x_hwc, recipe):
    return augment.change_colours({p: k[None] for p, k in keys.items()}, x_hwc[None], recipe)[0, 48, 48, 0]


def test_blur_comes_before_grey_and_solarise_after_both():
    """Each operation with certainty, against the same functions one after another in the published order."""
    x = jnp.asarray(np.random.default_rng(6).integers(0, 256, (3, 96, 96, 3)), jnp.float32)
    keys, told = keys_of(3), []
    found = np.asarray(_changed(keys, x, ViewAugmentation(jitter=1.0, blur=1.0, grey=1.0, solarise=1.0)))
    weights = jnp.asarray(colours.blur_weights(96))

    def operation_key(purpose, row):
        return jax.random.split(keys[purpose][row])[1]

    for row in range(3):
        y = colours.colour_jitter(x[row], *colours.draw_jitter(operation_key("colour", row)))
        level = below(jax.random.bits(operation_key("blur", row)), colours.SIGMAS)
        grey_after = colours.to_grey(colours.gaussian_blur(y, weights[level]))
        np.testing.assert_array_equal(found[row], np.broadcast_to(colours.solarise(grey_after), (96, 96, 3)))
        grey_before = jnp.broadcast_to(colours.to_grey(y), y.shape)
        other = colours.solarise(colours.gaussian_blur(grey_before, weights[level]))
        told.append(np.any(found[row] != np.asarray(other)))
    assert any(told), "or the order would not be told"
