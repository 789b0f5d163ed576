"""What a step of EMAE holds beside K steps of MAE, from programs that are compiled, or only written, and never run.

A whole step holds most in the backward pass of its blocks, where nothing of the loss is left; so the loss, whose arrays
are some hundredths of that, is compiled alone too, with the sizes of ViT-B/16.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from maect_jax.assemble import assemble, build_masks, build_objective, compile_for, source_shapes
from maect_jax.config import default, derive
from maect_jax.objectives.mae import pixel_targets
from small import one_device

VIT_B = (
    {"width": 768, "depth": 12, "heads": 12, "patch": 16, "image_size": 224},
    {"width": 512, "depth": 8, "heads": 16},
)
# Its proportions: 196 patches of as many values as the encoder is wide, decoder two thirds of that.
SMALL = (
    {"width": 48, "depth": 3, "heads": 3, "patch": 4, "image_size": 56},
    {"width": 32, "depth": 2, "heads": 4},
)
# settings of EMAE that change its loss
LOSSES = {
    "four parts": {},
    "seven parts": {"parts": 7},
    "fourteen parts": {"parts": 14},
    "one-sided": {"consistency_form": "one_sided"},
    "in pixels": {"consistency_space": "pixels"},
}


def settings(shape, method, parts=4, **emae):
    """First stage of either method in bfloat16; the mask ratio is that of EMAE's parts."""
    config = default()
    config.model.update(shape[0], dtype="bfloat16")
    config.model.decoder.update(shape[1])
    config.pretrain.update(method=method, views=1, mask_ratio=1 - 1 / parts)
    config.pretrain.emae.update(emae, parts=parts)
    derive(config, 10_000)
    return config


def lowered_step(config, pictures):
    mesh, size = one_device(), config.model.image_size
    step, state, _ = compile_for(
        assemble(config, "pretrain", 10_000, mesh), mesh, source_shapes(config, "pretrain", mesh)
    )
    batch = {
        "image": jax.ShapeDtypeStruct((pictures, 1, size, size, 3), jnp.uint8),
        "id": jax.ShapeDtypeStruct((pictures,), jnp.int32),
        "label": jax.ShapeDtypeStruct((pictures,), jnp.int32),
    }
    return step.lower(state, batch)


def temporary_bytes(lowered) -> int:
    """What the program holds beside its arguments; the machine code, which nobody runs, is not optimised."""
    return lowered.compile({"xla_backend_optimization_level": 0}).memory_analysis().temp_size_in_bytes


def test_a_step_holds_no_more_for_a_picture_than_four_steps_of_mae_for_one():
    """At as many sequences; parameters, gradients and moments are a hundredth of it."""
    emae, mae = (lowered_step(settings(SMALL, method), n) for method, n in (("emae", 8), ("mae", 32)))
    assert temporary_bytes(emae) <= 1.15 * temporary_bytes(mae)


def lowered_loss(config, pictures):
    """Value and gradient of what is minimised, from predictions on."""
    masks, patches, values = build_masks(config), 196, 768
    objective = build_objective(config, masks)

    def loss(prediction_bkmp, patches_bnp, shuffle_bn):
        target_bnp = pixel_targets(patches_bnp, normalise=True)
        return objective(prediction_bkmp, target_bnp, patches_bnp, shuffle_bn)

    return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(
        jax.ShapeDtypeStruct((pictures, masks.parts, masks.predicted, values), jnp.bfloat16),
        jax.ShapeDtypeStruct((pictures, patches, values), jnp.float32),
        jax.ShapeDtypeStruct((pictures, patches), jnp.int32),
    )


@pytest.mark.parametrize("emae", LOSSES.values(), ids=LOSSES)
def test_the_loss_holds_at_most_three_copies_of_the_predictions_more_than_that_of_mae(emae):
    """One in the order of the blocks, and a gradient of the reconstruction and of the agreement, all in bfloat16."""
    parts, pictures = emae.get("parts", 4), 4
    mae = temporary_bytes(lowered_loss(settings(VIT_B, "mae", parts), parts * pictures))
    copy = 2 * pictures * parts * (196 - 196 // parts) * 768
    assert temporary_bytes(lowered_loss(settings(VIT_B, "emae", **emae), pictures)) <= mae + 3 * copy


@pytest.mark.parametrize("emae", LOSSES.values(), ids=LOSSES)
def test_no_array_of_a_step_holds_all_predictions_in_float32(emae):
    """In the program before a compiler sees it; in bfloat16 there is one. One block of each stack is enough here."""
    config, pictures = settings(VIT_B, "emae", **emae), 8
    config.model.depth = config.model.decoder.depth = 1
    masks, text = build_masks(config), lowered_step(config, pictures).as_text()
    rows = {"f32": 0, "bf16": 0}
    for sizes, dtype in re.findall(r"tensor<((?:\d+x)+)768x(f32|bf16)>", text):
        rows[dtype] = max(rows[dtype], math.prod(int(size) for size in sizes[:-1].split("x")))
    assert rows["bf16"] >= pictures * masks.parts * masks.predicted > rows["f32"]
