"""The model card: what it tells, and that no name, note or setting of others becomes markdown, HTML or YAML."""

import dataclasses
import hashlib
import importlib.metadata
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt

from maect_jax.exchange.export import card
from maect_jax.exchange.export.proof import Proof
from maect_jax.exchange.export.targets import TARGETS
from maect_jax.exchange.provenance import NONE_STATED, OWN, UNKNOWN, Provenance
from maect_jax.results.record import Record
from models import random_model, weightless_model

NO_PROOF = Proof(None, "no library")
TITLES = ["Use", "Preprocessing", "Results", "Training", "Licence", "Files", "Proof"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_bytes(b"{}")
    return tmp_path


def render(folder: Path, model, target="timm", proof=NO_PROOF, **options) -> str:
    return card.render(model, TARGETS[target], folder, proof=proof, **options)


def parts(text: str) -> tuple[dict, str]:
    """The head, read as YAML, and the rest."""
    empty, front, body = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), body


class Shown:
    """What a renderer makes of a card's markdown: blocks of text, tables, links, …"""

    def __init__(self, body: str):
        blocks = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
        every = blocks + [child for block in blocks for child in block.children or ()]
        self.links = [token.attrs["href"] for token in every if token.type == "link_open"]
        self.html = [token.content.strip() for token in every if token.type.startswith("html")]
        self.fences = {token.info: token.content for token in every if token.type == "fence"}
        self.types = {token.type for token in every}
        self.rows, self.headings, texts = [], [], []
        for opening, block in pairwise(blocks):
            if opening.type == "tr_open":
                self.rows.append([])
            if block.type == "inline":
                texts.append("".join(" " if x.type == "softbreak" else x.content for x in block.children))
                if opening.type == "heading_open":
                    self.headings.append((opening.tag, texts[-1]))
                if opening.type in ("td_open", "th_open"):
                    self.rows[-1].append(texts[-1])
        self.text = "\n".join(texts)


# -------------------------------------------------------------------------------------------------------------- content


def test_card_tells_what_the_model_is_and_how_to_use_it(folder):
    model = weightless_model("B/16")
    head = {"kernel": np.zeros((768, 4)), "bias": np.zeros(4)}
    model = dataclasses.replace(model, name="digits-tune", params=model.params | {"head": head})
    front, body = parts(render(folder, model))
    assert front == {
        "license": "unknown",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["mae-ct", "masked-autoencoder", "self-supervised-learning", "vision-transformer"],
    }
    shown = Shown(body)
    assert shown.headings == [("h1", "digits-tune"), *(("h2", title) for title in TITLES)]
    # 85,647,360 without its fixed table of positions, and the head's 3,076
    assert "A Vision Transformer of 85.7 million parameters with a classifier of 4 classes" in shown.text
    assert shown.links == ["https://arxiv.org/abs/2304.10520"]
    size = "ViT-B/16: width 768, 12 blocks, 12 heads, patches of 16 x 16 pixels"
    assert ["architecture", size] in shown.rows
    assert ["pictures", "224 x 224 pixels, 3 channels"] in shown.rows
    assert ["feature of a picture", "class token, after the final norm"] in shown.rows
    assert shown.fences["python"].rstrip() == TARGETS["timm"].usage(model).rstrip()
    assert "brought to 256 pixels" in shown.text and "0.485, 0.456, 0.406" in shown.text
    assert "None are known of these weights." in shown.text
    assert "Not checked: no library." in shown.text
    assert "html_block" not in shown.types


def test_feature_is_named(folder):
    for changes, feature in (
        (dict(pooling="mean"), "mean of the patch tokens, after the final norm"),
        (dict(fc_norm=True), "mean of the patch tokens, then a norm"),
    ):
        shown = Shown(parts(render(folder, random_model(**changes)))[1])
        assert ["feature of a picture", feature] in shown.rows


