"""Colour operations against Pillow, torchvision and SciPy, each with its bound, and how often and in which order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from scipy import ndimage, stats
from torchvision.transforms import functional

from maect_jax.data.device import colours

FACTORS = (0.0, 0.6, 2458 / 4096, 0.75, 1.0, 1.125, 1 + 1638 / 4096, 2.0)  # rounded to 1 / 4096 as drawn ones are
OPERATIONS = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)


@pytest.fixture(scope="module")
def pictures():
    """uint8 [48, 64, 3] each: smooth, of a 1/f spectrum as photographs are, white noise, and one colour."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(48)[:, None], np.fft.rfftfreq(64)).clip(1 / 64)
    natural = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, 48, 64))) / frequency).transpose(1, 2, 0)
    smooth = ndimage.gaussian_filter(rng.standard_normal((48, 64, 3)), (2, 2, 0))
    low, high = smooth.min((0, 1)), smooth.max((0, 1))
    return {
        "smooth": np.round(255 * (smooth - low) / (high - low)).astype(np.uint8),
        "natural": np.clip(np.round(128 + 50 * natural / natural.std()), 0, 255).astype(np.uint8),
        "noise": rng.integers(0, 256, (48, 64, 3), np.uint8),
        "flat": np.broadcast_to(np.asarray([200, 120, 41], np.uint8), (48, 64, 3)),
    }


_jitter = jax.jit(jax.vmap(colours.colour_jitter, in_axes=(None, 0, 0, 0)))
_drawn = jax.jit(jax.vmap(colours.draw_jitter))


def jittered(picture: np.ndarray, orders, factors, turns) -> np.ndarray:
    arguments = (np.asarray(orders, np.int32), np.asarray(factors, np.float32), np.asarray(turns, np.float32))
    return np.asarray(_jitter(picture.astype(np.float32), *arguments))


def rounded(factor: float) -> float:
    return round(factor * colours.FINE) / colours.FINE


# --------------------------------------------------------------------------------------- against Pillow and torchvision


@pytest.mark.parametrize("operation", range(3), ids=["brightness", "contrast", "saturation"])
def test_brightness_contrast_and_saturation_are_torchvisions_to_the_bit(pictures, operation):
    for picture in pictures.values():
        factors = np.ones((len(FACTORS), 3))
        factors[:, operation] = [rounded(factor) for factor in FACTORS]
        found = jittered(picture, [[0, 1, 2, 3]] * len(FACTORS), factors, np.zeros(len(FACTORS)))
        for result, factor in zip(found, factors[:, operation]):
            expected = np.asarray(OPERATIONS[operation](Image.fromarray(picture), factor))
            np.testing.assert_array_equal(result, expected)


def test_grey_is_pillows_to_the_bit():
    pixels = np.random.default_rng(1).integers(0, 256, (300, 300, 3), np.uint8)
    grey = np.asarray(colours.to_grey(jnp.asarray(pixels, jnp.float32)))[..., 0]
    np.testing.assert_array_equal(grey, np.asarray(Image.fromarray(pixels).convert("L")))
    np.testing.assert_array_equal(grey, np.asarray(functional.to_grayscale(Image.fromarray(pixels), 3))[..., 1])


def test_solarise_is_pillows_to_the_bit(pictures):
    for picture in pictures.values():
        found = colours.solarise(jnp.asarray(picture, jnp.float32))
        np.testing.assert_array_equal(found, np.asarray(ImageOps.solarize(Image.fromarray(picture), 128)))
        np.testing.assert_array_equal(found, np.asarray(functional.solarize(Image.fromarray(picture), 128)))


