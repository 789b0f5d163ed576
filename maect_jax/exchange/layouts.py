"""How others name and order the tensors that we hold as trees: tables of rows, and two functions that walk them.

A layout is a list of rows; a row says which published tensors hold one leaf of our tree, how the axes are ordered, and
which shape they have. Published linear maps are (out, in), patch kernels (width, channel, row, column); ours are
(in, out) and (row * column * channel, width). Blocks are one tensor each there, one stack here.

Our trees are {'encoder': ...}, {'encoder': ..., 'decoder': ...} or, for the head, the fields of `TrainState`:
{'params', 'batch_stats', 'queue'} and 'target' in stage 3, the queue as a dict of its four fields.

Only methods of arrays are used on the way out, so `to_layout` also runs under `jax.eval_shape`.

Sources: released files of MAE, MAE-CT, timm 1.0.31, transformers 4.57.1 and 5.23.0.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from maect_jax.errors import CheckpointError
from maect_jax.models.patches import position_table

# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One leaf of our tree and where it lies in a published layout.

    Attributes:
      names: tensor names, '{i}' standing for the block; several are the parts of one matrix, joined on axis 0.
      path: place in our tree, dotted; '' for a tensor that we do not hold (position tables, counters).
      kind: rule for the axes, a key of `_OUT` and `_IN`, or 'positions' / 'count'.
      shape: of the joined tensors, one letter an axis: a letter means the same size wherever it occurs in the layout;
        '3d' is three times d, '1' is one.
    """

    names: tuple[str, ...]
    path: str
    kind: str
    shape: str


