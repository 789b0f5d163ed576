"""Ids, labels and augmented pixels of step s are functions of (seed, s), to the bit, however they are made.

Every row of a batch is told by a SHA-256 of its id, its label and the float32 pixels of its two views, minimal and
strong. A set of JPEGs of unequal sizes takes the streamed path, one of equal sizes the resident path; both hold a
broken picture, whose neighbour takes its place. Two processes are joined on this machine, as hosts are.
"""

import collections
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.batches.evaluation import EvaluationBatches
from maect_jax.data.batches.training import training_batches
from maect_jax.data.device.augment import IMAGENET_MEAN, IMAGENET_STD, make_views
from maect_jax.data.host.counters import step_ids
from maect_jax.data.sources.base import ArraySource, Source
from maect_jax.data.sources.open import open_source
from maect_jax.parallel.mesh import batch_sharding, make_mesh

N, BATCH, STEPS, SIZE, SEED = 37, 16, 5, 32, 11  # two steps an epoch
BROKEN = 20  # id of the picture that can not be read
EVALUATED = 37  # pictures in batches of 16: the last one is padded
LARGE = 4000  # pictures of a set whose epoch is longer than anything that is read ahead
PATHS = ("streamed", "resident")


# ------------------------------------------------------------------------------------------- what is run, here or there


def write_pictures(root: Path) -> None:
    """`streamed`: JPEGs of unequal sizes, some large enough to be decoded at a half; `resident`: PNGs of one size."""
    rng = np.random.default_rng(0)
    for i in range(N):
        height, width = rng.integers(30, 260, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 9, 3), np.uint8))
        for path, kind, size in (("streamed", "jpg", (int(width), int(height))), ("resident", "png", (48, 40))):
            file = root / path / "train" / f"class{i // 10}" / f"{i:02}.{kind}"
            file.parent.mkdir(parents=True, exist_ok=True)
            coarse.resize(size, Image.Resampling.BICUBIC).save(file)
            if i == BROKEN:
                file.write_bytes(file.read_bytes()[:40])


@partial(jax.jit, static_argnames="size")
def _both(batch, epoch, size):
    settings = {"seed": SEED, "epoch": epoch, "views": 2, "size": size, "scale": (0.2, 1.0)}
    settings |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return [make_views(batch, augmentation=name, **settings) for name in ("minimal", "strong")]


def parts(array: jax.Array, axis: int) -> dict[int, np.ndarray]:
    """This process's rows of a global array, by their number."""
    rows = {}
    for shard in array.addressable_shards:
        start = shard.index[axis].start or 0
        for i, row in enumerate(np.moveaxis(np.asarray(shard.data), axis, 0)):
            rows[start + i] = row
    return rows


