"""The names of the official MAE files, with or without a decoder, and those of MAE-CT's encoders.

Both name an encoder as timm does; MAE-CT's position table has no row for the class token. Nobody's loader is bound to
these files, so the proof runs them by a masked autoencoder put together from timm's modules, which have their names.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maect_jax.errors import ConfigError
from maect_jax.exchange.export import timm
from maect_jax.exchange.export.target import WEIGHTS, load_library, write_config, write_weights
from maect_jax.exchange.mapping import to_layout
from maect_jax.exchange.model import Model
from maect_jax.objectives.masking import patches_to_keep


class Mae:
    """`--to mae`: see `target.Target`."""

    name = "mae"
    loader = "pytorch"

    def check(self, model: Model) -> None:
        if model.decoder and (model.has_head or not model.encoder.final_norm):
            raise ConfigError(
                f"--to {self.name}: '{model.name}' has a decoder and is a classifier; these files hold either: leave "
                "the head or the decoder out"
            )
        timm.refuse_two_norms(self.name, model)

    def write(self, model: Model, folder: Path, metadata: Mapping[str, str]) -> None:
        settings = _encoder_settings(model)
        if model.decoder:
            tree = jax.tree.map(np.asarray, {name: model.params[name] for name in ("encoder", "decoder")})
            tensors = to_layout(tree, "mae_official_full", patch=model.encoder.patch, grid=model.encoder.grid)
            settings |= _decoder_settings(model)
        else:
            tensors = timm.tensors_of(model)
        write_weights(folder, tensors, metadata)
        write_config(folder, settings)

    def usage(self, model: Model) -> str:
        if model.decoder is None:
            return _usage(model, f"model = {timm.creation_of(model)}.eval()")
        return _usage(
            model,
            f'tensors = load_file("{WEIGHTS}")  # encoder and decoder, for the official masked autoencoder',
            'encoder = {name: x for name, x in tensors.items() if not name.startswith(("mask_token", "decoder"))}',
            f"model = {timm.creation_of(model, checkpoint_path=None)}.eval()",
            "model.load_state_dict(encoder)",
        )

    def outputs(
        self, model: Model, folder: Path, images_bchw: np.ndarray, noise_bn: np.ndarray
    ) -> dict[str, np.ndarray]:
        torch, module = load_library("torch"), timm.empty_module(model)
        if model.decoder:
            _add_decoder(module, model)
        timm.load_strictly(module, timm.read_file(folder))
        images_bchw, noise_bn = torch.from_numpy(images_bchw), torch.from_numpy(noise_bn)
        with torch.inference_mode():
            found = timm.encode(module, images_bchw, model.has_head)
            if model.decoder:
                found |= _reconstruct(module, model, images_bchw, noise_bn)
        return {name: x.numpy() for name, x in found.items()}


class MaeCt:
    """`--to maect`: see `target.Target`."""

    name = "maect"
    loader = "pytorch"

    def check(self, model: Model) -> None:
        if model.has_head or not model.encoder.final_norm:
            raise ConfigError(
                f"--to {self.name}: '{model.name}' is a classifier; these files hold an encoder alone: take --to timm, "
                "or leave the head out"
            )

    def write(self, model: Model, folder: Path, metadata: Mapping[str, str]) -> None:
        tree = jax.tree.map(np.asarray, {"encoder": model.params["encoder"]})
        tensors = to_layout(tree, "maect_encoder", patch=model.encoder.patch, grid=model.encoder.grid)
        write_weights(folder, tensors, metadata)
        write_config(folder, _encoder_settings(model))

    def usage(self, model: Model) -> str:
        return _usage(model, f"model = {timm.creation_of(model, no_embed_class=True)}.eval()")

    def outputs(
        self, model: Model, folder: Path, images_bchw: np.ndarray, noise_bn: np.ndarray
    ) -> dict[str, np.ndarray]:
        torch, module = load_library("torch"), timm.empty_module(model, no_embed_class=True)
        timm.load_strictly(module, timm.read_file(folder))
        with torch.inference_mode():
            found = timm.encode(module, torch.from_numpy(images_bchw), head=False)
        return {name: x.numpy() for name, x in found.items()}


def _encoder_settings(model: Model) -> dict[str, Any]:
    """What the tensors do not tell, and what they do, by the names of the official code's arguments."""
    encoder = model.encoder
    return {
        "img_size": model.image_size,
        "patch_size": encoder.patch,
        "in_chans": model.channels,
        "embed_dim": encoder.width,
        "depth": encoder.depth,
        "num_heads": encoder.heads,
        "mlp_ratio": encoder.mlp_ratio,
        "num_classes": timm.classes_of(model),
        "pooling": model.pooling,
    }


