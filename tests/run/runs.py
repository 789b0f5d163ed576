"""Starts the real program as its users do, on pictures made here."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TINY = "tests/run/tiny.py"


def make_pictures(
    folder: Path, size: int = 16, train: int = 16, test: int = 5, classes=("disc", "<i>square", "bar", "dot")
):
    """A folder train/<class>/*.png, test/<class>/*.png in which a class has its own shape; returns the folder."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size] / size
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                dy, dx = rng.uniform(0.35, 0.65, 2)
                shapes = (
                    (y - dy) ** 2 + (x - dx) ** 2 < 0.08,
                    (abs(y - dy) < 0.25) & (abs(x - dx) < 0.25),
                    abs(y - dy) < 0.1,
                    (y - dy) ** 2 + (x - dx) ** 2 < 0.01,
                )
                picture = np.where(shapes[label % 4][..., None], rng.uniform(160, 255, 3), rng.uniform(0, 90, 3))
                Image.fromarray(picture.astype(np.uint8)).save(folder / split / name / f"{i:03}.png")
    return folder


def command(workdir: Path, *arguments: str, config: str = TINY) -> list[str]:
    return [sys.executable, "launch.py", f"--config={config}", f"--workdir={workdir}", *arguments]


def environment(devices: int = 1) -> dict[str, str]:
    """One simulated device, and compiled programs shared between the runs of a test session."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "maect_jax_test_runs"))
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHONUNBUFFERED": "1",
    }


def launch(workdir: Path, *arguments: str, config: str = TINY, devices: int = 1) -> subprocess.CompletedProcess:
    """Runs to the end; never raises for a non-zero status."""
    return subprocess.run(
        command(workdir, *arguments, config=config),
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=600,
    )


def maect(*arguments, devices: int = 1) -> subprocess.CompletedProcess:
    """Runs `python -m maect_jax …` to the end; never raises for a non-zero status."""
    return subprocess.run(
        [sys.executable, "-m", "maect_jax", *map(str, arguments)],
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=900,
    )


def start(workdir: Path, *arguments: str, devices: int = 1) -> subprocess.Popen:
    """Starts in the background, for tests that send signals."""
    return subprocess.Popen(
        command(workdir, *arguments),
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def final_states(workdir: Path) -> dict[str, str]:
    """Hash of every array of the last checkpoint of each stage: weights, moments, statistics, queue, averages."""
    import jax
    from etils import epath

    from maect_jax.parallel.mesh import make_mesh, replicated
    from maect_jax.results.record import weights_hash
    from maect_jax.training.checkpoint import newest_step_folder, read_arrays, saved_tree

    sharding = replicated(make_mesh(devices=jax.devices()[:1]))
    hashes = {}
    for stage in ("pretrain", "head", "tune"):
        folder = newest_step_folder(epath.Path(workdir) / stage)
        parts = tuple(saved_tree(folder))
        hashes[stage] = f"{folder.name} {weights_hash(read_arrays(folder, parts, sharding))}"
    return hashes


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
