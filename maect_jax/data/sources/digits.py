"""The embedded data set: real handwritten digits as objects on a ground of another brightness and tint.

scikit-learn ships 1,797 handwritten digits of 8x8 pixels (UCI "Optical Recognition of Handwritten Digits", test part).
Each becomes two 32x32 RGB pictures: the digit, nearly white, nearly as large as the picture and at a random place, on
a dark ground whose brightness and tint are random. What a picture is *of* is the digit, but every patch carries the
ground, so a masked autoencoder's features are similar where the grounds are; tuning makes them similar where the
digits are, and that can be seen.

The split is by source digit: no handwriting of a training picture occurs in a held-out one.
"""

import colorsys

import numpy as np
from PIL import Image

SIDE = 32
CLASSES = tuple(str(digit) for digit in range(10))
HELD_OUT = 360  # source digits of the test split
COPIES = 2  # pictures of each source digit
_SEED = 2023  # the split and the pictures are part of the data set, not of a run

_SIZE = (28, 32)  # side of the digit in pixels
_GROUND = {"saturation": (0.0, 0.3), "value": (0.0, 0.3)}
_STROKE = {"saturation": (0.0, 0.2), "value": (0.85, 1.0)}


def load(split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Pictures uint8 [n, 32, 32, 3], labels int32 [n] and class names of the 'train' or 'test' split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(_SEED).permutation(len(data.images))
    sources = order[HELD_OUT:] if split == "train" else order[:HELD_OUT]
    images = np.stack([compose(data.images[i] / 16.0, int(i), copy) for i in sources for copy in range(COPIES)])
    return images, np.repeat(data.target[sources], COPIES).astype(np.int32), CLASSES


def compose(ink: np.ndarray, source: int, copy: int) -> np.ndarray:
    """One picture uint8 [32, 32, 3] from a digit's ink [8, 8] in 0..1; `source` and `copy` fix all random choices."""
    rng = np.random.default_rng((_SEED, source, copy))
    size = int(rng.integers(_SIZE[0], _SIZE[1] + 1))
    top, left = rng.integers(0, SIDE - size + 1, 2)
    digit = Image.fromarray((ink * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    alpha = np.zeros((SIDE, SIDE, 1))
    alpha[top : top + size, left : left + size, 0] = np.asarray(digit) / 255
    picture = (1 - alpha) * _colour(rng, **_GROUND) + alpha * _colour(rng, **_STROKE)
    return np.round(picture * 255).astype(np.uint8)


def _colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """A random hue with HSV saturation and value in the given ranges, RGB in 0..1, float [3]."""
    return np.asarray(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value)))
