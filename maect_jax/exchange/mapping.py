"""Between our trees and published tensors: two functions that walk a layout's rows, and what keeps them from fitting.

Only methods of arrays are used on the way out, so `to_layout` also runs under `jax.eval_shape`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import numpy as np

from maect_jax.errors import CheckpointError
from maect_jax.exchange import positions
from maect_jax.exchange.layouts import LAYOUTS, WITHOUT_CLASS_ROW
from maect_jax.exchange.rows import Row

_OUT = {
    "same": lambda x, patch: x,
    "again": lambda x, patch: x,
    "linear": lambda x, patch: x.T,
    "patch": lambda x, patch: x.reshape(patch, patch, -1, x.shape[1]).transpose(3, 2, 0, 1),
    "integer": lambda x, patch: x.astype(np.int64),
    "pointer": lambda x, patch: x.reshape(1).astype(np.int64),
}
_IN = {
    "same": lambda x: np.asarray(x, np.float32),
    "linear": lambda x: np.ascontiguousarray(np.asarray(x, np.float32).T),
    "patch": lambda x: np.asarray(x, np.float32).transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    "integer": lambda x: np.asarray(x, np.int32),
    "pointer": lambda x: np.asarray(x, np.int32).reshape(()),
}


def to_layout(
    tree: Mapping, layout: str, *, patch: int | None = None, grid: int | None = None, batches_tracked: int = 0
) -> dict[str, np.ndarray]:
    """Our tree as published tensors.

    Args:
      tree: see `layouts`; arrays (or tracers) of any float type, which is kept. Position tables that it does not hold
        are the fixed ones. Where a layout has no row for the class token's position, that is added to the token.
      layout: a key of `LAYOUTS`.
      patch, grid: patch side in pixels and patches a side; needed by all layouts of encoders.
      batches_tracked: what to write as BatchNorm's counter (two a head update in PyTorch).

    Raises:
      CheckpointError: the tree lacks leaves of the layout or has others.
    """
    leaves = _flatten(tree)
    rows = _rows(layout)
    computed = {row.path for row in rows if row.kind == "positions"} - leaves.keys()
    _refuse(layout, "this tree", _differences({row.path for row in rows if row.path} - computed, leaves))
    if layout in WITHOUT_CLASS_ROW and "encoder.pos_embed" in leaves:
        leaves["encoder.cls_token"] = leaves["encoder.cls_token"] + leaves["encoder.pos_embed"][:, :1]
    tensors = {}
    for row in rows:
        if not row.path:
            tensors[row.names[0]] = np.asarray(batches_tracked, np.int64)
        elif row.kind == "positions":
            token = "mask_token" if row.path.startswith("decoder") else "cls_token"
            width = leaves[f"{row.path.split('.')[0]}.{token}"].shape[-1]
            table = positions.fixed_table(width, grid) if row.path in computed else leaves[row.path]
            tensors[row.names[0]] = table[:, 1:] if layout in WITHOUT_CLASS_ROW else table
        else:
            leaf = leaves[row.path]
            stacked = "{i}" in row.names[0]
            for i in range(leaf.shape[0]) if stacked else (0,):
                whole = _OUT[row.kind](leaf[i] if stacked else leaf, patch)
                size = whole.shape[0] // len(row.names) if whole.ndim else 0
                for part, name in enumerate(row.names):
                    only = len(row.names) == 1
                    tensors[name.format(i=i)] = whole if only else whole[part * size : (part + 1) * size]
    return tensors


def from_layout(tensors: Mapping[str, np.ndarray], layout: str, allow_missing: Iterable[str] = ()) -> dict:
    """Published tensors as our tree, float32 and int32. Architecture and sizes are those of the tensors.

    The encoder's position table is held where it is not the fixed one.

    Args:
      allow_missing: patterns of leaves that the tree may lack, as 'decoder/*' or 'encoder/norm/*'.

    Raises:
      CheckpointError: tensors are missing, unexpected or of a shape that does not fit the others, or the decoder's
        position table is not the fixed one. All are listed.
    """
    found = misfits(tensors, layout, allow_missing)
    _refuse(layout, "these tensors", found)
    if found["misshaped"]:
        raise CheckpointError(f"{layout}: tensors of unexpected shape:\n  " + "\n  ".join(found["misshaped"]))
    leaves = {}
    for row, blocks in _places(tensors, layout):
        if not row.path or blocks[0][0] not in tensors:
            continue
        parts = [[np.asarray(tensors[name]) for name in names] for names in blocks]
        if row.kind == "positions":
            table = _with_class_row(parts[0][0], layout)
            if positions.is_fixed(table):
                continue
            if row.path.startswith("decoder"):
                raise CheckpointError(
                    f"{layout}: {row.names[0]} differs from the fixed sine-cosine table, the only one a decoder is "
                    "modelled with"
                )
            leaves[row.path] = np.asarray(table, np.float32)
        elif row.kind == "again":
            if not np.array_equal(leaves[row.path], _IN["same"](parts[0][0])):
                raise CheckpointError(f"{layout}: {row.names[0]} differs from the tensor that it repeats")
        else:
            each = [_IN[row.kind](p[0] if len(p) == 1 else np.concatenate(p)) for p in parts]
            leaves[row.path] = np.stack(each) if "{i}" in row.names[0] else each[0]
    return _unflatten(leaves)


def misfits(tensors: Mapping[str, np.ndarray], layout: str, allow_missing: Iterable[str] = ()) -> dict[str, list[str]]:
    """What keeps tensors from having the names and shapes of a layout; three empty lists when nothing does.

    Returns:
      'missing' and 'unexpected': names, sorted. 'misshaped': a sentence each on tensors that do not fit the others.
    """
    places = _places(tensors, layout)
    wanted, allowed = set(), set()
    problems, sizes = [], {}
    for row, blocks in places:
        names = [name for names in blocks for name in names]
        wanted.update(names)
        if row.kind == "again" or (_matches(row.path, allow_missing) and not any(name in tensors for name in names)):
            allowed.update(names)
        shape = [_split_size(axis) for axis in row.shape.split()]
        shape[:1] = [(times / len(row.names), letter) for times, letter in shape[:1]]
        for name in (name for name in names if name in tensors):
            wrong = _check_shape(name, np.shape(tensors[name]), shape, sizes)
            if row.kind == "positions" and not wrong:
                wrong = _check_grid(layout, name, *tensors[name].shape[1:])
            problems += wrong
    found = _differences(wanted, tensors)
    return found | {"missing": [name for name in found["missing"] if name not in allowed], "misshaped": problems}


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return bool(path) and any(fnmatchcase(path.replace(".", "/"), pattern) for pattern in patterns)


def _with_class_row(table: np.ndarray, layout: str) -> np.ndarray:
    if layout not in WITHOUT_CLASS_ROW:
        return table
    return np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)


def _rows(layout: str) -> list[Row]:
    if layout not in LAYOUTS:
        raise CheckpointError(f"no layout '{layout}'; there is {', '.join(LAYOUTS)}")
    return LAYOUTS[layout]


def _places(tensors: Mapping, layout: str) -> list[tuple[Row, list[list[str]]]]:
    """Each row with the names of its parts in each block, up to the highest index of the tensors: gaps show as missing.

    An index of more than three digits is no block.
    """
    places = []
    for row in _rows(layout):
        blocks = range(1)
        if "{i}" in row.names[0]:
            inside = re.compile(re.escape(row.names[0].split("{i}")[0]) + r"(\d{1,3})\.")
            blocks = range(max([int(m[1]) for name in tensors if (m := inside.match(name))], default=0) + 1)
        places.append((row, [[name.format(i=i) for name in row.names] for i in blocks]))
    return places


def _differences(wanted: set[str], there: Mapping) -> dict[str, list[str]]:
    return {"missing": sorted(wanted - there.keys()), "unexpected": sorted(there.keys() - wanted)}


def _refuse(layout: str, what: str, differences: Mapping[str, list[str]]) -> None:
    """Raises when there are names in `differences`, listing all of them."""
    lists = {title: differences[title] for title in ("missing", "unexpected")}
    if any(lists.values()):
        text = "\n".join(f"{title}: {', '.join(names)}" for title, names in lists.items() if names)
        raise CheckpointError(f"{what} do not fit the layout '{layout}'\n{text}")


def _split_size(axis: str) -> tuple[float, str]:
    """'3d' as (3, 'd'), 'd' as (1, 'd'), '1' as (1, '')."""
    digits = axis.rstrip("abcdefghijklmnopqrstuvwxyz")
    return float(digits or 1), axis[len(digits) :]


def _check_shape(name: str, found: tuple[int, ...], shape: list[tuple[float, str]], sizes: dict[str, int]) -> list[str]:
    """A sentence when `found` is not `shape`; sizes met for the first time are noted in `sizes`."""
    if len(found) == len(shape):
        for size, (times, letter) in zip(found, shape):
            if letter:
                sizes.setdefault(letter, max(round(size / times), 1))
    expected = [round(times * sizes[letter]) if letter in sizes else round(times) for times, letter in shape]
    unknown = len(found) != len(shape)
    return [f"{name}: {tuple(found)}, expected {tuple(expected)}"] if unknown or list(found) != expected else []


def _check_grid(layout: str, name: str, rows: int, width: int) -> list[str]:
    """A sentence when a position table of this shape is none of a square grid of patches."""
    patches = rows - (layout not in WITHOUT_CLASS_ROW)
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        return [f"{name}: {rows} rows are not a square grid with the class row as this layout has it"]
    return [f"{name}: width {width} is no multiple of 4"] if width % 4 else []


def _flatten(tree: Mapping, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _unflatten(leaves: Mapping[str, np.ndarray]) -> dict:
    tree: dict = {}
    for path, leaf in leaves.items():
        *folders, name = path.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree
