"""Weights for `convert`: a run's stage or checkpoint, or anybody's file, as one `Model`."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from maect_jax import assemble, handover
from maect_jax.errors import ConfigError
from maect_jax.exchange.files import open_model
from maect_jax.exchange.model import Model
from maect_jax.results.record import read_records
from maect_jax.trained import Trained, run_folder, run_settings, trained_at
from maect_jax.training.checkpoint import absolute
from maect_jax.weights import Instead, for_grid, settings_with, with_changes


@dataclass(frozen=True)
class Portable:
    """What is to be converted.

    Attributes:
      model: with its decoder, where the weights have one.
      notes: a sentence each on what was done to the weights.
      records: results of the run, as in `results.jsonl`; of any of its weights.
      run: its work folder; None for a file.
      trained: which of its weights; None for a file.
    """

    model: Model
    notes: tuple[str, ...] = ()
    records: tuple[dict, ...] = ()
    run: epath.Path | None = None
    trained: Trained | None = None


def open_portable(
    path: str, mesh: Mesh, instead: Instead, *, raw: bool = False, decoder_heads: int | None = None
) -> Portable:
    """The model at `path`; of a run that of its last complete stage.

    Args:
      path: as `weights.open_weights`.
      mesh: devices that a checkpoint is read on.
      instead: of what the weights say.
      raw: the tuned encoder itself instead of its moving average.
      decoder_heads: attention heads of a decoder in a file whose width does not tell them.

    Raises:
      ConfigError: nothing there, or `raw` where there is no average. CheckpointError: it can not be read.
    """
    if not absolute(path).exists():
        raise ConfigError(f"--weights: nothing at '{path}'; give a work folder, a stage in it, or a weights file")
    run = run_folder(path)
    if run is not None and decoder_heads:
        raise ConfigError(f"--decoder-heads: for weights files; '{path}' is a run, which knows; leave it out")
    if run is not None:
        return _of_run(path, run, mesh, instead, raw)
    if raw:
        raise ConfigError(f"--raw: '{path}' is a file, which holds one encoder; leave it out")
    opened = open_model(
        path,
        image_size=instead.image_size,
        heads=instead.heads,
        decoder_heads=decoder_heads,
        mean=instead.mean,
        std=instead.std,
        allow_missing=instead.allow_missing,
    )
    if decoder_heads and opened.model.decoder is None:
        raise ConfigError(f"--decoder-heads: '{path}' has no decoder; leave it out")
    return Portable(with_changes(opened.model, instead), opened.notes)


def _of_run(path: str, run: epath.Path, mesh: Mesh, instead: Instead, raw: bool) -> Portable:
    config, notes = settings_with(path, run_settings(run), instead)
    trained = trained_at(path, run, config)[-1]
    if raw and trained.stage != "tune":
        raise ConfigError(f"--raw: stage '{trained.stage}' of '{path}' has no moving average; leave it out")
    parts = jax.tree.map(np.asarray, trained.read(mesh))
    choose: Callable[[dict], dict] = handover.raw_encoder_of if raw else handover.encoder_of
    autoencoder = assemble.build_autoencoder(config)
    encoder = autoencoder.encoder.clone(dtype=jnp.float32, remat=False)
    params = {"encoder": jax.tree.map(np.asarray, for_grid(choose(parts), encoder.grid))}
    if "decoder" in parts["params"]:
        params["decoder"] = parts["params"]["decoder"]
    provenance = handover.provenance_of(trained.checkpoint)
    model = Model(
        name=f"{config.name}-{trained.stage}",
        encoder=encoder,
        params=params,
        provenance=replace(provenance, average="none") if raw else provenance,
        decoder=autoencoder.decoder.clone(dtype=jnp.float32, remat=False) if "decoder" in params else None,
        pooling=config.model.pooling,
        channels=config.model.channels,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        resize_ratio=config.data.resize_ratio,
        mask_ratio=config.pretrain.mask_ratio,
        normalised_pixels=config.pretrain.normalise_pixels,
    )
    return Portable(model, notes, tuple(read_records(run / "results.jsonl")), run, trained)


def encoder_only(model: Model) -> Model:
    """The model without decoder and head; `fc_norm`, which features go through, stays."""
    params = {name: part for name, part in model.params.items() if name not in ("decoder", "head")}
    return replace(model, decoder=None, classes=(), params=params)
