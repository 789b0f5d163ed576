"""Linear probes trained from pictures, a new crop and flip of each in every epoch, as they are published.

One jitted step crops and flips a batch, encodes it with the frozen encoder and updates all heads of the grid. Held-out
and test rows are measured on features of the whole, un-augmented picture that are at hand already, as they are for the
probe on cached features; only the training differs.

Sources: MAE (He et al. 2022), appendix A.2; MAE-CT (Lehner et al. 2023), released recipe.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from maect_jax.data.batches.training import training_batches
from maect_jax.data.device.augment import make_views
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.subset import SubsetSource
from maect_jax.evaluation.features import elementary, forward
from maect_jax.evaluation.probes.linear import first_state
from maect_jax.evaluation.probes.linear_heads import LinearPreset, probe_step
from maect_jax.evaluation.probes.linear_selection import (
    LinearResult,
    MeasuredRows,
    Probes,
    check_features,
    choose,
    default_mesh,
)
from maect_jax.evaluation.rows import hold_out
from maect_jax.models.vit import ViT
from maect_jax.parallel.mesh import batch_sharding, replicated

CROP_SCALE = (0.08, 1.0)  # share of the picture's area
CHUNK = 256  # pictures a device encodes at a time: batches of probes are large


def evaluate_linear_images(
    encoder: ViT,
    params: dict,
    source: Source,
    train: dict[str, np.ndarray],
    test: dict[str, np.ndarray],
    test_labels,
    classes: int,
    *,
    preset: LinearPreset,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop_scale: tuple[float, float] = CROP_SCALE,
    epochs: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    workers: int = 0,
    resident_limit: int = 2 << 30,
    check: Callable[[], None] = lambda: None,
) -> LinearResult:
    """Trains on augmented pictures of nine tenths of the train rows; otherwise as `linear.evaluate_linear`.

    Args:
      encoder, params: the frozen encoder.
      source: labelled train pictures; picture i is row i of `train`.
      train, test, test_labels, classes: features of whole pictures, as for `linear.evaluate_linear`; of the train rows
        only the held-out tenth is used.
      preset: without 'configured', see `LinearPreset.on`. The batch becomes a multiple of the number of devices.
      mean, std: of the encoder's training data, a channel, for values in 0..1.
      crop_scale: range of the crop's share of the picture.
      epochs, batch, seed, mesh: as there.
      workers, resident_limit: of the loader, see `data.batches.training`.
      check: called before every update; may raise to stop.

    Raises:
      ConfigError, DataError: as there; a picture that can not be decoded; fewer kept pictures than devices.
    """
    train, labels = check_features("train", train, source.labels, classes, preset)
    test, test_labels = check_features("test", test, test_labels, classes, preset)
    kept, held_out = hold_out(labels, seed)
    mesh = default_mesh(mesh)
    preset = preset.fit(kept.size, epochs, batch, multiple=mesh.size)
    training = train_epochs(
        encoder,
        params,
        SubsetSource(source, kept),
        classes,
        preset,
        mean=mean,
        std=std,
        crop_scale=crop_scale,
        seed=seed,
        mesh=mesh,
        workers=workers,
        resident_limit=resident_limit,
        check=check,
    )
    low, high = crop_scale
    with contextlib.closing(training):
        return choose(
            training,
            preset,
            MeasuredRows(mesh, {name: x[held_out] for name, x in train.items()}, labels[held_out]),
            MeasuredRows(mesh, test, test_labels),
            check,
            {
                "augmentation": f"random resized crop ({low:g}, {high:g}), flip",
                "train_rows": int(kept.size),
                "seed": seed,
            },
        )


def train_epochs(
    encoder: ViT,
    params: dict,
    source: Source,
    classes: int,
    preset: LinearPreset,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop_scale: tuple[float, float],
    seed: int,
    mesh: Mesh,
    workers: int,
    resident_limit: int,
    check: Callable[[], None],
) -> Iterator[tuple[Probes, np.ndarray]]:
    """Trains on all pictures of `source`; arguments as in `evaluate_linear_images`, `preset` after `fit`.

    Yields:
      feature -> its heads after the epoch, and their mean train loss over it, nats [features, heads].
    """
    widths = {name: encoder.width * len(elementary(name, encoder.depth)) for name in preset.features}
    state = first_state(preset, widths, classes, seed, mesh)
    batches = training_batches(
        source,
        batch=preset.batch,
        seed=seed,
        start_step=0,
        views=1,
        image_size=encoder.image_size,
        crop_scale=crop_scale,
        sharding=batch_sharding(mesh),
        workers=workers,
        resident_limit=resident_limit,
    )
    crops = _Crops(seed, tuple(crop_scale), tuple(mean), tuple(std), batches.steps_per_epoch)
    step = partial(_step, encoder=encoder, preset=preset, crops=crops, mesh=mesh)
    with contextlib.closing(batches):
        for _ in range(preset.epochs):
            losses = []
            for _ in range(preset.epoch_updates):
                check()
                state, loss_fh = step(state, params, next(batches))
                losses.append(loss_fh)
                if len(losses) > 1:  # one late: the device works on while the host loads, and is never far behind
                    losses[-2] = np.asarray(losses[-2])
            yield state.probes, np.mean(losses, axis=0)


@dataclasses.dataclass(frozen=True)
class _Crops:
    """How pictures are augmented: what `make_views` needs beside the batch."""

    seed: int
    scale: tuple[float, float]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    steps_per_epoch: int

    def view(self, batch: dict[str, jax.Array], step: jax.Array, size: int) -> jax.Array:
        """The one view of each picture in that update, float32 [batch, size, size, channels]."""
        return make_views(
            batch,
            seed=self.seed,
            epoch=step // self.steps_per_epoch,
            views=1,
            size=size,
            scale=self.scale,
            augmentation="minimal",
            mean=self.mean,
            std=self.std,
        )[0]


@partial(jax.jit, static_argnames=("encoder", "preset", "crops", "mesh"))
def _step(state, params, batch, *, encoder: ViT, preset: LinearPreset, crops: _Crops, mesh: Mesh):
    """Crops, encodes, updates all heads: the new state and the losses [features, heads] before it."""
    features = _encode(params, batch, state.step, encoder, preset.features, crops, mesh)
    state, loss_fh = probe_step(state, features, batch["label"], preset)
    return jax.lax.with_sharding_constraint((state, loss_fh), replicated(mesh))


def _encode(params, batch, step, encoder: ViT, names: tuple[str, ...], crops: _Crops, mesh: Mesh):
    """Feature -> float32 [batch, width] of the batch's augmented pictures, split over the devices as the batch is.

    Each device encodes its own pictures, at most CHUNK of them at a time, so that memory does not grow with the batch.
    """
    parts = {name: elementary(name, encoder.depth) for name in names}
    needed = tuple(dict.fromkeys(part for found in parts.values() for part in found))
    by_rows = PartitionSpec(mesh.axis_names)

    @partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), by_rows, PartitionSpec()), out_specs=by_rows)
    def encode(params, batch, step):
        rows = batch["id"].shape[0]
        chunks = -(-rows // CHUNK)
        chunk = -(-rows // chunks)

        def split(x: jax.Array) -> jax.Array:
            padded = jnp.pad(x, [(0, chunks * chunk - rows)] + [(0, 0)] * (x.ndim - 1))
            return padded.reshape(chunks, chunk, *x.shape[1:])

        def encode_chunk(pictures):
            return forward(encoder, needed, params, crops.view(pictures, step, encoder.image_size))

        found = jax.lax.map(encode_chunk, {key: split(batch[key]) for key in ("image", "id")})
        return {part: x.reshape(chunks * chunk, -1)[:rows] for part, x in found.items()}

    found = encode(params, {key: batch[key] for key in ("image", "id")}, step)
    return {name: jnp.concatenate([found[part] for part in parts[name]], axis=1) for name in names}
