"""What a weights file is: layout, architecture, provenance, tensors. Of the tensors only position tables are read."""

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from maect_jax.exchange.beside import NOTE, Said, parsed, said
from maect_jax.exchange.files import find_file, hashes, provenance_of, published_pooling, with_published_heads
from maect_jax.exchange.fitting import nearest_layout
from maect_jax.exchange.heads import PROBE_TENSORS
from maect_jax.exchange.layouts import ENCODERS, LAYOUTS, WITHOUT_CLASS_ROW
from maect_jax.exchange.mapping import misfits
from maect_jax.exchange.positions import is_fixed
from maect_jax.exchange.provenance import NONE_STATED, UNKNOWN, Provenance
from maect_jax.exchange.tensors import read_notes, some
from maect_jax.inspection.architecture import decoder_facts, encoder_facts, parameter_counts, tree_of
from maect_jax.inspection.shapes import Shape, read_shapes, read_some
from maect_jax.models.vit import ViT

_REAL = ("float64", "float32", "float16", "bfloat16")


def file_facts(path: str) -> dict[str, Any]:
    """Facts on a weights file, or on a folder with one; see `inspection.facts`.

    Raises:
      CheckpointError: its tensors can not be read.
    """
    file = find_file(path)
    shapes, container = read_shapes(file)
    notes = read_notes(file)
    facts = said(file, notes)
    sha256, md5 = hashes(file)
    fitting = [layout for layout in LAYOUTS if not any(misfits(shapes, layout).values())]
    kept = shapes.keys() == set(PROBE_TENSORS) and len(shapes["kernel"].shape) == 2
    fitting = ["maect_jax_probe"] if kept else fitting
    found: dict[str, Any] = {"layout": fitting[0] if fitting else None, "same_as": fitting[1:]}
    provenance = _without_encoder(facts, found["layout"])
    if not fitting:
        differences = {"nearest": nearest_layout(shapes)}
        differences |= misfits(shapes, differences["nearest"])
        found |= {"kind": "weights of no known layout", "differences": differences}
    elif fitting[0] in ENCODERS:
        found |= _model_facts(file, shapes, fitting[0], facts)
        provenance = provenance_of(file, fitting[0], _encoder(found["encoder"]), facts, notes, sha256, md5)
    else:
        found |= _head_facts({"probe": shapes} if kept else tree_of(shapes, fitting[0]), facts)
    found |= provenance_facts(provenance)
    if facts.provenance is None:
        found |= {"average": None, "trained_on": None}  # nobody says
    beside = _of_note(notes) | {name: value for name, value in notes.items() if name != NOTE}
    where = {"path": str(file), "container": container, "bytes": file.stat().st_size, "sha256": sha256, "md5": md5}
    return where | found | {"beside": beside, "tensors": shapes}


def _of_note(notes: Mapping[str, Any]) -> dict[str, Any]:
    """What our own note says beside what `said` reads: of a probe its encoder and its accuracy."""
    known = {item.name for item in fields(Said)}
    note = parsed(notes.get(NOTE))
    return {name: value for name, value in note.items() if name not in known and isinstance(value, str | int | float)}


def provenance_facts(provenance: Provenance) -> dict[str, Any]:
    """The fields of a `Provenance`, as they are."""
    return {item.name: getattr(provenance, item.name) for item in fields(provenance)}


def _without_encoder(facts: Said, layout: str | None) -> Provenance:
    """Provenance of what is no encoder."""
    if facts.provenance is not None:
        return facts.provenance
    if facts.license is not None:
        return Provenance(facts.license, "stated beside the weights")
    if layout == "maect_probe":
        return Provenance(NONE_STATED, "MAE-CT's release states none")
    return Provenance(UNKNOWN, "nothing says")


def _head_facts(tree: dict, facts: Said) -> dict[str, Any]:
    """Of a linear probe or an NNCLR head."""
    if "probe" in tree:
        found = {"kind": "linear probe", "head": classifier_facts(tree["probe"], facts)}
    else:
        projector = tree["params"]["projector"]
        width, hidden = projector["linear0"]["kernel"].shape
        sizes = {
            "width": width,
            "hidden": hidden,
            "out": projector["linear2"]["kernel"].shape[1],
            "predictor_hidden": tree["params"]["predictor"]["linear0"]["kernel"].shape[1],
            "queue": tree["queue"]["rows_qe"].shape[0],
        }
        found = {"kind": f"NNCLR head of stage {3 if 'target' in tree else 2}", "nnclr": sizes}
    return found | {"parameters": parameter_counts(tree)}


