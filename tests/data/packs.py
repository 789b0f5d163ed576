"""Small data sets and their packings, for the tests of packed records."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from maect_jax.data.packing.pack import Result, pack
from maect_jax.data.packing.plan import Settings
from maect_jax.data.packing.splits import open_splits


def natural(seed: int, height: int = 24, width: int = 32, channels: int = 3) -> np.ndarray:
    """A smooth picture with some texture, uint8 [h, w, c]; another one for each seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width, 0:1][:2]
    waves = sum(np.sin(rng.uniform(0, 0.4, channels) * x + rng.uniform(0, 0.4, channels) * y) for _ in range(3))
    return np.clip(128 + 35 * waves + rng.normal(0, 3, (height, width, channels)), 0, 255).astype(np.uint8)


def write_picture(path: Path, image_hwc: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image_hwc[:, :, 0] if image_hwc.shape[2] == 1 else image_hwc)
    image.save(path, **options)


def write_folder(root: Path, train: int = 12, test: int = 4, ending: str = "jpg", **size) -> Path:
    """train/<class>/… and val/<class>/… of two classes; no two pictures are equal."""
    seed = 0
    for split, count in (("train", train), ("val", test)):
        for name in ("cat", "dog"):
            for number in range(count // 2):
                write_picture(root / split / name / f"{number:03}.{ending}", natural(seed := seed + 1, **size))
    return root


def packed(source: Path | str, folder: Path, workers: int = 0, skip: bool = True, **settings) -> Result:
    """`data pack` without its command line."""
    return pack(str(source), open_splits(str(source)), folder, Settings(**settings), skip=skip, workers=workers)


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def many_shards(monkeypatch) -> None:
    """Shards of two kilobytes with shard_mb=1, so that a small set has several."""
    monkeypatch.setattr("maect_jax.data.packing.plan.MEGABYTE", 2000)
