"""One update of a fine-tuning, a pure function as those of pre-training: (state, batch) -> (state, metrics, vectors).

Source: MAE (He et al. 2022), appendix A.1 and released fine-tuning code: crop, flip, RandAugment, normalise, random
erasing; then mixup or CutMix over the batch; cross-entropy with soft targets; AdamW with layer-wise decay.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from maect_jax.data.device.augment import crop_and_flip, normalise
from maect_jax.data.device.mixing import mixup_cutmix, random_erasing, smooth_labels, soft_cross_entropy
from maect_jax.data.device.randaugment import rand_augment
from maect_jax.finetuning.model import Classifier, branch_scales
from maect_jax.finetuning.recipes import Recipe
from maect_jax.models.patches import patchify
from maect_jax.randomness import purpose_key, sample_keys
from maect_jax.training.optimizer import Group, moving_average
from maect_jax.training.schedule import mae_learning_rate_factor, peak_learning_rate
from maect_jax.training.state import TrainState, create_state
from maect_jax.training.steps import Clock, Step, apply_gradients, finish

UNDECAYED = ("cls_token",)  # beside biases, norms and positions
MIXING_SWITCH = 0.5  # share of batches with CutMix, where both are on


@dataclass(frozen=True)
class MaeClock(Clock):
    """A clock with MAE's schedule, which ends at the share `floor` of the peak."""

    floor: float = 0.0

    def factor(self, step: jax.Array) -> jax.Array:
        return mae_learning_rate_factor(step, self.updates, self.warmup, self.floor)


def clock_of(recipe: Recipe, batch: int, rows: int, seed: int) -> Clock:
    """Lengths in updates for so many training rows; the warm-up is whole updates."""
    per_epoch = rows // batch
    lengths = (recipe.epochs * per_epoch, round(recipe.warmup_epochs * per_epoch), per_epoch, seed)
    if recipe.schedule == "mae-ct":
        return Clock(*lengths)
    return MaeClock(*lengths, floor=min(1.0, recipe.min_lr / peak_learning_rate(recipe.base_lr, batch, 1)))


def groups_of(recipe: Recipe, batch: int) -> dict[str, Group]:
    """Optimiser settings of encoder, new norm and head; these two are not scaled by the layer decay."""
    peak = peak_learning_rate(recipe.base_lr, batch, 1)
    top = Group(peak, recipe.weight_decay)
    return {"encoder": Group(peak, recipe.weight_decay, recipe.layer_decay, UNDECAYED), "fc_norm": top, "head": top}


def first_state(params: dict, recipe: Recipe) -> TrainState:
    """State at step 0 from `model.start_params`; with a moving average of all weights where the recipe has one."""
    return create_state(params, ema=jax.tree.map(jnp.copy, params) if recipe.ema_factor else None)


def evaluated_params(state: TrainState) -> dict:
    """The weights that are evaluated: the moving average where there is one."""
    return state.ema or state.params


def make_finetune_step(
    model: Classifier, recipe: Recipe, *, batch: int, clock: Clock, mean: tuple[float, ...], std: tuple[float, ...]
) -> Step:
    """The update.

    Args:
      model: encoder and head.
      recipe: its settings; `batch` pictures an update instead of the recipe's, its rates scaled to it.
      clock: from `clock_of`; its seed and the step determine every random choice.
      mean, std: of the data, for pixel values in 0..1, one a channel.

    Returns:
      (state, {'image', 'id', 'label'}) -> (state, metrics, vectors [batch, width] that the head sees). Labels are
      integers in 0..classes-1; pictures as in `data.device.augment.make_views`.
    """
    encoder = model.encoder
    groups = groups_of(recipe, batch)

    def augmented(batch: dict, epoch: jax.Array) -> jax.Array:
        def keys(purpose):
            return sample_keys(clock.seed, purpose, epoch, batch["id"], 0)

        size, scale = encoder.image_size, recipe.crop_scale
        x = crop_and_flip(batch, seed=clock.seed, epoch=epoch, view=0, size=size, scale=scale)
        if recipe.rand_augment:
            x = rand_augment(keys("randaugment"), x, recipe.rand_augment, mean)
        x = normalise(x, mean, std)
        return random_erasing(keys("erasing"), x, recipe.erasing) if recipe.erasing else x

    def examples(batch: dict, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        images_bhwc = augmented(batch, clock.epoch(step))
        targets_bc = smooth_labels(batch["label"], model.classes, recipe.smoothing)
        key = jax.random.fold_in(purpose_key(clock.seed, "mixing"), step)
        return mixup_cutmix(key, images_bhwc, targets_bc, recipe.mixup, recipe.cutmix, MIXING_SWITCH)

    def loss_of(params, images_bhwc, targets_bc, scale_l2b):
        patches_bnp = patchify(images_bhwc, encoder.patch)
        logits_bc, vector_bd = model.apply({"params": params}, patches_bnp, scale_l2b)
        return soft_cross_entropy(logits_bc, targets_bc).mean(), vector_bd

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict, jax.Array]:
        images_bhwc, targets_bc = examples(batch, state.step)
        scale_l2b = None
        if recipe.drop_path:
            epoch = clock.epoch(state.step)
            scale_l2b = branch_scales(clock.seed, epoch, batch["id"], encoder.depth, recipe.drop_path)
        (loss, vector_bd), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, images_bhwc, targets_bc, scale_l2b
        )
        params, moments, metrics = apply_gradients(state, gradients, groups, encoder.depth, clock, recipe.betas)
        new = state.replace(params=params, moments=moments)
        if recipe.ema_factor:
            new = new.replace(ema=moving_average(state.ema, params, recipe.ema_factor))
        state, metrics = finish(state, new, metrics | {"loss": loss})
        return state, metrics, vector_bd

    return step
