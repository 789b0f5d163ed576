"""Clusters, maps, attention and confusions as a reader sees them, counted again from the arrays."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from made_up import CLASSES, Page, make_attention, make_clusters, make_confusion, make_scatter
from maect_jax.report.html import write_report


@pytest.fixture
def figures(tmp_path):
    (tmp_path / "figures").mkdir()
    return tmp_path / "figures"


def report_of(figures) -> Page:
    return Page(write_report(figures.parent))


def decoded(address: str) -> np.ndarray:
    """The picture that a data address holds."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",", 1)[1]))))


def test_clusters_stand_in_the_order_of_their_classes_with_framed_pictures(figures):
    arrays = make_clusters(figures / "clusters_tune.npz", 0.7, seed=1)
    page = report_of(figures)
    order = sorted(range(4), key=lambda k: (arrays["cluster_class"][k] < 0, arrays["cluster_class"][k]))
    frames, labels, right, total = [], [], 0, 0
    for k in order:
        for label in arrays["label"][k][arrays["valid"][k]]:
            labels.append(CLASSES[label])
            matched = arrays["cluster_class"][k]
            frames.append("plain" if matched < 0 else "same" if label == matched else "other")
            right, total = right + (label == matched), total + (matched >= 0)
    assert [image["class"].split()[0] for image in page.named("img")] == frames
    assert [image["alt"] for image in page.named("img")] == labels
    assert f"after tuning (MAE-CT) {right} of {total}." in page.words
    names = re.findall(r'class="cluster-name"><b title="([^"]*)"', page.source)
    named = [CLASSES[c] if c >= 0 else "no class" for c in arrays["cluster_class"][order]]
    assert [name.replace("&lt;", "<").replace("&gt;", ">") for name in names] == named
    for size, purity in zip(arrays["size"][order], arrays["purity"][order]):
        assert f"{size} picturespurity {100 * purity:.0f} %" in page.text


def test_small_pictures_are_kept_as_they_are(figures):
    arrays = make_clusters(figures / "clusters_tune.npz", 1.0, seed=1, side=16)
    first = np.flatnonzero(arrays["cluster_class"] >= 0)
    first = first[arrays["cluster_class"][first].argmin()]
    shown = decoded(report_of(figures).named("img")[0]["src"])
    np.testing.assert_array_equal(shown, arrays["picture"][first, 0])


def test_clusters_without_labels_or_pictures_are_neither_right_nor_wrong(figures):
    arrays = make_clusters(figures / "clusters_tune.npz", 0.7, seed=1)
    arrays |= {"label": np.full_like(arrays["label"], -1), "classes": np.array([], str), "purity": np.full(4, np.nan)}
    arrays["valid"][2] = False
    np.savez(figures / "clusters_tune.npz", **arrays)
    page = report_of(figures)
    assert {image["class"].split()[0] for image in page.named("img")} == {"plain"}
    assert page.text.count("purity –") == 4 and "(MAE-CT) 0 of 0." in page.words


def test_of_many_clusters_the_first_are_shown(figures):
    make_clusters(figures / "clusters_tune.npz", 0.7, 1, [f"class {c}" for c in range(24)], m=10, side=8)
    page = report_of(figures)
    assert page.source.count('class="cluster"') == 20 and len(page.named("img")) <= 20 * 8
    assert "The first 20 of 24 clusters are shown." in page.text


def test_weights_of_a_file_are_shown_without_asking_for_a_run(figures):
    make_clusters(figures / "clusters_vit_large.npz", 0.7, seed=1, side=8)
    page = report_of(figures)
    assert "Weights (vit large)" in page.words and "figures/clusters_pretrain.npz" not in page.text


def dots(page: Page) -> dict[str, list[np.ndarray]]:
    """Class of the style sheet -> places of its dots, for each map."""
    found: dict[str, list[np.ndarray]] = {}
    for name, path in re.findall(r'<path class="(dots-\w+)" d="([^"]*)"', page.source):
        places = [tuple(map(float, dot.split())) for dot in re.findall(r"M([\d.]+ [\d.]+)h0", path)]
        found.setdefault(name, []).append(np.array(places))
    return found


