"""Proof of an export: the written files, run by the library they are for, give what our model gives."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.errors import CheckpointError
from maect_jax.exchange.export.target import Target
from maect_jax.exchange.model import Model
from maect_jax.models.mae import MaskedAutoencoder
from maect_jax.models.patches import gather_rows, patchify
from maect_jax.models.vit import layer_norm, pool
from maect_jax.objectives.mae import pixel_targets, reconstruction_loss
from maect_jax.objectives.masking import patches_to_keep, shuffle

TOLERANCE = 1e-5  # largest relative difference that rounding in float32 explains


@dataclass(frozen=True)
class Proof:
    """How far the library's outputs are from ours.

    Attributes:
      differences: largest absolute difference over largest absolute value, an output; None = not checked.
      reason: why it was not checked; else ''.
    """

    differences: dict[str, float] | None
    reason: str = ""


def pictures(model: Model, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Fixed pictures [count, channels, size, size] in the range of normalised ones, and noise [count, patches].

    Both follow from the shape alone. The pictures hold slow waves and noise from pixel to pixel; no two noises of a
    picture are equal, so that every library keeps the same patches.
    """
    random = np.random.RandomState(0)  # its stream is the same in every version of NumPy
    size, patches = model.image_size, model.encoder.grid**2
    place = np.arange(size) / size
    cycles, phase = random.uniform(0.5, 4, (2, 2, count, model.channels, 1))
    rows, columns = np.cos(2 * np.pi * (cycles * place + phase))
    waves_bchw = rows[..., :, None] * columns[..., None, :]
    images_bchw = 1.2 * waves_bchw + random.uniform(-0.8, 0.8, waves_bchw.shape)
    noise_bn = np.stack([random.permutation(patches) for _ in range(count)]) / patches
    return images_bchw.astype(np.float32), noise_bn.astype(np.float32)


def ours(model: Model, images_bchw: np.ndarray, noise_bn: np.ndarray) -> dict[str, np.ndarray]:
    """What our modules compute, at full precision: every output of `Target.outputs` that the model has."""

    def compute(params, images_bchw, noise_bn):
        patches_bnp = patchify(images_bchw.transpose(0, 2, 3, 1), model.encoder.patch)
        tokens_bnd = model.encoder.apply({"params": params["encoder"]}, patches_bnp)
        vector_bd = pool(tokens_bnd, model.pooling)
        if "fc_norm" in params:
            vector_bd = layer_norm(jnp.float32, None).apply({"params": params["fc_norm"]}, vector_bd)
        found = {"tokens": tokens_bnd, "features": vector_bd}
        if model.has_head:
            found["logits"] = vector_bd @ params["head"]["kernel"] + params["head"]["bias"]
        return found | (reconstruct(params, patches_bnp, shuffle(noise_bn)) if model.decoder else {})

    def reconstruct(params, patches_bnp, shuffle_bn):
        keep = patches_to_keep(shuffle_bn.shape[1], model.mask_ratio)
        both = {name: params[name] for name in ("encoder", "decoder")}
        autoencoder = MaskedAutoencoder(model.encoder, model.decoder)
        visible_blp = gather_rows(patches_bnp, shuffle_bn[:, :keep])
        predictions_bnp, _ = autoencoder.apply({"params": both}, visible_blp, shuffle_bn, only_removed=False)
        targets_bnp = gather_rows(pixel_targets(patches_bnp, bool(model.normalised_pixels)), shuffle_bn)
        return {
            "predictions": gather_rows(predictions_bnp, jnp.argsort(shuffle_bn, axis=1)),
            "loss": reconstruction_loss(predictions_bnp[:, keep:], targets_bnp[:, keep:]),
        }

    with jax.default_matmul_precision("highest"):
        return {name: np.asarray(x) for name, x in jax.jit(compute)(model.params, images_bchw, noise_bn).items()}


def compare(target: Target, model: Model, folder: Path) -> Proof:
    """Runs a written folder by its library and our model on the same pictures.

    Raises:
      CheckpointError: the library does not take the files, or its outputs have other shapes.
    """
    images_bchw, noise_bn = pictures(model)
    try:
        theirs = target.outputs(model, folder, images_bchw, noise_bn)
    except ImportError as error:
        return Proof(None, " ".join(str(error).split()))
    expected = ours(model, images_bchw, noise_bn)
    for name, found in theirs.items():
        if found.shape != expected[name].shape:
            raise CheckpointError(
                f"{target.loader}: {name} of {folder} have the shape {found.shape}, not {expected[name].shape}"
            )
    return Proof({name: difference(expected[name], found) for name, found in theirs.items()})


def difference(found: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference over the reference's largest absolute value; not a number where one of them is."""
    found, reference = np.asarray(found, np.float64), np.asarray(reference, np.float64)
    return float(np.abs(found - reference).max() / np.abs(reference).max())
