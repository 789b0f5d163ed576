"""The report shows what the work folder holds, asks the network for nothing, and takes no text for markup."""

import json
import math

import numpy as np
import pytest

from made_up import (
    HOSTILE,
    Page,
    make_attention,
    make_clusters,
    make_confusion,
    make_neighbors,
    make_parts,
    make_reconstruction,
    make_scatter,
    make_workdir,
)
from maect_jax.errors import DataError
from maect_jax.report import charts
from maect_jax.report.html import write_report


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
    assert policy.startswith("default-src 'none'") and "script-src" not in policy


def test_text_from_outside_is_never_markup(page):
    # captions of queries, a cluster, the legend of the map, confusions, a picture of attention, config, environment
    assert page.text.count(HOSTILE) >= 10
    assert "<script" not in page.source.lower()
    assert any(HOSTILE in image.get("title", "") for image in page.named("img"))


def test_ids_are_unique_and_every_reference_has_its_target(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {use["href"] for use in page.named("use")} <= {f"#{name}" for name in ids}


def test_every_picture_has_words_and_every_table_heads(page):
    for image in page.named("img"):
        assert image["alt"].strip()
    for svg in page.named("svg"):
        assert svg["role"] == "img" and svg["aria-label"].strip()
    assert all(head.get("scope") in ("col", "row", "rowgroup") for head in page.named("th"))


def test_headline_and_counts_come_from_the_files(page, workdir):
    assert "from 42.1 % (MAE) to 67.4 % (MAE-CT): +25.3 points." in page.words
    for stage, name in (("pretrain", "MAE"), ("tune", "MAE-CT")):
        with np.load(workdir / f"figures/neighbors_{stage}.npz") as file:
            right = int((file["neighbor_label"] == file["query_label"][:, None]).sum())
        assert f"({name}) {right} of 48" in page.text
    start, end = page.source.index('id="neighbors"'), page.source.index('id="clusters"')
    chapter = page.source[start:end]
    assert chapter.count('class="same') + chapter.count('class="other') == 2 * 48


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


def test_torn_lines_are_left_out_and_counted(page):
    assert "1 unreadable line(s) of metrics.jsonl were left out" in page.words


def test_charts_show_what_was_logged_and_nothing_else(page, tmp_path):
    start = page.source.index('id="curves"')
    titles = [svg["aria-label"] for svg in page.named("svg") if svg["aria-label"] in page.source[start:]]
    losses = ["Loss, MAE", "Loss, control", "Loss, head", "Loss, MAE-CT"]
    of_emae = ("reconstruction_loss", "disagreement", "disagreement_ratio")
    expected = [*losses, *(title for key, (title, _, _) in charts.CHARTS.items() if key not in of_emae), "queue age"]
    assert titles[-len(expected) :] == expected
    lines = [{"stage": "tune", "step": step, "loss": loss} for step, loss in ((0, 1.0), (1, math.nan), (2, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = Page(write_report(tmp_path))
    assert [svg["aria-label"] for svg in page.named("svg")] == ["Loss, MAE-CT"]
    assert "1 logged value(s) were not finite" in page.text


CHAPTERS = ("neighbours", "clusters", "map of the features", "confusions", "attention", "reconstructions")


def test_every_missing_piece_leaves_one_sentence(tmp_path):
    page = Page(write_report(tmp_path))
    words = "headline", "table", "k-NN by layer", *CHAPTERS, "curves", "list of stages", "config", "environment"
    for word in words:
        assert page.text.count(f"No {word}") == 1, word
    for kind in ("neighbors", "clusters", "scatter", "confusion", "attention"):
        for stage in ("pretrain", "tune"):
            assert f"figures/{kind}_{stage}.npz is not in this folder." in page.text
    assert not page.tables and not page.named("svg") and not page.named("img")
    assert "parts" not in page.text  # which only EMAE has


def test_damaged_pieces_are_named_and_the_rest_is_shown(workdir, tmp_path):
    for name in ("metrics.jsonl", "results.jsonl", "config.resolved.yaml", "environment.json", "data.json"):
        (tmp_path / name).write_bytes(b'\xff\x00{"a": [\n' + b"[" * 100_000)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/reconstruction.npz").write_bytes(b"PK\x03\x04 torn")
    np.savez(tmp_path / "figures/neighbors_pretrain.npz", query=np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "figures/neighbors_tune.npz").write_bytes((workdir / "figures/neighbors_tune.npz").read_bytes())
    np.savez(tmp_path / "figures/clusters_tune.npz", **{"picture": np.array([{}], object)})
    page = Page(write_report(tmp_path))
    for file in ("reconstruction", "neighbors_pretrain", "clusters_tune"):
        assert f"figures/{file}.npz could not be read" in page.text
    assert "After tuning" in page.text and "Before tuning" not in page.text
    assert "No clusters" in page.text and "No config" not in page.text  # the config's text is shown as it is


WRONG = {  # file -> array of it -> a value that does not belong there
    "clusters": {"picture": np.zeros((4, 6, 8, 8, 3)), "label": np.zeros((4, 5), int), "valid": np.ones((4, 6), int)}
    | {"cluster_class": np.zeros(3, int), "size": np.zeros(4), "purity": np.zeros((4, 1)), "classes": np.zeros(4)},
    "scatter": {"xy": np.zeros((240, 3), np.float32), "label": np.zeros(239, int), "classes": np.zeros((2, 2), str)},
    "attention": {"attention": np.full((4, 6, 6, 6), np.nan), "label": np.zeros(5, int)}
    | {"picture": np.zeros((4, 0, 8, 3), np.uint8)},
    "confusion": {"matrix": np.zeros((4, 4)), "classes": np.array(["a", "b"]), "source": np.array(["a"])},
    "neighbors": {"neighbor": np.zeros((8, 6, 4, 4, 3), np.uint8), "similarity": np.zeros((8, 6), int)},
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in WRONG.items() for name in names])
def test_arrays_of_another_shape_or_type_are_not_used(workdir, tmp_path, kind, name):
    (tmp_path / "figures").mkdir()
    with np.load(workdir / f"figures/{kind}_tune.npz") as file:
        np.savez(tmp_path / f"figures/{kind}_tune.npz", **dict(file) | {name: WRONG[kind][name]})
    page = Page(write_report(tmp_path))
    assert f"figures/{kind}_tune.npz could not be read (ValueError: " in page.text
    assert not page.named("img") and not page.named("svg") and not page.tables


def test_attention_and_confusions_that_can_not_be_are_not_used(workdir, tmp_path):
    (tmp_path / "figures").mkdir()
    wrong = {"attention": {"attention": np.full((4, 6, 6, 6), -0.1)}, "scatter": {"xy": np.full((240, 2), np.inf)}}
    wrong["confusion"] = {"matrix": np.diag([3, -1, 2, 2])}
    for kind, arrays in wrong.items():
        with np.load(workdir / f"figures/{kind}_tune.npz") as file:
            np.savez(tmp_path / f"figures/{kind}_tune.npz", **dict(file) | arrays)
    page = Page(write_report(tmp_path))
    assert page.text.count("could not be read") == 3 and not page.named("svg")


def test_half_characters_in_names_cost_nothing_but_themselves(tmp_path):
    half = "\ud800<b>"
    lines = [{"stage": half, "step": step, "loss": 1.0} for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = {"stage": half, "evaluation": half, "metric": half, "value": 0.5, "protocol": {"name": half}}
    (tmp_path / "results.jsonl").write_text(json.dumps(record))
    (tmp_path / "figures").mkdir()
    make_confusion(tmp_path / "figures/confusion_tune.npz", 0.5, 1, ["a", half])
    page = Page(write_report(tmp_path))
    assert page.text.count("?<b>") >= 5 and "?<b>" not in page.source


def test_page_is_replaced_whole_and_is_the_same_for_the_same_folder(workdir, page):
    assert write_report(str(workdir)).read_text(encoding="utf-8") == page.source
    assert [path.name for path in workdir.iterdir() if "report" in path.name] == ["report.html"]
    with pytest.raises(DataError, match="is not a folder"):
        write_report(workdir / "no such run")


def test_unfinished_stage_is_told_from_a_finished_one(page):
    rows = page.rows(-2)
    assert rows["MAE"][:5] == ["finished", "100", "1,024", "2,400", "2 h 4 min"]
    assert rows["MAE, trained on instead (control)"][0] == "not finished"


def test_ten_classes_three_stages_and_photographs_fit_into_four_megabytes(workdir, tmp_path):
    classes = [f"class {c}" for c in range(10)]
    for name in ("metrics.jsonl", "results.jsonl"):
        (tmp_path / name).write_bytes((workdir / name).read_bytes())
    figures = tmp_path / "figures"
    figures.mkdir()
    for seed, stage in enumerate(("pretrain", "control", "tune")):
        make_neighbors(figures / f"neighbors_{stage}.npz", 0.5, seed, queries=12, side=96)
        make_clusters(figures / f"clusters_{stage}.npz", 0.5, seed, classes, m=10, side=96)
        make_scatter(figures / f"scatter_{stage}.npz", 9, seed, 5000, classes)
        make_attention(figures / f"attention_{stage}.npz", seed, q=8, heads=12, grid=14, side=96)
        make_confusion(figures / f"confusion_{stage}.npz", 0.5, seed, classes)
    make_reconstruction(figures / "reconstruction.npz", 12, side=192)
    for seed, when in ((3, "before"), (1, "after")):
        make_parts(figures / f"parts_{when}.npz", seed, 6, side=192)
    assert 1e6 < len(write_report(tmp_path).read_bytes()) < 4e6
