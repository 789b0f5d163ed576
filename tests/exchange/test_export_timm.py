"""Exports to timm, and the proof of any export: what timm computes from the files is what our modules compute."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from needed import needed
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from golden import constants
from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.exchange.export.proof import TOLERANCE, compare, difference, ours, pictures
from maect_jax.exchange.export.target import load_library, write_weights
from maect_jax.exchange.export.timm import TIMM, architecture_of, crop_pct, empty_module, tensors_of
from maect_jax.exchange.provenance import Provenance
from maect_jax.models.vit import SIZES
from models import photograph, published_model, random_model, weightless_model

KINDS = {
    "class token": dict(),
    "mean": dict(pooling="mean"),
    "decoder left out": dict(decoder=True),
    "one channel, other shape": dict(channels=1, width=64, depth=3, heads=2, patch=8, image_size=24),
    "linear probe on the mean": dict(classes=5, pooling="mean"),
    "fine-tuned": dict(classes=7, fc_norm=True, learned_positions=True),
    "fine-tuned, class token": dict(classes=7, learned_positions=True),
    "fine-tuned, without its head": dict(fc_norm=True, learned_positions=True),
}


@pytest.fixture(scope="module")
def timm():
    return needed("timm")


def written(model, folder, **metadata):
    """The folder, with the model in it."""
    TIMM.check(model)
    TIMM.write(model, folder, metadata)
    return folder


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


def tokens_and_result(module, images_bchw):
    torch = load_library("torch")
    with torch.no_grad():
        images = torch.from_numpy(images_bchw)
        return module.eval().forward_features(images).numpy(), module(images).numpy()


def assert_file_in_module(folder, module):
    """Every tensor of the file, and no other, is in the module, bit by bit."""
    tensors, state = load_file(folder / "model.safetensors"), module.state_dict()
    assert tensors.keys() == state.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(state[name].numpy(), tensor, err_msg=name)


# ------------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("kind", KINDS)
def test_timm_computes_what_our_model_does_however_it_is_loaded(timm, kind, tmp_path, caplog):
    model = random_model(**KINDS[kind])
    settings = settings_of(written(model, tmp_path))
    weights, classes = tmp_path / "model.safetensors", settings["num_classes"]
    images_bchw, noise_bn = pictures(model)
    expected = ours(model, images_bchw, noise_bn)
    proven = TIMM.outputs(model, tmp_path, images_bchw, noise_bn)
    assert proven.keys() == {"tokens", "features"} | ({"logits"} if model.has_head else set())
    assert all(difference(expected[name], proven[name]) <= TOLERANCE for name in proven)
    with caplog.at_level("WARNING"):
        modules = (
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True),
            timm.create_model(
                settings["architecture"], checkpoint_path=weights, num_classes=classes, **settings["model_args"]
            ),
        )
    assert not caplog.records
    for module in modules:
        assert_file_in_module(tmp_path, module)
        tokens, result = tokens_and_result(module, images_bchw)
        assert difference(expected["tokens"], tokens) <= TOLERANCE
        assert difference(expected["logits" if model.has_head else "features"], result) <= TOLERANCE


def test_vit_b_computes_the_same(timm, tmp_path):
    model = published_model("B/16", classes=10)
    written(model, tmp_path)
    assert architecture_of(model) == ("vit_base_patch16_224", {})
    module = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_file_in_module(tmp_path, module)
    images_bchw, noise_bn = pictures(model, 1)
    expected = ours(model, images_bchw, noise_bn)
    tokens, logits = tokens_and_result(module, images_bchw)
    assert difference(expected["tokens"], tokens) <= TOLERANCE
    assert difference(expected["logits"], logits) <= TOLERANCE


def test_mean_pooling_leaves_the_class_token_out(timm, tmp_path):
    model = random_model(pooling="mean")
    written(model, tmp_path)
    images_bchw, _ = pictures(model)
    tokens, features = tokens_and_result(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), images_bchw)
    np.testing.assert_allclose(features, tokens[:, 1:].mean(axis=1), rtol=0, atol=1e-6)
    assert np.abs(features - tokens.mean(axis=1)).max() > 1e-3


# ---------------------------------------------------------------------------------------------------- names and facts


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_timms_names_and_shapes(timm, size):
    model = weightless_model(size)
    name, arguments = architecture_of(model)
    sizes = {"S/16": "small", "B/16": "base", "L/16": "large", "H/16": "huge", "H/14": "huge"}
    assert name == f"vit_{sizes[size]}_patch{14 if size[0] == 'H' else 16}_224"
    assert arguments == ({"patch_size": 16} if size == "H/16" else {})
    shapes = {name: tensor.shape for name, tensor in tensors_of(model).items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in empty_module(model).state_dict().items()}


@pytest.mark.parametrize("size", ["B16", "L16", "H14"])
def test_published_sizes_have_the_names_and_shapes_of_the_reference(size):
    model = weightless_model(f"{size[0]}/{size[1:]}", decoder=True)
    shapes = {name: list(tensor.shape) for name, tensor in tensors_of(model).items()}
    assert shapes == constants("keys")["timm_mae"][size]


def test_norms_divide_as_ours_do(timm):
    module = empty_module(random_model(classes=3, fc_norm=True))
    epsilons = [part.eps for part in module.modules() if isinstance(part, load_library("torch").nn.LayerNorm)]
    assert epsilons == [1e-6] * 5  # two blocks, one after pooling


def test_a_narrower_mlp_is_one_of_the_arguments(timm):
    model = random_model()
    module = empty_module(replace(model, encoder=model.encoder.clone(mlp_ratio=2)))
    assert module.blocks[0].mlp.fc1.weight.shape == (96, 48)


def test_a_mask_token_is_never_written(tmp_path):
    folder = written(random_model(decoder=True), tmp_path)
    assert not [name for name in load_file(folder / "model.safetensors") if name.startswith(("mask", "decoder"))]


def test_pictures_are_prepared_as_ours(timm, tmp_path):
    facts = dict(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), resize_ratio=1.3, classes=2)
    settings = settings_of(written(random_model(image_size=20, **facts), tmp_path))
    found = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}"))
    assert tuple(found["input_size"]) == (3, 20, 20)
    assert (tuple(found["mean"]), tuple(found["std"])) == (facts["mean"], facts["std"])
    assert found["interpolation"] == "bicubic"
    resize, crop, *_ = timm.data.create_transform(**found).transforms
    assert (resize.size, tuple(crop.size)) == (26, (20, 20))
    assert "label_names" not in settings


@pytest.mark.parametrize("ratio", [1.0, 256 / 224, 1.05, 1.1, 1.25, 4 / 3])
def test_timm_resizes_to_the_pixels_that_we_do(ratio):
    model = random_model(resize_ratio=ratio)
    for size in range(4, 800, 4):
        resized = replace(model, encoder=model.encoder.clone(image_size=size))
        assert math.floor(size / crop_pct(resized)) == round(size * ratio), size


def test_class_names_and_licence_are_carried_forward(timm, tmp_path):
    provenance = Provenance(license="CC-BY-NC-4.0")
    written(replace(random_model(classes=2, provenance=provenance), classes=("cat", "é")), tmp_path)
    config = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).pretrained_cfg
    assert (list(config["label_names"]), config["license"]) == (["cat", "é"], "CC-BY-NC-4.0")


@pytest.mark.parametrize("kind", ["mean", "one channel, other shape", "fine-tuned"])
def test_usage_runs_as_written(timm, kind, tmp_path, monkeypatch):
    model = random_model(**KINDS[kind])
    written(model, tmp_path)
    photograph().save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(TIMM.usage(model), found)
    expected = ours(model, found["image"].numpy(), pictures(model, 1)[1])
    result = "logits" if model.has_head else "features"
    assert difference(expected[result], found[result].detach().numpy()) <= TOLERANCE
    assert difference(expected["tokens"], found["tokens"].detach().numpy()) <= TOLERANCE


def test_two_norms_are_refused():
    with pytest.raises(ConfigError, match=r"--to timm: 'tune' has a norm after the last block and one after pooling"):
        TIMM.check(replace(random_model(fc_norm=True), encoder=random_model().encoder))


# -------------------------------------------------------------------------------------------------------------- files


def test_equal_models_give_equal_bytes_with_what_is_said_in_the_header(tmp_path):
    model = random_model()
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        found.append((written(model, tmp_path / name, note="é") / "model.safetensors").read_bytes())
    assert found[0] == found[1]
    with safe_open(tmp_path / "a" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}


def test_views_are_written_by_their_values(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {"turned": base.T, "every second": base[::2, ::2], "same": np.broadcast_to(base[0], (3, 6))}
    write_weights(tmp_path, views, {})
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, views.pop(name))
    assert not views


@pytest.mark.parametrize(
    ("change", "message"), [("rename", "1 missing.*norm.bias.*1 unexpected.*norm.bios"), ("add", "1 unexpected")]
)
def test_tensors_that_timm_has_no_place_for_are_refused_in_one_line(timm, change, message, tmp_path):
    model = random_model()
    file = written(model, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["norm.bios"] = tensors.pop("norm.bias") if change == "rename" else tensors["norm.bias"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message) as caught:
        TIMM.outputs(model, tmp_path, *pictures(model))
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- proof


def test_pictures_follow_from_the_shape_alone():
    first, second = random_model(seed=1), random_model(seed=2, classes=3)
    for one, other in zip(pictures(first), pictures(second)):
        np.testing.assert_array_equal(one, other)
    images_bchw, noise_bn = pictures(random_model(channels=1, image_size=32))
    assert images_bchw.shape == (2, 1, 32, 32) and noise_bn.shape == (2, 64)
    assert images_bchw.dtype == noise_bn.dtype == np.float32
    assert 0.5 < images_bchw.std() < 1.5 and np.abs(images_bchw).max() <= 2
    assert all(len(set(row)) == 64 for row in noise_bn)
    assert (noise_bn[0] != noise_bn[1]).any() and (images_bchw[0] != images_bchw[1]).any()


def test_a_changed_bias_fails_the_proof(timm, tmp_path):
    model = random_model(seed=1)
    tensors = load_file(written(model, tmp_path) / "model.safetensors")
    assert max(compare(TIMM, model, tmp_path).differences.values()) <= TOLERANCE
    tensors["blocks.1.mlp.fc2.bias"][3] += 0.01
    save_file(tensors, tmp_path / "model.safetensors")
    assert compare(TIMM, model, tmp_path).differences["tokens"] > 100 * TOLERANCE


def test_not_a_number_fails_the_proof():
    assert not difference(np.array([1.0, np.nan]), np.ones(2)) <= TOLERANCE
    assert not difference(np.ones(2), np.array([1.0, np.nan])) <= TOLERANCE
    assert difference(np.array([1.0, -4.0]), np.array([1.0, -5.0])) == 0.2


def test_without_the_library_the_proof_says_so(monkeypatch, tmp_path):
    model = random_model()
    monkeypatch.setitem(sys.modules, "timm", None)
    proof = compare(TIMM, model, written(model, tmp_path))
    assert proof.differences is None
    assert proof.reason.startswith("timm can not be imported (ModuleNotFoundError: ")


def test_a_library_whose_import_fails_is_a_missing_one_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "unfit_library.py").write_text("raise RuntimeError('operator nms does not exist\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError) as caught:
        load_library("unfit_library")
    assert str(caught.value) == "unfit_library can not be imported (RuntimeError: operator nms does not exist)"


def test_outputs_of_another_shape_are_refused(tmp_path):
    model = random_model()

    class Other:
        loader = "other"

        def outputs(self, *_):
            return {"tokens": np.zeros((2, 16, 48), np.float32)}

    with pytest.raises(CheckpointError, match=r"other: tokens of .* have the shape \(2, 16, 48\), not \(2, 17, 48\)"):
        compare(Other(), model, tmp_path)
