"""The rows that layouts are made of: which published tensors hold one leaf of our trees, and how.

Published linear maps are (out, in), patch kernels (width, channel, row, column); ours are (in, out) and
(row * column * channel, width). Blocks are one tensor each there, one stack here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One leaf of our tree and where it lies in a published layout.

    Attributes:
      names: tensor names, '{i}' standing for the block; several are the parts of one matrix, joined on axis 0.
      path: place in our tree, dotted; '' for a tensor that we do not hold (counters).
      kind: rule for the axes, see `mapping`: 'same', 'linear', 'patch', 'integer', 'pointer'; 'positions' for a table
        that a tree only holds where it is learned; 'count' for a counter; 'again' for a repetition of what another row
        holds, which files may lack.
      shape: of the joined tensors, one letter an axis: a letter means the same size wherever it occurs in the layout;
        '3d' is three times d, '1' is one.
    """

    names: tuple[str, ...]
    path: str
    kind: str
    shape: str


@dataclass(frozen=True)
class BlockNames:
    """Names inside a block; `qkv` one matrix or three."""

    norm1: str
    qkv: tuple[str, ...]
    proj: str
    norm2: str
    fc1: str
    fc2: str


def affine(name: str | tuple[str, ...], path: str, kind: str, out: str, into: str = "") -> list[Row]:
    """Weight and bias of a linear map ('linear', out x into), a patch kernel, or a normalisation ('same')."""
    names = (name,) if isinstance(name, str) else name
    ours = "scale" if kind == "same" else "kernel"
    return [
        Row(tuple(f"{n}.weight" for n in names), f"{path}.{ours}", kind, f"{out} {into}".strip()),
        Row(tuple(f"{n}.bias" for n in names), f"{path}.bias", "same", out),
    ]


def blocks(prefix: str, part: str, names: BlockNames, d: str, f: str) -> list[Row]:
    """A stack of transformer blocks of width `d` with an MLP of width `f`."""
    inside, path = f"{prefix}.{{i}}.", f"{part}.blocks."
    return [
        *affine(inside + names.norm1, path + "norm1", "same", d),
        *affine(tuple(inside + n for n in names.qkv), path + "attn.qkv", "linear", f"3{d}", d),
        *affine(inside + names.proj, path + "attn.proj", "linear", d, d),
        *affine(inside + names.norm2, path + "norm2", "same", d),
        *affine(inside + names.fc1, path + "fc1", "linear", f, d),
        *affine(inside + names.fc2, path + "fc2", "linear", d, f),
    ]


def mlp(name: str, params: str, stats: str, layers: str) -> list[Row]:
    """Linear maps without bias and the batch normalisations between them, numbered as PyTorch's Sequential.

    `layers` holds 'out in' of each linear map, and 'bn' after those that a normalisation follows.
    """
    rows, index, linear, norm = [], 0, 0, 0
    for layer in layers.split(", "):
        out, into, *bn = layer.split()
        rows.append(Row((f"{name}.{index}.weight",), f"{params}.linear{linear}.kernel", "linear", f"{out} {into}"))
        if bn:
            at = f"{name}.{index + 1}"
            rows += affine(at, f"{params}.bn{norm}", "same", out)
            rows += statistics(at, f"{stats}.bn{norm}", out)
            norm += 1
        index, linear = index + 3, linear + 1
    return rows


def statistics(name: str, path: str, d: str) -> list[Row]:
    """What a batch normalisation has seen: mean, variance, and PyTorch's counter, which we do not hold."""
    return [
        Row((f"{name}.running_mean",), f"{path}.mean", "same", d),
        Row((f"{name}.running_var",), f"{path}.var", "same", d),
        Row((f"{name}.num_batches_tracked",), "", "count", ""),
    ]
