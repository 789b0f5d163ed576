"""The embedded data set: real handwritten digits as objects on coloured backgrounds.

scikit-learn ships 1,797 handwritten digits of 8x8 pixels (UCI "Optical Recognition of Handwritten Digits", test part).
Each becomes several 32x32 RGB pictures in which the digit is drawn in one colour, at a random place and size, on a smooth
background of two other colours. What a picture is *of* is the digit, but most of its pixels, and so most of what a masked
autoencoder must explain, are background: the difference that contrastive tuning makes can be seen.

The split is by source digit: no handwriting of a training picture occurs in a held-out one.
"""

import colorsys

import numpy as np
from PIL import Image

SIDE = 32
CLASSES = tuple(str(digit) for digit in range(10))
HELD_OUT = 360  # source digits of the test split
PICTURES_A_DIGIT = {"train": 4, "test": 4}
_SPLIT_SEED = 2023  # the split and the pictures are part of the data set, not of a run


def load(split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Pictures uint8 [n, 32, 32, 3], labels int32 [n] and class names of the 'train' or 'test' split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(data.images))
    sources = order[HELD_OUT:] if split == "train" else order[:HELD_OUT]
    copies = PICTURES_A_DIGIT[split]
    images = np.stack([compose(data.images[i] / 16.0, int(i), copy) for i in sources for copy in range(copies)])
    return images, np.repeat(data.target[sources], copies).astype(np.int32), CLASSES


def compose(ink: np.ndarray, source: int, copy: int) -> np.ndarray:
    """One picture uint8 [32, 32, 3] from a digit's ink [8, 8] in 0..1; `source` and `copy` fix all its random choices."""
    rng = np.random.default_rng((_SPLIT_SEED, source, copy))
    size = int(rng.integers(20, 29))
    top, left = rng.integers(0, SIDE - size + 1, 2)
    stroke = Image.fromarray((ink * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    alpha = np.zeros((SIDE, SIDE, 1), np.float32)
    alpha[top : top + size, left : left + size, 0] = np.asarray(stroke, np.float32) / 255
    picture = (1 - alpha) * _background(rng) + alpha * _colour(rng, value=(0.75, 1.0))
    return np.round(picture * 255).astype(np.uint8)


def _colour(rng: np.random.Generator, value: tuple[float, float]) -> np.ndarray:
    """A random hue, float [3] in 0..1, with its HSV value in the given range."""
    return np.asarray(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.3, 1.0), rng.uniform(*value)))


def _background(rng: np.random.Generator) -> np.ndarray:
    """A darker gradient between two random colours in a random direction, float [32, 32, 3] in 0..1."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) - 0.5
    share = np.clip(0.5 + (x * np.cos(angle) + y * np.sin(angle)), 0, 1)[..., None]
    return (1 - share) * _colour(rng, value=(0.05, 0.55)) + share * _colour(rng, value=(0.05, 0.55))