def _decoder_settings(model: Model) -> dict[str, Any]:
    decoder = model.decoder
    known = {} if model.normalised_pixels is None else {"norm_pix_loss": model.normalised_pixels}
    return {
        "decoder_embed_dim": decoder.width,
        "decoder_depth": decoder.depth,
        "decoder_num_heads": decoder.heads,
        "mask_ratio": model.mask_ratio,
        **known,
    }


def _usage(model: Model, *lines: str) -> str:
    """`lines` make timm's `model`; of its own settings for the pictures none are right."""
    size = (model.channels, model.image_size, model.image_size)
    loads = "from safetensors.torch import load_file\n" if any("load_file" in line for line in lines) else ""
    return "\n".join(
        (
            f"import timm\nfrom PIL import Image\n{loads}",
            *lines,
            "transform = timm.data.create_transform(",
            f'    {size}, interpolation="bicubic", crop_pct={timm.crop_pct(model)}, mean={model.mean}, std={model.std}',
            ")",
            timm.usage_on_picture(model),
        )
    )


def _add_decoder(module: Any, model: Model) -> None:
    """Adds the official decoder, without memory for its tensors, to timm's encoder: their names stand side by side."""
    torch, vit = load_library("torch"), load_library("timm.models.vision_transformer")
    nn, decoder, width = torch.nn, model.decoder, model.decoder.width
    norm = partial(nn.LayerNorm, eps=1e-6)
    with torch.device("meta"):
        module.mask_token = nn.Parameter(torch.empty(1, 1, width))
        module.decoder_pos_embed = nn.Parameter(torch.empty(1, 1 + decoder.grid**2, width))
        module.decoder_embed = nn.Linear(model.encoder.width, width)
        shape = dict(dim=width, num_heads=decoder.heads, mlp_ratio=decoder.mlp_ratio, qkv_bias=True, norm_layer=norm)
        module.decoder_blocks = nn.Sequential(*(vit.Block(**shape) for _ in range(decoder.depth)))
        module.decoder_norm = norm(width)
        module.decoder_pred = nn.Linear(width, decoder.values)


def _reconstruct(module: Any, model: Model, images_bchw: Any, noise_bn: Any) -> dict[str, Any]:
    """Predictions of all patches and the loss, tokens in the order of the picture; MAE (He et al. 2022), section 3."""
    torch = load_library("torch")
    (b, n), keep = noise_bn.shape, patches_to_keep(noise_bn.shape[1], model.mask_ratio)
    shuffle_bn = noise_bn.argsort(dim=1)
    restore_bn = shuffle_bn.argsort(dim=1)

    def rows(x_bnd, index_bl):
        return x_bnd.gather(1, index_bl[..., None].expand(-1, -1, x_bnd.shape[2]))

    visible_bld = rows(module.patch_embed(images_bchw) + module.pos_embed[:, 1:], shuffle_bn[:, :keep])
    class_b1d = (module.cls_token + module.pos_embed[:, :1]).expand(b, -1, -1)
    x = module.norm(module.blocks(torch.cat([class_b1d, visible_bld], dim=1)))
    x = module.decoder_embed(x)
    patches_bnd = rows(torch.cat([x[:, 1:], module.mask_token.expand(b, n - keep, -1)], dim=1), restore_bn)
    x = torch.cat([x[:, :1], patches_bnd], dim=1) + module.decoder_pos_embed
    predictions_bnp = module.decoder_pred(module.decoder_norm(module.decoder_blocks(x)))[:, 1:]

    patch, grid = model.encoder.patch, model.encoder.grid
    pixels = images_bchw.reshape(b, model.channels, grid, patch, grid, patch)
    targets_bnp = pixels.permute(0, 2, 4, 3, 5, 1).reshape(b, n, -1)
    if model.normalised_pixels:
        variance_bn1, mean_bn1 = torch.var_mean(targets_bnp, dim=2, correction=1, keepdim=True)
        targets_bnp = (targets_bnp - mean_bn1) / (variance_bn1 + 1e-6).sqrt()
    removed_bn = (restore_bn >= keep).float()
    error_bn = (predictions_bnp - targets_bnp).square().mean(dim=2)
    return {"predictions": predictions_bnp, "loss": (error_bn * removed_bn).sum() / removed_bn.sum()}


MAE = Mae()
MAECT = MaeCt()
