"""The three train steps: pure functions (state, batch) -> (state, metrics, embedding).

A batch is {'image': uint8, 'id': int32 [batch], 'label': int32 [batch]}; see `device.augment.make_views`. Metrics are
device scalars, read by the loop one step late; the embedding [batch, width] feeds the health figures.

Source: MAE (He et al. 2022) for stage 1; MAE-CT (Lehner et al. 2023) for stages 2 and 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from maect_jax.models.mae import MaskedAutoencoder
from maect_jax.models.nnclr import Predictor, Projector
from maect_jax.models.patches import gather_rows, patchify
from maect_jax.models.vit import ViT, pool
from maect_jax.neighbors.queue import age_in_updates, enqueue, find_neighbors
from maect_jax.objectives.mae import pixel_targets, reconstruction_loss
from maect_jax.objectives.masking import mask_noise, patches_to_keep, shuffle
from maect_jax.objectives.nnclr import nnclr_loss, unit
from maect_jax.randomness import sample_keys
from maect_jax.training import optimizer
from maect_jax.training.schedule import learning_rate_factor
from maect_jax.training.state import TrainState, keep_if_finite, merge

Step = Callable[[TrainState, dict], tuple[TrainState, dict, jax.Array]]


@dataclass(frozen=True)
class Clock:
    """Lengths of a stage in updates: total, warm-up, and updates an epoch; and the stage's seed."""

    updates: int
    warmup: int
    updates_per_epoch: int
    seed: int

    def factor(self, step: jax.Array) -> jax.Array:
        return learning_rate_factor(step, self.updates, self.warmup)

    def epoch(self, step: jax.Array) -> jax.Array:
        return step // self.updates_per_epoch


def _join_views(x_vb: jax.Array) -> jax.Array:
    """[views, batch, ...] -> [batch * views, ...], the views of a picture side by side.

    With the views outside, the joined axis could not stay split over the devices: the compiler would gather all
    pictures on each of them.
    """
    return x_vb.swapaxes(0, 1).reshape(-1, *x_vb.shape[2:])


def apply_gradients(
    state: TrainState,
    gradients: dict,
    groups: dict[str, optimizer.Group],
    depth: int,
    clock: Clock,
    betas: tuple[float, float] = optimizer.BETAS,
) -> tuple[dict, Any, dict]:
    """New parameters, new moments, and the metrics that every stage shares."""
    peaks, decays = optimizer.plan(state.params, groups, depth)
    factor = clock.factor(state.step)
    params, moments = optimizer.update(gradients, state.moments, state.params, peaks, decays, factor, betas)
    learning_rate = factor * max(group.peak for group in groups.values())
    metrics = {"gradient_norm": optax.tree.norm(gradients), "parameter_norm": optax.tree.norm(params)}
    return params, moments, metrics | {"learning_rate": learning_rate}


def finish(old: TrainState, new: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    """Guard against a non-finite loss, gradient or update, which must change nothing but the clocks."""
    finite = jnp.isfinite(jnp.stack([metrics[name] for name in ("loss", "gradient_norm", "parameter_norm")])).all()
    state = keep_if_finite(finite, old, new)
    return state, metrics | {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}


def make_pretrain_step(
    model: MaskedAutoencoder,
    views_of: Callable[[dict, jax.Array], jax.Array],
    *,
    clock: Clock,
    groups: dict[str, optimizer.Group],
    mask_ratio: float,
    normalise_pixels: bool,
    accumulate: int = 1,
) -> Step:
    """Stage 1: masked autoencoding.

    Args:
      model: encoder and decoder.
      views_of: (batch, epoch) -> normalised views [views, batch, h, w, c].
      clock, groups: schedule; optimiser settings for 'encoder' and 'decoder'.
      mask_ratio: share of removed patches.
      normalise_pixels: predict patches with zero mean and unit variance.
      accumulate: split the batch in as many parts, one after the other; must divide the batch. The loss and gradient
        are those of the whole batch, because each part has the same number of removed patches.
    """
    encoder = model.encoder
    patches = encoder.grid**2
    keep = patches_to_keep(patches, mask_ratio)

    def loss_of(params, images_bhwc, keys_b):
        shuffle_bn = shuffle(mask_noise(keys_b, patches))
        patches_bnp = patchify(images_bhwc, encoder.patch)
        prediction_bmp, tokens_bld = model.apply({"params": params}, patches_bnp, shuffle_bn, keep)
        target_bmp = gather_rows(pixel_targets(patches_bnp, normalise_pixels), shuffle_bn[:, keep:])
        return reconstruction_loss(prediction_bmp, target_bmp), pool(tokens_bld, "mean")

    def part_of(state, batch):
        epoch = clock.epoch(state.step)
        views_vbhwc = views_of(batch, epoch)
        v, b, *_ = views_vbhwc.shape
        keys_vb = jnp.stack([sample_keys(clock.seed, "mask", epoch, batch["id"], view) for view in range(v)])
        (loss, embedding), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, _join_views(views_vbhwc), _join_views(keys_vb)
        )
        return (loss, embedding.reshape(b, v, -1)[:, 0]), gradients

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict, jax.Array]:
        if accumulate == 1:
            (loss, embedding_bd), gradients = part_of(state, batch)
        else:
            # Every accumulate-th picture goes to one part, so that each device keeps working on pictures it holds.
            parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)
            zeros = jax.tree.map(jnp.zeros_like, state.params)

            def add(total, part):
                (loss, embedding_bd), gradients = part_of(state, part)
                return jax.tree.map(jnp.add, total, (loss, gradients)), embedding_bd

            total, embeddings = jax.lax.scan(add, (jnp.float32(0), zeros), parts)
            loss, gradients = jax.tree.map(lambda x: x / accumulate, total)
            embedding_bd = embeddings.swapaxes(0, 1).reshape(-1, embeddings.shape[-1])
        params, moments, metrics = apply_gradients(state, gradients, groups, encoder.depth, clock)
        state, metrics = finish(state, state.replace(params=params, moments=moments), metrics | {"loss": loss})
        return state, metrics, embedding_bd

    return step


