"""EMAE against MAE: what k-NN, linear probe and fine-tuning reach for pictures decoded, operations and seconds.

    python -m benchmarks.emae --data cifar10=FOLDER --data imagenette=FOLDER [--scale cpu|gpu] [--workdir runs/emae]
    python -m benchmarks.emae --figures            draws docs/emae-<data>-<scale>.png from what was measured

The same encoder, decoder, pictures, batch, peak rate and seeds; each point of a curve is a pre-training of its own,
with its own schedule, an eighth of the updates to warm up and then down to zero, so that no point is a stop in the
middle of a longer one. A picture costs EMAE what four pictures cost MAE, so its runs have a quarter of the epochs, and
a quarter of the updates; lengths whose eighth is not a whole number of epochs are left out. `parallel` is EMAE without
self-consistency (consistency_weight 0), at the longest length only: it tells what the parallel masks do from what the
agreement does.

A finished run is a row of `benchmarks/results/emae-<scale>.json` and is not repeated: the same command goes on where it
stopped, and `--minutes` ends it in time; rows of other settings are dropped. Seconds are updates by the seconds of one,
which are measured in turns, method after method in one process, so that other work on the machine meets all alike.

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
from maect_jax.assemble import assemble, compile_for, flops_per_update, source_shapes
from maect_jax.context import Run
from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.batches.resident import load_resident
from maect_jax.data.batches.training import training_batches
from maect_jax.data.sources.base import ArraySource, Source
from maect_jax.data.sources.open import open_source
from maect_jax.data.sources.subset import SubsetSource
from maect_jax.evaluate import settings_of
from maect_jax.evaluation import suite
from maect_jax.finetuning.recipes import recipe_for
from maect_jax.finetuning.run import fine_tune
from maect_jax.parallel.mesh import batch_sharding, make_mesh
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
WARMUP = 8  # epochs to one of warm-up
TIMED = 40  # updates of each method
LIGHT = {"rand_augment": None, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "drop_path": 0.0, "smoothing": 0.0}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the comparison is on one data set.

    Attributes:
      recipe: file and variant.
      model: settings of the model instead of the recipe's.
      train, test: pictures, the same number of each class as far as there are; None = all.
      epochs: of MAE, shortest first; EMAE has a quarter of each that is a multiple of 32.
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
        "cifar10": Scale("configs/cifar10.py", {}, None, None, (32, 64, 128), 256, 8e-4, (10, 512, 2e-3)),
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
    found = read(path)
    for name in dict.fromkeys(row["data"] for row in found["rows"]):
        each = found["seconds_an_update"][name]
        of_data = [r | {"seconds": r["updates"] * each[r["method"]]} for r in found["rows"] if r["data"] == name]
        draw(of_data, ROOT / "docs" / f"emae-{name}-{asked.scale}.png")
        print(f"\n{name}\n\n{verdicts(of_data)}")


def compare(folders: dict, scales: dict[str, Scale], seeds: int, workdir: epath.Path, path: Path, end: float) -> None:
    """Does the runs that are missing in `path`, until `end` (of `time.monotonic`)."""
    held = {}
    for name, folder in folders.items():
        sizes = {"train": scales[name].train, "test": scales[name].test}
        held[name] = tuple(share(hold(folder, split), size) for split, size in sizes.items())
        found, settled = read(path), json.loads(json.dumps(dataclasses.asdict(scales[name])))
        if found["scales"].get(name) != settled:
            found["rows"] = [row for row in found["rows"] if row["data"] != name]
            found["seconds_an_update"].pop(name, None)
            found["scales"][name] = settled
            write(path, found)
        time_updates(path, name, scales[name], held[name][0])
    with StopRequest() as stop:
        for seed in range(seeds):
            for name, pictures in held.items():
                for method, epochs in runs_of(scales[name]):
                    key = {"data": name, "method": method, "epochs": epochs, "seed": seed}
                    if any(key.items() <= row.items() for row in read(path)["rows"]) or time.monotonic() > end:
                        continue
                    config = config_of(scales[name], method, epochs, seed, len(pictures[0]))
                    folder = workdir / "-".join(map(str, key.values()))
                    found = read(path)
                    found["rows"].append(key | measure(config, *pictures, scales[name], folder, stop))
                    write(path, found)
                    print(json.dumps(found["rows"][-1]), flush=True)


def runs_of(scale: Scale) -> list[tuple[str, int]]:
    """(method, its epochs), shortest first."""
    found = []
    for epochs in scale.epochs:
        found.append(("mae", epochs))
        if epochs % (PARTS * WARMUP) == 0:
            found.append(("emae", epochs // PARTS))
    return [*found, ("parallel", scale.epochs[-1] // PARTS)]


def time_updates(path: Path, name: str, scale: Scale, train: Source) -> None:
    """Writes the seconds of an update of each method, medians of updates that take turns, where they are missing."""
    found = read(path)
    if name in found["seconds_an_update"]:
        return
    mesh, sides = make_mesh(), {}
    for method in METHODS:
        config = config_of(scale, method, WARMUP, 0, len(train))
        assembled = assemble(config, "pretrain", len(train), mesh)
        wanted = source_shapes(config, "pretrain", mesh)
        step, _, shardings = compile_for(assembled, mesh, wanted)
        state = jax.jit(assembled.first_state, out_shardings=shardings)({})
        batches = training_batches(
            train,
            batch=assembled.batch,
            seed=0,
            start_step=0,
            views=assembled.views,
            image_size=config.model.image_size,
            crop_scale=assembled.crop_scale,
            sharding=batch_sharding(mesh),
        )
        sides[method] = [step, state, batches, []]
    for _ in range(TIMED):
        for side in sides.values():
            began = time.perf_counter()
            side[1], metrics, _ = side[0](side[1], next(side[2]))
            jax.block_until_ready(metrics)
            side[3].append(time.perf_counter() - began)
    found = read(path)
    found["seconds_an_update"][name] = {m: statistics.median(side[3][2:]) for m, side in sides.items()}  # 2 warm up
    write(path, found)


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
    config.update(seed=seed, stages=("pretrain",))
    config.model.update(scale.model)
    config.pretrain.update(epochs=epochs, batch=scale.batch, views=1, base_lr=scale.base_lr)
    config.pretrain.update(METHODS[method] | {"warmup_epochs": epochs // WARMUP})
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
    last = [line for line in logged if line["stage"] == "pretrain" and "loss" in line][-1]
    last = {key: last[key] for key in ("loss", "reconstruction_loss", "disagreement") if key in last}
    updates = settings.updates_of(config, "pretrain", len(train))
    for folder in ("features", "finetune"):
        shutil.rmtree(workdir / folder, ignore_errors=True)
    return {
        "updates": updates,
        "pictures": updates * config.pretrain.batch,
        "flops": updates * flops_per_update(config, "pretrain"),
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


def read(path: Path) -> dict:
    """What was measured; of a new file the frame alone."""
    if path.exists():
        return json.loads(path.read_text())
    return {"machine": machine(), "scales": {}, "seconds_an_update": {}, "rows": []}


def write(path: Path, found: dict) -> None:
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
