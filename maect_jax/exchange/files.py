"""A weights file of any origin as a `Model`: told by its content, fitted name for name, with what is said beside it."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.exchange import positions
from maect_jax.exchange.beside import HUB_FILES, Said, said
from maect_jax.exchange.fitting import check_patterns, fitting_layout, missing_parts, without_parts
from maect_jax.exchange.layouts import LAYOUTS
from maect_jax.exchange.licenses import license_of
from maect_jax.exchange.mapping import from_layout
from maect_jax.exchange.model import Model
from maect_jax.exchange.provenance import Provenance
from maect_jax.exchange.pth import refusal
from maect_jax.exchange.tensors import read_notes, read_tensors, some
from maect_jax.models.mae import Decoder
from maect_jax.models.vit import ViT

PUBLISHED_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16}  # width of an encoder -> heads


@dataclass(frozen=True)
class Opened:
    """A weights file that has been read.

    Attributes:
      model: what it holds.
      layout: the key of `layouts.LAYOUTS` that it fits (timm's and MAE's encoders are the same).
      sha256: of the file, in hexadecimal.
      notes: a sentence each on what was done to the weights: positions resized, parts that were allowed to be missing.
      said: what is said beside the weights; heads that are not said are the published ones, if any.
    """

    model: Model
    layout: str
    sha256: str
    said: Said
    notes: tuple[str, ...] = ()


def find_file(path: str | PathLike) -> Path:
    """The weights file that a path means: itself, or the one in a folder in the form of timm or transformers.

    Raises:
      CheckpointError: a folder with none, or with weights split over several files.
    """
    if "://" in str(path):
        raise refusal(path, "weights of others are read from a local disk; copy the file there")
    path = Path(path)
    if not path.is_dir():
        return path
    for name in HUB_FILES:
        if (path / name).is_file():
            return path / name
        if (path / f"{name}.index.json").is_file():
            raise refusal(path, "holds weights split over several files; save them as one (max_shard_size='100GB')")
    raise refusal(
        path,
        "is neither a work folder (config.resolved.yaml), a stage or checkpoint in one, nor a folder with "
        "model.safetensors or pytorch_model.bin",
    )


def open_model(
    path: str | PathLike,
    *,
    image_size: int | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    allow_missing: Iterable[str] = (),
) -> Opened:
    """The model in a weights file of any published layout; see `tensors.read_tensors` for the files.

    Args:
      path: a file, or a folder with one; see `find_file`.
      image_size: pixels a side, a multiple of the patch, instead of the size in the file. A fixed position table is
        computed for it, a learned one resized; see `positions.RESIZED`.
      heads, decoder_heads: attention heads, which no shape tells. Default: what is said beside the weights, else the
        published number for the width, see `PUBLISHED_HEADS`.
      mean, std: of the pictures, a channel; instead of what is said.
      allow_missing: patterns of parts that the file may lack, such as 'decoder/*'.

    Raises:
      CheckpointError: the file can not be read, fits no layout name for name, or holds weights that are no real
        numbers or that our models do not compute with.
      ConfigError: `image_size`, `heads` or `mean` does not fit the file, `heads` is needed, or a pattern names no part.
    """
    path, allow_missing = find_file(path), tuple(allow_missing)
    check_patterns(allow_missing)
    tensors, _ = read_tensors(path)
    layout = fitting_layout(path, tensors, allow_missing)
    integers = [name for name, tensor in tensors.items() if not jnp.issubdtype(tensor.dtype, jnp.floating)]
    if integers:
        raise refusal(path, f"weights that are no real numbers: {some(integers)}")
    changes = missing_parts(path, tensors, layout)
    kernel, table = (_first(tensors, layout, kind) for kind in ("patch", "positions"))
    width, channels, patch, _ = kernel.shape
    grid = round(table.shape[1] ** 0.5)  # a class row more or less rounds away
    try:
        tree = from_layout(tensors, layout, allow_missing)
    except CheckpointError as error:
        raise refusal(path, error) from None
    del tensors
    tree = without_parts(tree, changes)
    if "pooler" in tree:
        del tree["pooler"]
        changes["pooler"] = "its map after the CLS token (pooler) is left out: no feature here is made with it"
    notes = read_notes(path)
    facts = with_published_heads(said(path, notes), width, tree)
    given = {name: value for name, value in (("mean", mean), ("std", std)) if value}
    facts = replace(facts, **given)
    if _resized(path, tree["encoder"], patch, grid, image_size):
        changes["positions"] = positions.resize_note(grid, image_size // patch)
    averages = [name for name in notes if "ema" in name.lower()]
    if averages:
        changes["average"] = f"beside the weights lies {averages[0]!a}, which is not read: these are not averaged"
    if facts.epsilon not in (None, 1e-6, 1e-12):
        changes["epsilon"] = f"config.json says layer_norm_eps {facts.epsilon:g}; computed here is 1e-6"
    if facts.unlike:
        raise refusal(path, f"config.json says {', '.join(facts.unlike)}, with which our models do not compute")
    for name, value in given.items():
        if len(value) != channels:
            raise ConfigError(f"{name}: {len(value)} values; the pictures of {path} have {channels} channels")
    if (facts.mean is None or facts.std is None) and "pos_embed" in tree["encoder"] and layout != "mae_finetuned":
        changes["mean"] = "nothing says its pictures' mean and deviation; ImageNet's are taken unless others are given"
    encoder = ViT(
        width,
        _depth(tree["encoder"]),
        _checked_heads(path, "heads", width, facts.heads if heads is None else heads),
        patch,
        image_size or grid * patch,
        mlp_ratio=_mlp_ratio(path, tree["encoder"]),
        learned_positions="pos_embed" in tree["encoder"],
        final_norm="norm" in tree["encoder"],
    )
    decoder = _decoder(path, tree, encoder, channels, facts.decoder_heads if decoder_heads is None else decoder_heads)
    sha256, md5 = hashes(path)
    model = Model(
        name=path.stem if path.stem not in ("model", "pytorch_model") else path.parent.name,
        encoder=encoder,
        params=tree,
        provenance=provenance_of(path, layout, encoder, facts, notes, sha256, md5),
        decoder=decoder,
        pooling=facts.pooling or published_pooling(layout, encoder, tree),
        channels=channels,
        classes=_classes(tree, facts),
        normalised_pixels=facts.normalised_pixels,
        **{
            name: value
            for name in ("mean", "std", "resize_ratio", "mask_ratio")
            if (value := getattr(facts, name)) is not None and (name not in ("mean", "std") or len(value) == channels)
        },
    )
    return Opened(model, layout, sha256, facts, tuple(changes.values()))


def _first(tensors: Mapping[str, np.ndarray], layout: str, kind: str) -> np.ndarray:
    """The tensor of the first row of a kind, which is the encoder's."""
    return next(tensors[row.names[0]] for row in LAYOUTS[layout] if row.kind == kind)


