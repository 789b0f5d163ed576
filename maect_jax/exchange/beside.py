"""What a weights file and its neighbours say of the model, as far as shapes do not: heads, pictures, licence.

In order: our own note in the header of safetensors, then `config.json`, `preprocessor_config.json` and the card
`README.md` of a folder in the form of timm or transformers. All of it is somebody's text: bounded, checked value by
value, and what is of another form is left out.
"""

import json
import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from maect_jax.exchange import provenance
from maect_jax.exchange.provenance import Provenance

NOTE = "maect_jax"  # key in the header
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # those that a config.json beside them speaks of
# of timm's ViT, those that shapes tell, or that change nothing in what is computed here
_TIMM_ARGUMENTS = (
    "img_size",
    "patch_size",
    "in_chans",
    "num_classes",
    "global_pool",
    "embed_dim",
    "depth",
    "num_heads",
)
_TIMM_ARGUMENTS += ("mlp_ratio", "qkv_bias", "class_token", "no_embed_class", "fc_norm", "dynamic_img_size")
_TIMM_ARGUMENTS += (
    "dynamic_img_pad",
    "drop_rate",
    "pos_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
)
_MAX_TEXT = 1 << 24  # bytes
_MAX_DEPTH = 32  # objects in objects


@dataclass(frozen=True)
class Said:
    """Facts about a model that its tensors do not tell; None = nothing says.

    `epsilon` is that of its LayerNorms; `unlike` are settings with which it computes something else than our models.
    """

    heads: int | None = None
    decoder_heads: int | None = None
    pooling: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize_ratio: float | None = None
    mask_ratio: float | None = None
    normalised_pixels: bool | None = None
    classes: tuple[str, ...] | None = None
    license: str | None = None
    epsilon: float | None = None
    unlike: tuple[str, ...] | None = None
    provenance: Provenance | None = None


def note_of(model, **more) -> str:
    """Our own note, for the header of a file that `model` is written to; `said` reads it."""
    decoder = model.decoder
    facts = {
        "heads": model.encoder.heads,
        "decoder_heads": decoder.heads if decoder else None,
        "pooling": model.pooling,
        "mean": model.mean,
        "std": model.std,
        "resize_ratio": model.resize_ratio,
        "mask_ratio": model.mask_ratio if decoder else None,
        "normalised_pixels": model.normalised_pixels,
        "classes": model.classes or None,
        "provenance": model.provenance.as_dict(),
    } | more
    return json.dumps({name: value for name, value in facts.items() if value is not None})


def said(path: Path, notes: dict[str, Any]) -> Said:
    """What is said of the weights in `path`.

    Args:
      notes: of the file itself, from `tensors.read_notes`.
    """
    own = parsed(notes.get(NOTE))
    found = _checked(own)
    if isinstance(own.get("provenance"), dict):
        found = replace(found, provenance=provenance.from_dict(own["provenance"]))
    if path.name in HUB_FILES:
        config, processor = (_read_json(path.parent / name) for name in ("config.json", "preprocessor_config.json"))
        for source in (_of_timm(config), _of_transformers(config, processor)):
            found = _first(found, _checked(source))
        found = _first(found, Said(license=_card_license(path.parent / "README.md")))
    return found


def _of_timm(config: dict) -> dict:
    arguments, pretrained = (_dict(config.get(name)) for name in ("model_args", "pretrained_cfg"))
    crop = _number(pretrained.get("crop_pct"))
    unlike = [f"{name} {value!r}" for name, value in arguments.items() if name not in _TIMM_ARGUMENTS and value]
    if config.get("global_pool") not in (None, "", "token", "avg"):
        unlike.append(f"global_pool {config['global_pool']!r}")
    return {
        "unlike": unlike,
        "heads": arguments.get("num_heads"),
        "pooling": {"avg": "mean", "token": "cls"}.get(str(config.get("global_pool"))),
        "mean": pretrained.get("mean"),
        "std": pretrained.get("std"),
        "resize_ratio": 1 / crop if crop and crop > 0 else None,
        "classes": pretrained.get("label_names") or config.get("label_names"),
        "license": pretrained.get("license"),
    }