def make_contrastive_step(
    encoder: ViT,
    projector: Projector,
    predictor: Predictor,
    views_of: Callable[[dict, jax.Array], jax.Array],
    *,
    mesh: Mesh,
    clock: Clock,
    groups: dict[str, optimizer.Group],
    pooling: str,
    temperature: float,
    top_k: int,
    target_factor: float | None = None,
    ema_factor: float | None = None,
) -> Step:
    """Stages 2 and 3: NNCLR on the pooled tokens of the whole picture.

    Stage 2 trains the head on a frozen encoder (`state.frozen` holds all of it). Stage 3 (`target_factor` given) also
    trains the upper blocks: `encoder.frozen` blocks and the stem stay in `state.frozen`; targets come from the EMA
    projector.

    Args:
      views_of: (batch, epoch) -> two normalised views [2, batch, h, w, c].
      mesh: devices, for the neighbour search.
      groups: optimiser settings for 'projector', 'predictor' and, in stage 3, 'encoder'.
      pooling: 'cls' or 'mean'.
      temperature: of the loss.
      top_k: a target's neighbour is picked among this many nearest rows of the queue.
      target_factor: EMA factor of the target projector; None: the projector itself gives the targets.
      ema_factor: EMA factor of the trained encoder parameters.
    """

    def views_features(params, frozen, views_vbhwc):
        v, b, *_ = views_vbhwc.shape
        patches = patchify(_join_views(views_vbhwc), encoder.patch)
        tokens = encoder.apply({"params": merge(frozen, params)["encoder"]}, patches)
        return pool(tokens, pooling).reshape(b, v, -1)

    def head(params, batch_stats, name, module, x):
        variables = {"params": params[name], "batch_stats": batch_stats[name]}
        y, new = module.apply(variables, x, train=True, mutable=["batch_stats"])
        return y, batch_stats | {name: new["batch_stats"]}

    def target_of(state, features_bd, embedding_be):
        if target_factor is None:
            target = embedding_be
        else:  # in training mode, as the reference: batch statistics; its running ones are copied after the update
            target, _ = projector.apply(state.target, features_bd, train=True, mutable=["batch_stats"])
        return jax.lax.stop_gradient(unit(target))

    def loss_of(params, state, batch, epoch):
        features_bvd = views_features(params, state.frozen, views_of(batch, epoch))
        stats, predictions, targets, neighbors = state.batch_stats, [], [], []
        for view in (0, 1):
            embedding, stats = head(params, stats, "projector", projector, features_bvd[:, view])
            prediction, stats = head(params, stats, "predictor", predictor, embedding)
            target = target_of(state, features_bvd[:, view], embedding)
            keys_b = sample_keys(clock.seed, "neighbor", epoch, batch["id"], view)
            predictions.append(prediction)
            targets.append(target)
            neighbors.append(find_neighbors(mesh, state.queue, target, batch["id"], top_k, keys_b))
        loss = nnclr_loss(tuple(predictions), tuple(n.rows_be for n in neighbors), temperature)
        return loss, (stats, targets, neighbors)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict, jax.Array]:
        epoch = clock.epoch(state.step)
        (loss, (stats, targets, neighbors)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, state, batch, epoch
        )
        params, moments, metrics = apply_gradients(state, gradients, groups, encoder.depth, clock)
        everywhere = jax.sharding.NamedSharding(mesh, PartitionSpec())
        entering = [jax.lax.with_sharding_constraint(x, everywhere) for x in (targets[0], batch["id"], batch["label"])]
        new = state.replace(params=params, moments=moments, batch_stats=stats, queue=enqueue(state.queue, *entering))
        if target_factor is not None:
            averaged = optimizer.moving_average(state.target["params"], params["projector"], target_factor)
            new = new.replace(target={"params": averaged, "batch_stats": stats["projector"]})
        if ema_factor is not None:
            new = new.replace(ema=optimizer.moving_average(state.ema, {"encoder": params["encoder"]}, ema_factor))
        metrics |= {"loss": loss} | _neighbor_metrics(state, batch, neighbors[0])
        state, metrics = finish(state, new, metrics)
        return state, metrics, targets[0]

    return step


def _neighbor_metrics(state: TrainState, batch: dict, neighbors) -> dict:
    """Figures of view 0's neighbours: share of the same class (over rows with a label), similarity, age, use."""
    labelled = (neighbors.label_b >= 0) & (batch["label"] >= 0)
    same = (neighbors.label_b == batch["label"]) & labelled
    size = state.queue.rows_qe.shape[0]
    used = jnp.zeros((size,), jnp.int32).at[neighbors.index_b].set(1).sum()
    b = batch["id"].shape[0]
    return {
        "neighbor_accuracy": same.mean(dtype=jnp.float32),
        "neighbor_similarity": neighbors.similarity_b.mean(),
        "neighbor_distinct": used / b,
        "queue_age": age_in_updates(state.queue, neighbors.index_b, b).mean(dtype=jnp.float32),
    }
