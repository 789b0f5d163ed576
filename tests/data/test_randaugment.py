"""RandAugment against PIL, operation by operation and as a whole, and what a picture may depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage
from timm.data import auto_augment

from maect_jax.data.device.randaugment import NOTHING, OPERATIONS, RandAugment, apply_operation, rand_augment
from maect_jax.parallel.mesh import batch_sharding, make_mesh

MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)
UNSIGNED = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")
BLENDS = ("Color", "Contrast", "Brightness", "Sharpness")
WARPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
LEVELS = (0.0, 0.57, 1.3, 2.9, 4.1, 5.0, 6.4, 7.49, 8.37, 8.9, 9.13, 9.77)


def pil_operation(picture: np.ndarray, name: str, level: float, sign: int) -> np.ndarray:
    """The operation in PIL with the published ranges of the increasing set; uint8 [h, w, c] to the same."""
    channels = picture.shape[2]
    image = Image.fromarray(picture if channels == 3 else picture[:, :, 0])
    width, height = image.size
    share = sign * level / 10
    fill = {"resample": Image.Resampling.BICUBIC, "fillcolor": FILL if channels == 3 else FILL[0]}

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, **fill)

    add = int(level / 10 * 110)
    result = {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Rotate": lambda: image.rotate(30 * share, **fill),
        "Posterize": lambda: ImageOps.posterize(image, 4 - int(level / 10 * 4)),
        "Solarize": lambda: ImageOps.solarize(image, 256 - int(level / 10 * 256)),
        "SolarizeAdd": lambda: image.point([min(255, i + add) if i < 128 else i for i in range(256)] * channels),
        "ShearX": lambda: affine(1, 0.3 * share, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, 0.3 * share, 1, 0),
        "TranslateX": lambda: affine(1, 0, 0.45 * share * width, 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, 0.45 * share * height),
    } | {
        name: lambda name=name: getattr(ImageEnhance, name)(image).enhance(max(0.1, 1 + 0.9 * share)) for name in BLENDS
    }
    return np.asarray(result[name]()).reshape(picture.shape)


@pytest.fixture(scope="module")
def pictures():
    """uint8 [48, 40, 3] each: smooth, noise, two values, one value, and almost one value."""
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.standard_normal((48, 40, 3)), (2, 2, 0))
    low, high = smooth.min((0, 1)), smooth.max((0, 1))
    almost = np.full((48, 40, 3), 90, np.uint8)
    almost[:3, :7] = 200
    return {
        "smooth": np.round(20 + 200 * (smooth - low) / (high - low)).astype(np.uint8),
        "noise": rng.integers(0, 256, (48, 40, 3), np.uint8),
        "two values": rng.choice(np.array([3, 200], np.uint8), (48, 40, 3)),
        "flat": np.full((48, 40, 3), 90, np.uint8),
        "almost flat": almost,
    }


_apply = jax.jit(jax.vmap(apply_operation, in_axes=(None, None, 0, 0, None)))


def found_and_expected(picture: np.ndarray, name: str, levels=LEVELS) -> tuple[np.ndarray, np.ndarray]:
    """Results for all levels and both signs, here and in PIL; int [2 * levels, h, w, c]."""
    level_l, sign_l = np.repeat(levels, 2).astype(np.float32), np.tile([1, -1], len(levels)).astype(np.float32)
    fill = np.asarray(FILL[: picture.shape[2]], np.uint8)
    found = _apply(picture, jnp.int32(OPERATIONS.index(name)), level_l, sign_l, fill)
    expected = [pil_operation(picture, name, level, sign) for level in levels for sign in (1, -1)]
    return np.asarray(found, np.int32), np.asarray(expected, np.int32)


# ------------------------------------------------------------------------------------------------- against timm and PIL


def timm_operation(picture: np.ndarray, name: str, level: float, sign: int) -> np.ndarray:
    """timm's own operation of the increasing set, with the settings that fine-tuning gives it."""
    name += {"Posterize": "Increasing", "Solarize": "Increasing"}.get(name, "")
    name += "Increasing" if name in BLENDS else "Rel" if name.startswith("Translate") else ""
    settings = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC, "translate_const": 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto_augment.random, "random", lambda: 0.25 if sign > 0 else 0.75)  # above one half it negates
        return np.asarray(auto_augment.AugmentOp(name, 1.0, level, settings)(Image.fromarray(picture)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_expected_pictures_of_these_tests_are_timms(pictures, name):
    for picture in (pictures["smooth"], pictures["noise"]):
        for level in LEVELS:
            for sign in (1, -1):
                expected = timm_operation(picture, name, level, sign)
                np.testing.assert_array_equal(pil_operation(picture, name, level, sign), expected)


def test_the_set_of_operations_is_timms():
    config = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": FILL})
    assert [op.name.removesuffix("Increasing").removesuffix("Rel") for op in config.ops] == list(OPERATIONS)
    assert {(op.prob, op.magnitude, op.magnitude_std) for op in config.ops} == {(0.5, 9, 0.5)}
    assert (config.num_layers, config.choice_weights) == (RandAugment().operations, None)


@pytest.mark.parametrize("name", ["Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd"])
def test_operations_on_whole_numbers_are_pils(pictures, name):
    for picture in pictures.values():
        found, expected = found_and_expected(picture, name)
        np.testing.assert_array_equal(found, expected)


def test_autocontrast_is_exact_where_pil_falls_below_a_whole_number(pictures):
    for picture in pictures.values():
        found, pil = found_and_expected(picture, "AutoContrast")
        low, high = (picture.reshape(-1, 3).astype(int).min(0), picture.reshape(-1, 3).astype(int).max(0))
        scaled = (picture - low) * 255
        whole = scaled % np.maximum(high - low, 1) == 0
        expected = np.where(high > low, scaled // np.maximum(high - low, 1), picture)
        np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))
        gap = found - pil
        assert np.all((gap == 0) | ((gap == 1) & whole))


@pytest.mark.parametrize("name", BLENDS)
def test_blends_are_pils_but_for_single_values(pictures, name):
    for picture in pictures.values():
        found, expected = found_and_expected(picture, name)
        gap = np.abs(found - expected)
        assert gap.max() <= 1 and (gap > 0).mean() < 1e-3


@pytest.mark.parametrize("name", WARPS)
def test_warps_are_pils_bicubic_but_for_single_values(pictures, name):
    for picture in pictures.values():
        found, expected = found_and_expected(picture, name)
        gap = np.abs(found - expected)
        assert gap.max() <= 1 and (gap > 0).mean() < 5e-3


@pytest.mark.parametrize("name", WARPS)
def test_centres_mapped_onto_the_border_by_round_levels_are_few(pictures, name):
    found, expected = found_and_expected(pictures["noise"], name, (*range(11), 0))
    gap = np.abs(found - expected)
    assert (gap > 1).mean() < 1e-3 and (gap > 0).mean() < 5e-3


def test_pictures_of_one_channel_are_pils_and_color_leaves_them(pictures):
    grey = pictures["smooth"][:, :, :1]
    for name in OPERATIONS:
        found, expected = found_and_expected(grey, name)
        gap = np.abs(found - expected)
        assert gap.max() <= 1 and (gap > 0).mean() < (0.03 if name == "AutoContrast" else 5e-3)
    np.testing.assert_array_equal(found_and_expected(grey, "Color")[0], np.broadcast_to(grey, (24, 48, 40, 1)))


def test_posterize_keeps_no_bit_at_the_largest_level_and_nothing_keeps_all(pictures):
    noise, fill = pictures["noise"], np.asarray(FILL, np.uint8)
    ten, one = np.float32([10.0]), np.float32([1.0])
    assert not np.any(_apply(noise, jnp.int32(OPERATIONS.index("Posterize")), ten, one, fill))
    np.testing.assert_array_equal(_apply(noise, jnp.int32(NOTHING), ten, one, fill)[0], noise)


# ----------------------------------------------------------------------------------------------------------- as a whole

N = 3000  # pictures; one shape for these tests, so that each recipe compiles once
SIGNED = [(name, 1) for name in UNSIGNED] + [(name, sign) for name in BLENDS + WARPS for sign in (1, -1)]
ALWAYS = {"deviation": 0.0, "probability": 1.0}


def small_picture() -> np.ndarray:
    """uint8 [16, 20, 3], smooth, enough pixels for Equalize; every operation changes it in its own way."""
    noise = ndimage.gaussian_filter(np.random.default_rng(1).standard_normal((16, 20, 3)), (1, 1, 0))
    return np.clip(np.round(110 + 250 * noise), 7, 243).astype(np.uint8)


def augmented(seed: int, picture: np.ndarray, recipe: RandAugment, mean=MEAN) -> np.ndarray:
    """`N` draws for one picture."""
    x = jnp.broadcast_to(jnp.asarray(picture, jnp.float32), (N, *picture.shape))
    return np.asarray(rand_augment(jax.random.split(jax.random.key(seed), N), x, recipe, mean))


def nearest(found: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the candidate with the smallest mean absolute difference to each result, and that difference."""
    found, candidates = found.reshape(len(found), -1), candidates.reshape(len(candidates), -1).astype(np.float32)
    gap = np.stack([np.abs(found - candidate).mean(axis=1) for candidate in candidates], axis=1)
    return gap.argmin(axis=1), gap.min(axis=1)


def test_operations_and_signs_are_drawn_uniformly():
    picture = small_picture()
    candidates = np.stack([pil_operation(picture, name, 9.0, sign) for name, sign in SIGNED])
    assert len(np.unique([picture, *candidates], axis=0)) == 25
    index, gap = nearest(augmented(0, picture, RandAugment(operations=1, **ALWAYS)), candidates)
    assert gap.max() < 0.2
    for i, (name, _) in enumerate(SIGNED):
        wanted = 1 / 15 if name in UNSIGNED else 1 / 30
        assert (index == i).mean() == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / N) ** 0.5)


def test_two_operations_follow_one_another_each_drawn_anew():
    picture = small_picture()
    first = [pil_operation(picture, name, 9.0, sign) for name, sign in SIGNED]
    candidates = np.stack([pil_operation(x, name, 9.0, sign) for x in first for name, sign in SIGNED])
    index, gap = nearest(augmented(1, picture, RandAugment(operations=2, **ALWAYS))[:600], candidates)
    assert gap.max() < 1.0, "a difference of one before Equalize or Contrast grows"
    assert len(np.unique(index)) > 200
    same = np.mean([SIGNED[i][0] == SIGNED[j][0] for i, j in zip(*np.divmod(index, len(SIGNED)))])
    assert same == pytest.approx(1 / 15, abs=0.05)  # some pairs of unlike operations give the same picture


def test_each_operation_is_left_out_half_of_the_time():
    picture = small_picture()
    untouched = np.all(augmented(2, picture, RandAugment()) == picture, axis=(1, 2, 3)).mean()
    assert untouched == pytest.approx(0.25, abs=0.035)


def test_levels_are_normal_and_end_at_ten():
    """Only a darkening Brightness turns white into a grey from 1 to 127: 255 (1 - 0.09 level)."""
    white, seen = np.full((16, 20, 3), 255, np.uint8), RandAugment(operations=1, probability=1.0)
    value = np.concatenate([augmented(seed, white, seen, (1.0, 1.0, 1.0))[:, 0, 0, 0] for seed in range(3, 9)])
    value = value[(value > 0) & (value < 128)]
    level = (1 - (value + 0.5) / 255) / 0.09
    assert level.size == pytest.approx(6 * N / 30, abs=100)
    assert level.mean() == pytest.approx(9.0, abs=0.08) and level.std() == pytest.approx(0.49, abs=0.06)
    assert level.max() < 10.03 and (value == 25).mean() == pytest.approx(0.0228, abs=0.025)


def test_settings_are_those_of_the_published_recipe():
    assert RandAugment() == RandAugment(operations=2, magnitude=9.0, deviation=0.5, probability=0.5)
    assert len(OPERATIONS) == len(set(OPERATIONS)) == 15


# --------------------------------------------------------------------------------------- what a picture may depend on


@pytest.fixture(scope="module")
def batch():
    """Keys and pictures [3000, 16, 20, 3] with fractions, and what becomes of them."""
    keys = jax.random.split(jax.random.key(10), N)
    x = np.random.default_rng(5).uniform(0, 255, (N, 16, 20, 3)).astype(np.float32)
    return keys, x, np.asarray(rand_augment(keys, x, RandAugment(), MEAN))


def test_pictures_come_back_in_whole_numbers(batch):
    _, x, found = batch
    assert found.dtype == np.float32 and found.shape == x.shape
    assert found.min() >= 0 and found.max() <= 255 and np.all(found == np.round(found))


def test_a_picture_depends_on_its_key_alone(batch):
    keys, x, found = batch
    order = np.random.default_rng(6).permutation(N)
    others = x[order]
    others[::2] = 50.0
    again = np.asarray(rand_augment(keys[order], others, RandAugment(), MEAN))
    np.testing.assert_array_equal(again[1::2], found[order][1::2])


def test_eight_devices_give_the_same_pictures_and_exchange_none(batch):
    keys, x, found = batch
    placed = jax.device_put((keys[:64], x[:64]), batch_sharding(make_mesh()))
    program = rand_augment.lower(*placed, RandAugment(), MEAN).compile().as_text()
    assert not any(word in program for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    np.testing.assert_array_equal(rand_augment(*placed, RandAugment(), MEAN), found[:64])


def test_equal_shapes_are_compiled_once(batch, caplog):
    keys, x, _ = batch
    with jax.log_compiles():
        rand_augment(keys, x / 2, RandAugment(), MEAN)
        assert "rand_augment" not in caplog.text
        rand_augment(keys, x, RandAugment(operations=0), MEAN)
    assert "rand_augment" in caplog.text, "another program is told"
