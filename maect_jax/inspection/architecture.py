"""What the shapes of parameters tell of their model.

Trees are ours, those of `models.vit.ViT` and `models.mae.Decoder`, with a `Shape` in the place of each array.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax

from maect_jax.exchange.layouts import LAYOUTS
from maect_jax.exchange.rows import Row
from maect_jax.inspection.shapes import Shape
from maect_jax.models.vit import SIZES

_NOT_TRAINED = {"batch_stats", "queue", "mean", "var"}  # statistics and the support set, which are no parameters


def tree_of(shapes: Mapping[str, Shape], layout: str) -> dict:
    """Our tree of tensors that fit a layout. All position tables are in it, the fixed ones too."""
    tree: dict = {}
    for row in LAYOUTS[layout]:
        if row.path and row.kind != "again":
            *folders, name = row.path.split(".")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[name] = _leaf(shapes, row)
    return tree


def _leaf(shapes: Mapping[str, Shape], row: Row) -> Shape:
    """The tensors of a row as the one leaf that `exchange.mapping` makes of them."""
    stacked = "{i}" in row.names[0]
    depth = next(i for i in itertools.count(1) if not stacked or row.names[0].format(i=i) not in shapes)
    parts = [shapes[name.format(i=i)] for i in range(depth) for name in row.names]
    axes = parts[0].shape
    if row.kind == "linear":
        axes = (axes[1], axes[0] * len(row.names))
    elif row.kind == "patch":
        axes = (math.prod(axes[1:]), axes[0])
    elif row.kind == "pointer":
        axes = ()
    elif len(row.names) > 1:
        axes = (axes[0] * len(row.names),)
    return Shape((depth, *axes) if stacked else axes, parts[0].dtype, sum(part.bytes for part in parts))


def encoder_facts(encoder: Mapping[str, Any], patch: int | None) -> dict[str, Any]:
    """Name where it is a published size, width, depth, width of the MLP, and whether there is a final norm."""
    width = encoder["cls_token"].shape[-1]
    depth, _, hidden = encoder["blocks"]["fc1"]["kernel"].shape
    sizes = {(size.width, size.depth, size.patch): f"ViT-{name}" for name, size in SIZES.items()}
    return {
        "name": sizes.get((width, depth, patch)),
        "width": width,
        "depth": depth,
        "mlp_width": hidden,
        "patch": patch,
        "final_norm": "norm" in encoder,
    }


def decoder_facts(decoder: Mapping[str, Any]) -> dict[str, Any]:
    """Width, depth, width of the MLP, and numbers predicted for a patch."""
    width, values = decoder["predict"]["kernel"].shape
    depth, _, hidden = decoder["blocks"]["fc1"]["kernel"].shape
    return {"width": width, "depth": depth, "mlp_width": hidden, "values": values}


def parameter_counts(tree: Mapping[str, Any]) -> dict[str, int]:
    """Number of parameters of each part: encoder, decoder, head, projector, …"""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [str(key.key) for key in path]
        if _NOT_TRAINED.isdisjoint(names):
            part = names[1] if names[0] == "params" else names[0]
            counts[part] = counts.get(part, 0) + leaf.size
    return counts
