"""Curves and verdicts of `benchmarks.emae`: what is reached for what it costs, over seeds."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

METRICS = {"knn": "k-NN", "linear": "linear probe", "finetune": "fine-tuning"}
COSTS = {"pictures": "pictures decoded", "flops": "operations", "seconds": "seconds of training"}
NAMES = {"mae": "MAE", "emae": "EMAE", "parallel": "EMAE without consistency"}
COLORS = {"mae": "#2f6fde", "emae": "#dd6b20", "parallel": "#7b8494"}


def draw(rows: list[dict], path: Path) -> None:
    """A row of panels a metric, a column a cost: mean over seeds, and the range shaded."""
    figure = Figure(figsize=(10.5, 8.4), layout="constrained")
    axes = figure.subplots(len(METRICS), len(COSTS), sharey="row", sharex="col")
    with matplotlib.rc_context({"font.size": 9}):
        for i, (metric, title) in enumerate(METRICS.items()):
            for j, (cost, label) in enumerate(COSTS.items()):
                panel = axes[i, j]
                for method, name in NAMES.items():
                    x, y = curve(rows, method, cost, metric)
                    if not len(x):
                        continue
                    mean, low, high = ([of(seeds) for seeds in y] for of in (np.mean, np.min, np.max))
                    panel.plot(x, mean, "o-", color=COLORS[method], label=name, markersize=4)
                    panel.fill_between(x, low, high, color=COLORS[method], alpha=0.15, linewidth=0)
                    panel.vlines(x, low, high, color=COLORS[method], alpha=0.4)
                panel.set_xscale("log")
                panel.grid(color="#dcdfe5", linewidth=0.7)
                panel.spines[:].set_visible(False)
                if i == len(METRICS) - 1:
                    panel.set_xlabel(label)
                if j == 0:
                    panel.set_ylabel(f"{title}, %")
        axes[0, 0].legend(frameon=False, loc="best")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def curve(rows: list[dict], method: str, cost: str, metric: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Cost [lengths], and for each length the accuracies in %, one a seed."""
    mine = [row for row in rows if row["method"] == method]
    x = sorted({row[cost] for row in mine})
    return np.array(x), [np.array([100 * row[metric] for row in mine if row[cost] == at]) for at in x]


def verdicts(rows: list[dict]) -> str:
    """A Markdown table: EMAE less MAE at equal cost, and what consistency adds; mean over seeds [least, greatest]."""
    lines = ["| | seeds | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 2) + "|"]
    pairs = ("emae", "mae", "flops"), ("emae", "mae", "pictures"), ("parallel", "mae", "flops")
    for method, baseline, cost in (*pairs, ("parallel", "mae", "pictures"), ("emae", "parallel", "flops")):
        for at in sorted({row[cost] for row in rows if row["method"] == method}):
            at_cost = [row for row in rows if np.isclose(row[cost], at)]
            of = [{row["seed"]: row for row in at_cost if row["method"] == name} for name in (method, baseline)]
            seeds = sorted(of[0].keys() & of[1].keys())
            if not seeds:
                continue
            title = f"{NAMES[method]} − {NAMES[baseline]} at {at:.3g} {COSTS[cost]}"
            cells = []
            for metric in METRICS:
                gaps = [100 * (of[0][seed][metric] - of[1][seed][metric]) for seed in seeds]
                cells.append(f"{np.mean(gaps):+.1f} [{min(gaps):+.1f}, {max(gaps):+.1f}]")
            lines.append(f"| {title} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
