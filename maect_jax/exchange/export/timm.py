"""timm: a folder in the form of its models on the hub, which `timm.create_model` also takes from a disk.

The file holds the encoder and, where there are, norm and head of a classifier. A decoder is left out: timm takes a file
with a mask token for DINOv2's and converts it to something else.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maect_jax.errors import ConfigError
from maect_jax.exchange.export.target import WEIGHTS, load_library, refuse_misfits, write_config, write_weights
from maect_jax.exchange.mapping import to_layout
from maect_jax.exchange.model import Model
from maect_jax.models.vit import Size

_ENTRIES = {
    "vit_tiny_patch16_224": Size(192, 12, 3, 16),
    "vit_small_patch16_224": Size(384, 12, 6, 16),
    "vit_base_patch16_224": Size(768, 12, 12, 16),
    "vit_large_patch16_224": Size(1024, 24, 16, 16),
    "vit_huge_patch14_224": Size(1280, 32, 16, 14),
}


class Timm:
    """`--to timm`: see `target.Target`."""

    name = "timm"
    loader = "timm"

    def check(self, model: Model) -> None:
        refuse_two_norms(self.name, model)

    def write(self, model: Model, folder: Path, metadata: Mapping[str, str]) -> None:
        write_weights(folder, tensors_of(model), metadata)
        architecture, arguments = architecture_of(model)
        classes = classes_of(model)
        names = {"label_names": list(model.classes)} if classes and len(model.classes) == classes else {}
        write_config(
            folder,
            {
                "architecture": architecture,
                "num_classes": classes,
                "num_features": model.encoder.width,
                "global_pool": "token" if model.pooling == "cls" else "avg",
                **names,
                "model_args": arguments,
                "pretrained_cfg": {
                    "input_size": [model.channels, model.image_size, model.image_size],
                    "fixed_input_size": True,
                    "interpolation": "bicubic",
                    "crop_pct": crop_pct(model),
                    "crop_mode": "center",
                    "mean": list(model.mean),
                    "std": list(model.std),
                    "num_classes": classes,
                    "pool_size": None,
                    "first_conv": "patch_embed.proj",
                    "classifier": "head",
                    "license": model.provenance.license,
                },
            },
        )

    def usage(self, model: Model) -> str:
        return f"""\
import timm
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()  # "." is this folder
# {creation_of(model)} loads the weights too,
# but knows nothing of the pictures' size, mean and deviation
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{usage_on_picture(model)}"""

    def outputs(
        self, model: Model, folder: Path, images_bchw: np.ndarray, noise_bn: np.ndarray
    ) -> dict[str, np.ndarray]:
        torch, module = load_library("torch"), _create(f"local-dir:{folder}")
        load_strictly(module, read_file(folder))
        with torch.inference_mode():
            found = encode(module, torch.from_numpy(images_bchw), model.has_head)
        return {name: x.numpy() for name, x in found.items()}


# --------------------------------------------------------------------------------------------------- facts about models


def tensors_of(model: Model) -> dict[str, np.ndarray]:
    """Encoder and, where there are, fc_norm and head, by timm's names, which are those of the official MAE files."""
    tree = jax.tree.map(np.asarray, {name: params for name, params in model.params.items() if name != "decoder"})
    sizes = {"patch": model.encoder.patch, "grid": model.encoder.grid}
    if model.encoder.final_norm:
        return to_layout(tree, "timm_classifier" if model.has_head else "timm_mae", **sizes)
    nothing = np.zeros((0, 0), np.float32)
    absent = {"fc_norm": {"scale": nothing, "bias": nothing}, "head": {"kernel": nothing, "bias": nothing}}
    absent = {name: leaves for name, leaves in absent.items() if name not in tree}
    tensors = to_layout(absent | tree, "mae_finetuned", **sizes)
    return {name: tensor for name, tensor in tensors.items() if name.split(".")[0] not in absent}


def architecture_of(model: Model) -> tuple[str, dict[str, Any]]:
    """timm's name of the nearest architecture, and the arguments of `create_model` that make it this model's.

    The number of classes is not among them.
    """
    encoder = model.encoder
    shape = Size(encoder.width, encoder.depth, encoder.heads, encoder.patch)
    name = min(_ENTRIES, key=lambda name: _distance(_ENTRIES[name], shape))
    entry, fc_norm = _ENTRIES[name], "fc_norm" in model.params
    given_and_usual = {
        "patch_size": (shape.patch, entry.patch),
        "embed_dim": (shape.width, entry.width),
        "depth": (shape.depth, entry.depth),
        "num_heads": (shape.heads, entry.heads),
        "mlp_ratio": (encoder.mlp_ratio, 4),
        "img_size": (model.image_size, 224),
        "in_chans": (model.channels, 3),
        "global_pool": ("token" if model.pooling == "cls" else "avg", "token"),
        "fc_norm": (fc_norm, None if model.pooling == "mean" else False),  # timm's own choice depends on its version
        "final_norm": (encoder.final_norm or fc_norm, True),
    }
    return name, {key: given for key, (given, usual) in given_and_usual.items() if given != usual}


