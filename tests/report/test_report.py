"""The report shows what the work folder holds, asks the network for nothing, and takes no text for markup."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from maect_jax.errors import DataError
from maect_jax.report import figures
from maect_jax.report.html import write_report

HOSTILE = "<script>alert(1)</script>"
CLASSES = ["disc", "stripes", "cross", HOSTILE]
LENGTH = {"pretrain": 2400, "control": 600, "head": 200, "tune": 400}  # updates of each stage of the made-up run


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
    )[label]
    colors = rng.integers(40, 230, (2, 3))
    noise = rng.normal(0, 8, (side, side, 3))
    return np.clip(np.where(shape[..., None], colors[0], colors[1]) + noise, 0, 255).astype(np.uint8)


def make_neighbors(path: Path, share: float, seed: int, queries: int = 8, k: int = 6) -> np.ndarray:
    """Write a neighbours file where about `share` of the neighbours are right; returns neighbor_label [q, k]."""
    rng = np.random.default_rng(seed)
    query_label = np.arange(queries, dtype=np.int32) % 4
    neighbor_label = np.where(rng.random((queries, k)) < share, query_label[:, None], rng.integers(0, 4, (queries, k)))
    np.savez(
        path,
        query=np.stack([picture(label, i) for i, label in enumerate(query_label)]),
        neighbor=np.stack([[picture(c, j + 9 * seed) for j, c in enumerate(row)] for row in neighbor_label]),
        query_label=query_label,
        neighbor_label=neighbor_label.astype(np.int32),
        similarity=np.sort(rng.uniform(0.4, 0.95, (queries, k)).astype(np.float32))[:, ::-1],
        classes=np.array(CLASSES),
    )  # fmt: skip
    return neighbor_label


def metric_lines() -> list[dict]:
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


RESULTS = {  # (evaluation, metric, protocol) -> value of pretrain, control, tune
    ("knn", "accuracy", "maect-knn"): (0.4213, 0.4391, 0.6744),
    ("knn", "accuracy", "maect-knn-std"): (0.4402, 0.4471, 0.6702),
    ("linear", "accuracy", "mae-linear"): (0.6810, 0.6895, 0.7423),
    ("logistic", "accuracy, 5 a class", "maect-logreg"): (0.3105, None, 0.5877),
    ("cluster", "nmi", "maect-kmeans"): (0.2950, 0.3011, 0.6137),
}  # fmt: skip


def make_workdir(path: Path) -> Path:
    """The folder of a made-up finished run; all numbers and pictures in it are test data."""
    (path / "figures").mkdir(parents=True)
    config = {
        "name": "mae_ct_vits_imagenette",
        "seed": 0,
        "stages": ["pretrain", "control", "head", "tune", "evaluate"],
        "model": {"width": 384, "depth": 12, "heads": 6, "patch": 8, "image_size": 96},
        "data": {"train": "imagenette/train", "test": "imagenette/validation"},
        "pretrain": {"epochs": 100, "batch": 1024, "mask_ratio": 0.75},
        "head": {"epochs": 8, "batch": 1024},
        "tune": {"epochs": 16, "batch": 1024, "note": HOSTILE},
    }
    (path / "config.resolved.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (path / "environment.json").write_text(json.dumps({"jax": "0.10.0", "device": "8 x TPU v5e", "note": HOSTILE}))
    torn = '{"stage": "tune", "step": 400, "lo'
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metric_lines()) + torn)
    records = [
        {"stage": stage, "evaluation": key[0], "metric": key[1], "value": value, "weights": f"{stage}-5f1c9e",
         "protocol": {"name": key[2], "k": 10, "temperature": 0.07}, "step": LENGTH[stage], "seed": 0}
        for key, values in RESULTS.items()
        for stage, value in zip(("pretrain", "control", "tune"), values)
        if value is not None
    ]  # fmt: skip
    (path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for stage in ("pretrain", "head", "tune"):
        (path / stage).mkdir()
        done = {"stage": stage, "step": LENGTH[stage], "seconds": 3.1 * LENGTH[stage], "weights": "5f1c9e0a77b2d1"}
        (path / stage / "DONE.json").write_text(json.dumps(done))
    make_neighbors(path / "figures/neighbors_pretrain.npz", 0.3, seed=1)
    make_neighbors(path / "figures/neighbors_tune.npz", 0.85, seed=2)
    original = np.stack([picture(i % 4, 50 + i) for i in range(6)])
    hidden = np.random.default_rng(3).permuted(np.tile(np.arange(36) < 27, (6, 1)), axis=1).reshape(6, 6, 6)
    masked = np.where(hidden.repeat(8, 1).repeat(8, 2)[..., None], 128, original).astype(np.uint8)
    blurred = original.reshape(6, 12, 4, 12, 4, 3).mean((2, 4)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    np.savez(path / "figures/reconstruction.npz", original=original, masked=masked, reconstructed=blurred)
    return path


class Page(HTMLParser):
    """What a browser makes of the page: tags with attributes, text outside style and script, and cells of tables."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.text, self.open = [], "", []
        self.tables: list[list[list[str]]] = []
        self.feed(self.source)

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


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def page(workdir):
    return Page(write_report(workdir))


