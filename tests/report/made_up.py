"""A made-up run's work folder, and a page as a browser reads it. All numbers and pictures in it are test data."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import yaml

HOSTILE = "<script>alert(1)</script>"
CLASSES = ["disc", "stripes", "cross", HOSTILE]
LENGTH = {"pretrain": 2400, "control": 600, "head": 200, "tune": 400}  # updates of each stage


def picture(label: int, seed: int, side: int = 48) -> np.ndarray:
    """A picture of a class, uint8 [side, side, 3]: its shape is the class, its colours and place are not."""
    rng = np.random.default_rng((label, seed))
    y, x = np.mgrid[:side, :side] / side - rng.uniform(0.35, 0.65, 2)[:, None, None]
    size = rng.uniform(0.16, 0.32)
    shape = (
        x**2 + y**2 < size**2,
        np.sin(60 * size * (x + y)) > 0,
        (abs(x) < size / 3) | (abs(y) < size / 3),
        (abs(x) < size) & (abs(y) < size),
    )[label % 4]
    colors = rng.integers(40, 230, (2, 3))
    noise = rng.normal(0, 8, (side, side, 3))
    return np.clip(np.where(shape[..., None], colors[0], colors[1]) + noise, 0, 255).astype(np.uint8)


def make_neighbors(path: Path, share: float, seed: int, queries: int = 8, k: int = 6, side: int = 48) -> np.ndarray:
    """Write a neighbours file where about `share` of the neighbours are right; returns neighbor_label [q, k]."""
    rng = np.random.default_rng(seed)
    query_label = np.arange(queries, dtype=np.int32) % 4
    neighbor_label = np.where(rng.random((queries, k)) < share, query_label[:, None], rng.integers(0, 4, (queries, k)))
    np.savez(
        path,
        query=np.stack([picture(label, i, side) for i, label in enumerate(query_label)]),
        neighbor=np.stack([[picture(c, j + 9 * seed, side) for j, c in enumerate(row)] for row in neighbor_label]),
        query_label=query_label,
        neighbor_label=neighbor_label.astype(np.int32),
        similarity=np.sort(rng.uniform(0.4, 0.95, (queries, k)).astype(np.float32))[:, ::-1],
        classes=np.array(CLASSES),
    )  # fmt: skip
    return neighbor_label


def make_clusters(
    path: Path, share: float, seed: int, classes: list[str] = CLASSES, m: int = 6, side: int = 48
) -> dict:
    """Write a clusters file with a cluster a class, in shuffled order, the last one unmatched; returns its arrays."""
    rng = np.random.default_rng(seed)
    k = len(classes)
    cluster_class = rng.permutation(k)
    cluster_class[-1] = -1
    label = np.where(rng.random((k, m)) < share, cluster_class[:, None] % k, rng.integers(0, k, (k, m)))
    valid = np.ones((k, m), bool)
    valid[0, m - 2 :] = False
    arrays = {
        "picture": np.stack([[picture(c, j + 7 * seed, side) for j, c in enumerate(row)] for row in label]),
        "label": label,
        "valid": valid,
        "cluster_class": cluster_class,
        "size": rng.integers(20, 60, k),
        "purity": rng.uniform(share, 1, k),
        "classes": np.array(classes),
    }
    np.savez(path, **arrays)
    return arrays


def make_scatter(path: Path, spread: float, seed: int, n: int = 240, classes: list[str] = CLASSES) -> dict:
    """Write a scatter file: classes on a ring, `spread` apart from their own centre; returns its arrays."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % len(classes)
    angle = 2 * np.pi * label / len(classes)
    xy = 30 * np.stack([np.cos(angle), np.sin(angle)], 1) + spread * rng.normal(size=(n, 2))
    arrays = {"xy": xy.astype(np.float32), "label": label, "classes": np.array(classes)}
    np.savez(path, **arrays)
    return arrays


