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
                    panel.plot(x, y.mean(1), "o-", color=COLORS[method], label=name, markersize=4)
                    panel.fill_between(x, y.min(1), y.max(1), color=COLORS[method], alpha=0.15, linewidth=0)
                    if len(x) == 1:
                        panel.vlines(x, y.min(1), y.max(1), color=COLORS[method], alpha=0.4)
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


def curve(rows: list[dict], method: str, cost: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Cost [lengths] and accuracy in % [lengths, seeds], lengths and seeds that all exist."""
    mine = [row for row in rows if row["method"] == method]
    seeds = sorted({row["seed"] for row in mine})
    found = {(row["length"], row["seed"]): row for row in mine}
    lengths = [n for n in sorted({row["length"] for row in mine}) if all((n, seed) in found for seed in seeds)]
    x = np.array([found[n, seeds[0]][cost] for n in lengths])
    return x, np.array([[100 * found[n, seed][metric] for seed in seeds] for n in lengths])


def verdicts(rows: list[dict]) -> str:
    """A Markdown table: EMAE less MAE, and what consistency adds, by metric; mean over seeds [least, greatest]."""
    by = {(row["method"], row["length"], row["seed"]): row for row in rows}
    longest = max(row["length"] for row in rows)
    comparisons = []
    for n in range(longest + 1):
        comparisons.append((f"EMAE − MAE, equal operations ({_size(rows, 'flops', 'mae', n)})", "emae", n, "mae", n))
    for n in range(longest + 1):
        pictures = {row["pictures"] for row in rows if row["method"] == "emae" and row["length"] == n}
        same = {r["length"] for r in rows if r["method"] == "mae" and r["pictures"] in pictures}
        for m in same:
            comparisons.append((f"EMAE − MAE, equal pictures ({pictures.copy().pop():,})", "emae", n, "mae", m))
    comparisons.append(("consistency: EMAE − parallel masks alone, longest", "emae", longest, "parallel", longest))
    lines = ["| | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for title, a, n, b, m in comparisons:
        seeds = [seed for seed in range(100) if (a, n, seed) in by and (b, m, seed) in by]
        cells = []
        for metric in METRICS if seeds else ():
            gaps = [100 * (by[a, n, seed][metric] - by[b, m, seed][metric]) for seed in seeds]
            cells.append(f"{np.mean(gaps):+.1f} [{min(gaps):+.1f}, {max(gaps):+.1f}]")
        if seeds:
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _size(rows: list[dict], cost: str, method: str, length: int) -> str:
    return f"{next(r[cost] for r in rows if r['method'] == method and r['length'] == length):.2g}"