def test_map_has_a_dot_a_picture_in_its_place_and_colour(figures):
    arrays = make_scatter(figures / "scatter_tune.npz", 9, seed=2)
    page = report_of(figures)
    found = dots(page)
    assert sorted(found) == [f"dots-{c}" for c in range(4)]
    everywhere = np.concatenate([of[0] for of in found.values()])
    low, high = arrays["xy"].min(0), arrays["xy"].max(0)
    scale = np.ptp(everywhere, axis=0) / (high - low)
    assert scale[0] == pytest.approx(scale[1], rel=1e-3)  # proportions are kept
    for c in range(4):
        true = (arrays["xy"][arrays["label"] == c] - low) * scale
        true[:, 1] = (high - low)[1] * scale[1] - true[:, 1]  # SVG counts from the top
        shown = found[f"dots-{c}"][0]
        distance = np.linalg.norm(shown[:, None] - (true + everywhere.min(0))[None], axis=-1)
        assert shown.shape == true.shape and distance.min(0).max() < 0.3 and distance.min(1).max() < 0.3


def test_map_says_in_words_how_far_apart_classes_are(figures):
    arrays = make_scatter(figures / "scatter_tune.npz", 14, seed=2)
    page = report_of(figures)
    distance = np.linalg.norm(arrays["xy"][:, None] - arrays["xy"][None], axis=-1) + 1e9 * np.eye(240)
    share = 100 * (arrays["label"][distance.argmin(1)] == arrays["label"]).mean()
    words = "Map of 240 test pictures, after tuning (MAE-CT)."
    assert (
        page.named("svg")[0]["aria-label"] == f"{words} For {share:.0f} % of them the nearest one is of the same class."
    )
    legend = page.text[page.text.index("Point at a class") :]
    assert all(name in legend for name in CLASSES)


def test_of_many_dots_a_part_of_every_class_is_drawn(figures):
    make_scatter(figures / "scatter_tune.npz", 5, seed=2, n=8000)
    page = report_of(figures)
    sizes = [len(of[0]) for of in dots(page).values()]
    assert sum(sizes) == 4000 and len(sizes) == 4 and min(sizes) > 900
    assert "4,000 of 8,000 pictures are drawn" in page.words


def test_colours_repeat_after_twenty_classes_and_the_caption_says_so(figures):
    make_scatter(figures / "scatter_tune.npz", 2, seed=2, n=92, classes=[f"class {c}" for c in range(23)])
    page = report_of(figures)
    assert "There are 23 classes and 20 colours: colours repeat" in page.words
    assert page.source.count('class="dots-2"') == 2 and 'class="of-' not in page.source
    assert all(f"<title>class {c}</title>" in page.source for c in range(23))


def test_dots_without_labels_or_places(figures):
    arrays = make_scatter(figures / "scatter_tune.npz", 5, seed=2)
    arrays["xy"][:3] = np.nan
    np.savez(figures / "scatter_tune.npz", xy=arrays["xy"], label=np.full(240, -1), classes=np.array([], str))
    page = report_of(figures)
    assert [len(of[0]) for of in dots(page).values()] == [237] and list(dots(page)) == ["dots-none"]
    assert page.named("svg")[0]["aria-label"].endswith("after tuning (MAE-CT).")


def test_maps_of_other_classes_do_not_share_a_legend(figures):
    make_scatter(figures / "scatter_pretrain.npz", 5, seed=2)
    make_scatter(figures / "scatter_tune.npz", 5, seed=2, classes=["a", "b"])
    page = report_of(figures)
    assert "figures/scatter_tune.npz has other classes" in page.text and len(page.named("svg")) == 1


