"""Exports by the names of the official MAE files and of MAE-CT's: encoder, decoder, predictions and loss."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from needed import needed
from safetensors.numpy import load_file, save_file

from golden import arrays, below, constants
from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.exchange.export.mae import MAE, MAECT
from maect_jax.exchange.export.proof import TOLERANCE, compare, difference, ours, pictures
from maect_jax.exchange.mapping import from_layout
from maect_jax.exchange.model import Model
from maect_jax.exchange.provenance import Provenance
from maect_jax.models.mae import Decoder
from models import photograph, published_model, random_model, weightless_model
from small import encoder_of

ENCODED, RECONSTRUCTED = {"tokens", "features"}, {"predictions", "loss"}
KINDS = {
    "encoder": dict(),
    "full, plain pixels, half removed": dict(decoder=True, normalised_pixels=False, mask_ratio=0.5),
    "full, targets not known": dict(decoder=True, normalised_pixels=None, pooling="mean"),
    "full, one channel, other shape": dict(
        decoder=True, channels=1, width=64, depth=3, heads=2, patch=8, image_size=40, mask_ratio=0.6
    ),
    "full, learned positions": dict(decoder=True, learned_positions=True),
    "fine-tuned": dict(classes=7, fc_norm=True, learned_positions=True),
}


@pytest.fixture(scope="module")
def timm():
    return needed("timm")


def written(target, model, folder):
    target.check(model)
    target.write(model, folder, {"note": "x"})
    return load_file(folder / "model.safetensors")


def of_reference():
    """The reference's masked autoencoder, and its values."""
    reference = arrays("mae")
    cfg = below(reference, "cfg/")
    encoder = encoder_of(cfg)
    shape = (int(cfg[f"decoder_{name}"]) for name in ("dim", "depth", "heads"))
    model = Model(
        name="reference",
        encoder=encoder,
        decoder=Decoder(*shape, encoder.grid, 3 * encoder.patch**2),
        params=from_layout(below(reference, "w/"), "mae_official_full"),
        provenance=Provenance(),
        mask_ratio=float(cfg["mask_ratio"]),
    )
    return model, reference


# ------------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_computes_what_our_model_does(timm, kind, tmp_path):
    model = random_model(**KINDS[kind])
    written(MAE, model, tmp_path)
    proof = compare(MAE, model, tmp_path)
    assert proof.differences.keys() == ENCODED | ({"logits"} if model.has_head else set()) | (
        RECONSTRUCTED if model.decoder else set()
    )
    assert max(proof.differences.values()) <= TOLERANCE


@pytest.mark.parametrize("normalised", [True, False])
def test_both_sides_of_the_proof_give_the_values_of_the_reference(timm, normalised, tmp_path):
    model, reference = of_reference()
    model = replace(model, normalised_pixels=normalised)
    written(MAE, model, tmp_path)
    loss = reference["loss_norm" if normalised else "loss_raw"]
    for compute in (MAE.outputs, lambda model, _, *inputs: ours(model, *inputs)):
        found = compute(model, tmp_path, reference["images"], reference["noise"])
        np.testing.assert_allclose(found["predictions"], reference["pred"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["loss"], loss, rtol=0, atol=2e-6)


def test_vit_b_computes_the_same(timm, tmp_path):
    model = published_model("B/16", decoder=True)
    written(MAE, model, tmp_path)
    images_bchw, noise_bn = pictures(model, 1)
    found, expected = MAE.outputs(model, tmp_path, images_bchw, noise_bn), ours(model, images_bchw, noise_bn)
    assert found.keys() == expected.keys() == ENCODED | RECONSTRUCTED
    assert all(difference(expected[name], found[name]) <= TOLERANCE for name in found)


@pytest.mark.parametrize("kind", [dict(learned_positions=True), dict(decoder=True, pooling="mean", channels=1)])
def test_maect_without_class_row_computes_the_same(timm, kind, tmp_path):
    model = random_model(**kind)
    written(MAECT, model, tmp_path)
    proof = compare(MAECT, model, tmp_path)
    assert proof.differences.keys() == ENCODED
    assert max(proof.differences.values()) <= TOLERANCE


def test_a_learned_class_row_becomes_part_of_maects_class_token(tmp_path):
    model = random_model(learned_positions=True)
    encoder = model.params["encoder"]
    tensors = written(MAECT, model, tmp_path)
    assert np.abs(encoder["pos_embed"][0, 0]).min() > 0
    np.testing.assert_array_equal(tensors["pos_embed"], encoder["pos_embed"][:, 1:])
    np.testing.assert_array_equal(tensors["cls_token"], encoder["cls_token"] + encoder["pos_embed"][:, :1])


# ------------------------------------------------------------------------------------------------- names and settings


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ("mae_official_full", ["B16", "L16", "H14"]),
        ("mae_official_encoder", ["B16", "L16", "H14"]),
        ("maect_encoder", ["B16", "L16", "H16", "H14"]),
    ],
)
def test_published_sizes_have_the_names_and_shapes_of_the_reference(layout, sizes, monkeypatch):
    reference, found = constants("keys")[layout], {}
    monkeypatch.setattr("maect_jax.exchange.export.mae.write_weights", lambda _, tensors, __: found.update(tensors))
    monkeypatch.setattr("maect_jax.exchange.export.mae.write_config", lambda *_: None)
    for size in sizes:
        found.clear()
        model = weightless_model(f"{size[0]}/{size[1:]}", decoder=layout == "mae_official_full")
        (MAECT if layout == "maect_encoder" else MAE).write(model, None, {})
        assert {name: list(tensor.shape) for name, tensor in found.items()} == reference[size]


