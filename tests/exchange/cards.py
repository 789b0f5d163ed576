"""Cards as a renderer shows them, and records of evaluations to write into them."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import yaml
from markdown_it import MarkdownIt

from maect_jax.exchange.export import card
from maect_jax.exchange.export.proof import Proof
from maect_jax.exchange.export.targets import TARGETS
from maect_jax.results.record import Record

NO_PROOF = Proof(None, "no library")
TITLES = ["Use", "Preprocessing", "Results", "Training", "Licence", "Files", "Proof"]
MINE = "a" * 64


def filled(folder: Path) -> Path:
    """The folder with files to list."""
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_bytes(b"{}")
    return folder


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


def record(evaluation="knn", metric="accuracy", value=0.8534, sha256=MINE, **changes) -> dict:
    protocol = {"name": f"preset-{evaluation}", "version": 1, "k": 10}
    protocol |= {"train": {"name": "digits train"}, "test": {"name": "digits test"}} | changes.pop("protocol", {})
    made = dict(stage="tune", seed=0, unit="fraction", interval=(0.8412, 0.8656), std=None, values=None)
    made |= dict(found={}, weights={"sha256": sha256}, model={}, cost={}, software={}) | changes
    record = Record(evaluation=evaluation, metric=metric, value=value, protocol=protocol, **made)
    return {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(record).items()}
