"""Crops: evaluation sees what torchvision's would, training what Pillow's crop and resize would, reduced or not."""

import importlib

import numpy as np
import pytest
from corpus import encoded, photo, with_orientation
from hypothesis import given
from hypothesis import strategies as st
from needed import needed
from PIL import Image
from real_pictures import first_pictures
from scipy.stats import ks_2samp

from maect_jax.data.host import crops
from maect_jax.data.host.counters import crop_box
from maect_jax.data.host.crops import central_crop, reduction_for, resize, resized_crop, training_crops
from maect_jax.data.host.decode import decode, open_picture

BICUBIC = Image.Resampling.BICUBIC
ASPECT = (3 / 4, 4 / 3)


def random_boxes(height, width, count, scale=(0.08, 1.0)):
    where = {"seed": 0, "epoch": 0, "view": 0, "scale": scale, "ratio": ASPECT}
    return [crop_box(height, width, sample_id=i, **where) for i in range(count)]


def cubic_weights(pixels, first, length, results):
    """Keys' cubic (a = -0.5), stretched where the picture shrinks; float64 [results, pixels].

    Source: Keys 1981, equation 15.
    """
    scale = length / results
    centers = first + (np.arange(results)[:, None] + 0.5) * scale
    x = np.abs((np.arange(pixels) + 0.5 - centers) / max(scale, 1))
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def exact_crop(image, box, size):
    """In float64, without a rounding in between: [size, size, c]."""
    top, left, height, width = box
    cut = image[top : top + height, left : left + width].astype(float)
    rows = np.tensordot(cubic_weights(height, 0, height, size), cut, (1, 0))
    result = np.tensordot(cubic_weights(width, 0, width, size), rows, (1, 1)).swapaxes(0, 1)
    return result.clip(0, 255)


def pillow_crop(image, box, size):
    top, left, height, width = box
    cut = image[top : top + height, left : left + width]
    return np.asarray(Image.fromarray(cut).resize((size, size), BICUBIC)).astype(int)


def cropped(image, box, size, reduction=1):
    result = np.full((size, size, image.shape[2]), 77, np.uint8)
    resized_crop(image, box, result, reduction)
    return result


def mean_error(left, right):
    return np.abs(left.astype(float) - right).mean()


@pytest.fixture(scope="module")
def mosaic():
    """Photographs side by side: more detail in a pixel than a photograph of that size has."""
    tiles = [decode(file, 3, name) for _, name, file in first_pictures("imagenette96", 2, 24)]
    rows = [np.concatenate(tiles[row * 8 : row * 8 + 8], axis=1) for row in range(6)]
    return np.ascontiguousarray(np.concatenate(rows)[:575, :767])


SIZES = [(375, 500), (500, 333), (97, 211), (224, 224), (30, 41), (17, 300), (256, 256), (225, 224), (1, 1), (3, 90)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("size", "ratio"), [(224, 256 / 224), (96, 1.0), (65, 1.143)])
def test_evaluation_sees_what_torchvision_shows(height, width, size, ratio):
    needed("torchvision")
    transforms = importlib.import_module("torchvision.transforms")
    functional = importlib.import_module("torchvision.transforms.functional")
    image, short = photo(height, width), round(size * ratio)
    ours = central_crop(image, size, ratio)
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose([transforms.Resize(short, bicubic), transforms.CenterCrop(size)])
    np.testing.assert_array_equal(ours, np.asarray(theirs(Image.fromarray(image))))
    on_tensors = transforms.Compose([transforms.Resize(short, bicubic, antialias=True), transforms.CenterCrop(size)])
    floats = on_tensors(functional.to_tensor(Image.fromarray(image))).permute(1, 2, 0).numpy() * 255
    assert mean_error(ours, floats.clip(0, 255)) < 1


def test_evaluation_of_grey_and_of_many_channels_is_that_of_each_channel():
    image = np.concatenate([photo(50, 70, seed) for seed in range(2)], axis=2)[:, :, :5]
    together = central_crop(image, 32, 256 / 224)
    for channel in range(5):
        alone = central_crop(np.ascontiguousarray(image[:, :, channel : channel + 1]), 32, 256 / 224)
        np.testing.assert_array_equal(together[:, :, channel : channel + 1], alone)


@pytest.mark.parametrize("upright", [True, False])
def test_strip_that_would_become_gigabytes_is_resized_in_its_middle_alone(upright, monkeypatch):
    strip = photo(3, 700)
    strip = np.ascontiguousarray(strip.swapaxes(0, 1)) if upright else strip
    whole = central_crop(strip, 64, 256 / 224)
    monkeypatch.setattr(crops, "MAX_PIXELS", 1000)
    assert np.abs(central_crop(strip, 64, 256 / 224).astype(int) - whole).max() <= 1
    monkeypatch.undo()
    longest = np.zeros((3_000_000, 1, 1) if upright else (1, 3_000_000, 1), np.uint8)
    assert central_crop(longest, 224, 256 / 224).shape == (224, 224, 1)


@pytest.mark.parametrize("size", [32, 96, 224])
def test_training_crops_are_those_of_pillow_and_as_exact(mosaic, size):
    for image, bound in ((photo(375, 500), 0.5), (mosaic, 0.5)):
        errors = []
        for box in random_boxes(*image.shape[:2], 4):
            ours, pillow, exact = (crop(image, box, size) for crop in (cropped, pillow_crop, exact_crop))
            errors.append((mean_error(ours, pillow), mean_error(ours, exact), mean_error(pillow, exact)))
            assert abs((ours - exact).mean()) < 0.1  # neither lighter nor darker
        to_pillow, to_exact, of_pillow = np.mean(errors, axis=0)
        assert to_pillow <= bound
        assert to_exact <= of_pillow + 0.01


def test_nothing_outside_the_box_bleeds_in():
    image = np.zeros((60, 80, 3), np.uint8)
    image[20:40, 30:60] = 200
    assert (cropped(image, (20, 30, 20, 30), 16) == 200).all()
    assert (cropped(255 - image, (20, 30, 20, 30), 48) == 55).all()


def test_crop_of_its_own_size_is_the_cut():
    image = photo(60, 80)
    np.testing.assert_array_equal(cropped(image, (11, 13, 32, 32), 32), image[11:43, 13:45])


def test_every_processor_gives_the_same_crops(monkeypatch):
    if crops.Resizer is None:
        pytest.skip("cykooz-resizer is not installed")
    extensions = importlib.import_module("cykooz_resizer").CpuExtensions
    image, found = photo(211, 307), {}
    for name in ("none", "sse4_1", "avx2", "neon"):
        made = crops.Resizer()
        made.cpu_extensions = getattr(extensions, name)
        if made.cpu_extensions != getattr(extensions, name):
            continue  # not of this processor
        monkeypatch.setattr(crops, "Resizer", lambda made=made: made)
        for channels in (1, 3):
            for size in (31, 224):
                boxes = random_boxes(211, 307, 4)
                crop = np.stack([cropped(np.ascontiguousarray(image[:, :, :channels]), b, size) for b in boxes])
                found.setdefault((channels, size), {})[name] = crop.tobytes()
        monkeypatch.undo()
    assert all(len(by_name) >= 2 and len(set(by_name.values())) == 1 for by_name in found.values()), found.keys()


def test_without_the_resizer_pillow_makes_nearly_the_same_crops(monkeypatch):
    picture = open_picture(encoded(photo(375, 500), "JPEG", quality=95), 3, "x")
    boxes = [*random_boxes(375, 500, 6), (0, 0, 375, 500), (7, 9, 301, 285)]
    ours = {size: training_crops(picture, boxes, size) for size in (64, 224)}
    monkeypatch.setattr(crops, "Resizer", None)
    for size, crop in ours.items():
        by_pillow = training_crops(picture, boxes, size)
        assert max(mean_error(a, b) for a, b in zip(crop, by_pillow)) <= 0.5


@given(st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), min_size=1, max_size=3), st.integers(8, 400))
def test_pictures_are_reduced_as_far_as_all_crops_stay_twice_too_large(sides, size):
    reduction = reduction_for([(0, 0, *box) for box in sides], size)
    smallest = min(min(box) for box in sides)
    assert reduction in (1, 2, 4, 8)
    assert reduction == 1 or smallest >= 2 * reduction * size
    assert reduction == 8 or smallest < 2 * (2 * reduction) * size


