"""The encoders that a path stands for: a run, one of its stages or checkpoints, or a file in somebody's layout."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import yaml
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maect_jax import assemble, handover
from maect_jax.config import TRAINED, default
from maect_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD
from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.evaluation.task import Weights
from maect_jax.exchange.files import open_encoder
from maect_jax.models.vit import ViT
from maect_jax.training.checkpoint import absolute

RAW = "tune, raw"  # the tuned encoder itself, beside its moving average


@dataclass(frozen=True)
class Instead:
    """What is to be taken instead of what the weights themselves say; None = as they say.

    Attributes:
      pooling: 'cls' or 'mean', the feature that stands for a picture.
      image_size: side of the pictures in pixels.
      resize_ratio: shorter side over picture size, before the central crop.
      dtype: type of the encoder's computation, 'bfloat16' or 'float32'.
      heads: attention heads of an encoder in a file whose width does not tell them.
    """

    pooling: str | None = None
    image_size: int | None = None
    resize_ratio: float | None = None
    dtype: str | None = None
    heads: int | None = None


def open_weights(path: str, mesh: Mesh, instead: Instead = Instead()) -> list[Weights]:
    """The encoders at `path`.

    Args:
      path: a work folder (every complete stage), a stage's folder, a checkpoint's folder, a weights file (see
        `exchange.files.open_encoder`), or a folder with one `model.safetensors`.
      mesh: devices that the parameters are put on.
      instead: of what the weights say.

    Raises:
      ConfigError: nothing there. CheckpointError: nothing complete there, or it can not be read.
    """
    root = absolute(path)
    if not root.exists():
        raise ConfigError(f"--weights: nothing at '{path}'; give a work folder, a stage in it, or a weights file")
    if not root.is_dir():
        return [_of_file(root, path, instead)]
    run = run_folder(path)
    if run is None and (root / "model.safetensors").exists():
        return [_of_file(root / "model.safetensors", path, instead)]
    if run is None:
        raise CheckpointError(
            f"--weights: '{path}' is neither a work folder (config.resolved.yaml), a stage or checkpoint in one, nor a "
            "folder with model.safetensors"
        )
    config = run_settings(run)
    if instead.heads:
        raise ConfigError(f"--heads: '{path}' is a run, which knows its heads; leave it out")
    for section, key in ((config.model, "pooling"), (config.model, "image_size"), (config.model, "dtype")):
        section[key] = getattr(instead, key) or section[key]
    config.data.resize_ratio = instead.resize_ratio or config.data.resize_ratio
    if config.model.image_size % config.model.patch:
        raise ConfigError(
            f"--image-size {config.model.image_size}: must be a multiple of the patch, {config.model.patch}"
        )
    if root == run:
        found = of_run(config, root, mesh, path)
        if not found:
            raise CheckpointError(f"--weights: '{path}' has no complete stage to evaluate; continue its training first")
        return found
    if root.parent == run:
        if not (root / "DONE.json").exists():
            raise CheckpointError(
                f"--weights: the stage '{path}' is not complete; continue its training, or give a checkpoint in it, "
                f"{root / 'checkpoints'}/<step>"
            )
        return of_stage(config, root, mesh, path)
    stage, step = root.parent.parent.name, int(root.name)
    found = _of_parts(config, stage, step, path, lambda: handover.read_step(root, mesh))
    return [dataclasses.replace(weights, stage=f"{weights.stage} @ {step}") for weights in found]


def run_folder(path: str) -> epath.Path | None:
    """The work folder that a path stands in: a run, a stage of it, or a stage's checkpoint; None for anything else."""
    root = absolute(path)
    folders = [root]
    if root.name in TRAINED:
        folders.append(root.parent)
    if root.name.isdigit() and root.parent.name == "checkpoints":
        folders.append(root.parent.parent.parent)
    return next((folder for folder in folders if (folder / "config.resolved.yaml").exists()), None)


def run_settings(root: epath.Path) -> ConfigDict:
    """The settings the run in `root` was trained with.

    Raises:
      CheckpointError: they are missing or damaged.
    """
    path = root / "config.resolved.yaml"
    try:
        config = default()
        config.update(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: can not be read ({error}); it says which model the run trained") from None
    return config


def of_run(config: ConfigDict, workdir: epath.Path, mesh: Mesh, source: str) -> list[Weights]:
    """The encoders of every complete stage of a run; the pre-training may lie in the run it started from."""
    folders = handover.evaluated_folders(config, workdir)
    return [weights for folder in folders.values() for weights in of_stage(config, folder, mesh, source)]


def of_stage(config: ConfigDict, folder: epath.Path, mesh: Mesh, source: str) -> list[Weights]:
    """The encoder of a complete stage; after tuning also the raw one beside its moving average."""
    step = handover.read_done(folder)["step"]
    return _of_parts(config, folder.name, step, source, lambda: handover.read_stage(folder, mesh)[0])


def _of_parts(config: ConfigDict, stage: str, step: int, source: str, read: Callable[[], dict]) -> list[Weights]:
    encoder = assemble.build_encoder(config)
    origin = {"source": source, "stage": stage, "step": step}
    averaged = f"exponential, {config.tune.ema_factor}"

    def weights(name: str, average: str, load: Callable[[], dict]) -> Weights:
        return Weights(
            stage=name,
            encoder=encoder,
            load=load,
            pooling=config.model.pooling,
            mean=config.data.mean,
            std=config.data.std,
            resize_ratio=config.data.resize_ratio,
            channels=config.model.channels,
            seed=config.seed,
            origin=origin | {"average": average},
        )

    found = [weights(stage, averaged if stage == "tune" else "none", lambda: handover.encoder_of(read()))]
    if stage == "tune":
        found.append(weights(RAW, "none", lambda: handover.raw_encoder_of(read())))
    return found


def _of_file(file: epath.Path, source: str, instead: Instead) -> Weights:
    """An encoder from others; its class token, but the patch mean for MAE-CT's B/16 (published so)."""
    opened = open_encoder(file, image_size=instead.image_size, heads=instead.heads)
    dtype = jnp.dtype(instead.dtype or "bfloat16")
    encoder = ViT(opened.width, opened.depth, opened.heads, opened.patch, opened.image_size, dtype=dtype)
    of_maect_base = opened.layout == "maect_encoder" and opened.width == 768
    return Weights(
        stage=file.stem if file.stem != "model" else file.parent.name,
        encoder=encoder,
        load=lambda: opened.params,
        pooling=instead.pooling or ("mean" if of_maect_base else "cls"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resize_ratio=instead.resize_ratio or 256 / 224,
        channels=opened.channels,
        seed=0,
        origin={"source": source, "stage": "file", "layout": opened.layout, "file_sha256": opened.sha256},
    )
