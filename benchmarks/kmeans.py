"""K-means against scikit-learn: full Lloyd to convergence, on all cores of one CPU.

    python -m benchmarks.kmeans

Both sides start from float32 features on the host and end with inertia, centres and assignment of all rows, with one
tolerance and one maximum of iterations. From equal centres both do the same iterations; from seeds of their own the
number of iterations differs from run to run, hence also the time; it stands beside it. Ours is
`evaluation.clustering.kmeans`, compiled before the clock starts; repetitions take turns, so that other work on the
machine meets both alike. scikit-learn's iterations use all cores by OpenMP; its seeds use the matrix library's threads,
of which it gets one here: more of them wait for each other wherever a core is busy, which made seeds ten times slower.
The mini-batch runs that large sets get stand beside, with the inertia they give away.
Writes `benchmarks/results/kmeans.json`.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import jax
import jaxlib
import numpy as np
import sklearn
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from maect_jax.evaluation.clustering import kmeans
from maect_jax.parallel.mesh import make_mesh

ROWS, WIDTH, CLUSTERS, SOURCES = 50_000, 512, 100, 200
RESULT = Path(__file__).parent / "results" / "kmeans.json"
CASES = {"equal centres": 1, "1 restart": 1, "3 restarts": 3}  # and the number of restarts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5, help="timed runs of each side (default 5)")
    repetitions = parser.parse_args().repetitions
    load = [os.getloadavg()[0]]
    jax.config.update("jax_platforms", "cpu")
    features = mixture()
    mesh = make_mesh(devices=jax.devices()[:1])

    def ours(restarts: int, seed: int, centres=None) -> dict:
        centres = None if centres is None else centres[None]
        found = kmeans.lloyd(mesh, features, CLUSTERS, restarts=restarts, seed=seed, centres=centres)
        return {"inertia": float(found.inertia.min()), "iterations": int(found.iterations.sum())}

    def theirs(restarts: int, seed: int, centres=None) -> dict:
        init = "k-means++" if centres is None else centres
        model = KMeans(CLUSTERS, init=init, n_init=restarts, max_iter=300, tol=1e-4, random_state=seed)
        with threadpool_limits(1, "blas"):
            found = model.fit(features)
        # that of the best restart alone is told
        return {"inertia": float(found.inertia_), "iterations": found.n_iter_ if restarts == 1 else None}

    def drawn(restarts: int, seed: int, centres=None) -> dict:
        found = kmeans.mini_batch(mesh, features, CLUSTERS, restarts=restarts, seed=seed)
        return {"inertia": float(found.inertia.min()), "iterations": int(found.iterations.sum())}

    rows = []
    for case, restarts in CASES.items():
        given = case == "equal centres"
        sides = {"ours": ours, "sklearn": theirs} | ({} if given else {"mini_batch": drawn})
        runs = {name: [] for name in sides}
        for name in ("ours", "mini_batch"):  # compiles
            if name in sides:
                sides[name](restarts, 0, features[:CLUSTERS] if given else None)
        for seed in range(repetitions):
            start_kd = features[CLUSTERS * seed :][:CLUSTERS] if given else None
            for name, side in sides.items():
                start = time.perf_counter()
                found = side(restarts, seed, start_kd)
                runs[name].append(found | {"seconds": time.perf_counter() - start})
                print(f"{case}, {name}: {runs[name][-1]}", flush=True)
        rows.append({"case": case, "restarts": restarts} | summary(runs) | {"runs": runs})
    report(rows, [*load, os.getloadavg()[0]])


def mixture() -> np.ndarray:
    """Float32 [50000, 512]: two hundred overlapping Gaussians, twice the clusters that are looked for."""
    rng = np.random.default_rng(0)
    mean = rng.standard_normal((SOURCES, WIDTH), np.float32)
    return mean[rng.integers(0, SOURCES, ROWS)] + 2 * rng.standard_normal((ROWS, WIDTH), np.float32)


def summary(runs: dict[str, list[dict]]) -> dict:
    """Medians and least of seconds, and ours over theirs."""
    found = {}
    for name, results in runs.items():
        seconds = [run["seconds"] for run in results]
        found |= {f"{name}_median": float(np.median(seconds)), f"{name}_min": min(seconds)}
        found[f"{name}_inertia"] = float(np.median([run["inertia"] for run in results]))
        if results[0]["iterations"]:
            found[f"{name}_iterations"] = float(np.median([run["iterations"] for run in results]))
    ratios = {f"ratio_{of}": found[f"ours_{of}"] / found[f"sklearn_{of}"] for of in ("median", "min", "inertia")}
    return found | ratios


def report(rows: list[dict], load: list[float]) -> None:
    """Prints the table and writes the record."""
    print(f"{ROWS} x {WIDTH}, {CLUSTERS} clusters, {os.cpu_count()} cores; seconds, median (least)")
    names = ("ours", "sklearn", "ratio", "mini_batch")
    print(f"{'':14}" + "".join(f"{name:>18}" for name in names) + f"{'inertia ratio':>18}")
    for row in rows:
        cells = [f"{row[f'{n}_median']:.2f} ({row[f'{n}_min']:.2f})" if f"{n}_min" in row else "" for n in names]
        print(f"{row['case']:14}" + "".join(f"{cell:>18}" for cell in cells) + f"{row['ratio_inertia']:>18.5f}")
    machine = {
        "cores": os.cpu_count(),
        "load_before_and_after": load,
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (jax, jaxlib, np, sklearn)},
    }
    settings = {"rows": ROWS, "width": WIDTH, "clusters": CLUSTERS, "gaussians": SOURCES, "tolerance": 1e-4}
    settings |= {"max_iterations": 300, "mini_batch": {"batch": kmeans.batch_size(CLUSTERS), "steps": kmeans.STEPS}}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