def _resized(path: Path, encoder: dict, patch: int, grid: int, image_size: int | None) -> bool:
    """Puts learned positions of another size in the place of those of the file; False where nothing was to do."""
    if image_size is None or image_size == grid * patch:
        return False
    if image_size < patch or image_size % patch:
        raise ConfigError(f"image_size: {image_size} is no multiple of the patch of {path}, {patch} pixels")
    if "pos_embed" not in encoder:
        return False
    encoder["pos_embed"] = positions.resize(encoder["pos_embed"], image_size // patch)
    return True


def _depth(part: dict) -> int:
    return len(part["blocks"]["norm1"]["scale"])


def _mlp_ratio(path: Path, part: dict) -> int:
    into, out = part["blocks"]["fc1"]["kernel"].shape[1:]
    if out % into:
        raise refusal(path, f"an MLP of {out} channels in blocks of {into}; only whole multiples are modelled")
    return out // into


def _checked_heads(path: Path, key: str, width: int, heads: int | None) -> int:
    if heads is None:
        raise ConfigError(f"{key}: {path} has width {width}, for which no number of heads is published; give it")
    if heads < 1 or width % heads:
        raise ConfigError(f"{key}: {heads} does not divide the width {width} of {path}; give a divisor")
    return heads


def with_published_heads(facts: Said, width: int, tree: dict) -> Said:
    """Where nothing is said, the number that is published for the width."""
    decoder = tree["decoder"]["predict"]["kernel"].shape[0] if "decoder" in tree else None
    return replace(
        facts,
        heads=facts.heads or PUBLISHED_HEADS.get(width),
        decoder_heads=facts.decoder_heads or (16 if decoder == 512 else None),
    )


def _decoder(path: Path, tree: dict, encoder: ViT, channels: int, heads: int | None) -> Decoder | None:
    """The decoder's shape; None where the file has none."""
    if "decoder" not in tree:
        return None
    width, values = tree["decoder"]["predict"]["kernel"].shape
    if values != channels * encoder.patch**2:
        raise refusal(path, f"its decoder predicts {values} values a patch of {channels} x {encoder.patch} squared")
    heads = _checked_heads(path, "decoder_heads", width, heads)
    ratio = _mlp_ratio(path, tree["decoder"])
    return Decoder(width, _depth(tree["decoder"]), heads, encoder.grid, values, mlp_ratio=ratio)


def published_pooling(layout: str, encoder: ViT, tree: dict) -> str:
    """The patch mean for MAE-CT's B/16 (published so) and under an `fc_norm`, else the CLS token."""
    of_maect_base = layout == "maect_encoder" and encoder.width == 768
    return "mean" if of_maect_base or "fc_norm" in tree else "cls"


def _classes(tree: dict, facts: Said) -> tuple[str, ...]:
    """Names of the head's classes, where there are as many names as outputs."""
    names = facts.classes or ()
    return names if "head" in tree and len(names) == len(tree["head"]["bias"]) else ()


def hashes(path: Path) -> tuple[str, str]:
    """SHA-256 and MD5 of a file, in hexadecimal; the latter is how MAE's files are published."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            sha256.update(chunk)
            md5.update(chunk)
    return sha256.hexdigest(), md5.hexdigest()


def provenance_of(
    path: Path, layout: str, encoder: ViT, facts: Said, notes: dict[str, Any], sha256: str, md5: str
) -> Provenance:
    """What our own note in the file says; else that the weights come from this file."""
    if facts.provenance is not None:
        return facts.provenance
    license, source = license_of(layout, encoder, facts.license, notes, md5)
    origin = {"name": path.name, "sha256": sha256, "layout": layout, "license": license}
    step = notes.get("epoch")
    return Provenance(
        license=license,
        license_source=source,
        derived_from=(origin,),
        trained_on="",
        stage=f"epoch {step}" if type(step) is int else "",
    )