def make_attention(path: Path, seed: int, q: int = 4, heads: int = 6, grid: int = 6, side: int = 48) -> dict:
    """Write an attention file: each head looks at one place; returns its arrays."""
    rng = np.random.default_rng(seed)
    place = rng.uniform(0, grid, (q, heads, 2, 1, 1))
    y, x = np.mgrid[:grid, :grid]
    heat = np.exp(-((y - place[:, :, 0]) ** 2 + (x - place[:, :, 1]) ** 2) / 2)
    label = np.arange(q) % 4
    arrays = {
        "picture": np.stack([picture(label[i], 30 + i, side) for i in range(q)]),
        "attention": (0.9 * heat / heat.sum((2, 3), keepdims=True)).astype(np.float32),
        "label": label,
        "classes": np.array(CLASSES),
    }
    np.savez(path, **arrays)
    return arrays


def make_confusion(
    path: Path, share: float, seed: int, classes: list[str] = CLASSES, source: str = "maect-knn"
) -> dict:
    """Write a confusion file where about `share` of 50 pictures a class are right; returns its arrays."""
    rng = np.random.default_rng(seed)
    c = len(classes)
    p = np.full((c, c), (1 - share) / max(c - 1, 1)) + np.eye(c) * (share - (1 - share) / max(c - 1, 1))
    arrays = {
        "matrix": np.stack([rng.multinomial(50, row / row.sum()) for row in p]),
        "classes": np.array(classes),
        "source": np.array(source),
    }
    np.savez(path, **arrays)
    return arrays