def test_page_makes_no_request(page):
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form", "audio", "video")
        for key, value in attributes.items():
            if key in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
                assert value.startswith(("data:", "#")), (tag, key, value[:60])
            assert not key.startswith("on"), (tag, key)
    assert "http://" not in page.source and "https://" not in page.source and "@import" not in page.source
    assert page.source.count("url(") == page.source.count("url(#")
    policy = next(meta["content"] for meta in page.named("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")


def test_text_from_outside_is_never_markup(page):
    assert page.text.count(HOSTILE) >= 4  # two captions of queries, config and environment
    assert "<script" not in page.source.lower()
    assert any(HOSTILE in image.get("title", "") for image in page.named("img"))


def test_results_table_equals_the_records(page):
    head, *rows = page.tables[0]
    assert [cell.strip() for cell in head] == [
        "Evaluation",
        "MAE",
        "MAE, trained on instead (control)",
        "MAE-CT",
        "MAE-CT − MAE",
        "MAE-CT − control",
    ]
    assert len(rows) == len(RESULTS)
    for (name, *cells), ((_, metric, protocol), values) in zip(rows, RESULTS.items()):
        assert metric in name and name.strip().endswith(protocol)
        before, control, after = values
        change = [None if other is None else after - other for other in (before, control)]
        for text, value in zip(cells, [*values, *change], strict=True):
            assert text.strip() == "–" if value is None else abs(float(text.replace("−", "-")) - 100 * value) <= 0.0501
    exact = [float(cell["data-value"]) for cell in page.named("td") if "data-value" in cell]
    expected = []
    for before, control, after in RESULTS.values():
        expected += [before, control, after, after - before, None if control is None else after - control]
    assert exact == pytest.approx([value for value in expected if value is not None], abs=1e-12)
    assert page.source.count("<b>67.4</b>") == 1  # the best of its row


def test_headline_and_counts_come_from_the_files(page, workdir):
    assert "from 42.1 % (MAE) to\n    67.4 % (MAE-CT): +25.3 points." in page.text
    for stage in ("pretrain", "tune"):
        with np.load(workdir / f"figures/neighbors_{stage}.npz") as file:
            right = int((file["neighbor_label"] == file["query_label"][:, None]).sum())
        assert f"({figures.STAGES[stage]}) {right} of 48" in page.text
    frames = [
        image["class"].split()[0] for image in page.named("img") if image.get("class", "")[:4] in ("same", "othe")
    ]
    assert len(frames) == 2 * 48


def test_control_has_its_neighbors_apart_from_before_and_after(workdir, tmp_path):
    (tmp_path / "figures").mkdir()
    for stage in ("pretrain", "tune"):
        (tmp_path / f"figures/neighbors_{stage}.npz").write_bytes(
            (workdir / f"figures/neighbors_{stage}.npz").read_bytes()
        )
    right = int(
        (make_neighbors(tmp_path / "figures/neighbors_control.npz", 0.4, seed=5) == np.arange(8)[:, None] % 4).sum()
    )
    page = Page(write_report(tmp_path))
    assert f"trained on (control) {right} of 48" in page.text and "Neighbours of the control" in page.text
    assert [block["style"] for block in page.named("div") if block.get("class") == "strips"] == [
        "--strips: 2",
        "--strips: 1",
    ]


def test_newest_record_of_a_seed_counts_and_seeds_are_averaged(tmp_path):
    record = {"stage": "tune", "evaluation": "knn", "metric": "loss", "protocol": {"name": "p"}, "seed": 0}
    old = record | {"stage": "pretrain", "value": 0.35}
    lines = [record | {"value": 0.1}, record | {"value": 0.5}, record | {"value": 0.3, "seed": 1}, old]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = Page(write_report(tmp_path))
    assert [cell.strip() for cell in page.tables[0][1][1:]] == ["35.0", "40.0± 14.1, 2 seeds", "+5.0"]
    assert "<b>35.0</b>" in page.source  # of a loss the lower is the better
    assert "No headline" in page.text


def test_torn_lines_are_left_out_and_counted(page):
    assert "1 unreadable line(s) of metrics.jsonl were left out" in " ".join(page.text.split())


def test_charts_show_what_was_logged_and_nothing_else(page, tmp_path):
    titles = [svg["aria-label"] for svg in page.named("svg")]
    losses = ["Loss, MAE", "Loss, control", "Loss, head", "Loss, MAE-CT"]
    assert titles == losses + [title for title, _, _ in figures.CHARTS.values()] + ["queue age"]
    lines = [{"stage": "tune", "step": step, "loss": loss} for step, loss in ((0, 1.0), (1, math.nan), (2, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = Page(write_report(tmp_path))
    assert [svg["aria-label"] for svg in page.named("svg")] == ["Loss, MAE-CT"]
    assert "1 logged value(s) were not finite" in page.text


def test_series_are_ordered_and_a_repeated_step_counts_once():
    lines = [{"stage": "tune", "step": step, "loss": loss} for step, loss in ((0, 5.0), (8, 4.0), (4, 3.0), (8, 2.0))]
    assert figures.metric_series([*lines, {"loss": 1.0}]) == {"loss": {"tune": ([0, 4, 8], [5.0, 3.0, 2.0])}}


def test_every_missing_piece_leaves_one_sentence(workdir, tmp_path):
    empty = Page(write_report(tmp_path))
    words = "headline", "table", "neighbours", "reconstructions", "curves", "list of stages", "config", "environment"
    for word in words:
        assert f"No {word}" in empty.text
    assert not empty.tables and not empty.named("svg") and not empty.named("img")
    for name in ("metrics.jsonl", "results.jsonl", "config.resolved.yaml", "environment.json"):
        (tmp_path / name).write_bytes(b'\xff\x00{"a": [\n')
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/reconstruction.npz").write_bytes(b"PK\x03\x04 torn")
    np.savez(tmp_path / "figures/neighbors_pretrain.npz", query=np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "figures/neighbors_tune.npz").write_bytes((workdir / "figures/neighbors_tune.npz").read_bytes())
    damaged = Page(write_report(tmp_path))
    assert "figures/reconstruction.npz could not be read" in damaged.text
    assert "figures/neighbors_pretrain.npz could not be read" in damaged.text
    assert "After tuning" in damaged.text and "Before tuning" not in damaged.text


def test_page_is_replaced_whole_and_is_the_same_for_the_same_folder(workdir, page):
    assert write_report(str(workdir)).read_text(encoding="utf-8") == page.source
    assert [path.name for path in workdir.iterdir() if "report" in path.name] == ["report.html"]
    with pytest.raises(DataError, match="is not a folder"):
        write_report(workdir / "no such run")


def test_unfinished_stage_is_told_from_a_finished_one(page):
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in page.tables[-2]}
    assert rows["MAE"][:5] == ["finished", "100", "1,024", "2,400", "2 h 4 min"]
    assert rows["MAE, trained on instead (control)"][0] == "not finished"


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grids_hold_the_pictures_in_order(channels):
    pictures = np.random.default_rng(0).integers(0, 255, (3, 2, 32, 32, channels), dtype=np.uint8)
    shown = pictures[..., :3] if channels >= 3 else pictures[..., :1].repeat(3, -1)
    original, masked, reconstructed = pictures
    grid = figures.reconstruction_grid(original, masked, reconstructed, min_side=32)
    assert grid.shape == (2 * 35 + 3, 3 * 35 + 3, 3) and (grid[:3] == 255).all()
    for column, part in enumerate((1, 2, 0)):
        for row in range(2):
            cell = grid[3 + 35 * row : 35 + 35 * row, 3 + 35 * column : 35 + 35 * column]
            np.testing.assert_array_equal(cell, shown[part, row])


def test_neighbor_grid_frames_right_green_and_wrong_red():
    pictures = np.random.default_rng(0).integers(0, 255, (2, 3, 32, 32, 3), dtype=np.uint8)
    grid = figures.neighbor_grid(pictures[:, 0], pictures[:, 1:], np.array([4, 7]), np.array([[4, 5], [6, 7]]))
    tile = 64 + 2 * 3 + 3  # 32 pixels enlarged by the whole factor 2, frame, gap
    assert grid.shape == (2 * tile + 3, 3 * tile + 3, 3)
    white = figures.BACKGROUND
    expected = [[white, figures.SAME_CLASS, figures.OTHER_CLASS], [white, figures.OTHER_CLASS, figures.SAME_CLASS]]
    for row in range(2):
        for column in range(3):
            cell = grid[3 + tile * row : tile * (row + 1), 3 + tile * column : tile * (column + 1)]
            frame = np.concatenate([cell[:3].reshape(-1, 3), cell[-3:].reshape(-1, 3), cell[:, :3].reshape(-1, 3)])
            assert (frame == expected[row][column]).all()
            np.testing.assert_array_equal(cell[3:-3:2, 3:-3:2], pictures[row, column])
            np.testing.assert_array_equal(cell[4:-3:2, 4:-3:2], pictures[row, column])
    assert figures.SAME_CLASS[1] == max(figures.SAME_CLASS) and figures.OTHER_CLASS[0] == max(figures.OTHER_CLASS)


def test_png_is_read_back_by_pillow(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    (tmp_path / "grey.png").write_bytes(figures.to_png(grey))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grey.png")), grey.repeat(3, -1))


@pytest.mark.parametrize(
    "call",
    [
        lambda: figures.to_png(np.zeros((4, 4, 3), np.float32)),
        lambda: figures.to_png(np.zeros((2, 4, 4, 3), np.uint8)),
        lambda: figures.reconstruction_grid(*np.zeros((2, 1, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)),
        lambda: figures.neighbor_grid(
            *(np.zeros(shape, np.uint8) for shape in ((2, 4, 4, 3), (2, 5, 4, 4, 3), 2, (2, 4)))
        ),
        lambda: figures.curve({"a": ([1, 2], [1.0])}, "t", "x", "y"),
        lambda: figures.curve({"a": ([1], [math.nan])}, "t", "x", "y"),
    ],
)
def test_wrong_shapes_are_named(call):
    with pytest.raises(ValueError, match=r"\[|no series"):
        call()


def test_curve_is_deterministic_takes_no_text_for_markup_and_bounds_its_size():
    series = {"_<b>$x^": (range(50_000), np.sin(np.arange(50_000) / 999)), "b": ([3], [0.5])}
    svg = figures.curve(series, "A <i> & $\\frac", "x", "y")
    assert svg == figures.curve(series, "A <i> & $\\frac", "x", "y")
    assert svg.startswith("<svg") and "_&lt;b&gt;$x^</text>" in svg and "<i>" not in svg and "<b>" not in svg
    assert len(svg) < 60_000 and "date" not in svg.lower() and "currentColor" in svg


def test_neighbors_without_labels_are_neither_right_nor_wrong(tmp_path):
    for stage, seed in (("pretrain", 1), ("tune", 2)):
        path = tmp_path / "figures" / f"neighbors_{stage}.npz"
        path.parent.mkdir(exist_ok=True)
        make_neighbors(path, share=0.5, seed=seed)
        with np.load(path) as file:
            arrays = dict(file)
        unlabelled = {name: np.full_like(arrays[name], -1) for name in ("query_label", "neighbor_label")}
        np.savez(path, **arrays | unlabelled | {"classes": np.array([], dtype=str)})
    text = write_report(tmp_path).read_text()
    assert "They have no labels." in text and 'class="plain' in text
    assert 'class="same' not in text and 'class="other' not in text and "of the query's own class" not in text