_OUT = {
    "same": lambda x, patch: x,
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


def _affine(name: str | tuple[str, ...], path: str, kind: str, out: str, into: str = "") -> list[Row]:
    """Weight and bias of a linear map ('linear', out x into), a patch kernel, or a normalisation ('same')."""
    names = (name,) if isinstance(name, str) else name
    ours = "scale" if kind == "same" else "kernel"
    return [
        Row(tuple(f"{n}.weight" for n in names), f"{path}.{ours}", kind, f"{out} {into}".strip()),
        Row(tuple(f"{n}.bias" for n in names), f"{path}.bias", "same", out),
    ]


@dataclass(frozen=True)
class _BlockNames:
    """Names inside a block; `qkv` one matrix or three."""

    norm1: str
    qkv: tuple[str, ...]
    proj: str
    norm2: str
    fc1: str
    fc2: str


_TIMM_BLOCK = _BlockNames("norm1", ("attn.qkv",), "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_HF4_BLOCK = _BlockNames(
    "layernorm_before",
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attention.output.dense",
    "layernorm_after",
    "intermediate.dense",
    "output.dense",
)
_HF5_BLOCK = _BlockNames(
    "layernorm_before",
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attention.o_proj",
    "layernorm_after",
    "mlp.fc1",
    "mlp.fc2",
)


def _blocks(prefix: str, part: str, names: _BlockNames, d: str, f: str) -> list[Row]:
    inside, path = f"{prefix}.{{i}}.", f"{part}.blocks."
    return [
        *_affine(inside + names.norm1, path + "norm1", "same", d),
        *_affine(tuple(inside + n for n in names.qkv), path + "attn.qkv", "linear", f"3{d}", d),
        *_affine(inside + names.proj, path + "attn.proj", "linear", d, d),
        *_affine(inside + names.norm2, path + "norm2", "same", d),
        *_affine(inside + names.fc1, path + "fc1", "linear", f, d),
        *_affine(inside + names.fc2, path + "fc2", "linear", d, f),
    ]


def _encoder(cls: str, positions: str, patch: str, blocks: str, norm: str, names: _BlockNames) -> list[Row]:
    return [
        Row((cls,), "encoder.cls_token", "same", "1 1 d"),
        Row((positions,), "", "positions", "1 n d"),
        *_affine(patch, "encoder.patch_embed", "patch", "d", "c p p"),
        *_blocks(blocks, "encoder", names, "d", "f"),
        *_affine(norm, "encoder.norm", "same", "d"),
    ]


def _decoder(prefix: str, blocks: str, names: _BlockNames) -> list[Row]:
    return [
        Row((f"{prefix}mask_token",), "decoder.mask_token", "same", "1 1 e"),
        Row((f"{prefix}decoder_pos_embed",), "", "positions", "1 n e"),
        *_affine(f"{prefix}decoder_embed", "decoder.embed", "linear", "e", "d"),
        *_blocks(f"{prefix}{blocks}", "decoder", names, "e", "g"),
        *_affine(f"{prefix}decoder_norm", "decoder.norm", "same", "e"),
        *_affine(f"{prefix}decoder_pred", "decoder.predict", "linear", "v", "e"),
    ]


def _mlp(name: str, params: str, stats: str, layers: str) -> list[Row]:
    """Linear maps without bias and the batch normalisations between them, numbered as PyTorch's Sequential.

    `layers` holds 'out in' of each linear map, and 'bn' after those that a normalisation follows.
    """
    rows, index, linear, norm = [], 0, 0, 0
    for layer in layers.split(", "):
        out, into, *bn = layer.split()
        rows.append(Row((f"{name}.{index}.weight",), f"{params}.linear{linear}.kernel", "linear", f"{out} {into}"))
        if bn:
            at = f"{name}.{index + 1}"
            rows += _affine(at, f"{params}.bn{norm}", "same", out)
            rows.append(Row((f"{at}.running_mean",), f"{stats}.bn{norm}.mean", "same", out))
            rows.append(Row((f"{at}.running_var",), f"{stats}.bn{norm}.var", "same", out))
            rows.append(Row((f"{at}.num_batches_tracked",), "", "count", ""))
            norm += 1
        index, linear = index + 3, linear + 1
    return rows


_PROJECTOR = "h d bn, h h bn, e h bn"
_TIMM = _encoder("cls_token", "pos_embed", "patch_embed.proj", "blocks", "norm", _TIMM_BLOCK)
_HF = ("vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "vit.embeddings.patch_embeddings.projection")
_HEAD = [
    Row(("queue",), "queue.rows_qe", "same", "q e"),
    Row(("queue_y",), "queue.label_q", "integer", "q"),
    Row(("queue_id",), "queue.id_q", "integer", "q"),
    Row(("queue_ptr",), "queue.pointer", "pointer", "1"),
    *_mlp("projector", "params.projector", "batch_stats.projector", _PROJECTOR),
    *_mlp("predictor", "params.predictor", "batch_stats.predictor", "k e bn, e k"),
]

LAYOUTS: dict[str, list[Row]] = {
    "mae_official_full": [*_TIMM, *_decoder("", "decoder_blocks", _TIMM_BLOCK)],
    "mae_official_encoder": _TIMM,
    "timm_mae": _TIMM,
    "maect_encoder": _TIMM,
    "maect_head_stage2": _HEAD,
    "maect_head_stage3": [*_HEAD, *_mlp("target_projector", "target.params", "target.batch_stats", _PROJECTOR)],
    "hf4_pretraining": [
        *_encoder(*_HF, "vit.encoder.layer", "vit.layernorm", _HF4_BLOCK),
        *_decoder("decoder.", "decoder_layers", _HF4_BLOCK),
    ],
    "hf5_pretraining": [
        *_encoder(*_HF, "vit.layers", "vit.layernorm", _HF5_BLOCK),
        *_decoder("decoder.", "decoder_layers", _HF5_BLOCK),
    ],
}
_WITHOUT_CLASS_ROW = ("maect_encoder",)  # position tables of patches only

# ------------------------------------------------------------------------------------------------------------ functions


def to_layout(
    tree: Mapping, layout: str, *, patch: int | None = None, grid: int | None = None, batches_tracked: int = 0
) -> dict[str, np.ndarray]:
    """Our tree as published tensors.

    Args:
      tree: see the top of this file; arrays (or tracers) of any float type, which is kept.
      layout: a key of `LAYOUTS`.
      patch, grid: patch side in pixels and patches a side; needed by all layouts but the heads.
      batches_tracked: what to write as BatchNorm's counter (two a head update in PyTorch).

    Raises:
      CheckpointError: the tree lacks leaves of the layout or has others.
    """
    leaves = _flatten(tree)
    rows = _rows(layout)
    _refuse(layout, "this tree", _differences({row.path for row in rows if row.path}, leaves))
    tensors = {}
    for row in rows:
        if row.kind == "count":
            tensors[row.names[0]] = np.asarray(batches_tracked, np.int64)
        elif row.kind == "positions":
            part = "decoder" if "decoder" in row.names[0] else "encoder"
            width = leaves[f"{part}.norm.scale"].shape[-1]
            tensors[row.names[0]] = _positions(layout, width, grid)
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


def from_layout(tensors: Mapping[str, np.ndarray], layout: str) -> dict:
    """Published tensors as our tree, float32 and int32. Architecture and sizes are those of the tensors.

    Raises:
      CheckpointError: tensors are missing, unexpected or of a shape that does not fit the others, or a position table
        differs from the fixed sine-cosine table. All are listed.
    """
    found = misfits(tensors, layout)
    _refuse(layout, "these tensors", found)
    if found["misshaped"]:
        raise CheckpointError(f"{layout}: tensors of unexpected shape:\n  " + "\n  ".join(found["misshaped"]))
    problems, leaves = [], {}
    for row, blocks in _places(tensors, layout):
        parts = [[np.asarray(tensors[name]) for name in names] for names in blocks]
        if row.kind == "positions":
            problems += _check_positions(layout, row.names[0], parts[0][0])
        elif row.path:
            each = [_IN[row.kind](p[0] if len(p) == 1 else np.concatenate(p)) for p in parts]
            leaves[row.path] = np.stack(each) if "{i}" in row.names[0] else each[0]
    if problems:
        raise CheckpointError(f"{layout}: " + "; ".join(problems))
    return _unflatten(leaves)


def misfits(tensors: Mapping[str, np.ndarray], layout: str) -> dict[str, list[str]]:
    """What keeps tensors from having the names and shapes of a layout; three empty lists when nothing does.

    Returns:
      'missing' and 'unexpected': names, sorted. 'misshaped': a sentence each on tensors that do not fit the others.
    """
    places = _places(tensors, layout)
    wanted = {name for _, blocks in places for names in blocks for name in names}
    problems, sizes = [], {}
    for row, blocks in places:
        shape = [_split_size(axis) for axis in row.shape.split()]
        shape[:1] = [(times / len(row.names), letter) for times, letter in shape[:1]]
        for name in (name for names in blocks for name in names if name in tensors):
            wrong = _check_shape(name, np.shape(tensors[name]), shape, sizes)
            if row.kind == "positions" and not wrong:
                wrong = _check_grid(layout, name, *tensors[name].shape[1:])
            problems += wrong
    return {**_differences(wanted, tensors), "misshaped": problems}


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


def _positions(layout: str, width: int, grid: int) -> np.ndarray:
    table_nd = position_table(width, grid).astype(np.float32)
    rows = [] if layout in _WITHOUT_CLASS_ROW else [np.zeros((1, width), np.float32)]
    return np.concatenate([*rows, table_nd])[None]


def _check_grid(layout: str, name: str, rows: int, width: int) -> list[str]:
    """A sentence when a position table of this shape is none of a square grid of patches."""
    patches = rows - (layout not in _WITHOUT_CLASS_ROW)
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        return [f"{name}: {rows} rows are not a square grid with the class row as this layout has it"]
    return [f"{name}: width {width} is no multiple of 4"] if width % 4 else []


def _check_positions(layout: str, name: str, found: np.ndarray) -> list[str]:
    """A sentence when a table is not the one that our models compute (float16 files: within their rounding)."""
    grid = math.isqrt(found.shape[1])  # with or without the class row
    tolerance = 1e-5 if found.dtype.itemsize >= 4 else 4e-3
    error = np.abs(found.astype(np.float64) - _positions(layout, found.shape[2], grid)).max()
    why = "positions that were trained or resized can not be held"
    return [] if error <= tolerance else [f"{name} differs from the fixed sine-cosine table by {error:.2g}; {why}"]


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