def _distance(entry: Size, shape: Size) -> tuple[float, ...]:
    return (abs(math.log(entry.width / shape.width)), abs(entry.depth - shape.depth), abs(entry.heads - shape.heads))


def refuse_two_norms(target: str, model: Model) -> None:
    """Raises ConfigError when a model ends with two norms."""
    if model.encoder.final_norm and "fc_norm" in model.params:
        raise ConfigError(
            f"--to {target}: '{model.name}' has a norm after the last block and one after pooling; these files hold "
            "one of them, and no form here both"
        )


def classes_of(model: Model) -> int:
    """Classes of the head; 0 = there is none."""
    return model.params["head"]["bias"].shape[0] if model.has_head else 0


def crop_pct(model: Model) -> float:
    """The share with which timm, which rounds down, brings the shorter side to as many pixels as we do."""
    short = round(model.image_size * model.resize_ratio)
    share = model.image_size / short
    while math.floor(model.image_size / share) < short:
        share = math.nextafter(share, 0)
    return share


# ---------------------------------------------------------------------------------------------------------------- usage


def creation_of(model: Model, **more: Any) -> str:
    """The call that makes timm's model of the weights alone; `more` is added to its arguments, None = left out."""
    architecture, arguments = architecture_of(model)
    arguments = {"checkpoint_path": WEIGHTS, "num_classes": classes_of(model), **arguments, **more}
    texts = {name: json.dumps(x) if isinstance(x, str) else x for name, x in arguments.items() if x is not None}
    given = ", ".join(f"{name}={text}" for name, text in texts.items())
    return f'timm.create_model("{architecture}", {given})'


def usage_on_picture(model: Model) -> str:
    """The lines after timm's `model` and `transform` are there."""
    width, vector = model.encoder.width, "class token" if model.pooling == "cls" else "mean of the patch tokens"
    result = f"logits = model(image)  # [1, {classes_of(model)}]"
    if not model.has_head:
        result = f"features = model(image)  # [1, {width}], the {vector}"
    return f"""\
image = transform(Image.open("picture.jpg").convert("{"L" if model.channels == 1 else "RGB"}"))[None]
{result}
tokens = model.forward_features(image)  # [1, {1 + model.encoder.grid**2}, {width}], the class token first"""


# -------------------------------------------------------------------------------------------------------------- modules


def empty_module(model: Model, **more: Any) -> Any:
    """timm's model of this architecture, without values; `more` are further arguments."""
    architecture, arguments = architecture_of(model)
    return _create(architecture, num_classes=classes_of(model), **arguments, **more)


def _create(name: str, **arguments: Any) -> Any:
    """timm's model without memory for its tensors and without their random start, where timm can leave them out."""
    timm, torch = load_library("timm"), load_library("torch")
    try:
        with torch.device("meta"):
            return timm.create_model(name, **arguments)
    except RuntimeError:  # older versions look at values while they build: "Tensor.item() cannot be called on meta"
        return timm.create_model(name, **arguments)


def read_file(folder: Path) -> dict[str, Any]:
    """The tensors of a written folder as PyTorch's, mapped from the file."""
    return load_library("safetensors.torch").load_file(folder / WEIGHTS)


def load_strictly(module: Any, tensors: Mapping[str, Any]) -> None:
    """Puts tensors in the place of a module's own, without a copy, and the module in its state for evaluation.

    Raises:
      CheckpointError: the module has others.
    """
    found = module.load_state_dict(tensors, strict=False, assign=True)
    refuse_misfits("timm", found.missing_keys, found.unexpected_keys)
    module.eval()


def encode(module: Any, images_bchw: Any, head: bool) -> dict[str, Any]:
    """'tokens', 'features' and, with a head, 'logits' of timm's model; PyTorch's tensors."""
    tokens_bnd = module.forward_features(images_bchw)
    found = {"tokens": tokens_bnd, "features": module.forward_head(tokens_bnd, pre_logits=True)}
    return found | ({"logits": module.forward_head(tokens_bnd)} if head else {})


TIMM = Timm()
