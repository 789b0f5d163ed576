"""Recipes, the classifier and drop path: published values, what is kept of an encoder, statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.finetuning.model import branch_scales, classifier_of, drop_path_rates, start_params
from maect_jax.finetuning.recipes import RECIPES, fitting_batch, recipe_for
from maect_jax.finetuning.step import clock_of, groups_of
from maect_jax.models.patches import position_table
from maect_jax.models.vit import SIZES
from maect_jax.training.optimizer import plan
from maect_jax.training.schedule import mae_learning_rate_factor
from small import encoder_of

SMALL = dict(img_size=16, patch_size=4, dim=24, depth=3, heads=2)
CLASSES = 5


def encoder_params(**changes):
    encoder = encoder_of(SMALL | changes)
    return jax.jit(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, encoder.grid**2, 48)))["params"])()


def started(pooling, **changes):
    model = classifier_of(encoder_of(SMALL | changes), CLASSES, pooling)
    return model, jax.jit(lambda params: start_params(model, params, 48, jax.random.key(1)))(encoder_params())


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("name", "size", "values"),
    [  # base rate, batch, epochs, weight decay, layer decay, drop path
        ("mae-finetune", "B/16", (5e-4, 1024, 100, 0.05, 0.65, 0.1)),
        ("mae-finetune", "L/16", (1e-3, 1024, 50, 0.05, 0.75, 0.2)),
        ("mae-finetune", "H/14", (1e-3, 1024, 50, 0.05, 0.75, 0.3)),
        ("finetune-1pct", "L/16", (3e-5, 512, 50, 0.05, 0.75, 0.0)),
        ("finetune-1pct", "H/16", (3e-5, 512, 50, 0.4, 0.75, 0.0)),
        ("finetune-1pct", "H/14", (3e-5, 512, 50, 0.4, 0.75, 0.0)),
        ("finetune-10pct", "L/16", (3e-5, 512, 50, 0.05, 0.75, 0.0)),
        ("finetune-10pct", "H/14", (1e-3, 256, 50, 0.05, 0.75, 0.2)),
    ],
)
def test_published_values(name, size, values):
    shape = SIZES[size]
    recipe = recipe_for(name, shape.width, shape.depth, shape.patch)
    keys = ("base_lr", "batch", "epochs", "weight_decay", "layer_decay", "drop_path")
    assert (recipe.size, *(getattr(recipe, key) for key in keys)) == (size, *values)
    assert (recipe.betas, recipe.warmup_epochs, recipe.smoothing) == ((0.9, 0.999), 5, 0.1)


def test_augmentations_are_those_published_for_each_share():
    def switches(name, size):
        recipe = RECIPES[name][size]
        return bool(recipe.rand_augment), recipe.mixup, recipe.cutmix, recipe.erasing

    assert {switches("mae-finetune", size) for size in RECIPES["mae-finetune"]} == {(True, 0.8, 1.0, 0.25)}
    assert {switches("finetune-1pct", size) for size in RECIPES["finetune-1pct"]} == {(False, 0.0, 0.0, 0.0)}
    assert switches("finetune-10pct", "L/16") == (True, 0.0, 0.0, 0.0)
    assert switches("finetune-10pct", "H/16") == switches("finetune-10pct", "H/14") == (True, 0.8, 1.0, 0.25)
    proxies = [r for name in ("finetune-1pct", "finetune-10pct") for r in RECIPES[name].values()]
    assert {recipe.source for recipe in proxies} == {"follow-up proxy"}


def test_a_size_without_a_recipe_takes_the_nearest_ones():
    assert recipe_for("mae-finetune", 64, 4, 4).size == "B/16"
    assert recipe_for("mae-finetune", 1280, 32, 16).size == "H/14"
    assert recipe_for("finetune-1pct", 768, 12, 16).size == "L/16"
    assert recipe_for("finetune-1pct", 1280, 32, 14).size == "H/14"
    with pytest.raises(
        ConfigError, match=r"no recipe 'finetune-5pct'; there is mae-finetune, finetune-1pct, finetune-10"
    ):
        recipe_for("finetune-5pct", 768, 12, 16)


def test_few_rows_have_a_batch_within_a_quarter_of_them():
    assert [fitting_batch(512, rows, 1) for rows in (12_811, 2048, 500, 28, 3)] == [512, 512, 64, 4, 1]
    assert fitting_batch(512, 28, devices=8) == 8


def test_layer_decay_has_the_published_factors():
    model = classifier_of(encoder_of(SMALL | dict(dim=24, depth=12)), CLASSES, "fc_norm")
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 48)))["params"])
    recipe = dataclasses.replace(RECIPES["mae-finetune"]["B/16"], base_lr=1.0)
    peaks, decays = plan(params, groups_of(recipe, 256), depth=12)
    published = [0.0754, 0.1160, 0.1785, 0.2746, 0.4225, 0.65]  # blocks 6 to 11 of 12, rounded to four digits
    for leaf in jax.tree.leaves(peaks["encoder"]["blocks"]):
        np.testing.assert_allclose(leaf.ravel()[6:], published, atol=5e-5)
        np.testing.assert_allclose(leaf.ravel(), 0.65 ** np.arange(12, 0, -1))
    stem = {name: peaks["encoder"][name] for name in ("patch_embed", "cls_token", "pos_embed")}
    np.testing.assert_allclose(jax.tree.leaves(stem), 0.65**13)
    assert {float(x) for x in jax.tree.leaves([peaks["head"], peaks["fc_norm"]])} == {1.0}
    decayed = {jax.tree_util.keystr(path) for path, decay in jax.tree_util.tree_leaves_with_path(decays) if decay}
    maps = ("patch_embed", "blocks']['attn']['qkv", "blocks']['attn']['proj", "blocks']['fc1", "blocks']['fc2")
    assert decayed == {f"['encoder']['{name}']['kernel']" for name in maps} | {"['head']['kernel']"}


def test_the_rate_rises_from_zero_in_five_epochs_and_ends_at_the_least_rate():
    recipe = RECIPES["mae-finetune"]["L/16"]
    clock = clock_of(recipe, batch=1024, rows=1_281_167, seed=0)
    assert (clock.updates, clock.warmup, clock.updates_per_epoch) == (50 * 1251, 5 * 1251, 1251)
    peak = 1e-3 * 1024 / 256
    epoch = np.arange(50 * 1251) / 1251
    cosine = 1e-6 + (peak - 1e-6) * 0.5 * (1 + np.cos(np.pi * (epoch - 5) / 45))
    expected = np.where(epoch < 5, peak * epoch / 5, cosine)
    found = peak * mae_learning_rate_factor(np.arange(50 * 1251), clock.updates, clock.warmup, clock.floor, np)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert float(clock.factor(jnp.int32(0))) == 0
    shorter = clock_of(recipe.lasting(10), batch=100, rows=2_000, seed=0)
    assert (shorter.updates, shorter.warmup) == (200, 20)


# --------------------------------------------------------------------------------------------------------------- model


def test_the_checkpoints_norm_stays_with_cls_and_goes_with_fc_norm():
    given = encoder_params()
    for pooling, parts in (("cls", {"encoder", "head"}), ("fc_norm", {"encoder", "fc_norm", "head"})):
        _, params = started(pooling)
        assert set(params) == parts
        kept = {name: leaf for name, leaf in params["encoder"].items() if name != "pos_embed"}
        wanted = {name: leaf for name, leaf in given.items() if name != "norm" or pooling == "cls"}
        jax.tree.map(np.testing.assert_array_equal, kept, wanted)


def test_other_pictures_sizes_get_their_own_positions_and_a_head_that_starts_small():
    model, params = started("fc_norm", img_size=24)
    table = params["encoder"]["pos_embed"]
    np.testing.assert_allclose(table[0], np.concatenate([np.zeros((1, 24)), position_table(24, 6)]), atol=1e-7)
    assert 1e-5 < params["head"]["kernel"].std() < 3e-5
    logits, _ = jax.jit(lambda: model.apply({"params": params}, jnp.ones((2, 36, 48))))()
    assert logits.shape == (2, CLASSES)
    assert abs(logits).max() < 1e-3


def test_a_classifier_of_bfloat16_gives_float32_logits():
    model = classifier_of(encoder_of(SMALL, dtype=jnp.bfloat16), CLASSES, "cls")
    _, params = started("cls")
    logits, _ = jax.eval_shape(lambda: model.apply({"params": params}, jnp.ones((2, 16, 48))))
    assert logits.dtype == jnp.float32


def test_an_encoder_of_another_architecture_is_refused():
    model = classifier_of(encoder_of(SMALL), CLASSES, "cls")
    with pytest.raises(CheckpointError, match="the encoder to fine-tune is of another architecture"):
        jax.eval_shape(lambda: start_params(model, encoder_params(depth=2), 48, jax.random.key(0)))


# ----------------------------------------------------------------------------------------------------------- drop path


def test_drop_path_rises_linearly_and_keeps_the_expectation():
    ids = jnp.arange(4000)
    scale = np.asarray(jax.jit(lambda ids: branch_scales(0, jnp.int32(3), ids, 5, 0.4))(ids))
    assert scale.shape == (5, 2, 4000)
    np.testing.assert_allclose(drop_path_rates(5, 0.4), [0, 0.1, 0.2, 0.3, 0.4])
    for rate, scale_2b in zip((0, 0.1, 0.2, 0.3, 0.4), scale):
        values = np.unique(scale_2b)
        np.testing.assert_allclose(values, [0, 1 / (1 - rate)] if rate else [1], rtol=1e-6)
        spread = np.sqrt(rate * (1 - rate) / 8000)
        assert abs((scale_2b == 0).mean() - rate) <= 4 * spread
    dropped = scale[1:] == 0
    pairs = np.corrcoef(dropped.reshape(8, -1))[~np.eye(8, dtype=bool)]
    assert abs(pairs).max() < 4 / np.sqrt(4000), "blocks and branches are drawn apart"


def test_what_a_picture_drops_does_not_depend_on_its_batch_but_on_the_epoch():
    draw = jax.jit(lambda epoch, ids: branch_scales(7, epoch, ids, 4, 0.5))
    ids = jnp.arange(64)
    whole = draw(jnp.int32(1), ids)
    np.testing.assert_array_equal(draw(jnp.int32(1), ids[::-1])[:, :, ::-1], whole)
    assert (np.asarray(draw(jnp.int32(2), ids)) != np.asarray(whole)).any()
    assert len(np.unique(np.asarray(whole).reshape(8, 64), axis=1).T) > 16, "pictures draw apart"


def test_a_dropped_branch_adds_nothing():
    model, params = started("fc_norm")
    patches = jax.random.normal(jax.random.key(0), (2, 16, 48))
    scale = jnp.ones((3, 2, 2)).at[:, :, 1].set(0)  # the second picture skips every branch
    apply = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs))
    plain, _ = apply(patches)
    dropped, vector = apply(patches, scale)
    np.testing.assert_allclose(dropped[0], plain[0], atol=1e-9)
    stem = params["encoder"]
    mean = (patches[1] @ stem["patch_embed"]["kernel"] + stem["patch_embed"]["bias"] + stem["pos_embed"][0, 1:]).mean(0)
    np.testing.assert_allclose(vector[1], (mean - mean.mean()) / np.sqrt(mean.var() + 1e-6), atol=1e-4)
