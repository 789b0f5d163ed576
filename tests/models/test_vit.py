"""Encoder, decoder and patches: order of values, initialisation, number types, recomputation, freezing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax.models.nnclr import Predictor, Projector
from maect_jax.models.patches import gather_rows, patchify, unpatchify
from maect_jax.models.vit import join_blocks, pool, split_blocks
from maect_jax.objectives.mae import pixel_targets, reconstruction_loss
from maect_jax.objectives.masking import mask_noise, patches_to_keep, shuffle
from small import encoder_of, mae_of

SMALL = dict(img_size=16, patch_size=4, dim=32, depth=3, heads=2, decoder_dim=24, decoder_depth=2, decoder_heads=2)
WIDE = dict(img_size=32, patch_size=8, dim=128, depth=2, heads=4, decoder_dim=64, decoder_depth=2, decoder_heads=4)
KEEP = 4  # of 16 patches


@pytest.fixture(scope="module")
def patches():
    return jax.random.normal(jax.random.key(1), (3, 16, 48))


@pytest.fixture(scope="module")
def order():
    return shuffle(mask_noise(jax.random.split(jax.random.key(2), 3), 16))


@pytest.fixture(scope="module")
def params(patches, order):
    return jax.jit(lambda: mae_of(SMALL).init(jax.random.key(0), patches[:, :KEEP], order)["params"])()


@pytest.fixture(scope="module")
def wide():
    """Parameters of a model wide enough that the extremes of a uniform distribution come near its bounds."""
    model = mae_of(WIDE)
    arguments = jnp.zeros((1, 4, 192)), jnp.arange(16)[None]
    return jax.jit(lambda key: model.init(key, *arguments)["params"])(jax.random.key(3))


# ------------------------------------------------------------------------------------------------------------- patches


def test_patches_of_a_ramp_picture_are_rows_of_pixels_with_the_channel_fastest():
    h, w, c, p = 4, 6, 3, 2
    picture = np.arange(h * w * c).reshape(1, h, w, c)
    found = patchify(jnp.asarray(picture), p)
    assert found.shape == (1, 6, 12)
    for n in range(6):
        row, column = divmod(n, 3)
        block = picture[0, row * p : (row + 1) * p, column * p : (column + 1) * p]
        np.testing.assert_array_equal(found[0, n], block.ravel())
    np.testing.assert_array_equal(found[0, 0, :6], range(6))  # two pixels of the first row, three channels each


def test_unpatchify_inverts_patchify():
    pictures = jax.random.normal(jax.random.key(0), (2, 12, 12, 1))
    np.testing.assert_array_equal(unpatchify(patchify(pictures, 4), 4, 1), pictures)


# ------------------------------------------------------------------------------------------------------ initialisation


def bound_of(leaf) -> float:
    return float(np.abs(np.asarray(leaf)).max())


def test_linear_maps_start_xavier_uniform_and_qkv_as_one_matrix(wide):
    d, e = 128, 64
    kernels = {
        "encoder": {"attn.qkv": 4 * d, "attn.proj": 2 * d, "fc1": 5 * d, "fc2": 5 * d},
        "decoder": {"attn.qkv": 4 * e, "attn.proj": 2 * e, "fc1": 5 * e, "fc2": 5 * e},
    }
    for part, fans in kernels.items():
        for name, fan in fans.items():
            leaf = wide[part]["blocks"]
            for key in name.split("."):
                leaf = leaf[key]
            bound = np.sqrt(6 / fan)
            assert 0.97 * bound < bound_of(leaf["kernel"]) <= bound, (part, name)
            np.testing.assert_allclose(leaf["kernel"].std(), bound / np.sqrt(3), rtol=0.03)
            assert not np.any(leaf["bias"]), (part, name)
    for leaf, fan in ((wide["decoder"]["embed"], d + e), (wide["decoder"]["predict"], e + 192)):
        assert 0.97 * np.sqrt(6 / fan) < bound_of(leaf["kernel"]) <= np.sqrt(6 / fan)
        assert not np.any(leaf["bias"])


def test_blocks_of_a_stack_start_differently(wide):
    kernel = wide["encoder"]["blocks"]["fc1"]["kernel"]
    assert not np.any(kernel[0] == kernel[1])


def test_patch_embedding_starts_as_its_matrix_view_with_pytorchs_convolution_bias(wide):
    embed = wide["encoder"]["patch_embed"]
    assert 0.97 * np.sqrt(6 / (192 + 128)) < bound_of(embed["kernel"]) <= np.sqrt(6 / (192 + 128))
    assert 0.9 * 192**-0.5 < bound_of(embed["bias"]) <= 192**-0.5


def test_tokens_start_normal_and_normalisations_as_identity(wide):
    for token in (wide["encoder"]["cls_token"], wide["decoder"]["mask_token"]):
        np.testing.assert_allclose(token.std(), 0.02, rtol=0.35)
    for norm in (wide["encoder"]["norm"], wide["decoder"]["norm"], wide["encoder"]["blocks"]["norm1"]):
        assert np.all(norm["scale"] == 1) and np.all(norm["bias"] == 0)


def test_head_starts_as_pytorchs_linear_layers():
    projector = Projector(256, 64).init(jax.random.key(0), jnp.zeros((2, 128)), train=False)["params"]
    predictor = Predictor(256, 64).init(jax.random.key(0), jnp.zeros((2, 64)), train=False)["params"]
    fans = {("linear0", 128), ("linear1", 256), ("linear2", 256)}
    for tree, layers in ((projector, fans), (predictor, {("linear0", 64), ("linear1", 256)})):
        for name, fan_in in layers:
            assert set(tree[name]) == {"kernel"}, "head layers have no bias"
            assert 0.97 * fan_in**-0.5 < bound_of(tree[name]["kernel"]) <= fan_in**-0.5, name


def test_predictions_differ_between_removed_patches_at_the_start(params, patches, order):
    visible = gather_rows(patches, order[:, :KEEP])
    prediction, _ = mae_of(SMALL).apply({"params": params}, visible, order)
    gaps = np.abs(prediction[:, :, None] - prediction[:, None]).mean(-1) + np.eye(12)
    assert gaps.min() > 1e-3


# ------------------------------------------------------------------------------------------------------------ behaviour


def loss_of(model):
    def loss(params, patches, order):
        prediction, _ = model.apply({"params": params}, gather_rows(patches, order[:, :KEEP]), order)
        return reconstruction_loss(prediction, gather_rows(pixel_targets(patches, True), order[:, KEEP:]))

    return loss


def test_loss_in_shuffled_order_is_the_masked_loss_in_picture_order(params, patches, order):
    """Against NumPy in float64: predictions put back into picture order, targets and mask as the paper defines them."""
    visible = gather_rows(patches, order[:, :KEEP])
    shuffled, _ = mae_of(SMALL).apply({"params": params}, visible, order, only_removed=False)
    prediction, mask = np.zeros((3, 16, 48)), np.ones((3, 16))
    for b in range(3):
        prediction[b, np.asarray(order[b])] = shuffled[b]
        mask[b, np.asarray(order[b, :KEEP])] = 0
    x = np.asarray(patches, np.float64)
    target = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6)
    expected = (((prediction - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    np.testing.assert_allclose(loss_of(mae_of(SMALL))(params, patches, order), expected, rtol=1e-6)


def test_recomputing_activations_changes_neither_loss_nor_gradient(params, patches, order):
    plain, recomputed = (
        jax.jit(jax.value_and_grad(loss_of(mae_of(SMALL, remat=remat))))(params, patches, order)
        for remat in (False, True)
    )
    np.testing.assert_allclose(plain[0], recomputed[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), plain[1], recomputed[1])


def test_bfloat16_computation_keeps_float32_parameters_and_gradients(params, patches, order):
    model = mae_of(SMALL, dtype=jnp.bfloat16)
    fresh = jax.eval_shape(lambda: model.init(jax.random.key(0), patches[:, :KEEP], order)["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    prediction, tokens = jax.eval_shape(lambda: model.apply({"params": params}, patches[:, :KEEP], order))
    assert prediction.dtype == tokens.dtype == jnp.bfloat16
    loss, gradients = jax.jit(jax.value_and_grad(loss_of(model)))(params, patches, order)
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, loss_of(mae_of(SMALL))(params, patches, order), rtol=2e-2)


def test_tokens_follow_the_order_of_the_patches_given(params, patches):
    """Blocks do not know the order: all patches shuffled give the shuffled tokens and the same CLS token."""
    encoder = encoder_of(SMALL)
    index = shuffle(mask_noise(jax.random.split(jax.random.key(9), 3), 16))
    variables = {"params": params["encoder"]}
    plain = encoder.apply(variables, patches)
    shuffled = encoder.apply(variables, gather_rows(patches, index), index)
    np.testing.assert_allclose(shuffled[:, 0], plain[:, 0], atol=1e-5)
    np.testing.assert_allclose(shuffled[:, 1:], gather_rows(plain[:, 1:], index), atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_split_encoder_computes_what_the_whole_one_does(frozen, params, patches):
    trained, lower = split_blocks(params["encoder"], frozen)
    jax.tree.map(np.testing.assert_array_equal, join_blocks(trained, lower), params["encoder"])
    whole = encoder_of(SMALL).apply({"params": params["encoder"]}, patches)
    parts = encoder_of(SMALL, frozen=frozen).apply({"params": {**lower, **trained}}, patches)
    np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_pooling_takes_the_class_token_or_the_mean_of_the_patches():
    tokens = jnp.asarray([[[9.0, 9.0], [1.0, 2.0], [3.0, 4.0]]])
    np.testing.assert_array_equal(pool(tokens, "cls"), [[9.0, 9.0]])
    np.testing.assert_array_equal(pool(tokens, "mean"), [[2.0, 3.0]])


def test_number_of_kept_patches_is_truncated_in_floating_point():
    assert patches_to_keep(100, 0.9) == 9  # 100 * (1 - 0.9) is a little below 10
    assert patches_to_keep(196, 0.75) == 49
    assert patches_to_keep(256, 0.75) == 64
