"""Our own two-view crops; one side of `benchmarks.input`.

'core' is the function that a loader runs, in one thread of one process; 'threads' and 'processes' the whole pipeline
up to arrays on a CPU device, on all cores; 'core-profile' where the time of one core goes; 'memory-…' what 100,000
pictures leave behind.
"""

import statistics
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import serving

from maect_jax.data.batches.samples import Rows, TrainingChunks
from maect_jax.data.batches.slots import room
from maect_jax.data.batches.training import training_batches
from maect_jax.data.host import counters, crops, decode
from maect_jax.data.sources.open import open_source
from maect_jax.parallel.mesh import batch_sharding, make_mesh

VIEWS, SEED = 2, 0
MODES = ("core", "threads", "processes", "core-profile", "memory-threads", "memory-processes")


def chunks(source):
    """The function of a loader, from batch to batch."""
    rows = Rows(np.arange(serving.BATCH), serving.BATCH)
    load = TrainingChunks(source, rows, SEED, VIEWS, serving.SIZE, serving.SCALE, serving.RATIO, "error")
    columns, place = room(load.layout()), 0
    while True:
        notes = load(place, columns)
        if notes.error:
            raise notes.error
        place += 1
        yield rows.chunk


def pipeline(source, workers: int, size: int = serving.SIZE):
    """Batches on the device."""
    stream = training_batches(
        source,
        batch=serving.BATCH,
        seed=SEED,
        start_step=0,
        views=VIEWS,
        image_size=size,
        crop_scale=serving.SCALE,
        sharding=batch_sharding(make_mesh(devices=jax.devices()[:1])),
        workers=workers,
        resident_limit=0,
    )
    for batch in stream:
        yield len(jax.block_until_ready(batch)["id"])


def memory(source, workers: int) -> dict:
    """Bytes that this process and its loaders hold after every 10,000 of 100,000 pictures; shared pages count once."""
    held, done = [], 0
    for pictures in pipeline(source, workers, size=64):
        done += pictures
        if done // 10_000 > len(held):
            held.append((done, proportional_bytes()))
        if len(held) == 10:
            return {"bytes": held}


def proportional_bytes() -> int:
    """Proportional set size of this process and all below it."""
    total = 0
    for process in serving.processes():
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += 1024 * int(line.split()[1])
    return total


def profile(source, seconds: float) -> dict:
    """Median µs a picture of each part, by itself on a chunk of pictures, and of the whole; 'rest' is what is left."""
    rows = Rows(np.arange(serving.BATCH), serving.BATCH)
    load = TrainingChunks(source, rows, SEED, VIEWS, serving.SIZE, serving.SCALE, serving.RATIO, "error")
    out = np.empty((VIEWS, serving.SIZE, serving.SIZE, source.channels), np.uint8)
    parts: dict[str, list[float]] = {}

    def timed(name, do, *columns):
        began = time.thread_time()
        results = [do(*row) for row in zip(*columns)]
        parts.setdefault(name, []).append((time.thread_time() - began) / len(columns[0]))
        return results

    def crop(pixels, boxes):
        for box, view in zip(boxes, out):
            crops.resized_crop(pixels, box, view)

    columns = room(load.layout())
    until, place = time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        began = time.thread_time()
        load(place, columns)
        ids = columns["id"][rows.of(place)[1]].tolist()
        parts.setdefault("whole", []).append((time.thread_time() - began) / len(ids))
        encoded = timed("read", lambda i: source.read(i)[0], ids)
        pictures = timed("header", lambda e: decode.open_picture(e, source.channels, ""), encoded)
        boxes = timed("boxes", boxes_of, pictures, ids)
        pixels = timed("decode", lambda picture: picture.pixels(), pictures)
        timed("crops", crop, pixels, boxes)
        place += 1
    medians = {name: statistics.median(values) * 1e6 for name, values in parts.items()}
    medians["rest"] = 2 * medians["whole"] - sum(medians.values())
    return {"microseconds": medians}


def boxes_of(picture, sample_id):
    about = {"seed": SEED, "epoch": 0, "sample_id": sample_id, "scale": serving.SCALE, "ratio": serving.RATIO}
    return [counters.crop_box(picture.height, picture.width, view=view, **about) for view in range(VIEWS)]


def main() -> None:
    given = serving.arguments(__doc__, MODES)
    source = open_source(given.folder, "train")
    packages = ("jax", "numpy", "grain", "simplejpeg", "pillow", "cykooz-resizer")
    about = {"versions": {package: version(package) for package in packages}}
    workers = given.cores if "processes" in given.mode else 0
    if given.mode.startswith("memory"):
        serving.serve(lambda _: memory(source, workers), **about)
    elif given.mode == "core-profile":
        serving.serve(lambda seconds: profile(source, seconds), **about)
    elif given.mode == "core":
        serving.serve(serving.measured(chunks(source)), **about)
    else:
        serving.serve(serving.measured(pipeline(source, workers)), **about)


if __name__ == "__main__":
    main()