@pytest.mark.parametrize(
    ("normalised", "says"),
    [
        (True, "Pixels normalised patch by patch"),
        (False, "Pixels of the preprocessed picture, not normalised patch by patch"),
        (None, "It is not known whether it predicts"),
    ],
)
def test_pixels_that_the_decoder_predicts_are_named(normalised, says, folder):
    model = random_model(decoder=True, normalised_pixels=normalised, mask_ratio=0.6)
    shown = Shown(parts(render(folder, model, "mae"))[1])
    chapter = shown.headings.index(("h2", "What the decoder predicts"))
    assert shown.headings[chapter - 1] == ("h2", "Preprocessing")
    assert sum(text in shown.text for text in ("Pixels normalised", "Pixels of the", "It is not known")) == 1
    assert says in shown.text
    assert ["decoder", "width 32, 2 blocks, 4 heads; 60 % of the patches are removed"] in shown.rows


@pytest.mark.parametrize(
    ("license", "front"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
        ("GPL-3.0-or-later", {"license": "gpl-3.0"}),
        (UNKNOWN, {"license": "unknown"}),
        (NONE_STATED, {"license": "other", "license_name": "none-stated"}),
        (OWN, {"license": "other", "license_name": "unstated"}),
        ("Our Licence, v2: 'no' harm\n---\n", {"license": "other", "license_name": "our-licence-v2-no-harm"}),
    ],
)
def test_licence_is_spelled_as_the_hub_spells_it_and_told_in_full(license, front, folder):
    origin = Provenance(license=license, license_source="its owner")
    found, body = parts(render(folder, random_model(provenance=origin)))
    assert {name: text for name, text in found.items() if name.startswith("license")} == front
    assert f"{' '.join(license.split())} (its owner)" in Shown(body).text


def test_training_and_what_the_weights_were_made_from_are_told(folder):
    recipe = {"seed": 3, "model": {"width": 48, "names": ["a", None]}, "rate": 1e-3, "text": "ü: -"}
    chain = (
        {"name": "mine", "stage": "pretrain", "sha256": "1" * 64, "license": OWN},
        {"name": "mae.pth", "layout": "mae_official_full", "sha256": "2" * 64, "license": "CC-BY-NC-4.0"},
    )
    origin = Provenance(
        derived_from=chain, recipe=recipe, stage="tune", step=300, average="exponential, 0.99", trained_on="digits"
    )
    shown = Shown(parts(render(folder, random_model(provenance=origin)))[1])
    rows = [
        ["stage", "tune"],
        ["step", "300"],
        ["average of the weights", "exponential, 0.99"],
        ["trained on", "digits"],
        ["mine", "pretrain", OWN, "1" * 64],
        ["mae.pth", "mae_official_full", "CC-BY-NC-4.0", "2" * 64],
    ]
    assert [row for row in shown.rows if row in rows] == rows
    assert yaml.safe_load(shown.fences["yaml"]) == recipe
    assert shown.html == ["<details><summary>Settings</summary>", "</details>"]
    assert "trained by MAE-CT" in shown.text


def test_files_stand_with_size_and_sha256(folder):
    shown = Shown(parts(render(folder, random_model()))[1])
    for path in folder.iterdir():
        size, sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        assert [path.name, str(size), sha256] in shown.rows


def test_proof_is_told_with_versions_and_definition(folder):
    version = importlib.metadata.version("timm")
    proof = Proof({"tokens": 3.21e-7, "loss": 0.0})
    body = parts(render(folder, random_model(), proof=proof, dtype="bfloat16"))[1]
    shown = Shown(body)
    assert ["tokens", "3.2e-07"] in shown.rows and ["loss", "0.0e+00"] in shown.rows
    assert f"timm {version}, torch 2" in shown.text and "max|a − b| / max|b|" in shown.text
    assert "from the weights rounded to bfloat16" in shown.text and ["weights", "bfloat16"] in shown.rows
    assert "Not checked" not in shown.text