def _of_transformers(config: dict, processor: dict) -> dict:
    labels = _dict(config.get("id2label"))
    indices = [str(i) for i in range(len(labels))]
    size, crop = _dict(processor.get("size")), _dict(processor.get("crop_size"))
    short, side = _number(size.get("shortest_edge")), _number(crop.get("height"))
    whole = "height" in size and not processor.get("do_center_crop")  # squashed to a square; here the aspect is kept
    plain = processor.get("do_normalize") is False
    activation = config.get("hidden_act", "gelu")
    return {
        "heads": config.get("num_attention_heads"),
        "decoder_heads": config.get("decoder_num_attention_heads"),
        "mask_ratio": config.get("mask_ratio"),
        "normalised_pixels": config.get("norm_pix_loss"),
        "epsilon": config.get("layer_norm_eps"),
        "unlike": [f"hidden_act {activation!r}"] if activation != "gelu" else [],
        "resize_ratio": 1.0 if whole else short / side if short and side else None,
        "mean": [0.0, 0.0, 0.0] if plain else processor.get("image_mean"),
        "std": [1.0, 1.0, 1.0] if plain else processor.get("image_std"),
        "classes": [labels[i] for i in indices] if labels.keys() == set(indices) else None,
    }


def _checked(values: dict) -> Said:
    """The values of the expected form; others count as not said."""
    good: dict[str, Any] = {}
    for name in ("heads", "decoder_heads"):
        if type(values.get(name)) is int and 0 < values[name] < 1000:
            good[name] = values[name]
    for name, low, high in (("resize_ratio", 1.0, 4.0), ("mask_ratio", 0.0, 1.0), ("epsilon", 0.0, 1.0)):
        value = _number(values.get(name))
        if value is not None and low <= value <= high and (name, value) != ("mask_ratio", 0.0):
            good[name] = value  # a ratio of 0 is how exported features are had, not how the model was trained
    for name in ("mean", "std"):
        channels = values.get(name)
        numbers = [_number(x) for x in channels[:100]] if isinstance(channels, list) else []
        if numbers and all(x is not None and (x > 0 or name == "mean") for x in numbers):
            good[name] = tuple(numbers)
    if values.get("pooling") in ("cls", "mean"):
        good["pooling"] = values["pooling"]
    if isinstance(values.get("normalised_pixels"), bool):
        good["normalised_pixels"] = values["normalised_pixels"]
    classes = values.get("classes")
    if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
        good["classes"] = tuple(_printable(name) for name in classes)
    if isinstance(values.get("license"), str):
        good["license"] = _printable(values["license"])
    if values.get("unlike"):
        good["unlike"] = tuple(_printable(text) for text in values["unlike"][:20] if isinstance(text, str))
    return Said(**good)


def _first(found: Said, further: Said) -> Said:
    """What the first of the two says, else the second."""
    empty = [item.name for item in fields(Said) if getattr(found, item.name) is None]
    return replace(found, **{name: getattr(further, name) for name in empty})


def _card_license(path: Path) -> str | None:
    """The licence in the head of a model card; of 'other' its name."""
    front = re.match(r"---\n(.*?)\n---", read_text(path), re.DOTALL)
    values = dict(re.findall(r"^(license|license_name):[ \t]*(\S.*)$", front[1], re.MULTILINE)) if front else {}
    license = values.get("license", "").strip("'\" ")
    found = values.get("license_name", license) if license == "other" else license
    return _printable(found.strip("'\" ")) or None


def _read_json(path: Path) -> dict:
    return parsed(read_text(path))


def parsed(text: Any) -> dict:
    """A JSON object of bounded size and depth; {} for anything else."""
    try:
        found = json.loads(text) if isinstance(text, str) and len(text) <= _MAX_TEXT else {}
    except (ValueError, RecursionError):
        return {}
    return _dict(found) if _is_plain(found) else {}


def _is_plain(value: Any, levels: int = _MAX_DEPTH) -> bool:
    """Whether a value is nested no deeper than this, and its texts can be written again: no halves of characters."""
    if isinstance(value, str):
        return not any("\ud800" <= c <= "\udfff" for c in value)
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_plain(item, levels - 1) for item in inner)


def read_text(path: Path) -> str:
    """Content of a file of bounded size; '' where there is none, or none that can be read to its end."""
    if not path.is_file():
        return ""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_TEXT + 1)
    except OSError:
        return ""
    return content.decode(errors="replace") if len(content) <= _MAX_TEXT else ""


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)
    return float(value) if good else None


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:200])
