"""No name, note or setting of others becomes markdown, HTML or YAML in a model card, or makes it long."""

import dataclasses
import hashlib
import re

import pytest
import yaml
from cards import MINE, TITLES, Shown, filled, parts, record, render

from maect_jax.exchange.export import card
from maect_jax.exchange.export.proof import Proof
from maect_jax.exchange.provenance import Provenance, without_place
from models import random_model


@pytest.fixture
def folder(tmp_path):
    return filled(tmp_path)


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
    entry = record(
        text, text, protocol={"name": text, "feature": text, "train": {"name": text}, "test": {"name": text}}
    )
    (folder / "odd|`name`.txt").write_text("x")
    rendered = render(
        folder,
        model,
        entries=card.results_of([entry], MINE, Provenance()),
        notes=[text, "done"],
        proof=Proof(None, text),
    )
    front, body = parts(rendered)
    shown = Shown(body)

    assert set(front) <= {"license", "license_name", "library_name", "pipeline_tag", "tags"}
    assert front["license"] in ("other", "unknown") and re.fullmatch("[a-z0-9.-]+", front["license_name"])
    titles = [*TITLES[:2], "Classes", *TITLES[2:], "Notes"]
    assert [title for title in shown.headings[1:]] == [("h2", title) for title in titles]
    assert shown.links == []
    assert not shown.types & {"image", "html_inline", "strong_open", "em_open", "s_open", "hr", "blockquote_open"}
    details = ["<details><summary>{}</summary>", "</details>"]
    names = ("Names, in the order of the outputs", "Settings")
    assert shown.html == [tag.format(name) for name in names for tag in details]
    assert all(c.isprintable() or c == "\n" for c in rendered)
    assert not re.search(r"(https?|javascript)://|www\.|(?<!\\)@evil", without_code(body))
    assert len(rendered) < 40_000

    read = plain(text)
    if len(read) < 200:
        in_code, data = read.replace("`", "'"), plain(without_place(text)).replace("`", "'")
        rows = shown.rows
        assert [in_code or "–"] * 4 in rows and ["trained on", in_code or "–"] in rows
        result = rows[[row[0] for row in rows].index("evaluation") + 1]
        feature = f", on {in_code or '–'}" if text else ""
        assert result[1:4] == [f"{in_code or '–'}{feature}", *[data or "–"] * 2]
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