@pytest.mark.parametrize(
    "reason",
    [
        "timm can not be imported (OSError: /home/John Doe/lib/x.so: cannot open shared object file)",
        r"timm can not be imported (OSError: C:\Users\Doe\x.dll)",
        "timm can not be imported (ImportError: '../Doe/x' is broken)",
    ],
)
def test_reason_for_no_proof_holds_no_path(reason, folder):
    text = Shown(parts(render(folder, random_model(), proof=Proof(None, reason)))[1]).text
    assert "Not checked: timm can not be imported" in text
    assert "Doe" not in text and "…." in text


# -------------------------------------------------------------------------------------------------------------- results

MINE = "a" * 64


def record(evaluation="knn", metric="accuracy", value=0.8534, sha256=MINE, **changes) -> dict:
    protocol = {"name": f"preset-{evaluation}", "version": 1, "k": 10}
    protocol |= {"train": {"name": "digits train"}, "test": {"name": "digits test"}} | changes.pop("protocol", {})
    made = dict(stage="tune", seed=0, unit="fraction", interval=(0.8412, 0.8656), std=None, values=None)
    made |= dict(found={}, weights={"sha256": sha256}, model={}, cost={}, software={}) | changes
    record = Record(evaluation=evaluation, metric=metric, value=value, protocol=protocol, **made)
    return {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(record).items()}


def result_rows(folder, *records) -> list[list[str]]:
    entries = card.results_of(records, MINE)
    rows = Shown(parts(render(folder, random_model(), entries=entries))[1]).rows
    titles = ["evaluation", "protocol", "trained on", "tested on", "metric", "value"]
    return [row for row in rows if len(row) == len(titles) and row != titles]


def test_results_stand_in_groups_with_protocol_pictures_and_interval(folder):
    rows = result_rows(
        folder,
        record("cluster", "nmi", 0.5, interval=None, std=0.0123),
        record("knn"),
        record("mine", "effective_rank", 123.456, unit="", interval=None),
        record("knn", protocol={"name": "maect-knn-std"}, value=1.0, interval=(1.0, 1.0)),
    )
    data = ["digits train", "digits test"]
    assert rows == [
        ["Nearest neighbours vote (k-NN)", "preset-knn", *data, "accuracy", "85.3 % [84.1, 86.6]"],
        ["", "maect-knn-std", *data, "accuracy", "100.0 % [100.0, 100.0]"],
        ["Clusters found without labels (k-means)", "preset-cluster", *data, "NMI", "50.0 % ± 1.2"],
        ["mine", "preset-mine", *data, "effective rank", "123.5"],
    ]


def test_only_numbers_of_these_weights_are_shown_and_the_newest_of_each(folder):
    rows = result_rows(
        folder,
        record(value=0.1),
        record(value=0.2, sha256="b" * 64, stage="pretrain"),
        record(value=0.3, weights={}, stage="control"),
        record("knn_layers", value=0.4),
        record(value=0.5),
    )
    assert [row[-1] for row in rows] == ["50.0 % [84.1, 86.6]"]


def test_numbers_of_rounded_weights_are_not_claimed(folder):
    entries = card.results_of([record()], MINE)
    for dtype, told in (("bfloat16", True), ("float32", False)):
        text = Shown(parts(render(folder, random_model(), entries=entries, dtype=dtype))[1]).text
        assert ("Of the encoder, before its weights were rounded to bfloat16." in text) == told


# --------------------------------------------------------------------------------------------------------- foreign text

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=y>",
    "</details>",
    "![x](http://evil.example/x.png)",
    "[x](javascript:alert(1))",
    "<http://evil.example>",
    "https://evil.example www.evil.example me@evil.example",
    "`` ` ``` code",
    "~~~\n```\n\n# heading",
    "| a | b |",
    "a || b",
    "\\| c",
    "**bold** _x_ __y__ ~~z~~",
    "---\nlicense: mit\n---",
    "\n\n# heading\n\n* item\n1. one\n> quote\n",
    "{{ 7 * 7 }}{% include 'x' %}",
    "&lt;b&gt; &amp; &#60;",
    "x: y\n- !!python/object/apply:os.system ['x']",
    "\x1b[31mred\x00\u202eevil\u2028line",
    "$x^2$ $$y$$",
    "",
    " ",
    "\\",
    "x" * 5000,
]


