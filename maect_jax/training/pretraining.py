"""The step of stage 1: masked autoencoding of pictures in one part (MAE) or several (EMAE, disjoint masks).

Source: MAE (He et al. 2022), section 3; EMAE (Li et al. 2023), section 3.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from maect_jax.models.mae import MaskedAutoencoder
from maect_jax.models.patches import gather_rows, patchify
from maect_jax.models.vit import pool
from maect_jax.objectives import emae
from maect_jax.objectives.mae import deviation, pixel_targets, reconstruction_loss
from maect_jax.objectives.masking import Masks, mask_noise, shuffle
from maect_jax.randomness import sample_keys
from maect_jax.training import optimizer
from maect_jax.training.state import TrainState
from maect_jax.training.steps import Clock, Step, apply_gradients, finish, join_views

# (predictions [batch, parts, predicted, values], targets of all patches and these patches [batch, patches, values],
# shuffled order [batch, patches]) -> (loss, metrics)
Loss = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def reconstruction_only(masks: Masks) -> Loss:
    """MAE's loss, the mean over parts where there are several."""

    def loss_of(prediction_bkmp, target_bnp, patches_bnp, shuffle_bn):
        b, k, m, p = prediction_bkmp.shape
        removed_bm = shuffle_bn[:, masks.places_km[:, masks.keep :].ravel()]
        return reconstruction_loss(prediction_bkmp.reshape(b, k * m, p), gather_rows(target_bnp, removed_bm)), {}

    return loss_of


def self_consistent(masks: Masks, *, weight: float, norm: str, form: str, space: str, normalised_pixels: bool) -> Loss:
    """EMAE's loss; the arguments are the settings that `objectives.emae` describes."""
    factor = weight * emae.norm_factor(norm, masks.parts)
    shown = masks.predicted // (masks.parts - 1)  # patches of a block that are predicted

    def of_blocks(x_bnp, shuffle_bn):
        """Rows of all patches, by block: [batch, blocks, shown, values]."""
        b, n, p = x_bnp.shape
        places = jnp.arange(n).reshape(masks.parts, masks.keep)[:, :shown].ravel()
        return gather_rows(x_bnp, shuffle_bn[:, places]).reshape(b, masks.parts, shown, p)

    def loss_of(prediction_bkmp, target_bnp, patches_bnp, shuffle_bn):
        prediction_bcosp = emae.by_block(prediction_bkmp)
        whole = emae.reconstruction(prediction_bcosp, of_blocks(target_bnp, shuffle_bn))
        scale_bcs1 = None
        if space == "pixels" and normalised_pixels:
            scale_bcs1 = of_blocks(deviation(patches_bnp), shuffle_bn)
        apart = emae.disagreement(prediction_bcosp, form, scale_bcs1)
        loss = whole + factor * apart if factor else whole
        return loss, {"reconstruction_loss": whole, "disagreement": apart}

    return loss_of


def make_pretrain_step(
    model: MaskedAutoencoder,
    views_of: Callable[[dict, jax.Array], jax.Array],
    *,
    clock: Clock,
    groups: dict[str, optimizer.Group],
    masks: Masks,
    objective: Loss,
    normalise_pixels: bool,
    accumulate: int = 1,
) -> Step:
    """Stage 1.

    All parts of a picture go through encoder and decoder in one batch, side by side, each with its own class token. A
    patch that several parts see is embedded in each; with EMAE's masks each patch is embedded once.

    Args:
      model: encoder and decoder.
      views_of: (batch, epoch) -> normalised views [views, batch, h, w, c].
      clock, groups: schedule; optimiser settings for 'encoder' and 'decoder'.
      masks: what each part sees and predicts.
      objective: what is minimised.
      normalise_pixels: predict patches with zero mean and unit variance.
      accumulate: split the batch in as many groups, one after the other; must divide the batch. Loss and gradient are
        those of the whole batch, because every picture counts alike.
    """
    encoder = model.encoder
    keep, parts = masks.keep, masks.parts

    def loss_of(params, images_bhwc, keys_b):
        shuffle_bn = shuffle(mask_noise(keys_b, masks.patches))
        patches_bnp = patchify(images_bhwc, encoder.patch)
        b, _, p = patches_bnp.shape
        order_bkm = shuffle_bn[:, masks.places_km]
        visible_blp = gather_rows(patches_bnp, order_bkm[:, :, :keep].reshape(b, -1)).reshape(b * parts, keep, p)
        order_bm = order_bkm.reshape(b * parts, -1)
        prediction_bmp, tokens_bld = model.apply({"params": params}, visible_blp, order_bm)
        prediction_bkmp = prediction_bmp.reshape(b, parts, masks.predicted, p)
        target_bnp = pixel_targets(patches_bnp, normalise_pixels)
        loss, metrics = objective(prediction_bkmp, target_bnp, patches_bnp, shuffle_bn)
        return loss, (metrics | {"loss": loss}, pool(tokens_bld[::parts], "mean"))

    def group_of(state, batch):
        epoch = clock.epoch(state.step)
        views_vbhwc = views_of(batch, epoch)
        v, b, *_ = views_vbhwc.shape
        keys_vb = jnp.stack([sample_keys(clock.seed, "mask", epoch, batch["id"], view) for view in range(v)])
        (_, (metrics, embedding)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, join_views(views_vbhwc), join_views(keys_vb)
        )
        return (metrics, gradients), embedding.reshape(b, v, -1)[:, 0]

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict, jax.Array]:
        if accumulate == 1:
            (metrics, gradients), embedding_bd = group_of(state, batch)
        else:
            # Every accumulate-th picture goes to one group, so that each device keeps working on pictures it holds.
            split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)
            one = jax.tree.map(lambda x: x[0], split)
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(group_of, state, one)[0])

            def add(total, group):
                found, embedding_bd = group_of(state, group)
                return jax.tree.map(jnp.add, total, found), embedding_bd

            total, embeddings = jax.lax.scan(add, zeros, split)
            metrics, gradients = jax.tree.map(lambda x: x / accumulate, total)
            embedding_bd = embeddings.swapaxes(0, 1).reshape(-1, embeddings.shape[-1])
        if "disagreement" in metrics:  # in units of the error of a value
            error = jnp.sqrt(metrics["reconstruction_loss"])
            metrics |= {"disagreement_ratio": metrics["disagreement"] / error}
        params, moments, shared = apply_gradients(state, gradients, groups, encoder.depth, clock)
        state, metrics = finish(state, state.replace(params=params, moments=moments), metrics | shared)
        return state, metrics, embedding_bd

    return step