def test_a_full_file_gives_the_very_same_parameters_back(tmp_path):
    model = random_model(decoder=True)
    tree = from_layout(written(MAE, model, tmp_path), "mae_official_full")
    assert jax.tree.structure(tree) == jax.tree.structure(model.params)
    jax.tree.map(np.testing.assert_array_equal, tree, model.params)


def test_settings_hold_what_shapes_do_not_tell(tmp_path):
    written(MAE, random_model(decoder=True, mask_ratio=0.6, pooling="mean"), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings == {
        "img_size": 16,
        "patch_size": 4,
        "in_chans": 3,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 4,
        "mlp_ratio": 4,
        "num_classes": 0,
        "pooling": "mean",
        "decoder_embed_dim": 32,
        "decoder_depth": 2,
        "decoder_num_heads": 4,
        "mask_ratio": 0.6,
        "norm_pix_loss": True,
    }


def test_targets_that_are_not_known_are_not_stated(tmp_path):
    written(MAE, random_model(decoder=True, normalised_pixels=None), tmp_path)
    assert "norm_pix_loss" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("target", "kind"), [(MAE, dict()), (MAE, dict(decoder=True)), (MAECT, dict(learned_positions=True))]
)
def test_usage_runs_as_written(timm, target, kind, tmp_path, monkeypatch):
    model = random_model(mean=(0.1, 0.2, 0.3), std=(0.3, 0.2, 0.1), **kind)
    written(target, model, tmp_path)
    photograph().save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(target.usage(model), found)
    assert tuple(found["transform"].transforms[-1].mean) == model.mean
    expected = ours(model, found["image"].numpy(), pictures(model, 1)[1])
    for name in ENCODED:
        assert difference(expected[name], found[name].detach().numpy()) <= TOLERANCE


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("target", "kind", "message"),
    [
        (MAE, dict(decoder=True, classes=3), "--to mae: 'tune' has a decoder and is a classifier"),
        (MAE, dict(decoder=True, fc_norm=True), "--to mae: 'tune' has a decoder and is a classifier"),
        (MAECT, dict(classes=3), "--to maect: 'tune' is a classifier.*--to timm"),
        (MAECT, dict(fc_norm=True), "--to maect: 'tune' is a classifier.*--to timm"),
    ],
)
def test_what_the_files_can_not_hold_is_refused(target, kind, message):
    with pytest.raises(ConfigError, match=message):
        target.check(random_model(**kind))


def test_a_file_that_lacks_a_tensor_of_the_decoder_is_refused_in_one_line(timm, tmp_path):
    model = random_model(decoder=True)
    tensors = written(MAE, model, tmp_path)
    del tensors["mask_token"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing \(mask_token\)") as caught:
        MAE.outputs(model, tmp_path, *pictures(model))
    assert "\n" not in str(caught.value)


def test_the_noise_says_which_patches_are_kept(timm, tmp_path):
    model = random_model(decoder=True)
    written(MAE, model, tmp_path)
    images_bchw, noise_bn = pictures(model)
    one, other = (MAE.outputs(model, tmp_path, images_bchw, noise) for noise in (noise_bn, noise_bn[:, ::-1].copy()))
    assert difference(one["predictions"], other["predictions"]) > 100 * TOLERANCE
    assert difference(one["tokens"], other["tokens"]) == 0
