"""EMAE against MAE: what k-NN, linear probe and fine-tuning reach for pictures decoded, operations and seconds.

    python -m benchmarks.emae --data cifar10=FOLDER --data imagenette=FOLDER [--scale cpu|gpu] [--workdir runs/emae]
    python -m benchmarks.emae --figures            draws docs/emae-<data>-<scale>.png from what was measured

The same encoder, decoder, pictures, rates and seeds; each point of a curve is a pre-training of its own, with its own
schedule from warm-up to zero, so that no point is a stop in the middle of a longer one. `parallel` is EMAE without
self-consistency (consistency_weight 0), at the longest length only: it tells what the parallel masks do from what the
agreement does. A picture costs EMAE what four pictures cost MAE, so its runs have a quarter of the epochs.

Runs take turns over the methods, seed by seed. A finished run is a row of `benchmarks/results/emae-<scale>.json` and is
not repeated: the same command goes on where it stopped, and `--minutes` ends it in time. Seconds are of the training
loop, input included, compilation and evaluation left out: pictures over the median rate of all runs of the method on
that data, so that other work on the machine meets all alike.

Nothing is chosen on the test pictures: all settings are below.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import time
from pathlib import Path

import jax
import numpy as np
import yaml
from etils import epath
from ml_collections import ConfigDict

from benchmarks.emae_figures import draw, verdicts
from maect_jax import config as settings
from maect_jax import config_checks, weights
from maect_jax.assemble import flops_per_update
from maect_jax.context import Run
from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.batches.resident import load_resident
from maect_jax.data.sources.base import ArraySource, Source
from maect_jax.data.sources.open import open_source
from maect_jax.data.sources.subset import SubsetSource
from maect_jax.evaluate import settings_of
from maect_jax.evaluation import suite
from maect_jax.finetuning.recipes import recipe_for
from maect_jax.finetuning.run import fine_tune
from maect_jax.parallel.mesh import make_mesh
from maect_jax.stages import run_stages
from maect_jax.terminal import use_compilation_cache
from maect_jax.training.logbook import Logbook
from maect_jax.training.stop import StopRequest

ROOT = Path(__file__).parents[1]
METHODS = {
    "mae": {"method": "mae"},
    "emae": {"method": "emae"},
    "parallel": {"method": "emae", "emae": {"consistency_weight": 0.0}},
}
PARTS = 4
LIGHT = {"rand_augment": None, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "drop_path": 0.0, "smoothing": 0.0}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the comparison is on one data set.

    Attributes:
      recipe: file and variant.
      model: settings of the model instead of the recipe's.
      train, test: pictures, the same number of each class as far as there are; None = all.
      epochs: of MAE, shortest first; EMAE has a quarter of each.
      batch, base_lr: of pre-training; the peak rate is base_lr * batch / 256 for all methods.
      finetune: epochs, batch and base rate of the fine-tuning on all labels: `mae-finetune` with crops and flips as
        its only regularisation, because the published one needs more updates than these runs have.
    """

    recipe: str
    model: dict
    train: int | None
    test: int | None
    epochs: tuple[int, ...]
    batch: int
    base_lr: float
    finetune: tuple[int, int, float]


SCALES = {
    "cpu": {
        "cifar10": Scale("configs/cifar10.py:small", {"patch": 8}, 3072, 2000, (8, 16, 32), 64, 4e-3, (6, 64, 4e-3)),
        "imagenette": Scale(
            "configs/imagenette.py:small",
            {"patch": 16, "image_size": 64},
            3072,
            2000,
            (8, 16, 32),
            64,
            4e-3,
            (6, 64, 4e-3),
        ),
    },
    "gpu": {
        "cifar10": Scale("configs/cifar10.py", {}, None, None, (16, 32, 64), 256, 8e-4, (10, 512, 2e-3)),
        "imagenette": Scale("configs/imagenette.py", {}, None, None, (32, 64, 128), 256, 8e-4, (20, 256, 2e-3)),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER", help="cifar10=…, imagenette=…")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--workdir", default="runs/emae")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further run after so many")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figures", action="store_true", help="only draw and tell what was measured")
    asked = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / f"emae-{asked.scale}.json"
    if not asked.figures:
        use_compilation_cache()
        folders = dict(pair.split("=", 1) for pair in asked.data)
        if unknown := folders.keys() - SCALES[asked.scale].keys():
            parser.error(f"--data: no scale for {', '.join(sorted(unknown))}")
        end = time.monotonic() + 60 * asked.minutes
        compare(folders, SCALES[asked.scale], asked.seeds, epath.Path(asked.workdir).resolve(), path, end)
    rows = read(path)["rows"]
    for name in dict.fromkeys(row["data"] for row in rows):
        of_data = with_seconds([row for row in rows if row["data"] == name])
        draw(of_data, ROOT / "docs" / f"emae-{name}-{asked.scale}.png")
        print(f"\n{name}\n\n{verdicts(of_data)}")


def compare(folders: dict, scales: dict[str, Scale], seeds: int, workdir: epath.Path, path: Path, end: float) -> None:
    """Does the runs that are missing in `path`, until `end` (of `time.monotonic`)."""
    held = {name: (hold(folder, "train"), hold(folder, "test")) for name, folder in folders.items()}
    with StopRequest() as stop:
        for seed in range(seeds):
            for i in range(max(len(scales[name].epochs) for name in folders)):
                for name, (train, test) in held.items():
                    scale = scales[name]
                    some = share(train, scale.train), share(test, scale.test)
                    last = i == len(scale.epochs) - 1
                    for method in [m for m in METHODS if last or m != "parallel"]:
                        key = {"data": name, "method": method, "length": i, "seed": seed}
                        if any(key.items() <= row.items() for row in read(path)["rows"]) or time.monotonic() > end:
                            continue
                        config = config_of(scale, method, scale.epochs[i], seed, len(some[0]))
                        row = key | measure(config, *some, scale, workdir / "-".join(map(str, key.values())), stop)
                        add(path, row, scale)
                        print(json.dumps(row), flush=True)


