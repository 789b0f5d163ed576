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
from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.evaluation.task import Weights
from maect_jax.exchange.files import open_model
from maect_jax.exchange.model import Model
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
      allow_missing: patterns of parts that a file may lack, such as 'decoder/*'.
    """

    pooling: str | None = None
    image_size: int | None = None
    resize_ratio: float | None = None
    dtype: str | None = None
    heads: int | None = None
    allow_missing: tuple[str, ...] = ()


def open_weights(path: str, mesh: Mesh, instead: Instead = Instead()) -> list[Weights]:
    """The encoders at `path`.

    Args:
      path: a work folder (every complete stage), a stage's folder, a checkpoint's folder, a weights file (see
        `exchange.files.open_model`), or a folder with one `model.safetensors`.
      mesh: devices that the parameters are put on.
      instead: of what the weights say.

    Raises:
      ConfigError: nothing there. CheckpointError: nothing complete there, or it can not be read.
    """
    root = absolute(path)
    if not root.exists():
        raise ConfigError(f"--weights: nothing at '{path}'; give a work folder, a stage in it, or a weights file")
    run = run_folder(path)
    if run is None:
        return [_of_file(root, path, instead)]
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
    """An encoder from others."""
    opened = open_model(file, image_size=instead.image_size, heads=instead.heads, allow_missing=instead.allow_missing)
    model = opened.model
    if model.channels not in (1, 3):
        raise ConfigError(f"--weights: '{source}' takes {model.channels} channels; pictures to evaluate have 1 or 3")
    origin = {"source": source, "stage": "file", "layout": opened.layout, "file_sha256": opened.sha256}
    origin["license"] = model.provenance.license
    return Weights(
        stage=model.name,
        encoder=model.encoder.clone(dtype=jnp.dtype(instead.dtype or "bfloat16")),
        load=lambda: encoder_params(model),
        pooling=instead.pooling or model.pooling,
        mean=model.mean,
        std=model.std,
        resize_ratio=instead.resize_ratio or model.resize_ratio,
        channels=model.channels,
        seed=0,
        origin=origin | ({"notes": list(opened.notes)} if opened.notes else {}),
    )


def encoder_params(model: Model) -> dict:
    """Parameters that features are made with: the encoder's, and `fc_norm` over the mean of its patch tokens."""
    return model.params["encoder"] | {name: model.params[name] for name in ("fc_norm",) if name in model.params}
