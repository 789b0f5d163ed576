"""Logistic regression against scikit-learn: the same problems to the same distance from the optimum, on one CPU.

    python -m benchmarks.logistic

Both sides start from float32 features on the host and end with weights. Ours solves the problems of a case at once with
`evaluation.probes.logistic_solver.solve`, compiled before the clock starts; scikit-learn's `LogisticRegression`
(L-BFGS, no intercept, float64) solves them one after the other, each at the loosest power of ten as tolerance with
which its objective comes within 1e-6 of ours, which itself is bound to lie about as near to the optimum. Objectives are
computed in float64; 'above' compares them with the lower of the two. Repetitions take turns, so that other work on the
machine meets both alike. Writes `benchmarks/results/logistic.json`.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jaxlib
import numpy as np
import scipy
import sklearn
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

from maect_jax.evaluation.probes.logistic import PRESETS
from maect_jax.evaluation.probes.logistic_solver import TOLERANCE, solve
from maect_jax.parallel.mesh import make_mesh

SHOTS, SPLITS, WIDTH = 5, 3, 384
SWEEP_ROWS, SWEEP_WIDTH, SWEEP_CLASSES = 1000, 64, 10
TOLERANCES = [10.0**-power for power in range(4, 11)]
RESULT = Path(__file__).parent / "results" / "logistic.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5, help="timed runs of each side (default 5)")
    repetitions = parser.parse_args().repetitions
    load = [os.getloadavg()[0]]
    mesh, rows = make_mesh(), []
    for case, (x, y, l2) in cases().items():
        classes = int(y.max()) + 1

        def ours(x=x, y=y, l2=l2, classes=classes) -> np.ndarray:
            return np.asarray(solve(mesh, x, y, l2, classes).weights_sdc)

        began = time.perf_counter()
        found = {"ours": objectives(x, y, l2, ours())}
        compiled = time.perf_counter() - began
        tolerance = loosest(x, y, l2, found["ours"])

        def theirs(x=x, y=y, l2=l2, tolerance=tolerance) -> np.ndarray:
            return np.stack([scikit_learn(*problem) for problem in zip(*alone(x, y, l2), tolerance)])

        sides = {"ours": ours, "sklearn": theirs}
        found["sklearn"] = objectives(x, y, l2, theirs())
        seconds = {name: [] for name in sides}
        for _ in range(repetitions):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                seconds[name].append(time.perf_counter() - start)
        row = {"case": case, "problems": len(l2), "rows": x.shape[1], "width": x.shape[2], "classes": classes}
        row |= {"l2": l2.tolist(), "sklearn_tolerance": tolerance, "first_call": compiled, "seconds": seconds}
        row |= {f"{name}_{of}": float(getattr(np, of)(seconds[name])) for name in sides for of in ("median", "min")}
        row |= {f"ratio_{of}": row[f"ours_{of}"] / row[f"sklearn_{of}"] for of in ("median", "min")}
        row |= {f"{name}_objective": value.tolist() for name, value in found.items()}
        least = np.minimum(*found.values())
        row |= {f"{name}_above": float((value / least - 1).max()) for name, value in found.items()}
        rows.append(row)
        print(f"{case}: done", flush=True)
    report(rows, [*load, os.getloadavg()[0]])


def cases() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Features float32 [problems or 1, rows, width], labels [problems or 1, rows] and l2 [problems] by name."""
    found = {}
    for classes in (200, 10):
        features, labels = zip(*(few_shot(classes, seed) for seed in range(SPLITS)))
        l2 = np.full(SPLITS, PRESETS["maect-logreg"].strengths[0] / (classes * SHOTS))
        found[f"{classes} classes x {SHOTS}, {SPLITS} splits"] = np.stack(features), np.stack(labels), l2
    x, y = raw()
    strengths = np.array(PRESETS["dinov2-logreg"].strengths)[12:24:4]
    found[f"{SWEEP_CLASSES} classes, {len(strengths)} of dinov2's C"] = x[None], y[None], strengths / len(x)
    return found


def few_shot(classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One split: class means and as much noise, in dimensions of scale 3 to 0.3; rows centred and of unit length."""
    rng = np.random.default_rng(seed)
    scale = np.geomspace(3, 0.3, WIDTH)
    y = np.repeat(np.arange(classes), SHOTS)
    x = (rng.normal(size=(classes, WIDTH))[y] + rng.normal(size=(y.size, WIDTH))) * scale
    x -= x.mean(axis=1, keepdims=True)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), y


def raw() -> tuple[np.ndarray, np.ndarray]:
    """Features as an encoder may give them: around an offset, in dimensions of scale 10 to 0.1."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, SWEEP_CLASSES, SWEEP_ROWS)
    x = 0.5 * rng.normal(size=(SWEEP_CLASSES, SWEEP_WIDTH))[y] + rng.normal(size=(SWEEP_ROWS, SWEEP_WIDTH))
    x = x * np.geomspace(10, 0.1, SWEEP_WIDTH) + 3 * rng.normal(size=SWEEP_WIDTH)
    return x.astype(np.float32), y


def alone(x, y, l2) -> tuple[list, list, list]:
    """Features in float64, labels and l2 of each problem."""
    problems = range(len(l2))
    return [x[i % len(x)].astype(np.float64) for i in problems], [y[i % len(y)] for i in problems], l2.tolist()


def scikit_learn(x, y, l2: float, tolerance: float) -> np.ndarray:
    """Weights [width, classes] by scikit-learn."""
    model = LogisticRegression(C=1 / (l2 * len(y)), fit_intercept=False, tol=tolerance, max_iter=20_000)
    return model.fit(x, y).coef_.T


def objective(x, y, l2: float, weights) -> float:
    logits = x @ weights.astype(np.float64)
    loss = logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
    return loss.mean() + l2 / 2 * np.square(weights.astype(np.float64)).sum()


def objectives(x, y, l2, weights) -> np.ndarray:
    return np.array([objective(*problem) for problem in zip(*alone(x, y, l2), weights)])


def loosest(x, y, l2, target: np.ndarray) -> list[float]:
    """For each problem the loosest tolerance with which scikit-learn comes near enough to the target, else the last."""
    chosen = []
    for problem, least in zip(zip(*alone(x, y, l2)), target):
        for tolerance in TOLERANCES:
            if objective(*problem, scikit_learn(*problem, tolerance)) <= least * (1 + TOLERANCE):
                break
        chosen.append(tolerance)
    return chosen


def report(rows: list[dict], load: list[float]) -> None:
    """Prints the table and writes the record."""
    print(f"{os.cpu_count()} cores; seconds, median (least); share by which the worst objective is above the optimum")
    names = ("ours", "sklearn", "ratio")
    print(f"{'':30}" + "".join(f"{name:>16}" for name in names) + "".join(f"{name:>11}" for name in names[:2]))
    for row in rows:
        cells = [f"{row[f'{name}_median']:.3f} ({row[f'{name}_min']:.3f})" for name in names]
        above = [f"{row[f'{name}_above']:.1e}" for name in names[:2]]
        print(f"{row['case']:30}" + "".join(f"{c:>16}" for c in cells) + "".join(f"{c:>11}" for c in above))
    machine = {
        "cores": os.cpu_count(),
        "load_before_and_after": load,
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (jax, jaxlib, np, scipy, sklearn)},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine, "target": TOLERANCE, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
