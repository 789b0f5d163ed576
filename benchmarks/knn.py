"""k-NN classification against faiss: the same neighbours and votes, on all cores of one CPU.

    python -m benchmarks.knn

Both sides start from float32 features on the host and end with a class for each query: unit length, exact search by
inner product, weighted vote. Ours is `maect_jax.evaluation.knn.classify`, compiled before the clock starts; the other
is `faiss.IndexFlatIP` and a vote in NumPy. Repetitions take turns, so that other work on the machine meets both alike.
Writes `benchmarks/results/knn.json`.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import faiss
import jax
import jaxlib
import numpy as np

from maect_jax.evaluation import knn
from maect_jax.parallel.mesh import make_mesh

BANK, QUERIES, WIDTH, CLASSES = 50_000, 10_000, 512, 1000
NEIGHBORS = (10, 200)
RESULT = Path(__file__).parent / "results" / "knn.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5, help="timed runs of each side (default 5)")
    repetitions = parser.parse_args().repetitions
    jax.config.update("jax_platforms", "cpu")
    faiss.omp_set_num_threads(os.cpu_count())
    bank, labels, query = clusters()
    mesh = make_mesh(devices=jax.devices()[:1])
    rows = []
    for k in NEIGHBORS:
        preset = replace(knn.PRESETS["maect-knn"], k=k)
        sides = {
            "ours": lambda preset=preset: knn.classify(mesh, bank, labels, query, preset, CLASSES),
            "faiss": lambda preset=preset: classify_faiss(bank, labels, query, preset),
        }
        answer = {name: side() for name, side in sides.items()}  # compiles, and warms the caches
        seconds = {name: [] for name in sides}
        for _ in range(repetitions):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                seconds[name].append(time.perf_counter() - start)
        rows.append({"k": k, "agreement": float((answer["ours"] == answer["faiss"]).mean()), "seconds": seconds})
    for row in rows:
        row |= {f"{name}_{of}": getattr(np, of)(row["seconds"][name]) for name in sides for of in ("median", "min")}
        row |= {f"ratio_{of}": row[f"ours_{of}"] / row[f"faiss_{of}"] for of in ("median", "min")}
    report(rows)


def clusters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bank float32 [50000, 512] in a thousand overlapping classes, its labels, and queries [10000, 512]."""
    rng = np.random.default_rng(0)
    center = rng.standard_normal((CLASSES, WIDTH), np.float32)
    labels = rng.integers(0, CLASSES, BANK + QUERIES)
    x = center[labels] + 3 * rng.standard_normal((BANK + QUERIES, WIDTH), np.float32)
    return x[:BANK], labels[:BANK].astype(np.int32), x[BANK:]


def classify_faiss(bank: np.ndarray, labels: np.ndarray, query: np.ndarray, preset: knn.KnnPreset) -> np.ndarray:
    """The same protocol with faiss and NumPy: int [queries]."""
    bank, query = bank.copy(), query.copy()
    faiss.normalize_L2(bank)
    faiss.normalize_L2(query)
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank)
    similarity, neighbor = index.search(query, preset.k)
    cell = np.arange(len(query))[:, None] * CLASSES + labels[neighbor]
    weight = np.exp((similarity - similarity[:, :1]) / preset.temperature)
    votes = np.bincount(cell.ravel(), weight.ravel(), len(query) * CLASSES)
    return votes.reshape(-1, CLASSES).argmax(axis=1)


def report(rows: list[dict]) -> None:
    """Prints the table and writes the record."""
    print(f"bank {BANK} x {WIDTH}, {QUERIES} queries, {os.cpu_count()} cores; seconds, median (least)")
    print(f"{'k':>4} {'ours':>15} {'faiss':>15} {'ratio':>15} {'agreement':>10}")
    for row in rows:
        cells = [f"{row[f'{name}_median']:.2f} ({row[f'{name}_min']:.2f})" for name in ("ours", "faiss", "ratio")]
        print(f"{row['k']:>4} " + " ".join(f"{cell:>15}" for cell in cells) + f" {row['agreement']:>10.4f}")
    machine = {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (jax, jaxlib, np, faiss)},
    }
    settings = {"bank": BANK, "queries": QUERIES, "width": WIDTH, "classes": CLASSES, "chunk": knn.CHUNK}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
