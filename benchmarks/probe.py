"""What ten base rates of the linear probe cost beside one: seconds an epoch, warm, in turns.

    python -m benchmarks.probe [--repeats=25]

On cached features a second rate saves the gathering and normalising of the batch but not its own two matrix products,
so the ratio depends on what those cost. `limit` is the ratio that would remain if the one-rate epoch were as it is and
each further rate cost its multiplications alone, at the speed of a large matrix product on the same machine. From
pictures the encoder does nearly all the work, once for all rates.

Prints a table and writes benchmarks/results/probe.json.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.data.sources.base import ArraySource
from maect_jax.evaluation.probes import linear, linear_images
from maect_jax.evaluation.probes.linear_heads import PRESETS
from maect_jax.models.vit import ViT
from maect_jax.parallel.mesh import make_mesh

# kept rows, width, batch, classes: of the project's own recipes, then one width at several numbers of classes
CASES = {
    "digits": (2_587, 96, 256, 10),
    "imagenette": (8_523, 384, 1024, 10),
    "cifar10": (45_000, 192, 1024, 10),
    "20,000 x 768, 2 classes": (20_000, 768, 1024, 2),
    "20,000 x 768, 10 classes": (20_000, 768, 1024, 10),
    "20,000 x 768, 100 classes": (20_000, 768, 1024, 100),
}
PICTURES, PICTURE_BATCH, PICTURE_CLASSES = 1024, 256, 10
ENCODER = ViT(width=96, depth=4, heads=3, patch=4, image_size=32)


def preset_of(rates: int, repeats: int, batch: int):
    preset = PRESETS["maect-linear"].on("cls")
    return dataclasses.replace(preset, base_rates=preset.base_rates[:rates], epochs=repeats + 1, batch=batch)


def from_features(rates: int, repeats: int, rows: int, width: int, batch: int, classes: int):
    """The epochs of a probe on random features, a generator."""
    rng = np.random.default_rng(0)
    features = {"cls": rng.normal(size=(rows, width)).astype(np.float32)}
    return linear.train_epochs(features, rng.integers(0, classes, rows), classes, preset_of(rates, repeats, batch))


def from_pictures(rates: int, repeats: int):
    """The epochs of a probe on augmented random pictures, a generator."""
    rng = np.random.default_rng(0)
    side = ENCODER.image_size
    images = rng.integers(0, 256, (PICTURES, side, side, 3), np.uint8)
    source = ArraySource("noise", images, rng.integers(0, PICTURE_CLASSES, PICTURES))
    return linear_images.train_epochs(
        ENCODER,
        ENCODER.init(jax.random.key(0), jnp.zeros((1, ENCODER.grid**2, 3 * ENCODER.patch**2)))["params"],
        source,
        PICTURE_CLASSES,
        preset_of(rates, repeats, PICTURE_BATCH).fit(PICTURES),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        crop_scale=linear_images.CROP_SCALE,
        seed=0,
        mesh=make_mesh(devices=jax.devices()[:1]),
        workers=0,
        resident_limit=2 << 30,
        check=lambda: None,
    )


def seconds(*probes) -> list[list[float]]:
    """Seconds of each epoch of each probe but the first, in turns."""
    for probe in probes:
        next(probe)  # compiles
    found = [[] for _ in probes]
    while True:
        for times, probe in zip(found, probes):
            began = time.perf_counter()
            if next(probe, None) is None:
                return found
            times.append(time.perf_counter() - began)


def matmul_flops_per_second() -> float:
    """Of [1024, 768] x [768, 1000], the best of some."""
    multiply = jax.jit(partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    a, b = jnp.ones((1024, 768)), jnp.ones((768, 1000))
    multiply(a, b).block_until_ready()
    times = []
    for _ in range(50):
        began = time.perf_counter()
        multiply(a, b).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * 1024 * 768 * 1000 / min(times)


def compare(one: list[float], ten: list[float]) -> dict:
    median_one, median_ten = statistics.median(one), statistics.median(ten)
    return {
        "one_rate_seconds": median_one,
        "ten_rates_seconds": median_ten,
        "ratio": median_ten / median_one,
        "one_rate_fastest": min(one),
        "ratio_of_fastest": min(ten) / min(one),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    repeats = parser.parse_args().repeats
    speed, found = 0.0, {}
    for name, case in CASES.items():
        speed = max(speed, matmul_flops_per_second())
        found[name] = compare(*seconds(*(from_features(rates, repeats, *case) for rates in (1, 10))))
    for name, (rows, width, batch, classes) in CASES.items():
        flops_of_a_rate = 4 * (rows // batch) * batch * width * classes
        found[name]["limit"] = 1 + 9 * flops_of_a_rate / speed / found[name]["one_rate_fastest"]
    pictures = f"{PICTURES:,} pictures, {PICTURE_CLASSES} classes"
    found[pictures] = compare(*seconds(*(from_pictures(rates, max(repeats // 5, 1)) for rates in (1, 10))))
    machine = {
        "device": jax.devices()[0].device_kind,
        "cpu_count": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "matmul_gflops": round(speed / 1e9, 1),
    }
    path = Path(__file__).parent / "results" / "probe.json"
    path.parent.mkdir(exist_ok=True)
    cases = {name: dict(zip(("rows", "width", "batch", "classes"), case)) for name, case in CASES.items()}
    content = {"machine": machine, "repeats": repeats, "cases": cases, "results": found}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{'':27} {'one rate':>11} {'ten rates':>11} {'ratio':>6} {'fastest':>8} {'limit':>6}")
    for name, row in found.items():
        times = f"{1e3 * row['one_rate_seconds']:8.1f} ms {1e3 * row['ten_rates_seconds']:8.1f} ms"
        limit = f"{row['limit']:6.2f}" if "limit" in row else "     -"
        print(f"{name:27} {times} {row['ratio']:6.2f} {row['ratio_of_fastest']:8.2f} {limit}")


if __name__ == "__main__":
    main()
