"""Folders for transformers load there without a word and compute what our models do; see test_transformers4.py."""

import dataclasses
import json
import logging
import sys
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image

from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.exchange.export.huggingface import HF_VIT, HF_VITMAE
from maect_jax.exchange.export.package import write_package
from maect_jax.exchange.export.proof import TOLERANCE, compare, difference, ours, pictures
from maect_jax.models.patches import position_table
from models import published_model, random_model

GREY = {"channels": 1, "mean": (0.5,), "std": (0.2,)}
# Target, class that transformers is to make, and what sets the model apart.
CASES = {
    "features": (HF_VIT, "ViTModel", {}),
    "grey, means, learned positions": (
        HF_VIT,
        "ViTModel",
        GREY | {"pooling": "mean", "learned_positions": True, "image_size": 24},
    ),
    "classifier": (HF_VIT, "ViTForImageClassification", {"classes": 3, "width": 32, "heads": 2, "depth": 3}),
    "encoder": (HF_VITMAE, "ViTMAEModel", {"learned_positions": True, "patch": 8, "image_size": 32}),
    "autoencoder": (HF_VITMAE, "ViTMAEForPreTraining", {"decoder": True, "pooling": "mean"}),
    "autoencoder of plain pixels": (
        HF_VITMAE,
        "ViTMAEForPreTraining",
        GREY | {"decoder": True, "normalised_pixels": False, "mask_ratio": 0.6, "learned_positions": True},
    ),
}
AUTO = {
    "ViTModel": transformers.AutoModel,
    "ViTMAEModel": transformers.AutoModel,
    "ViTForImageClassification": transformers.AutoModelForImageClassification,
    "ViTMAEForPreTraining": transformers.AutoModelForPreTraining,
}


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """(target, model, folder) of each case."""
    target, _, changes = CASES[request.param]
    model, folder = random_model(**changes), tmp_path_factory.mktemp("exported")
    target.check(model)
    target.write(model, folder, {"origin": "a test"})
    return target, model, folder


@pytest.fixture(scope="module")
def loaded(exported):
    """What transformers makes of the folder: the network, what it reports, and all that is said meanwhile."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        network, report = load(exported[2])
    logger.removeHandler(handler)
    return network, report, said + [str(warning.message) for warning in warned]


def load(folder):
    """The network of the Auto class for the folder, and what was missing or unexpected."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return AUTO[name].from_pretrained(folder, output_loading_info=True)


def test_auto_classes_find_every_tensor_and_no_other_and_warn_of_nothing(exported, loaded, request):
    network, report, said = loaded
    assert type(network).__name__ == CASES[request.node.callspec.params["exported"]][1]
    assert {"missing_keys", "unexpected_keys"} <= report.keys()
    assert not any(report.values()), report
    assert said == []
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert not network.training


def test_transformers_computes_what_our_model_does(exported):
    target, model, folder = exported
    differences = compare(target, model, folder).differences
    wanted = {"tokens", "features"}
    wanted |= {"logits"} if model.has_head else set()
    wanted |= {"predictions", "loss"} if model.decoder else set()
    assert differences.keys() == wanted
    assert max(differences.values()) <= TOLERANCE, differences


def test_vit_b_with_its_decoder_computes_what_our_model_does(tmp_path):
    model = published_model("B/16", decoder=True)
    HF_VITMAE.write(model, tmp_path, {})
    differences = compare(HF_VITMAE, model, tmp_path).differences
    assert differences.keys() == {"tokens", "features", "predictions", "loss"}
    assert max(differences.values()) <= TOLERANCE, differences


def test_outputs_are_quiet(exported, capfd):
    target, model, folder = exported
    capfd.readouterr()
    target.outputs(model, folder, *pictures(model))
    assert capfd.readouterr() == ("", "")


def test_lines_of_the_card_run_and_give_the_models_features(exported, tmp_path, monkeypatch):
    target, model, _ = exported
    folder = tmp_path / "export"
    write_package(model, target, folder, prove=False)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.jpg")
    monkeypatch.chdir(folder)
    lines: dict = {}
    exec(target.usage(model), lines)

    images_bchw = lines["inputs"]["pixel_values"].numpy()
    assert images_bchw.shape == (1, model.channels, model.image_size, model.image_size)
    expected = ours(model, images_bchw, np.zeros((1, model.encoder.grid**2), np.float32))
    if model.has_head:
        assert lines["name"] == f"LABEL_{expected['logits'].argmax()}"
    else:
        assert difference(expected["features"], lines["features"].numpy()) <= TOLERANCE
    if "patches" in lines:
        assert difference(expected["tokens"][:, 1:], lines["patches"].numpy()) <= TOLERANCE


def test_norms_have_the_published_epsilon(loaded):
    norms = [module for module in loaded[0].modules() if isinstance(module, torch.nn.LayerNorm)]
    assert norms and {norm.eps for norm in norms} == {1e-6}


