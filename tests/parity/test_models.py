"""Position tables, encoder, masked autoencoder and head against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import arrays, below
from maect_jax.exchange.mapping import from_layout, to_layout
from maect_jax.models.nnclr import Predictor, Projector
from maect_jax.models.patches import gather_rows, patchify, position_table, unpatchify
from maect_jax.objectives.mae import pixel_targets, reconstruction_loss
from maect_jax.objectives.masking import patches_to_keep, shuffle
from small import cast, channels_last, encoder_of, mae_of

# ----------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("number", range(5))
def test_position_table(number):
    reference = below(arrays("posembed"), f"table{number}/")
    table = position_table(int(reference["dim"]), int(reference["grid"]))
    np.testing.assert_allclose(table[:4], reference["first4"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(table[-2:], reference["last2"], rtol=0, atol=1e-12)
    flat = table.ravel()
    weights = (np.arange(flat.size) + 1) / flat.size
    np.testing.assert_allclose(flat.sum(), reference["sum"], rtol=1e-12)
    np.testing.assert_allclose((flat**2).sum(), reference["sumsq"], rtol=1e-12)
    np.testing.assert_allclose((flat * weights).sum(), reference["weighted_sum"], rtol=1e-12)
    if "full" in reference:
        np.testing.assert_allclose(table, reference["full"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(table.astype(np.float32), reference["full"], rtol=0, atol=6e-8)


# ------------------------------------------------------------------------------------------------------------- encoder


@pytest.mark.parametrize(("dtype", "suffix", "atol"), [("float32", "", 2e-5), ("float64", "_f64", 1e-10)])
def test_encoder_tokens_of_the_full_and_the_masked_picture(dtype, suffix, atol):
    reference = arrays("encoder")
    cfg = below(reference, "cfg/")
    with jax.enable_x64(dtype == "float64"):
        encoder = encoder_of(cfg, dtype=jnp.dtype(dtype))
        params = cast(from_layout(below(reference, "w/"), "mae_official_encoder")["encoder"], dtype)
        patches = patchify(channels_last(reference["images"]).astype(dtype), encoder.patch)
        order = shuffle(jnp.asarray(reference["noise"]))
        keep = patches_to_keep(encoder.grid**2, float(cfg["mask_ratio"]))
        visible = order[:, :keep]

        @jax.jit
        def both(params):
            masked = encoder.apply({"params": params}, gather_rows(patches, visible), visible)
            return encoder.apply({"params": params}, patches), masked

        full, masked = both(params)
    assert full.dtype == dtype
    assert keep == cfg["n_keep"]
    np.testing.assert_array_equal(order, reference["ids_shuffle"])
    np.testing.assert_allclose(full, reference[f"tokens_full{suffix}"], rtol=0, atol=atol)
    np.testing.assert_allclose(masked, reference[f"tokens_masked{suffix}"], rtol=0, atol=atol)


# -------------------------------------------------------------------------------------------------- masked autoencoder


def in_picture_order(shuffled_bnp, order_bn):
    return gather_rows(shuffled_bnp, jnp.argsort(order_bn, axis=1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_masked_autoencoder_predictions_targets_losses_and_gradients(dtype):
    reference = arrays("mae")
    cfg = below(reference, "cfg/")
    f64 = dtype == "float64"
    suffix = "_f64" if f64 else ""
    with jax.enable_x64(f64):
        model = mae_of(cfg, dtype=jnp.dtype(dtype))
        params = cast(from_layout(below(reference, "w/"), "mae_official_full"), dtype)
        images = channels_last(reference["images"]).astype(dtype)
        patches = patchify(images, model.encoder.patch)
        order = shuffle(jnp.asarray(reference["noise"]))
        keep = patches_to_keep(patches.shape[1], float(cfg["mask_ratio"]))
        visible = gather_rows(patches, order[:, :keep])
        normalised, raw = pixel_targets(patches, True), pixel_targets(patches, False)

        def losses(params):
            prediction, _ = model.apply({"params": params}, visible, order)
            each = [reconstruction_loss(prediction, gather_rows(t, order[:, keep:])) for t in (normalised, raw)]
            return each[0], each[1]

        (loss_norm, loss_raw), gradients = jax.jit(jax.value_and_grad(losses, has_aux=True))(params)
        shuffled, _ = jax.jit(lambda p: model.apply({"params": p}, visible, order, False))(params)
        prediction = in_picture_order(shuffled, order)
    np.testing.assert_array_equal(unpatchify(patches, model.encoder.patch, 3), images)
    mask = np.ones(order.shape)
    np.put_along_axis(mask, np.asarray(order[:, :keep]), 0, axis=1)
    np.testing.assert_array_equal(mask, reference["mask"])
    np.testing.assert_allclose(prediction, reference[f"pred{suffix}"], rtol=0, atol=1e-10 if f64 else 1e-5)
    np.testing.assert_allclose(loss_norm, reference[f"loss_norm{suffix}"], rtol=0, atol=1e-11 if f64 else 2e-6)
    np.testing.assert_allclose(loss_raw, reference[f"loss_raw{suffix}"], rtol=0, atol=1e-11 if f64 else 2e-6)
    np.testing.assert_allclose(normalised, reference["target_norm"], rtol=0, atol=5e-6)
    np.testing.assert_array_equal(np.asarray(raw, np.float32), reference["target_raw"])
    found = to_layout(jax.tree.map(np.asarray, gradients), "mae_official_full", patch=8, grid=4)
    expected = below(reference, "g/")
    assert expected.keys() == found.keys() - {"pos_embed", "decoder_pos_embed"}
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=5e-7, err_msg=name)


# ---------------------------------------------------------------------------------------------------------------- head


def head_from(tensors: dict) -> dict:
    """The reference's head without queue as our tree."""
    empty = {"queue": np.zeros((1, 32)), "queue_y": [0], "queue_id": [0], "queue_ptr": [0]}
    return from_layout({**tensors, **empty}, "maect_head_stage2")


def test_head_in_evaluation_and_training_and_its_running_statistics():
    reference = arrays("nnclr_head")
    cfg = below(reference, "cfg/")
    tree = head_from(below(reference, "w/"))
    projector = Projector(int(cfg["hidden"]), int(cfg["out"]))
    predictor = Predictor(int(cfg["pred_hidden"]), int(cfg["out"]))

    def both(stats, train):
        new, x = {}, jnp.asarray(reference["features"])
        outputs = []
        for name, module in (("projector", projector), ("predictor", predictor)):
            variables = {"params": tree["params"][name], "batch_stats": stats[name]}
            x, changed = module.apply(variables, x, train=train, mutable=["batch_stats"])
            new[name] = changed["batch_stats"]
            outputs.append(x)
        return outputs, new

    def check(outputs, moment):
        np.testing.assert_allclose(outputs[0], reference[f"{moment}_z"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(outputs[1], reference[f"{moment}_p"], rtol=0, atol=1e-5)

    outputs, unchanged = both(tree["batch_stats"], train=False)
    check(outputs, "eval_before")
    jax.tree.map(np.testing.assert_array_equal, unchanged, tree["batch_stats"])
    outputs, after = both(tree["batch_stats"], train=True)
    check(outputs, "train")
    check(both(after, train=False)[0], "eval_after")

    found = to_layout(jax.tree.map(np.asarray, tree | {"batch_stats": after}), "maect_head_stage2", batches_tracked=1)
    for name, value in below(reference, "after/").items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-6, err_msg=name)
    for name, biased in below(reference, "after_biased/").items():
        assert np.abs(found[name] - biased).max() > 1e-3, name