def hashes(folder, path: str, mesh, start: int = 0, workers: int = 0) -> dict[str, str]:
    """'step/row' -> hash, for this process's rows of steps `start` to STEPS."""
    batches = training_batches(
        open_source(str(Path(folder) / path), "train"),
        batch=BATCH,
        seed=SEED,
        start_step=start,
        views=2,
        image_size=SIZE,
        crop_scale=(0.2, 1.0),
        sharding=batch_sharding(mesh),
        workers=workers,
        bad=BadPictures("skip", limit=0.1),
    )
    assert batches.resident == (path == "resident")
    found = {}
    try:
        for step in range(start, STEPS):
            batch = next(batches)
            minimal, strong = _both(batch, jnp.int32(step // batches.steps_per_epoch), SIZE)
            columns = [parts(x, 0) for x in (batch["id"], batch["label"])] + [parts(x, 1) for x in (minimal, strong)]
            for row in columns[0]:
                content = b"".join(column[row].tobytes() for column in columns)
                found[f"{step}/{row}"] = hashlib.sha256(content).hexdigest()
    finally:
        batches.close()
    return found


class Counted(Source):
    """A source that remembers which pictures were read."""

    def __init__(self, source: Source):
        self.source, self.read_ids = source, []
        self.name, self.classes, self.labels, self.channels = (
            getattr(source, name) for name in ("name", "classes", "labels", "channels")
        )

    def __len__(self):
        return len(self.source)

    def read(self, index):
        self.read_ids.append(int(index))
        return self.source.read(index)


def in_memory(n: int) -> ArraySource:
    images = np.random.default_rng(1).integers(0, 256, (n, 8, 8, 3), np.uint8)
    return ArraySource("memory", images, np.arange(n) % 7)


def evaluated(mesh) -> dict:
    """This process's share of a pass over EVALUATED pictures, and which of them it has read."""
    source = Counted(in_memory(EVALUATED))
    rows = []
    settings = {"batch": BATCH, "image_size": 8, "resize_ratio": 1.0, "sharding": batch_sharding(mesh)}
    for step, batch in enumerate(EvaluationBatches(source, **settings)):
        columns = {name: parts(batch[name], 0) for name in ("id", "label", "valid", "image")}
        for row, sample_id in columns["id"].items():
            image = columns["image"][row]
            right = np.array_equal(image, source.source.images[sample_id]) if sample_id >= 0 else not image.any()
            place = step * BATCH + row
            rows.append([place, int(sample_id), int(columns["label"][row]), bool(columns["valid"][row]), bool(right)])
    return {"rows": rows, "read": sorted(source.read_ids)}


def trained_on(mesh) -> dict:
    """Which ids this process was given in three steps of a large streamed set, and which it has read."""
    source = Counted(in_memory(LARGE))
    batches = training_batches(
        source,
        batch=BATCH,
        seed=SEED,
        start_step=0,
        views=1,
        image_size=8,
        crop_scale=(0.2, 1.0),
        sharding=batch_sharding(mesh),
        resident_limit=0,
    )
    given = [int(i) for _ in range(3) for i in parts(next(batches)["id"], 0).values()]
    batches.close()
    return {"given": given, "read": source.read_ids}


def one_of_two(process: int, port: int, folder: str) -> None:
    """What each of two processes does: its results go to a file of its own."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, initialization_timeout=60)
    mesh = make_mesh()
    results = {path: hashes(folder, path, mesh) for path in PATHS}
    results |= {"evaluated": evaluated(mesh), "trained_on": trained_on(mesh), "devices": jax.device_count()}
    Path(folder, f"process{process}.json").write_text(json.dumps(results))
    jax.distributed.shutdown()


# ------------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("counters")
    write_pictures(root)
    return root


def alone():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """On one device, loaded by threads, in one go: path -> hashes."""
    return {path: hashes(folder, path, alone()) for path in PATHS}


@pytest.fixture(scope="module")
def two_processes(folder):
    """Results of two processes with one device each, joined over the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).resolve()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "PYTHONPATH": os.pathsep.join([str(here.parents[2]), str(here.parent), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("XLA_FLAGS", None)
    scripts = [f"import test_counters; test_counters.one_of_two({i}, {port}, {str(folder)!r})" for i in (0, 1)]
    logs = [(folder / f"log{i}").open("w+") for i in (0, 1)]
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=log, stderr=log)
        for script, log in zip(scripts, logs)
    ]
    try:
        end = time.monotonic() + 180
        while None in (codes := [process.poll() for process in processes]) and time.monotonic() < end:
            if any(codes):  # the other would wait for it
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [log.seek(0) or log.read()[-3000:] for log in logs]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return [json.loads((folder / f"process{i}.json").read_text()) for i in (0, 1)]


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("path", PATHS)
def test_pixels_differ_by_epoch_and_id_and_the_broken_picture_gives_its_place(uninterrupted, folder, path):
    wanted = np.concatenate([step_ids(SEED, step, BATCH, N) for step in range(STEPS)])
    assert BROKEN in wanted, "or nothing is shown about it"
    bad = BadPictures("skip", 0.1, folder / path / "bad_images.jsonl")
    source = open_source(str(folder / path), "train")
    settings = {"views": 2, "image_size": SIZE, "crop_scale": (0.2, 1.0), "sharding": batch_sharding(alone())}
    batches = training_batches(source, batch=BATCH, seed=SEED, start_step=0, bad=bad, **settings)
    found = np.concatenate([np.asarray(next(batches)["id"]) for _ in range(STEPS)])
    batches.close()
    np.testing.assert_array_equal(found, np.where(wanted == BROKEN, BROKEN + 1, wanted))
    assert bad.count(source) == 1
    assert len(uninterrupted[path]) == STEPS * BATCH
    different = {(place // BATCH // (N // BATCH), sample_id) for place, sample_id in enumerate(found.tolist())}
    assert len(set(uninterrupted[path].values())) == len(different), "one by epoch and id"


@pytest.mark.parametrize("path", PATHS)
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(uninterrupted, folder, path):
    for start in (1, 2, 4):  # within an epoch, at its end, two epochs on
        expected = {place: x for place, x in uninterrupted[path].items() if int(place.split("/")[0]) >= start}
        assert hashes(folder, path, alone(), start) == expected


@pytest.mark.parametrize("workers", [2, 4])
def test_loader_processes_change_nothing(uninterrupted, folder, workers):
    assert hashes(folder, "streamed", alone(), workers=workers) == uninterrupted["streamed"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("devices", [2, 8])
def test_devices_change_nothing(uninterrupted, folder, path, devices):
    assert hashes(folder, path, make_mesh(devices=jax.devices()[:devices])) == uninterrupted[path]


@pytest.mark.parametrize("path", PATHS)
def test_two_processes_see_together_what_one_sees(uninterrupted, two_processes, path):
    first, second = (process[path] for process in two_processes)
    assert [process["devices"] for process in two_processes] == [2, 2]
    assert len(first) == len(second) == STEPS * BATCH // 2 and not first.keys() & second.keys()
    assert first | second == uninterrupted[path]


def test_each_process_reads_only_what_it_trains_on(two_processes):
    shares = [process["trained_on"] for process in two_processes]
    order = np.stack([step_ids(SEED, step, BATCH, LARGE) for step in range(LARGE // BATCH)])
    for share, own in zip(shares, np.split(order, 2, axis=1)):
        assert share["given"] == own[:3].ravel().tolist()
        assert collections.Counter(share["given"]) <= collections.Counter(share["read"])
        assert len(share["read"]) < own.size and set(share["read"]) <= set(own.ravel().tolist())
    assert not set(shares[0]["read"]) & set(shares[1]["read"])


# ----------------------------------------------------------------------------------------------------------- evaluation


def assert_each_once(shares: list[dict]) -> None:
    rows = sorted(row for share in shares for row in share["rows"])
    padded = -(-EVALUATED // BATCH) * BATCH
    place, ids, labels, valid, right = (np.asarray(column) for column in zip(*rows))
    np.testing.assert_array_equal(place, np.arange(padded))
    np.testing.assert_array_equal(valid, place < EVALUATED)
    np.testing.assert_array_equal(ids, np.where(valid, place, -1))
    np.testing.assert_array_equal(labels, np.where(valid, place % 7, -1))
    assert right.all()
    for share in shares:
        assert share["read"] == sorted(row[1] for row in share["rows"] if row[3])


def test_evaluation_counts_each_picture_once_and_masks_the_padding():
    assert_each_once([evaluated(alone())])


def test_two_processes_evaluate_each_picture_once_and_read_only_their_own(two_processes):
    shares = [process["evaluated"] for process in two_processes]
    assert_each_once(shares)
    read = [set(share["read"]) for share in shares]
    assert not read[0] & read[1] and read[0] | read[1] == set(range(EVALUATED)) and min(map(len, read)) >= BATCH // 2
