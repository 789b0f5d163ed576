"""Which layout the tensors of a file fit, and which parts of it the file may lack."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from maect_jax.errors import ConfigError
from maect_jax.exchange.layouts import ENCODERS, LAYOUTS
from maect_jax.exchange.mapping import misfits
from maect_jax.exchange.pth import refusal
from maect_jax.exchange.tensors import some

_PARTS = ("encoder.norm", "decoder", "fc_norm", "head", "pooler")  # what a model may lack, as a whole


def check_patterns(allow_missing: tuple[str, ...]) -> None:
    parts = [part.replace(".", "/") for part in _PARTS]
    for pattern in allow_missing:
        if not any(allows([pattern], part) for part in parts):
            known = ", ".join(f"'{part}/*'" for part in parts)
            raise ConfigError(f"allow_missing: '{pattern}' is no part that may be missing; there is {known}")


def allows(patterns: Iterable[str], part: str) -> bool:
    """Whether one of the patterns, such as 'decoder/*', stands for a whole part."""
    leaves = [row.path.replace(".", "/") for rows in LAYOUTS.values() for row in rows]
    return any(fnmatchcase(leaf, pattern) for leaf in leaves if leaf.startswith(f"{part}/") for pattern in patterns)


def nearest_layout(tensors: Mapping[str, Any], allow_missing: Iterable[str] = ()) -> str:
    """The layout that tensors, or their shapes, fit best; one of an encoder unless they fit another exactly.

    Of equals that which needs the fewest allowances.
    """
    for name in LAYOUTS:
        if name not in ENCODERS and not _count(misfits(tensors, name)):
            return name
    misfit = {layout: _count(misfits(tensors, layout, allow_missing)) for layout in ENCODERS}
    allowed = {layout: _count(misfits(tensors, layout)) - misfit[layout] for layout in ENCODERS}
    return min(ENCODERS, key=lambda layout: (misfit[layout], allowed[layout]))


def fitting_layout(path: Path, tensors: Mapping[str, np.ndarray], allow_missing: tuple[str, ...]) -> str:
    """The layout of an encoder that the tensors fit.

    Raises:
      CheckpointError: there is none; lists what differs from the nearest.
    """
    nearest = nearest_layout(tensors, allow_missing)
    if nearest not in ENCODERS:
        kind = "a linear probe; give it to convert as --head" if nearest == "maect_probe" else "an NNCLR head"
        raise refusal(path, f"holds no encoder but {kind}")
    differences = misfits(tensors, nearest, allow_missing)
    lists = [f"{len(items)} {title}: {some(items)}" for title, items in differences.items() if items]
    if lists:
        found = "; ".join(lists)
        more = "; `python -m maect_jax inspect` lists all" if " more" in found else ""
        raise refusal(path, f"fits no known layout; compared with the nearest, {nearest}: {found}{more}")
    return nearest


def _count(differences: Mapping[str, list[str]]) -> int:
    return sum(map(len, differences.values()))


def missing_parts(path: Path, tensors: Mapping[str, np.ndarray], layout: str) -> dict[str, str]:
    """Part -> a sentence for each part of which something is missing, as it was allowed to be.

    Raises:
      CheckpointError: what is missing can not be done without.
    """
    missing = set(misfits(tensors, layout)["missing"])
    found: dict[str, list[str]] = {}
    for row in LAYOUTS[layout]:
        lost = [name for name in missing if any(_is_block(name, of_row) for of_row in row.names)]
        part = next((part for part in _PARTS if row.path.startswith(f"{part}.")), "")
        if lost and not part:
            raise refusal(path, f"lacks what no encoder can do without: {some(sorted(lost))}")
        if lost:
            found.setdefault(part, []).extend(lost)
    return {
        part: f"left out {part}, allowed to be missing: it has no {some(sorted(lost))}" for part, lost in found.items()
    }


def _is_block(name: str, of_row: str) -> bool:
    """Whether a tensor's name is that of a row, in any block."""
    before, stacked, after = of_row.partition("{i}")
    if not stacked:
        return name == of_row
    return name.startswith(before) and name.endswith(after) and name[len(before) : len(name) - len(after)].isdigit()


def without_parts(tree: dict, parts: Iterable[str]) -> dict:
    kept = {name: part for name, part in tree.items() if name not in parts}
    if "encoder.norm" in parts:
        kept["encoder"] = {name: leaf for name, leaf in kept["encoder"].items() if name != "norm"}
    return kept