def shift(left, right):
    """By how many pixels (down, right) `left` lies beside `right`, by least squares."""
    left, right = (image.astype(float).mean(2) for image in (left, right))
    slopes = np.stack([slope.ravel() for slope in np.gradient(right)], axis=1)
    return -np.linalg.lstsq(slopes, (left - right).ravel(), rcond=None)[0]


@pytest.fixture(scope="module")
def large(mosaic):
    """(picture, greatest mean error): a natural one, and one with as much detail in its colours as in its luminance."""
    # a photograph of this size has less detail in a pixel than the mosaic of small ones
    natural = np.asarray(Image.fromarray(mosaic).resize((1149, 861), BICUBIC))[:859, :1147]
    return (np.ascontiguousarray(natural), 1.5), (photo(859, 1147), 2.5)


@pytest.mark.parametrize(
    ("orientation", "subsampling"), [(1, "4:2:0"), (3, "4:2:2"), (6, "4:4:4"), (7, "4:2:0"), (8, "4:2:2")]
)
@pytest.mark.parametrize(("reduction", "size"), [(2, 120), (4, 60), (8, 32)])
def test_crops_of_a_reduced_picture_are_those_of_the_whole_and_not_beside_them(
    large, orientation, subsampling, reduction, size
):
    exif = with_orientation(orientation)
    for image, bound in large:
        picture = open_picture(encoded(image, "JPEG", quality=92, subsampling=subsampling, exif=exif), 3, "x")
        whole = np.ascontiguousarray(picture.pixels())
        boxes = random_boxes(picture.height, picture.width, 60, (0.4, 1))
        boxes = [box for box in boxes if reduction_for([box], size) == reduction]
        assert len(boxes) >= 2
        for box in boxes[:2]:
            (ours,), of_whole = training_crops(picture, [box], size), cropped(whole, box, size)
            assert 0 < mean_error(ours, of_whole) <= bound
            assert np.abs(shift(ours, of_whole)).max() < 0.01  # of a pixel of the crop; half a pixel would be 0.5


def test_views_of_a_picture_are_the_crops_of_each_box():
    picture = open_picture(encoded(photo(90, 120), "JPEG"), 3, "x")
    boxes = random_boxes(90, 120, 3)
    together = training_crops(picture, boxes, 32)
    assert together.shape == (3, 32, 32, 3)
    np.testing.assert_array_equal(together, np.stack([cropped(picture.pixels(), box, 32) for box in boxes]))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_crops_of_a_turned_jpeg_are_those_of_the_upright_picture(orientation):
    picture = open_picture(encoded(photo(91, 122), "JPEG", exif=with_orientation(orientation)), 3, "x")
    upright = np.ascontiguousarray(picture.pixels())
    boxes = random_boxes(picture.height, picture.width, 5)
    for crop, box in zip(training_crops(picture, boxes, 32), boxes):
        assert mean_error(crop, pillow_crop(upright, box, 32)) < 0.5


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_crops_of_other_numbers_of_channels_are_those_of_each_channel(channels):
    image = np.concatenate([photo(50, 70, seed) for seed in range(2)], axis=2)[:, :, :channels]
    for box in random_boxes(50, 70, 3):
        crop = cropped(np.ascontiguousarray(image), box, 24)
        for channel in range(channels):
            assert mean_error(crop[:, :, channel], pillow_crop(image[:, :, channel], box, 24)) < 0.5


def test_resize_to_the_same_size_changes_nothing():
    image = photo(20, 30)
    assert resize(image, 20, 30) is image


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (120, 900)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0)])
def test_boxes_are_distributed_as_torchvision_draws_them(height, width, scale):
    torch = needed("torch")
    needed("torchvision")
    transform = importlib.import_module("torchvision.transforms").RandomResizedCrop
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    theirs = np.array([transform.get_params(picture, list(scale), list(ASPECT)) for _ in range(1500)], float)
    ours = np.array(random_boxes(height, width, 1500, scale), float)
    for boxes in (ours, theirs):
        top, left, tall, wide = boxes.T
        assert top.min() >= 0 and left.min() >= 0 and (top + tall).max() <= height and (left + wide).max() <= width
    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] + b[:, 2] / 2,
    ):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-4