def make_reconstruction(path: Path, count: int = 6, side: int = 48) -> None:
    patches, patch = 6, side // 6
    original = np.stack([picture(i % 4, 50 + i, side) for i in range(count)])
    order = np.random.default_rng(3).permuted(np.tile(np.arange(patches**2), (count, 1)), axis=1)
    hidden = (order < 27).reshape(count, patches, patches).repeat(patch, 1).repeat(patch, 2)
    masked = np.where(hidden[..., None], 128, original).astype(np.uint8)
    half = side // 4
    blurred = original.reshape(count, half, 4, half, 4, 3).mean((2, 4)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    np.savez(path, original=original, masked=masked, reconstructed=blurred)


def make_parts(
    path: Path, seed: int, count: int = 3, shown: int = 4, parts: int = 4, side: int = 48, grid: int = 6
) -> dict:
    """Write a file of pictures in parts, the same pictures for every seed; returns its arrays."""
    rng, patch = np.random.default_rng(seed), side // grid
    original = np.stack([picture(i % 4, 70 + i, side) for i in range(count)])
    block = np.random.default_rng(4).permuted(np.tile(np.arange(grid**2) % parts, (count, 1)), axis=1)
    hidden = np.stack([block != k for k in range(shown)], axis=1).reshape(count, shown, grid, grid)
    hidden = hidden.repeat(patch, 2).repeat(patch, 3)[..., None]
    noisy = original[:, None] + rng.integers(-40, 40, (count, shown, side, side, 3))
    disagreement = rng.gamma(4, 0.02 * seed, (count, grid, grid)).astype(np.float32)
    arrays = {
        "original": original,
        "seen": np.where(hidden, 128, original[:, None]).astype(np.uint8),
        "completed": np.where(hidden, np.clip(noisy, 0, 255), original[:, None]).astype(np.uint8),
        "disagreement": disagreement,
        "mean_disagreement": disagreement.mean(),
        "error": np.float32(0.3 + 0.2 * seed),
        "parts": np.array(parts),
    }
    np.savez(path, **arrays)
    return arrays


def metric_lines(method: str = "mae") -> list[dict]:
    """Of every stage; 'emae' logs how its parts do, too."""
    rng = np.random.default_rng(0)
    clock, lines = 1.75e9, []
    for stage, length in LENGTH.items():
        for step in range(0, length, 4):
            clock += 4 * 0.31
            t = step / length
            line = {
                "stage": stage,
                "step": step,
                "epoch": step / 24,
                "time": clock,
                "images_per_second": 3300 + 90 * rng.normal(),
            }
            line["learning_rate"] = 1.5e-3 * min(t * 20, 0.5 + 0.5 * math.cos(math.pi * t))
            line["gradient_norm"] = 0.8 + 2 * math.exp(-9 * t) + 0.1 * rng.normal()
            if stage in ("pretrain", "control"):
                line["loss"] = 0.62 * (stage == "pretrain") * math.exp(-5 * t) + 0.4 + 0.01 * rng.normal()
                if method == "emae":
                    line |= {"reconstruction_loss": line["loss"] - 0.05, "disagreement": 0.1, "disagreement_ratio": 0.2}
            else:
                line["loss"] = 5.5 - 1.6 * t**0.5 + 0.05 * rng.normal()
                line["neighbor_accuracy"] = 0.3 + 0.3 * t + 0.01 * rng.normal()
                line |= {
                    "embedding_std": 0.0625 - 0.01 * math.exp(-5 * t),
                    "effective_rank": 40 + 70 * t,
                    "queue_age": 12,
                }
            if step % 200 == 0:
                line["knn"] = {"pretrain": 0.2 + 0.22 * t**0.6, "control": 0.42 + 0.02 * t}.get(stage, 0.42 + 0.25 * t)
            lines.append(line)
    return lines


RESULTS = {  # (evaluation, metric, protocol, unit) -> value of pretrain, control, tune
    ("knn", "accuracy", "maect-knn", "fraction"): (0.4213, 0.4391, 0.6744),
    ("knn", "accuracy", "maect-knn-std", "fraction"): (0.4402, 0.4471, 0.6702),
    ("linear", "accuracy", "maect-linear", "fraction"): (0.6810, 0.6895, 0.7423),
    ("linear", "accuracy", "maect-linear, selected on test", "fraction"): (0.6850, 0.6920, 0.7461),
    ("logreg", "accuracy", "maect-logreg 5 per class", "fraction"): (0.3105, None, 0.5877),
    ("ridge", "accuracy", "bigvision-fewshot 10 per class", "fraction"): (0.3310, 0.3402, 0.6011),
    ("robustness", "accuracy", "maect-linear on dim pictures", "fraction"): (0.4920, 0.4897, 0.6113),
    ("cluster", "acc", "ours-cluster", "fraction"): (0.3650, 0.3711, 0.6537),
    ("cluster", "nmi", "ours-cluster", "fraction"): (0.2950, 0.3011, 0.6137),
    ("cluster", "silhouette", "ours-cluster", ""): (0.0421, 0.0433, 0.1822),
    ("cluster", "davies_bouldin", "ours-cluster", ""): (3.1214, 3.0977, 1.8012),
    ("cluster", "inertia", "ours-cluster", ""): (13456.7, 13377.1, 9021.4),
    ("retrieval", "precision@1", "ours-retrieval", "fraction"): (0.4011, 0.4120, 0.6510),
    ("health", "effective_rank", "ours-health", ""): (41.23, 43.1, 118.4),
    ("health", "uniformity", "ours-health", ""): (-0.8123, -0.8251, -2.4012),
    ("colour", "error", "ours-colour", ""): (0.00641, 0.00639, 0.00702),
}  # fmt: skip
SETTINGS = {"version": 1, "feature": "cls", "k": 10, "temperature": 0.07, "transform": {"image_size": 96}}
SETS = {"train": {"name": "imagenette/train", "rows": 9469, "hash": "aa11"}, "test": {"name": "t", "rows": 3925}}


def make_record(
    stage: str, evaluation: str, metric: str, name: str, value: float, unit: str = "fraction", **more
) -> dict:
    """A line of `results.jsonl`; `more` replaces or adds fields, 'protocol' is merged."""
    protocol = {"name": name} | SETTINGS | SETS | more.pop("protocol", {})
    width = 0.0153
    record = {
        "schema": 2, "time": "2026-01-02T03:04:05+00:00", "stage": stage, "seed": 0, "evaluation": evaluation,
        "metric": metric, "value": value, "unit": unit, "std": None, "values": None, "protocol": protocol, "found": {},
        "interval": [value - width, value + width] if metric == "accuracy" else None,
        "weights": {"sha256": f"{stage}-5f1c9e", "source": "run", "stage": stage, "step": 9, "average": True},
        "model": {"depth": 12}, "software": {"jax": "0.10"}, "cost": {"seconds": 1.0, "cache": False},
    }  # fmt: skip
    return record | more


def result_records() -> list[dict]:
    records = []
    for i, stage in enumerate(("pretrain", "control", "tune")):
        for (evaluation, metric, name, unit), values in RESULTS.items():
            if values[i] is None:
                continue
            more = {"protocol": {"train": SETS["train"], "seeds": 3}} if evaluation in ("logreg", "ridge") else {}
            if evaluation in ("logreg", "ridge"):
                more |= {"std": 0.0124, "values": [values[i] - 0.01, values[i], values[i] + 0.01]}
            if evaluation == "cluster" and unit == "fraction" and metric != "silhouette":
                more["found"] = {"mean": values[i] - 0.02, "std": 0.011}
            if evaluation == "linear":
                more["found"] = {"base_rate": 0.01 * (i + 1), "epoch": 40 + i}
            records.append(make_record(stage, evaluation, metric, name, values[i], unit, **more))
        if stage != "control":
            for block in range(1, 13):
                value = 0.2 + 0.02 * block + (0.0035 * max(block - 5, 0) ** 2 if stage == "tune" else 0)
                protocol = {"block": block}
                records.append(
                    make_record(stage, "knn_layers", "accuracy", f"maect-knn, block {block}", value, protocol=protocol)
                )
    return records


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_workdir(path: Path, method: str = "mae") -> Path:
    """The folder of a made-up finished run that pre-trained by that method."""
    (path / "figures").mkdir(parents=True)
    config = {
        "name": "mae_ct_vits_imagenette",
        "seed": 0,
        "stages": ["pretrain", "control", "head", "tune", "evaluate"],
        "model": {"width": 384, "depth": 12, "heads": 6, "patch": 8, "image_size": 96},
        "data": {"train": "imagenette/train", "test": "imagenette/validation"},
        "pretrain": {"method": method, "epochs": 100, "batch": 1024, "mask_ratio": 0.75},
        "head": {"epochs": 8, "batch": 1024},
        "tune": {"epochs": 16, "batch": 1024, "note": HOSTILE},
    }
    (path / "config.resolved.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (path / "environment.json").write_text(json.dumps({"jax": "0.10.0", "device": "8 x TPU v5e", "note": HOSTILE}))
    (path / "data.json").write_text(json.dumps({"train": "aa11", "test": "bb22", "shared": 0}))
    write_lines(path / "metrics.jsonl", metric_lines(method))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "tune", "step": 400, "lo')
    write_lines(path / "results.jsonl", result_records())
    for stage in ("pretrain", "head", "tune"):
        (path / stage).mkdir()
        done = {"stage": stage, "step": LENGTH[stage], "seconds": 3.1 * LENGTH[stage], "weights": "5f1c9e0a77b2d1"}
        (path / stage / "DONE.json").write_text(json.dumps(done))
    for seed, (stage, share) in enumerate({"pretrain": 0.3, "tune": 0.85}.items(), 1):
        make_neighbors(path / f"figures/neighbors_{stage}.npz", share, seed)
        make_clusters(path / f"figures/clusters_{stage}.npz", share, seed)
        make_scatter(path / f"figures/scatter_{stage}.npz", 16 * (1 - share), seed)
        make_attention(path / f"figures/attention_{stage}.npz", seed)
        make_confusion(path / f"figures/confusion_{stage}.npz", share, seed)
    make_reconstruction(path / "figures/reconstruction.npz")
    if method == "emae":
        for seed, when in ((3, "before"), (1, "after")):
            make_parts(path / f"figures/parts_{when}.npz", seed)
    return path


class Page(HTMLParser):
    """What a browser makes of a page: tags with attributes, text outside style and script, and cells of tables."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.text, self.open = [], "", []
        self.tables: list[list[list[str]]] = []
        self.feed(self.source)
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:  # void elements such as <img> have no end
            pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def rows(self, table: int = 0) -> dict[str, list[str]]:
        """First cell -> the other cells of each row of a table, with plain spaces."""
        cells = [[" ".join(cell.split()) for cell in row] for row in self.tables[table]]
        return {row[0]: row[1:] for row in cells}