def test_position_tables_are_not_those_of_a_model_from_scratch(exported, loaded):
    model, state = exported[1], loaded[0].state_dict()
    found = {key.split(".")[-1]: tensor[0].numpy() for key, tensor in state.items() if "pos" in key.split(".")[-1]}

    def fixed(width):
        return np.vstack([np.zeros(width), position_table(width, model.encoder.grid)])

    learned = model.params["encoder"].get("pos_embed")
    np.testing.assert_allclose(
        found["position_embeddings"], fixed(model.encoder.width) if learned is None else learned[0], atol=1e-7
    )
    assert ("decoder_pos_embed" in found) == (model.decoder is not None)
    if model.decoder:
        np.testing.assert_allclose(found["decoder_pos_embed"], fixed(model.decoder.width), atol=1e-7)


def test_pooler_gives_the_class_token_bit_for_bit(tmp_path):
    HF_VIT.write(random_model(), tmp_path, {})
    with torch.no_grad():
        found = load(tmp_path)[0](torch.randn(2, 3, 16, 16))
    assert torch.equal(found.pooler_output, found.last_hidden_state[:, 0])


def test_class_names_are_those_of_the_model(tmp_path):
    names = ("cat", "Хлеб", "cat")
    HF_VIT.write(dataclasses.replace(random_model(classes=3), classes=names), tmp_path, {})
    config = load(tmp_path)[0].config
    assert config.num_labels == 3
    assert config.id2label == dict(enumerate(names))
    assert set(config.label2id) == set(names)


def test_settings_of_the_decoder_are_written(tmp_path):
    model = random_model(decoder=True, normalised_pixels=None, mask_ratio=0.6)
    HF_VITMAE.write(model, tmp_path, {})
    config = load(tmp_path)[0].config
    assert (config.mask_ratio, config.norm_pix_loss) == (0.6, False)
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (32, 2)
    assert (config.decoder_num_attention_heads, config.decoder_intermediate_size) == (4, 128)


def test_encoder_without_decoder_masks_nothing(tmp_path):
    HF_VITMAE.write(random_model(), tmp_path, {})
    with torch.no_grad():
        found = load(tmp_path)[0](torch.randn(1, 3, 16, 16))
    assert found.last_hidden_state.shape == (1, 1 + 16, 48)


def test_files_of_a_shorter_type_compute_in_float32(exported, tmp_path):
    target, model, folder = exported
    target.write(model, tmp_path, {})
    file = tmp_path / "model.safetensors"
    short = {name: tensor.bfloat16() for name, tensor in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(short, file, {"format": "pt"})
    found = target.outputs(model, tmp_path, *pictures(model))
    assert {x.dtype for x in found.values()} == {np.dtype("float32")}
    assert difference(found["tokens"], target.outputs(model, folder, *pictures(model))["tokens"]) > TOLERANCE


def test_header_of_the_weights_holds_the_texts(exported):
    with safetensors.safe_open(exported[-1] / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "origin": "a test"}


@pytest.mark.parametrize(
    "target, changes, mend",
    [
        (HF_VIT, {"fc_norm": True}, "no norm after its last block, .*use --to timm"),
        (HF_VITMAE, {"fc_norm": True}, "no norm after its last block, .*use --to timm"),
        (HF_VIT, {"classes": 2, "pooling": "mean"}, "mean of the patch tokens.*use --to timm"),
        (HF_VITMAE, {"classes": 2}, "no place for the head.*use --to timm, or --to hf-vit"),
    ],
)
def test_what_transformers_can_not_express_is_refused_with_the_way_out(target, changes, mend):
    with pytest.raises(ConfigError, match=mend) as caught:
        target.check(random_model(**changes))
    assert "\n" not in str(caught.value) and f"--to {target.name}: " in str(caught.value)


def test_second_norm_is_refused():
    model = random_model()
    model = dataclasses.replace(model, params=model.params | {"fc_norm": model.params["encoder"]["norm"]})
    for target in (HF_VIT, HF_VITMAE):
        with pytest.raises(
            ConfigError, match=f"--to {target.name}: 'tune' has a norm after the last block and one after"
        ):
            target.check(model)


def test_folder_whose_tensors_do_not_fit_is_refused_in_one_line(tmp_path):
    model = random_model(classes=2)
    HF_VIT.write(model, tmp_path, {})
    headless = dataclasses.replace(model, params={"encoder": model.params["encoder"]})
    with pytest.raises(CheckpointError, match=r"2 missing \(pooler.*2 unexpected \(classifier") as caught:
        HF_VIT.outputs(headless, tmp_path, *pictures(model))
    assert "\n" not in str(caught.value)


def test_library_that_can_not_be_imported_is_told(tmp_path, monkeypatch):
    model = random_model()
    HF_VIT.write(model, tmp_path, {})
    monkeypatch.setitem(sys.modules, "transformers.models.vit.modeling_vit", None)
    proof = compare(HF_VIT, model, tmp_path)
    assert proof.differences is None
    assert proof.reason.startswith("transformers.models.vit.modeling_vit can not be imported")
