"""Exported settings of preprocessing: transformers makes of pictures what an evaluation here does."""

import os

import numpy as np
import pytest
from needed import needed
from PIL import Image
from test_transformers4 import BESIDE, run

from maect_jax.data.host.crops import central_crop
from maect_jax.exchange.export.package import write_package
from maect_jax.exchange.export.targets import TARGETS
from models import random_model

PROCESS = """
import sys
from pathlib import Path
import numpy as np
import transformers
from PIL import Image
assert transformers.__version__.startswith("4.")
for folder in map(Path, sys.argv[1:]):
    process = transformers.AutoImageProcessor.from_pretrained(folder)
    values = process(images=Image.open(folder / "picture.png"), return_tensors="pt")["pixel_values"]
    np.save(folder / "values.npy", values.numpy())
"""
SHAPES = {
    "colour": dict(),
    "grey": dict(channels=1, mean=(0.4,), std=(0.3,)),
    "no margin": dict(resize_ratio=1.0, image_size=32),
    "wide margin": dict(resize_ratio=1.5, patch=8, image_size=64),
}


def picture(channels: int, height: int, width: int) -> Image.Image:
    """A picture with fine and coarse detail."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([120 + 70 * np.sin(x / 6 + c) + 40 * np.cos(y / 4 - c) for c in range(channels)], axis=2)
    noisy = waves + np.random.default_rng(0).normal(0, 15, waves.shape)
    pixels = noisy.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])


def evaluated(model, image: Image.Image) -> np.ndarray:
    """What an evaluation here makes of a picture, in 0..1."""
    pixels = np.asarray(image).reshape(image.height, image.width, model.channels)
    return central_crop(pixels, model.image_size, model.resize_ratio).transpose(2, 0, 1) / 255


def assert_same_picture(model, image: Image.Image, values_chw: np.ndarray) -> None:
    """Mean difference below one of 255 levels, before normalisation."""
    mean, std = (np.array(x)[:, None, None] for x in (model.mean, model.std))
    assert np.abs(values_chw * std + mean - evaluated(model, image)).mean() < 1 / 255


# Where an odd number of pixels is cut off, transformers rounds half of it down, an evaluation to even: not here.
@pytest.mark.parametrize(("name", "shape"), [("mae", "colour"), *(("hf-vit", shape) for shape in SHAPES)])
def test_image_processor_of_transformers_5_does_what_an_evaluation_does(name, shape, tmp_path):
    transformers = needed("transformers")
    model = random_model(**SHAPES[shape])
    write_package(model, TARGETS[name], tmp_path / "out", prove=False)
    process = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    for size in ((90, 140), (140, 90), (20, 33), (16, 16)):
        image = picture(model.channels, *size)
        (values_chw,) = process(images=image, return_tensors="pt")["pixel_values"].numpy()
        assert values_chw.shape == (model.channels, model.image_size, model.image_size)
        assert_same_picture(model, image, values_chw)


def test_image_processor_of_transformers_4_does_what_an_evaluation_does(tmp_path):
    if not BESIDE.is_dir() and not os.environ.get("CI"):
        pytest.skip("transformers 4 is not beside the environment; `make test` puts it there")
    models = {shape: random_model(**SHAPES[shape]) for shape in ("colour", "grey")}
    for shape, model in models.items():
        write_package(model, TARGETS["hf-vit"], tmp_path / shape, prove=False)
        picture(model.channels, 90, 140).save(tmp_path / shape / "picture.png")
    done = run("-c", PROCESS, *(str(tmp_path / shape) for shape in models))
    assert done.returncode == 0 and "use_fast" not in done.stderr, done.stderr
    for shape, model in models.items():
        (values_chw,) = np.load(tmp_path / shape / "values.npy")
        assert_same_picture(model, picture(model.channels, 90, 140), values_chw)
