"""A run of EMAE as a reader sees it: under its own name, and its parts with how far they are apart."""

import base64
import io
import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from made_up import HOSTILE, Page, make_parts, make_workdir
from maect_jax.report import charts
from maect_jax.report.html import write_report


@pytest.fixture
def figures(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "config.resolved.yaml").write_text("pretrain: {method: emae}")
    return tmp_path / "figures"


def report_of(figures) -> Page:
    return Page(write_report(figures.parent))


def decoded(image: dict) -> np.ndarray:
    """The picture that an <img> holds."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].split(",", 1)[1]))))


def test_pictures_stand_with_their_parts_before_and_after(figures):
    before = make_parts(figures / "parts_before.npz", 3, side=24)
    after = make_parts(figures / "parts_after.npz", 1, side=24)
    images = report_of(figures).named("img")[1:]  # the first is the colour scale
    assert len(images) == 3 * (1 + 4 + 2 * (1 + 4))
    for i in range(3):
        of_picture = images[15 * i : 15 * (i + 1)]
        assert all(image["alt"].startswith(f"picture {i + 1}") for image in of_picture)
        found = [decoded(image) for image in of_picture]
        np.testing.assert_array_equal(found[0], after["original"][i])
        np.testing.assert_array_equal(found[1:5], after["seen"][i])
        np.testing.assert_array_equal(found[6:10], before["completed"][i])
        np.testing.assert_array_equal(found[11:], after["completed"][i])
        assert found[5].shape == found[10].shape == (6, 6, 3)


def test_maps_of_all_pictures_have_one_scale_which_is_named(figures):
    found = {when: make_parts(figures / f"parts_{when}.npz", seed) for seed, when in ((3, "before"), (1, "after"))}
    page = report_of(figures)
    value, brightness = [], []
    for i in range(3):
        for when, arrays in found.items():
            (image,) = [of for of in page.named("img") if of["alt"] == f"picture {i + 1}, disagreement {when} training"]
            value.append(arrays["disagreement"][i].ravel())
            brightness.append(decoded(image).astype(float) @ [0.2126, 0.7152, 0.0722])
            assert f"{when.capitalize()} training: disagreement {arrays['disagreement'][i].mean():.3g}," in page.words
    value, brightness = np.concatenate(value), np.concatenate([of.ravel() for of in brightness])
    top = value.max()
    assert top == found["before"]["disagreement"].max()
    assert (np.diff(value[brightness.argsort()]) > -0.02 * top).all()  # dark to bright, over both files
    assert brightness[value.argmax()] > 220 and brightness[value.argmin()] < 30
    scale = page.named("img")[0]
    assert scale["alt"] == f"from dark, 0, to bright, {top:.3g}" and f"one scale: 0 {top:.3g}" in page.words
    assert (np.diff(decoded(scale)[0].astype(float) @ [0.2126, 0.7152, 0.0722]) > -1).all()


def test_disagreement_error_and_their_ratio_are_a_table(figures):
    for seed, when in ((3, "before"), (1, "after")):
        arrays = make_parts(figures / f"parts_{when}.npz", seed)
        apart = {"before": 0.125, "after": 0.25}[when]
        np.savez(figures / f"parts_{when}.npz", **arrays | {"mean_disagreement": np.float32(apart)})
    rows = report_of(figures).rows(0)
    assert rows["All 3 pictures"] == ["Before", "After"]
    assert rows["Disagreement"] == ["0.125", "0.25"]
    assert rows["Error, root of its mean square"] == ["0.9", "0.5"]
    assert rows["Disagreement over error"] == ["0.139", "0.5"]


def test_no_error_gives_no_ratio(figures):
    np.savez(figures / "parts_after.npz", **make_parts(figures / "x.npz", 1) | {"error": np.float32(0)})
    assert report_of(figures).rows(0)["Disagreement over error"] == ["–"]


def test_of_many_parts_and_pictures_the_first_are_shown(figures):
    for seed, when in ((3, "before"), (1, "after")):
        make_parts(figures / f"parts_{when}.npz", seed, count=8, shown=5, parts=9)
    page = report_of(figures)
    assert len(page.named("img")) == 1 + 6 * 15
    assert "into 9 parts" in page.words
    assert "The first 4 of 9 parts are shown. The first 6 of 8 pictures are shown." in page.words


def test_two_parts_have_nothing_to_disagree_in(figures):
    for seed, when in ((3, "before"), (1, "after")):
        arrays = make_parts(figures / f"parts_{when}.npz", seed, shown=2, parts=2)
        nothing = {name: np.zeros_like(arrays[name]) for name in ("disagreement", "mean_disagreement")}
        np.savez(figures / f"parts_{when}.npz", **arrays | nothing)
    page = report_of(figures)
    assert "nothing in which they could disagree" in page.words and "one scale" not in page.words
    assert len(page.named("img")) == 3 * (1 + 2 + 2 * 2) and not page.tables


@pytest.mark.parametrize(("there", "missing"), [("before", "after"), ("after", "before")])
def test_one_file_alone_is_shown_with_the_reason_for_the_other(there, missing, figures):
    make_parts(figures / f"parts_{there}.npz", 1)
    page = report_of(figures)
    assert (
        f"figures/parts_{missing}.npz is not in this folder." in page.words and "No reconstruction by" not in page.words
    )
    assert f"{there.capitalize()} training:" in page.words and f"{missing.capitalize()} training:" not in page.words
    assert len(page.named("img")) == 1 + 3 * 10


def test_without_files_the_chapter_is_a_sentence(figures):
    page = report_of(figures)
    missing = "figures/parts_before.npz is not in this folder. figures/parts_after.npz is not in this folder."
    assert f"No reconstruction by parts: {missing}" in page.words


def test_parts_are_shown_where_the_settings_are_lost(figures):
    make_parts(figures / "parts_after.npz", 1)
    (figures.parent / "config.resolved.yaml").write_bytes(b"\xff[[[")
    assert "Reconstruction by parts" in report_of(figures).words


def test_parts_of_other_pictures_are_not_compared(figures):
    arrays = make_parts(figures / "parts_before.npz", 3)
    np.savez(figures / "parts_before.npz", **arrays | {"seen": arrays["seen"][:, ::-1]})
    make_parts(figures / "parts_after.npz", 1)
    page = report_of(figures)
    assert "parts_before.npz has other pictures or other parts" in page.words
    assert "Before training" not in page.words and len(page.named("img")) == 1 + 3 * 10


WRONG = {
    "original": np.zeros((3, 48, 48, 3)),
    "seen": np.zeros((3, 4, 24, 48, 3), np.uint8),
    "completed": np.zeros((3, 5, 48, 48, 3), np.uint8),
    "disagreement": np.zeros((3, 6, 5), np.float32),
    "mean_disagreement": np.zeros(3, np.float32),
    "error": np.array(HOSTILE),
    "parts": np.array(4.0),
}
IMPOSSIBLE = [
    ("disagreement", np.full((3, 6, 6), np.nan)),
    ("disagreement", np.full((3, 6, 6), -0.1)),
    ("mean_disagreement", np.array(np.inf)),
    ("error", np.array(-1.0)),
    ("parts", np.array(3)),
    ("parts", np.array(-4)),
]


@pytest.mark.parametrize(("name", "array"), [*WRONG.items(), *IMPOSSIBLE])
def test_arrays_that_can_not_be_are_named_and_not_used(name, array, figures):
    np.savez(figures / "parts_after.npz", **make_parts(figures / "parts_before.npz", 3) | {name: array})
    page = report_of(figures)
    assert "figures/parts_after.npz could not be read (ValueError: " in page.text
    assert "Before training" in page.words and "After training" not in page.words


def test_a_torn_file_and_one_with_objects_cost_their_place_alone(figures):
    (figures / "parts_before.npz").write_bytes(b"PK\x03\x04 torn")
    np.savez(figures / "parts_after.npz", **make_parts(figures / "x.npz", 1) | {"seen": np.array([{}], object)})
    words = report_of(figures).words
    assert "No reconstruction by parts: figures/parts_before.npz could not be read" in words
    assert "figures/parts_after.npz could not be read" in words


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("runs") / "run", "emae")


def test_a_run_of_emae_is_called_so_everywhere(workdir):
    page = Page(write_report(workdir))
    attributes = [value for _, of in page.tags for value in of.values() if value and not value.startswith("data:")]
    told = page.text + "\n".join(attributes)
    assert told.count("EMAE") > 50 and not re.findall(r".*(?<!E)MAE.*", told)
    assert "from 42.1 % (EMAE) to 67.4 % (EMAE-CT): +25.3 points. The same EMAE, trained on instead" in page.words
    head = [cell.strip() for cell in page.tables[0][0]]
    assert head[1:] == ["EMAE", "EMAE, trained on instead (control)", "EMAE-CT", "EMAE-CT − EMAE", "EMAE-CT − control"]
    assert {"EMAE", "EMAE, trained on instead (control)", "EMAE-CT"} <= page.rows(-2).keys()  # what was run


def test_how_the_parts_did_in_training_is_charted(workdir):
    titles = [svg["aria-label"] for svg in Page(write_report(workdir)).named("svg")]
    for metric in ("reconstruction_loss", "disagreement", "disagreement_ratio"):
        assert titles.count(charts.CHARTS[metric][0]) == 1


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"pretrain": {"method": "disjoint"}}, ["disjoint MAE", "MAE-CT"]),
        ({"pretrain": {"method": "mae"}}, ["MAE", "MAE-CT"]),
        ({"pretrain": {"epochs": 1}}, ["MAE", "MAE-CT"]),
        ({"pretrain": {"method": HOSTILE}}, ["MAE", "MAE-CT"]),
        ({"pretrain": {"method": ["emae"]}}, ["MAE", "MAE-CT"]),
        ({"pretrain": ["method"]}, ["MAE", "MAE-CT"]),
        ({}, ["MAE", "MAE-CT"]),
    ],
)
def test_names_of_other_runs_and_of_damaged_settings(settings, names, tmp_path):
    (tmp_path / "config.resolved.yaml").write_text(yaml.safe_dump(settings))
    records = [
        {"stage": stage, "evaluation": "knn", "metric": "accuracy", "value": 0.5, "unit": "fraction", "protocol": "p"}
        for stage in ("pretrain", "tune")
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, records)))
    page = Page(write_report(tmp_path))
    assert [cell.strip() for cell in page.tables[0][0][1:3]] == names
    assert f"from 50.0 % ({names[0]}) to 50.0 % ({names[1]})" in page.words
    assert "<script" not in page.source
