"""The folder that `convert` writes: weights, settings, preprocessing and model card, all of it or nothing."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import ml_dtypes
import numpy as np

from maect_jax.errors import CheckpointError, ConfigError, MaectError
from maect_jax.exchange import positions
from maect_jax.exchange.beside import NOTE, note_of
from maect_jax.exchange.export import card
from maect_jax.exchange.export.proof import TOLERANCE, Proof, compare
from maect_jax.exchange.export.target import WEIGHTS, Target
from maect_jax.exchange.model import Model
from maect_jax.results.record import weights_hash

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_SHORT = {"bfloat16": "BF16", "float16": "F16"}  # names in a file
_WITH_DECODER = ("mae", "hf-vitmae")  # targets; the others leave it out
_BICUBIC = 3  # Pillow's number of the filter
_CHUNK = 1 << 24  # bytes, a multiple of a number's


def write_package(
    model: Model,
    target: Target,
    out: Path,
    *,
    records: Iterable[dict[str, Any]] = (),
    notes: Iterable[str] = (),
    dtype: str = "float32",
    prove: bool = True,
    say: Callable[[str], None] = print,
) -> Proof:
    """Writes a model for a target, with all that belongs to it, and proves that its library computes the same.

    Everything is written beside `out` and moved there at the end. Equal weights give equal files.

    Args:
      model: float32.
      out: a folder that does not exist yet, or is empty.
      records: of `results.jsonl`; the card shows those of these weights.
      notes: a sentence each on what was done to the weights, for the card.
      dtype: of the written tensors, a key of `DTYPES`. The proof is that of the rounded weights, in float32.
      prove: run the target's library, where it is there.
      say: prints a line.

    Returns:
      The proof; without differences, and with the reason, where the library is missing or `prove` is False.

    Raises:
      ConfigError: the target can not express the model or the type; `out` is taken.
      CheckpointError: the library does not take the files, or computes something else.
    """
    _check_dtype(target, dtype)
    target.check(model)
    place = _free_place(Path(out))
    entries = card.results_of(records, _evaluated_hash(model), model.provenance) if records else ()
    model = _what_is_written(model, target)
    rounded = _rounded(model, target, dtype)
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as temporary:
        folder = Path(temporary) / place.name
        folder.mkdir()
        target.write(rounded, folder, {NOTE: _note(model)})
        (folder / card.PREPROCESSOR).write_text(json.dumps(_preprocessing(model), indent=2) + "\n")
        if prove:
            say(f"running what is written by {target.loader}, and our model")
        proof = _prove(target, rounded, folder) if prove else Proof(None, "the conversion was told not to")
        if dtype != "float32":
            _shorten(folder / WEIGHTS, dtype)
        text = card.render(model, target, folder, proof=proof, entries=entries, notes=notes, dtype=dtype)
        (folder / card.CARD).write_text(text, encoding="utf-8")
        folder.rename(place)
    return proof


def _note(model: Model) -> str:
    """Our own note for the header.

    Raises:
      CheckpointError: it holds what somebody's file says of itself, and that can not be written.
    """
    try:
        note = note_of(model)
        json.dumps(json.loads(note), ensure_ascii=False).encode()
    except RecursionError:
        raise CheckpointError(f"'{model.name}': the recipe that its file holds is nested too deeply") from None
    except UnicodeEncodeError:
        raise CheckpointError(f"'{model.name}': what its file says of itself holds half characters") from None
    return note


def _check_dtype(target: Target, dtype: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: no type '{dtype}'; there is {', '.join(DTYPES)}")
    if target.name == "onnx" and dtype != "float32":
        raise ConfigError(
            f"--dtype {dtype}: --to onnx writes a graph in float32; leave the type out, or take --to timm"
        )


def _free_place(out: Path) -> Path:
    """The absolute path of a folder that may be written.

    Raises:
      ConfigError: something is there.
    """
    if out.is_dir():
        if any(out.iterdir()):
            raise ConfigError(f"--out: '{out}' is not empty; give a folder that does not exist yet, or an empty one")
        if out.is_mount():
            raise ConfigError(f"--out: '{out}' is a mounted volume, which no folder can replace; give a folder in it")
    elif out.exists():
        raise ConfigError(f"--out: '{out}' is a file; give a folder that does not exist yet")
    return out.resolve()


def _what_is_written(model: Model, target: Target) -> Model:
    """The model without what the target leaves out, so that the files say of themselves what they hold.

    Names of classes are as they are read from a file; see `beside`.
    """
    if target.name not in _WITH_DECODER:
        params = {name: part for name, part in model.params.items() if name != "decoder"}
        model = replace(model, decoder=None, params=params)
    names = model.classes if model.has_head else ()
    return replace(model, classes=tuple("".join(c if c.isprintable() else "?" for c in name[:200]) for name in names))


def _rounded(model: Model, target: Target, dtype: str) -> Model:
    """The model with float32 weights that `dtype` holds exactly, the encoder's position table among them.

    A decoder has no table among its weights: the fixed one is rounded in the file alone. What a target adds up is added
    before.

    Raises:
      ConfigError: a weight is beyond the range of the type.
    """
    if dtype == "float32":
        return model

    def to_type(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        with np.errstate(over="ignore"):
            short = x.astype(DTYPES[dtype]).astype(np.float32)
        if not np.array_equal(np.isfinite(short), np.isfinite(x)):
            raise ConfigError(f"--dtype {dtype}: '{model.name}' has weights beyond its range; take bfloat16 or float32")
        return short

    encoder = {"pos_embed": positions.fixed_table(model.encoder.width, model.encoder.grid)} | model.params["encoder"]
    if target.name == "maect":  # its files have no row for the class token
        table_1nd = np.array(encoder["pos_embed"])
        encoder["cls_token"] = encoder["cls_token"] + table_1nd[:, :1]
        table_1nd[:, :1] = 0
        encoder["pos_embed"] = table_1nd
    params = jax.tree.map(to_type, model.params | {"encoder": encoder})
    return replace(model, params=params, encoder=model.encoder.clone(learned_positions=True))


def _preprocessing(model: Model) -> dict[str, Any]:
    """Settings of transformers' processor that cuts out the central crop; ViT's own squeezes the picture.

    The name with 'Fast' is the one under which versions 4 and 5 load it without a warning, for grey pictures too. Where
    an odd number of pixels is cut off, its crop may lie one pixel beside ours.
    """
    return {
        "image_processor_type": "CLIPImageProcessorFast",
        "do_convert_rgb": model.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": round(model.image_size * model.resize_ratio)},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": model.image_size, "width": model.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
    }


def _prove(target: Target, model: Model, folder: Path) -> Proof:
    """The comparison.

    Raises:
      CheckpointError: the library fails, or what it computes is not what our model does.
    """
    try:
        proof = compare(target, model, folder)
    except MaectError:
        raise
    except Exception as error:  # whatever a library of an unexpected version ends with
        what = card.one_line(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{target.loader} can not run what --to {target.name} wrote ({what})") from error
    wrong = [f"{name} by {x:.1e}" for name, x in (proof.differences or {}).items() if not x <= TOLERANCE]
    if wrong:
        raise CheckpointError(
            f"--to {target.name}: what {target.loader} computes from the written files differs from our model: "
            f"{', '.join(wrong)} of the largest value, where {TOLERANCE} is allowed; nothing is kept. Convert with "
            f"another version of {target.loader}"
        )
    return proof


def _shorten(path: Path, dtype: str) -> None:
    """Rewrites a file of `target.write_weights` with every tensor in a type of two bytes, in the same order."""
    short = path.with_suffix(".short")
    with open(path, "rb") as file, open(short, "wb") as new:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                tensor["dtype"] = _SHORT[dtype]
                tensor["data_offsets"] = [offset // 2 for offset in tensor["data_offsets"]]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        while chunk := file.read(_CHUNK):
            new.write(np.frombuffer(chunk, "<f4").astype(DTYPES[dtype]).tobytes())
    short.replace(path)


def _evaluated_hash(model: Model) -> str:
    """The hash by which an evaluation knows these weights: of all that features are made with."""
    return weights_hash(
        model.params["encoder"] | {name: model.params[name] for name in ("fc_norm",) if name in model.params}
    )