def classifier_facts(head: dict, facts: Said) -> dict[str, Any]:
    """Classes of a linear head, and their names where there are as many."""
    width, classes = head["kernel"].shape
    names = facts.classes or ()
    return {"width": width, "classes": classes, "names": names if len(names) == classes else ()}


def _model_facts(file: Path, shapes: Mapping[str, Shape], layout: str, facts: Said) -> dict[str, Any]:
    """Of an encoder and the parts beside it."""
    names = {row.path: row.names[0] for row in LAYOUTS[layout]}
    tree = tree_of(shapes, layout)
    learned = _take_fixed_positions(file, shapes, layout, tree)
    _, channels, patch, _ = shapes[names["encoder.patch_embed.kernel"]].shape
    grid = math.isqrt(shapes[names["encoder.pos_embed"]].shape[1])  # a class row more or less rounds away
    encoder = encoder_facts(tree["encoder"], patch) | {"channels": channels, "image_size": grid * patch}
    encoder["positions"] = "learned" if "encoder" in learned else "fixed"
    published = with_published_heads(facts, encoder["width"], tree)
    _add_heads(encoder, facts.heads, published.heads)
    found: dict[str, Any] = {"kind": "encoder", "encoder": encoder}
    problems = []
    if "decoder" in tree:
        decoder = decoder_facts(tree["decoder"]) | {"normalised_pixels": facts.normalised_pixels}
        _add_heads(decoder, facts.decoder_heads, published.decoder_heads)
        found |= {"kind": "masked autoencoder", "decoder": decoder}
        if decoder["values"] != channels * patch**2:
            problems.append(
                f"its decoder predicts {decoder['values']} values a patch, not {channels} x {patch} squared"
            )
        if "decoder" in learned:
            problems.append("its decoder's positions are not the fixed sine-cosine table")
    if "head" in tree:
        found |= {"kind": "classifier", "head": classifier_facts(tree["head"], facts)}
    for part in (found["encoder"], found.get("decoder", {})):
        if part and part["mlp_width"] % part["width"]:
            problems.append(f"an MLP of {part['mlp_width']} channels in blocks of {part['width']}")
        if part and part["heads"] and part["width"] % part["heads"]:
            problems.append(f"{part['heads']} heads do not divide the width {part['width']}")
    if facts.unlike:
        problems.append(f"config.json says {', '.join(facts.unlike)}")
    if other := [name for name, shape in shapes.items() if shape.dtype not in _REAL]:
        problems.append(f"weights that are no real numbers: {some(other)}")
    pooling = facts.pooling or published_pooling(layout, _encoder(encoder), tree)
    pictures = {name: getattr(facts, name) for name in ("mean", "std", "resize_ratio", "mask_ratio")}
    said_pictures = {name: value for name, value in pictures.items() if value is not None}
    counts = {"parameters": parameter_counts(tree)}
    return found | counts | {"pooling": pooling, "pictures": said_pictures, "problems": problems}


def _take_fixed_positions(file: Path, shapes: Mapping[str, Shape], layout: str, tree: dict) -> set[str]:
    """Takes the position tables that are the fixed ones out of the tree; returns the parts with others."""
    learned = set()
    for row in LAYOUTS[layout]:
        if row.kind == "positions":
            part, name = row.path.split(".")[0], row.names[0]
            if shapes[name].dtype in _REAL:
                table = read_some(file, [name])[name]
                if layout in WITHOUT_CLASS_ROW:
                    table = np.pad(table, ((0, 0), (1, 0), (0, 0)))
                if is_fixed(table):
                    del tree[part]["pos_embed"]
                    continue
            learned.add(part)
    return learned


def _add_heads(part: dict[str, Any], own: int | None, published: int | None) -> None:
    """Attention heads, which no shape tells, and who says how many they are."""
    part["heads"] = own or published
    part["heads_source"] = "said" if own else "published" if published else "unknown"


def _encoder(facts: Mapping[str, Any]) -> ViT:
    """The encoder that a licence and a pooling are told by."""
    return ViT(
        facts["width"],
        facts["depth"],
        facts["heads"] or 1,
        facts["patch"],
        facts["image_size"],
        learned_positions=facts["positions"] == "learned",
    )