def plain(text: str) -> str:
    """What is to be read of a text: its printable words."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_of_others_is_shown_and_does_nothing(text, folder):
    step = {"name": text, "layout": text, "license": text, "sha256": text}
    origin = Provenance(
        license=text,
        license_source=text,
        derived_from=(step, {"stage": [text], "name": {text: 1}}),
        trained_on=text,
        recipe={"a": text, "b": {text: [text]}},
        stage=text,
        average=text,
        code_version=text,
    )
    model = random_model(name=text or "m", provenance=origin, classes=3)
    model = dataclasses.replace(model, classes=(text, "cat", text))
    entry = record(text, text, protocol={"name": text, "train": {"name": text}, "test": {"name": text}})
    (folder / "odd|`name`.txt").write_text("x")
    rendered = render(
        folder, model, entries=card.results_of([entry], MINE), notes=[text, "done"], proof=Proof(None, text)
    )
    front, body = parts(rendered)
    shown = Shown(body)

    assert set(front) <= {"license", "license_name", "library_name", "pipeline_tag", "tags"}
    assert front["license"] in ("other", "unknown") and re.fullmatch("[a-z0-9.-]+", front["license_name"])
    titles = [*TITLES[:2], "Classes", *TITLES[2:], "Notes"]
    assert [title for title in shown.headings[1:]] == [("h2", title) for title in titles]
    assert shown.links == ["https://arxiv.org/abs/2304.10520"]
    assert not shown.types & {"image", "html_inline", "strong_open", "em_open", "s_open", "hr", "blockquote_open"}
    details = ["<details><summary>{}</summary>", "</details>"]
    names = ("Names, in the order of the outputs", "Settings")
    assert shown.html == [tag.format(name) for name in names for tag in details]
    assert all(c.isprintable() or c == "\n" for c in rendered)
    assert not re.search(
        r"(https?|javascript)://|www\.|(?<!\\)@evil", without_code(body.replace("https://arxiv.org", ""))
    )
    assert len(rendered) < 40_000

    read = plain(text)
    if len(read) < 200:
        in_code = read.replace("`", "'")
        rows = shown.rows
        assert [in_code or "–"] * 4 in rows and ["trained on", in_code or "–"] in rows
        assert rows[[row[0] for row in rows].index("evaluation") + 1][1:4] == [in_code or "–"] * 3
        assert ["odd|'name'.txt", "1", hashlib.sha256(b"x").hexdigest()] in rows
        assert f"{in_code or ' '}, cat, {in_code or ' '}" in shown.text
        assert f"({read})" in shown.text and f"{read}\ndone" in shown.text
        assert yaml.safe_load(shown.fences["yaml"]) == {"a": text, "b": {text: [text]}}


def without_code(body: str) -> str:
    """The markdown outside of fences and code in sentences, where addresses could become links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^(`{3,}).*?^\1$", "", body))


def test_settings_and_chains_are_bounded(folder):
    nested: dict = {}
    for _ in range(450):
        nested = {"a": nested}
    for recipe, why in (({"x": ["word"] * 100_000}, "# too long"), (nested, "# nested too deeply")):
        origin = Provenance(recipe=recipe, derived_from=({"name": "x"},) * 1000)
        shown = Shown(parts(render(folder, random_model(provenance=origin)))[1])
        assert shown.fences["yaml"] == f"{why}\n"
        assert shown.rows.count(["x", "–", "–", "–"]) == 100 and "And 900 more" in shown.text


def test_many_classes_are_counted(folder):
    names = tuple(f"class {i}" for i in range(1200))
    shown = Shown(parts(render(folder, random_model(classes=1200, name="m")))[1])
    assert "class 0" not in shown.text
    model = dataclasses.replace(random_model(classes=1200), classes=names)
    text = Shown(parts(render(folder, model))[1]).text
    assert "class 999 and 200 more" in text and "class 1000" not in text