def hold(folder: str, split: str) -> ArraySource:
    """All pictures of a split in memory, read once for all runs."""
    source = open_source(folder, split)
    images, _ = load_resident(source)
    return ArraySource(f"{Path(folder).name}/{split}", images, source.labels, source.classes)


def share(source: Source, pictures: int | None) -> Source:
    """The first pictures of each class in turn, so many in all."""
    if pictures is None or pictures >= len(source):
        return source
    seen = np.zeros(len(source.classes), int)
    rank = np.empty(len(source), int)
    for i, label in enumerate(source.labels):
        rank[i], seen[label] = seen[label], seen[label] + 1
    rows = np.sort(np.lexsort((source.labels, rank))[:pictures])
    if isinstance(source, ArraySource):
        return ArraySource(source.name, source.images[rows], source.labels[rows], source.classes)
    return SubsetSource(source, rows)


def config_of(scale: Scale, method: str, epochs: int, seed: int, pictures: int) -> ConfigDict:
    """The settings of one pre-training."""
    config = settings.load(str(ROOT / scale.recipe), {"data.train": "in memory"})
    epochs = epochs if method == "mae" else epochs // PARTS
    config.update(seed=seed, stages=("pretrain",))
    config.model.update(scale.model)
    config.pretrain.update(epochs=epochs, batch=scale.batch, views=1, base_lr=scale.base_lr)
    config.pretrain.update(METHODS[method] | {"warmup_epochs": max(1, epochs // 8)})
    config.evaluate.every_epochs = 0
    settings.derive(config, pictures)
    if problems := config_checks.check(config):
        raise SystemExit("\n".join(problems))
    return config


def measure(
    config: ConfigDict, train: Source, test: Source, scale: Scale, workdir: epath.Path, stop: StopRequest
) -> dict:
    """Trains and evaluates in `workdir`, which is continued where it was left; what the row of this run holds."""
    (workdir / "pretrain").mkdir(parents=True, exist_ok=True)
    (workdir / "config.resolved.yaml").write_text(yaml.safe_dump(settings.plain(config)))
    mesh = make_mesh()
    logbook = Logbook(workdir)
    run = Run(config, workdir, mesh, train, test, logbook, stop, True, BadPictures("error"))
    try:
        run_stages(run)
    finally:
        logbook.close()
    subjects = weights.open_weights(str(workdir), mesh)
    place = suite.Place(mesh, workdir, stop, run.say)
    asked = settings_of(run)
    quick = dataclasses.replace(asked, only=("knn", "linear"), preset="maect")
    records = suite.evaluate(subjects, train, test, quick, place)
    names = {"knn": "maect-knn", "linear": "maect-linear"}
    found = {
        kind: next(r.value for r in records if r.protocol["name"] == name and r.metric == "accuracy")
        for kind, name in names.items()
    }
    found["finetune"] = finetuned(subjects[0], train, test, scale, workdir / "finetune", mesh, stop)
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    of_stage = [line for line in logged if line["stage"] == "pretrain" and "images_per_second" in line]
    updates = settings.updates_of(config, "pretrain", len(train))
    rates = sorted(line["images_per_second"] for line in of_stage)
    last = {k: of_stage[-1][k] for k in ("loss", "reconstruction_loss", "disagreement") if k in of_stage[-1]}
    for folder in ("features", "finetune"):
        shutil.rmtree(workdir / folder, ignore_errors=True)
    return {
        "epochs": config.pretrain.epochs,
        "updates": updates,
        "pictures": updates * config.pretrain.batch,
        "flops": updates * flops_per_update(config, "pretrain"),
        "images_per_second": statistics.median(rates),
        **found,
        **last,
    }


def finetuned(
    subject: weights.Weights, train: Source, test: Source, scale: Scale, folder: epath.Path, mesh, stop: StopRequest
) -> float:
    """Test accuracy after fine-tuning on all labels; the epoch is chosen on a held-out tenth of them."""
    encoder = subject.encoder
    epochs, batch, rate = scale.finetune
    recipe = recipe_for("mae-finetune", encoder.width, encoder.depth, encoder.patch)
    recipe = dataclasses.replace(recipe, base_lr=rate, batch=batch, **LIGHT)
    return fine_tune(
        subject.load(),
        encoder,
        train,
        test,
        np.arange(len(train)),
        recipe,
        mesh=mesh,
        folder=folder,
        seed=subject.seed,
        stop=stop,
        mean=subject.mean,
        std=subject.std,
        resize_ratio=subject.resize_ratio,
        provenance=subject.provenance,
        epochs=epochs,
    ).accuracy


def with_seconds(rows: list[dict]) -> list[dict]:
    """Rows of one data set with `seconds`, see above."""
    kinds = {row["method"] for row in rows}
    rate = {m: statistics.median(r["images_per_second"] for r in rows if r["method"] == m) for m in kinds}
    return [row | {"seconds": row["pictures"] / rate[row["method"]]} for row in rows]


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"machine": machine(), "scales": {}, "rows": []}


def add(path: Path, row: dict, scale: Scale) -> None:
    found = read(path)
    found["scales"][row["data"]] = dataclasses.asdict(scale)
    found["rows"].append(row)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    temporary.replace(path)


def machine() -> dict:
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    main()
