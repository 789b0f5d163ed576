"""Folders for transformers: the plain ViT (`hf-vit`) and the masked autoencoder (`hf-vitmae`).

Tensors have the names of transformers 4, which newer versions map to theirs while loading. Position tables are written
even where they are fixed: models made from settings alone may have zeros in their place. So is every setting that the
weights need, above all LayerNorm's epsilon, 1e-6, which is 1e-12 there by default.

Source: transformers 4.57.1 and 5.23.0.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maect_jax.errors import ConfigError
from maect_jax.exchange.export.target import load_library, refuse_misfits, write_config, write_weights
from maect_jax.exchange.export.timm import refuse_two_norms
from maect_jax.exchange.mapping import to_layout
from maect_jax.exchange.model import Model


class HFViT:
    """ViTModel, or ViTForImageClassification where there is a head; a decoder is left out.

    ViTModel ends with a pooler, a linear map and tanh on the CLS token after the final norm, for which these models
    have no weights. The identity without tanh is written: `pooler_output` is the CLS token after the final norm.
    Versions before 4.50 do not know that setting and apply tanh; the tokens are right there too.
    """

    name = "hf-vit"
    loader = "transformers"

    def check(self, model: Model) -> None:
        _refuse_other_norms(self.name, model)
        if model.has_head and model.pooling != "cls":
            raise ConfigError(
                f"--to {self.name}: the head of '{model.name}' is on the mean of the patch tokens, "
                "ViTForImageClassification's on the CLS token; use --to timm"
            )

    def write(self, model: Model, folder: Path, metadata: Mapping[str, str]) -> None:
        width = model.encoder.width
        settings = _encoder_settings(model) | {"model_type": "vit", "encoder_stride": model.encoder.patch}
        if model.has_head:
            classes = model.classes or [f"LABEL_{i}" for i in range(len(model.params["head"]["bias"]))]
            settings |= {
                "architectures": ["ViTForImageClassification"],
                "id2label": {str(i): name for i, name in enumerate(classes)},
                "label2id": {name: i for i, name in enumerate(classes)},
            }
            layout, last = "hf4_classifier", {"head": model.params["head"]}
        else:
            settings |= {"architectures": ["ViTModel"], "pooler_act": "linear", "pooler_output_size": width}
            identity = {"kernel": np.eye(width, dtype=np.float32), "bias": np.zeros(width, np.float32)}
            layout, last = "hf4_model", {"pooler": identity}
        _write(model, folder, metadata, layout, {"encoder": model.params["encoder"]} | last, settings)

    def usage(self, model: Model) -> str:
        if model.has_head:
            line = "name = model.config.id2label[outputs.logits.argmax().item()]"
        elif model.pooling == "cls":
            line = "features = outputs.pooler_output  # the CLS token: the pooler is the identity"
        else:
            line = "features = outputs.last_hidden_state[:, 1:].mean(dim=1)  # pooler_output is the CLS token"
        return _usage(model, "AutoModelForImageClassification" if model.has_head else "AutoModel", line)

    def outputs(
        self, model: Model, folder: Path, images_bchw: np.ndarray, noise_bn: np.ndarray
    ) -> dict[str, np.ndarray]:
        network = _load("vit", "AutoModelForImageClassification" if model.has_head else "AutoModel", folder)
        torch = load_library("torch")
        normed = []
        with torch.no_grad():
            if model.has_head:  # its result does not hold the tokens
                network.vit.layernorm.register_forward_hook(lambda norm, given, tokens_bnd: normed.append(tokens_bnd))
            result = network(torch.from_numpy(images_bchw))
            tokens_bnd = normed[0] if model.has_head else result.last_hidden_state
            found = {"tokens": tokens_bnd, "features": tokens_bnd[:, 0]}
            if model.has_head:
                found["logits"] = result.logits
            elif model.pooling == "cls":
                found["features"] = result.pooler_output
            else:
                found["features"] = tokens_bnd[:, 1:].mean(dim=1)
        return {name: x.numpy() for name, x in found.items()}


class HFViTMAE:
    """ViTMAEForPreTraining where there is a decoder, else ViTMAEModel, whose mask ratio is then 0: it makes features.

    ViTMAEModel returns patch tokens in shuffled order at every mask ratio; its `ids_restore` puts them back. AutoModel
    makes a ViTMAEModel of every folder, for which a decoder's tensors are unexpected: AutoModelForPreTraining it is.
    """

    name = "hf-vitmae"
    loader = "transformers"

    def check(self, model: Model) -> None:
        _refuse_other_norms(self.name, model)
        if model.has_head:
            raise ConfigError(
                f"--to {self.name}: there is no place for the head of '{model.name}'; use --to timm, or --to hf-vit "
                "for a head on the CLS token"
            )

    def write(self, model: Model, folder: Path, metadata: Mapping[str, str]) -> None:
        settings = _encoder_settings(model) | {"model_type": "vit_mae"}
        tree = {"encoder": model.params["encoder"]}
        if model.decoder:
            decoder = model.decoder
            settings |= {
                "architectures": ["ViTMAEForPreTraining"],
                "decoder_hidden_size": decoder.width,
                "decoder_num_hidden_layers": decoder.depth,
                "decoder_num_attention_heads": decoder.heads,
                "decoder_intermediate_size": decoder.mlp_ratio * decoder.width,
                "mask_ratio": model.mask_ratio,
            }
            if model.normalised_pixels is not None:
                settings["norm_pix_loss"] = model.normalised_pixels
            tree["decoder"] = model.params["decoder"]
        else:
            settings |= {"architectures": ["ViTMAEModel"], "mask_ratio": 0.0}
        _write(model, folder, metadata, "hf4_pretraining" if model.decoder else "hf4_encoder", tree, settings)

    def usage(self, model: Model) -> str:
        place = "[:, 0]" if model.pooling == "cls" else "[:, 1:].mean(dim=1)"
        if not model.decoder:
            lines = (
                f"features = outputs.last_hidden_state{place}",
                "order = outputs.ids_restore[..., None].expand(-1, -1, model.config.hidden_size)",
                "patches = outputs.last_hidden_state[:, 1:].gather(1, order)  # they come in shuffled order",
            )
            return _usage(model, "AutoModel", *lines)
        lines = (
            "predictions, loss = outputs.logits, outputs.loss",
            "",
            "model.config.mask_ratio = 0.0  # features need the whole picture",
            "with torch.no_grad():",
            f"    features = model.vit(**inputs).last_hidden_state{place}",
        )
        return _usage(model, "AutoModelForPreTraining", *lines)

    def outputs(
        self, model: Model, folder: Path, images_bchw: np.ndarray, noise_bn: np.ndarray
    ) -> dict[str, np.ndarray]:
        network = _load("vit_mae", "AutoModelForPreTraining" if model.decoder else "AutoModel", folder)
        torch = load_library("torch")
        pixels_bchw, noise_bn = torch.from_numpy(images_bchw), torch.from_numpy(noise_bn)
        with torch.no_grad():
            found = {}
            if model.decoder:
                masked = network(pixels_bchw, noise=noise_bn)
                found = {"predictions": masked.logits, "loss": masked.loss}
                network.config.mask_ratio = 0.0
            whole = (network.vit if model.decoder else network)(pixels_bchw, noise=noise_bn)
            shuffled_bnd = whole.last_hidden_state
            order_bnd = whole.ids_restore[..., None].expand(-1, -1, shuffled_bnd.shape[-1])
            patches_bnd = shuffled_bnd[:, 1:].gather(1, order_bnd)
            found["tokens"] = torch.cat([shuffled_bnd[:, :1], patches_bnd], dim=1)
            found["features"] = shuffled_bnd[:, 0] if model.pooling == "cls" else patches_bnd.mean(dim=1)
        return {name: x.numpy() for name, x in found.items()}


def _refuse_other_norms(name: str, model: Model) -> None:
    if not model.encoder.final_norm:
        raise ConfigError(
            f"--to {name}: '{model.name}' has no norm after its last block, and transformers' models always have one; "
            "use --to timm"
        )
    refuse_two_norms(name, model)


def _encoder_settings(model: Model) -> dict[str, Any]:
    encoder = model.encoder
    return {
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp_ratio * encoder.width,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": model.image_size,
        "patch_size": encoder.patch,
        "num_channels": model.channels,
        "dtype": "float32",  # of the computation, also where the file is of a shorter type
    }


def _write(model: Model, folder: Path, metadata: Mapping[str, str], layout: str, tree: dict, settings: dict) -> None:
    tensors = to_layout(jax.tree.map(np.asarray, tree), layout, patch=model.encoder.patch, grid=model.encoder.grid)
    write_weights(folder, tensors, metadata)
    write_config(folder, settings)


def _usage(model: Model, auto: str, *lines: str) -> str:
    why = "" if auto == "AutoModel" else f"  # AutoModel has no place for the {'head' if model.has_head else 'decoder'}"
    grey = model.channels == 1
    image = 'Image.open("picture.jpg")'
    return "\n".join(
        [
            *(["import numpy as np"] if grey else []),
            "import torch",
            "from PIL import Image",
            f"from transformers import AutoImageProcessor, {auto}",
            "",
            'folder = "."  # this one',
            f"model = {auto}.from_pretrained(folder).eval(){why}",
            f'image = np.array({image}.convert("L"))[..., None]' if grey else f'image = {image}.convert("RGB")',
            'inputs = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")',
            "with torch.no_grad():",
            "    outputs = model(**inputs)",
            *lines,
        ]
    )


def _load(kind: str, auto: str, folder: Path) -> Any:
    """The model in a folder, quietly; CheckpointError where it does not take exactly the tensors that are there."""
    load_library(
        f"transformers.models.{kind}.modeling_{kind}"
    )  # below, transformers would not say what is wrong with it
    classes = load_library("transformers.models.auto.modeling_auto")
    logging = load_library("transformers.utils.logging")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network, report = getattr(classes, auto).from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    refuse_misfits("transformers", report["missing_keys"], report["unexpected_keys"])
    return network.eval()


HF_VIT = HFViT()
HF_VITMAE = HFViTMAE()
