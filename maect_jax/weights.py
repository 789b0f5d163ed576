"""The encoders that a path stands for: a run, one of its stages or checkpoints, or a file in somebody's layout."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maect_jax import assemble, foreign, handover
from maect_jax.errors import ConfigError
from maect_jax.evaluation.task import Weights
from maect_jax.exchange.files import open_model
from maect_jax.exchange.model import Model
from maect_jax.exchange.positions import grid_of, resize, resize_note
from maect_jax.exchange.provenance import Provenance
from maect_jax.models.vit import ViT
from maect_jax.trained import Trained, run_folder, run_settings, trained_at
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
      mean, std: a channel, of the pictures of an encoder in a file; for values in 0..1.
      heads: attention heads of an encoder in a file whose width does not tell them.
      allow_missing: patterns of parts that a file may lack, such as 'decoder/*'.
    """

    pooling: str | None = None
    image_size: int | None = None
    resize_ratio: float | None = None
    dtype: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
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
    config, notes = settings_with(path, run_settings(run), instead)
    found = trained_at(path, run, config)
    return [weights for trained in found for weights in of_trained(config, trained, mesh, path, notes)]


def settings_with(path: str, config: ConfigDict, instead: Instead) -> tuple[ConfigDict, tuple[str, ...]]:
    """A run's settings with what is to be taken instead, and a sentence each on what that does to the weights.

    Raises:
      ConfigError: something can not be taken instead.
    """
    for name in ("heads", "mean", "std", "allow_missing"):
        if getattr(instead, name):
            option = name.replace("_", "-")
            raise ConfigError(f"--{option}: for weights files; '{path}' is a run, which knows; leave it out")
    grid = config.model.image_size // config.model.patch
    for section, key in ((config.model, "pooling"), (config.model, "image_size"), (config.model, "dtype")):
        section[key] = getattr(instead, key) or section[key]
    config.data.resize_ratio = instead.resize_ratio or config.data.resize_ratio
    if config.model.image_size % config.model.patch:
        raise ConfigError(
            f"--image-size {config.model.image_size}: must be a multiple of the patch, {config.model.patch}"
        )
    new = config.model.image_size // config.model.patch
    return config, (resize_note(grid, new),) if new != grid and config.model.positions == "learned" else ()


def of_trained(
    config: ConfigDict, trained: Trained, mesh: Mesh, source: str, notes: tuple[str, ...] = ()
) -> list[Weights]:
    """The encoder of a stage or checkpoint; after tuning also the raw one beside its moving average."""
    encoder = assemble.build_encoder(config)
    origin = {"source": source, "stage": trained.stage, "step": trained.step}
    origin |= {"notes": list(notes)} if notes else {}
    provenance = handover.provenance_of(trained.checkpoint)
    tuned = trained.stage == "tune"
    averaged = f"exponential, {config.tune.ema_factor}" if tuned else "none"

    def weights(name: str, average: str, choose: Callable[[dict], dict]) -> Weights:
        about = origin | {"average": average, "license": provenance.license}

        def load() -> dict:
            return for_grid(choose(trained.read(mesh)), encoder.grid)

        return _in_run(config, name, encoder, load, about, replace(provenance, average=average))

    found = [weights(trained.name, averaged, handover.encoder_of)]
    if tuned:
        name = RAW if trained.complete else trained.name.replace(trained.stage, RAW, 1)
        found.append(weights(name, "none", handover.raw_encoder_of))
    return found


def for_grid(encoder: dict, grid: int) -> dict:
    """Encoder parameters for so many patches a side: learned positions are resized, see `exchange.positions`."""
    table = encoder.get("pos_embed")
    if table is None or grid_of(table) == grid:
        return encoder
    return encoder | {"pos_embed": resize(np.asarray(table), grid)}


def _of_file(file: epath.Path, source: str, instead: Instead) -> Weights:
    """An encoder from others."""
    opened = open_model(
        file,
        image_size=instead.image_size,
        heads=instead.heads,
        mean=instead.mean,
        std=instead.std,
        allow_missing=instead.allow_missing,
    )
    model = with_changes(opened.model, instead)
    if model.channels not in (1, 3):
        raise ConfigError(f"--weights: '{source}' takes {model.channels} channels; pictures to evaluate have 1 or 3")
    origin = {"source": source, "stage": "file", "layout": opened.layout, "file_sha256": opened.sha256}
    origin["license"] = model.provenance.license
    return Weights(
        stage=model.name,
        encoder=model.encoder.clone(dtype=jnp.dtype(instead.dtype or "bfloat16")),
        load=lambda: encoder_params(model),
        pooling=model.pooling,
        mean=model.mean,
        std=model.std,
        resize_ratio=model.resize_ratio,
        channels=model.channels,
        seed=0,
        origin=origin | ({"notes": list(opened.notes)} if opened.notes else {}),
        provenance=model.provenance,
    )


def with_changes(model: Model, instead: Instead) -> Model:
    """A file's model with what is to be taken instead of what it says; all else is in it already."""
    given = {name: getattr(instead, name) for name in ("pooling", "resize_ratio")}
    return replace(model, **{name: value for name, value in given.items() if value is not None})


def of_initial(config: ConfigDict) -> Weights:
    """The weights file that a run starts from, in the place of the pre-training that it stands for."""
    opened = foreign.open_initial(config)
    params = foreign.sources_of(config, "head", opened)["encoder"]
    origin = {"source": opened.model.name, "stage": "pretrain", "layout": opened.layout, "file_sha256": opened.sha256}
    origin |= {"license": opened.model.provenance.license, "average": "none"}
    encoder = assemble.build_encoder(config)
    return _in_run(config, "pretrain", encoder, lambda: params, origin, opened.model.provenance)


def _in_run(
    config: ConfigDict, stage: str, encoder: ViT, load: Callable[[], dict], origin: dict, provenance: Provenance
) -> Weights:
    """Weights whose pictures are prepared as the run's settings say."""
    return Weights(
        stage=stage,
        encoder=encoder,
        load=load,
        pooling=config.model.pooling,
        mean=config.data.mean,
        std=config.data.std,
        resize_ratio=config.data.resize_ratio,
        channels=config.model.channels,
        seed=config.seed,
        origin=origin,
        provenance=provenance,
    )


def encoder_params(model: Model) -> dict:
    """Parameters that features are made with: the encoder's, and `fc_norm` over the mean of its patch tokens."""
    return model.params["encoder"] | {name: model.params[name] for name in ("fc_norm",) if name in model.params}