def exact_turn(picture: np.ndarray, turn: float) -> np.ndarray:
    """Hue turned in HSV, in float64."""
    x = picture.astype(np.float64)
    high, chroma = x.max(-1), np.ptp(x, axis=-1)
    r, g, b = np.moveaxis(x, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        hue = np.select([high == r, high == g], [(g - b) / chroma % 6, 2 + (b - r) / chroma], 4 + (r - g) / chroma)
    hue = np.where(chroma > 0, (hue + 6 * turn) % 6, 0.0)
    second = chroma * (1 - np.abs(hue % 2 - 1))
    zero = np.zeros_like(chroma)
    sectors = [(chroma, second, zero), (second, chroma, zero), (zero, chroma, second)]
    sectors += [(zero, second, chroma), (second, zero, chroma), (chroma, zero, second)]
    table = np.asarray([np.stack(sector, -1) for sector in sectors])
    return np.take_along_axis(table, hue.astype(int)[None, ..., None] % 6, axis=0)[0] + (high - chroma)[..., None]


@pytest.mark.parametrize("turn", [-0.5, -0.1, -1 / 4096, 0.0, 0.03, 0.1, 0.5])
def test_hue_is_turned_exactly_and_is_torchvisions_up_to_its_8_bit_hsv(pictures, turn):
    turn = rounded(turn)
    for name, picture in pictures.items():
        found = np.asarray(colours.shift_hue(jnp.asarray(picture, jnp.float32), turn))
        exact = exact_turn(picture, turn)
        assert np.abs(found - exact).max() <= 0.5 + 1e-9
        theirs = np.asarray(functional.adjust_hue(Image.fromarray(picture), turn)).astype(np.float64)
        gap = np.abs(found - theirs)
        assert gap.mean() < (1.5 if name in ("smooth", "natural") else 2.5) and gap.max() <= 16


def test_hue_keeps_grey_pixels():
    grey = jnp.broadcast_to(jnp.arange(256.0)[None, :, None], (1, 256, 3))
    np.testing.assert_array_equal(colours.shift_hue(grey, 0.25), grey)


# ----------------------------------------------------------------------------------------------------- order and choice


def test_operations_come_in_the_given_order(pictures):
    """All 24 orders against torchvision's functions and the exact hue, one after another, to the bit."""
    picture, factors, turn = pictures["smooth"], (rounded(1.35), rounded(0.65), rounded(1.2)), rounded(0.09)
    orders = list(itertools.permutations(range(4)))
    found = jittered(picture, orders, [factors] * 24, [turn] * 24)

    def expected(order):
        x = picture
        for i in order:
            if i == colours.HUE:
                x = np.floor(np.round(exact_turn(x, turn), 6) + 0.5).astype(np.uint8)
            else:
                x = np.asarray(OPERATIONS[i](Image.fromarray(x), factors[i]))
        return x

    np.testing.assert_array_equal(found, np.stack([expected(order) for order in orders]))
    assert len({x.tobytes() for x in found}) == 24, "or the order would not be told"


N = 24_000


@pytest.fixture(scope="module")
def draws():
    return tuple(np.asarray(x) for x in _drawn(jax.random.split(jax.random.key(2), N)))


def test_all_24_orders_are_as_likely(draws):
    found, counts = np.unique(draws[0], axis=0, return_counts=True)
    assert found.tolist() == [list(order) for order in itertools.permutations(range(4))]
    assert stats.chisquare(counts).pvalue > 1e-4


def test_factors_and_turns_are_uniform_in_the_published_ranges(draws):
    _, factors, turns = draws
    for values, middle, spread in zip((*factors.T, turns), (1, 1, 1, 0), (0.4, 0.4, 0.2, 0.1)):
        assert np.abs(values - middle).max() <= spread
        assert stats.kstest(values, stats.uniform(middle - spread, 2 * spread).cdf).pvalue > 1e-4
        assert np.all(values * 4096 == np.round(values * 4096))
    together = np.corrcoef(np.stack([*factors.T, turns, draws[0][:, 0]]))
    assert np.abs(together - np.eye(5)).max() < 5 / N**0.5, "choices are independent"


# ----------------------------------------------------------------------------------------------------------------- blur


def blurred(picture: np.ndarray, level: int, size: int = 224) -> tuple[np.ndarray, float]:
    """The picture blurred by that level of pictures of `size`, and its standard deviation."""
    weights = colours.blur_weights(size)[level]
    return np.asarray(_blur(picture.astype(np.float32), weights), np.float64), float(colours.sigmas(size)[level])


_blur = jax.jit(colours.gaussian_blur)
LEVELS = (0, 100, 400, 800, 1023)


@pytest.mark.parametrize("level", LEVELS)
def test_blur_is_a_true_gaussian_with_repeated_border(pictures, level):
    """Rounded twice, its mean error is below 0.4 grey levels, as that of any rounding is 0.25."""
    for picture in pictures.values():
        found, sigma = blurred(picture, level)
        exact = ndimage.gaussian_filter(picture.astype(np.float64), (sigma, sigma, 0), mode="nearest", truncate=8)
        gap = np.abs(found - exact)
        assert gap.mean() < 0.4 and gap.max() < 2.5, sigma  # the largest where three deviations end the kernel
        assert np.all(found == np.round(found))


@pytest.mark.parametrize(("level", "worst"), [(0, 1), (100, 11), (400, 3), (800, 3), (1023, 3)])
def test_blur_is_pillows_up_to_its_boxes(pictures, level, worst):
    """Pillow's radius is the deviation of three box filters, farthest from a Gaussian where it is about 0.3 pixels."""
    for name, bound in (("smooth", 1), ("natural", 3), ("noise", worst), ("flat", 1e-9)):
        found, sigma = blurred(pictures[name], level)
        theirs = np.asarray(Image.fromarray(pictures[name]).filter(ImageFilter.GaussianBlur(sigma)))
        assert np.abs(found - theirs).mean() < bound, (name, sigma)


def test_deviations_are_uniform_in_the_published_range_and_smaller_for_smaller_pictures():
    sigmas = colours.sigmas(224)
    assert sigmas[0] == pytest.approx(0.1, abs=1e-3) and sigmas[-1] == pytest.approx(2.0, abs=1e-3)
    np.testing.assert_allclose(np.diff(sigmas), 1.9 / 1024, rtol=1e-9)
    np.testing.assert_allclose(colours.sigmas(56), sigmas / 4)
    np.testing.assert_array_equal(colours.sigmas(384), sigmas)


@pytest.mark.parametrize("size", [32, 96, 224])
def test_blur_weights_are_multiples_of_2_to_the_minus_15_that_sum_to_one(size):
    weights = colours.blur_weights(size).astype(np.float64)
    assert np.all(weights.sum(1) == 1) and np.all(weights * 2**15 == np.round(weights * 2**15))
    assert weights.min() >= 0 and np.all(weights == weights[:, ::-1])
    deviation = (weights[-1] * np.arange(-(weights.shape[1] // 2), weights.shape[1] // 2 + 1) ** 2).sum() ** 0.5
    if size == 224:
        assert deviation == pytest.approx(2.0, rel=0.03)
