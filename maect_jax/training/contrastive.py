"""The step of stages 2 and 3: contrastive learning with neighbours from a support queue.

Source: MAE-CT (Lehner et al. 2023), section 4 and released recipes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from maect_jax.models.nnclr import Predictor, Projector
from maect_jax.models.patches import patchify
from maect_jax.models.vit import ViT, pool
from maect_jax.neighbors.queue import age_in_updates, enqueue, find_neighbors
from maect_jax.objectives.nnclr import nnclr_loss, unit
from maect_jax.randomness import sample_keys
from maect_jax.training import optimizer
from maect_jax.training.state import TrainState, merge
from maect_jax.training.steps import Clock, Step, apply_gradients, finish, join_views


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
        patches = patchify(join_views(views_vbhwc), encoder.patch)
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