def test_attention_shows_the_picture_the_mean_and_each_head(figures):
    before = make_attention(figures / "attention_pretrain.npz", seed=1)
    after = make_attention(figures / "attention_tune.npz", seed=2)
    page = report_of(figures)
    titles = re.findall(r"<title>([^<]*): at most ([\d.]+) % on a patch</title>", page.source)
    images = [image["href"] for image in page.named("image") if image["class"] == "sharp" and "opacity" in image]
    heads = ["all heads", *(f"head {i}" for i in range(1, 7))]
    names = [f"{stage}, {head}" for _ in range(4) for stage in ("MAE", "MAE-CT") for head in heads]
    assert [title for title, _ in titles] == names and len(images) == len(names)
    maps = [
        map_gg
        for i in range(4)
        for of in (before["attention"], after["attention"])
        for map_gg in (of[i].astype(float).sum(0) / 6, *of[i])
    ]
    for map_gg, address, (_, top) in zip(maps, images, titles):
        heat = decoded(address)
        assert heat.shape == (6, 6, 3) and float(top) == pytest.approx(100 * map_gg.max(), rel=0.06)
        brightness = heat.astype(float) @ [0.2126, 0.7152, 0.0722]
        dark_to_bright = (map_gg / map_gg.max()).ravel()[brightness.ravel().argsort()]
        assert (np.diff(dark_to_bright) > -0.02).all()
    assert len(page.named("img")) == 4  # both stages look at the same pictures


def test_attention_to_other_pictures_is_shown_apart(figures):
    make_attention(figures / "attention_pretrain.npz", seed=1, q=8, heads=8)
    make_attention(figures / "attention_tune.npz", seed=2, q=3, heads=3)
    page = report_of(figures)
    assert len(page.named("img")) == 6 + 3
    assert "The first 6 of 8 heads are shown. The first 6 of 8 pictures are shown." in page.words


def test_confusions_are_a_table_with_its_largest_errors_in_words(figures):
    matrix = make_confusion(figures / "confusion_tune.npz", 0.6, 3, source="linear, <b>")["matrix"]
    page = report_of(figures)
    head, *rows = page.tables[0]
    assert head[1:] == CLASSES and [row[0] for row in rows] == CLASSES
    np.testing.assert_array_equal([[int(n) for n in row[1:]] for row in rows], matrix)
    assert f"{100 * np.diag(matrix).sum() / matrix.sum():.1f} % right, linear, <b>" in page.words
    errors = sorted((-matrix[i, j], i, j) for i in range(4) for j in range(4) if i != j)[:5]
    for count, true, predicted in errors:
        assert f"{CLASSES[true]} taken for {CLASSES[predicted]}: {-count} of 50" in page.text
    assert page.text.count(" taken for ") == 5 + 1  # and the chapter's title
    tones = [float(cell["style"].split()[1]) for cell in page.named("td") if "--tone" in cell.get("style", "")]
    np.testing.assert_allclose(tones, np.sqrt(matrix / 50)[matrix > 0], atol=0.0051)


def test_nothing_confused_is_said(figures):
    np.savez(figures / "confusion_tune.npz", matrix=np.diag([3, 0]), classes=np.array(["a", "b"]), source=np.array(""))
    assert "Nothing was confused." in report_of(figures).text


@pytest.mark.parametrize(("classes", "block"), [(24, 1), (600, 2)])
def test_confusions_of_many_classes_are_a_picture(figures, classes, block):
    names = [f"class {c}" for c in range(classes)]
    matrix = np.zeros((classes, classes), np.int64)
    matrix[np.arange(classes), np.arange(classes)] = 9
    matrix[2, classes - 1] = 7
    np.savez(figures / "confusion_tune.npz", matrix=matrix, classes=np.array(names), source=np.array("knn"))
    page = report_of(figures)
    (image,) = page.named("img")
    shown = decoded(image["src"])
    assert shown.shape == (classes // block, classes // block, 4) and not page.tables
    drawn = np.argwhere(shown[..., 3] > 0).tolist()
    side = classes // block
    assert drawn == sorted([[i, i] for i in range(side)] + [[2 // block, side - 1]])
    assert shown[2 // block, side - 1, 0] > shown[2 // block, side - 1, 1] and shown[0, 0, 1] > shown[0, 0, 0]
    assert f"class 2 taken for class {classes - 1}: 7 of 16" in page.text


def test_one_class_alone(figures):
    make_clusters(figures / "clusters_tune.npz", 1, 1, ["only"], m=1, side=8)
    np.savez(
        figures / "scatter_tune.npz", xy=np.zeros((1, 2), np.float32), label=np.array([0]), classes=np.array(["only"])
    )
    page = report_of(figures)
    assert "no class" in page.text and [len(of[0]) for of in dots(page).values()] == [1]
