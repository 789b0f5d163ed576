"""Classifiers for an encoder: folded as PyTorch computes them, on the published feature, refused where they misfit."""

import dataclasses
import hashlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.exchange.export.proof import difference, ours, pictures
from maect_jax.exchange.heads import find_head, folded, open_head
from maect_jax.exchange.mapping import to_layout
from maect_jax.exchange.provenance import Provenance
from maect_jax.finetuning.model import classifier_of
from maect_jax.models.patches import patchify
from maect_jax.results.record import weights_hash
from maect_jax.training.checkpoint import Checkpoints
from models import random_model
from torch_files import torch
from weight_files import refusal

CLASSES = ["a", "<b>", "c", "d", "e"]
OWN = Provenance("mit", "stated", stage="tune", step=7, code_version="0.1.0")


@pytest.fixture(scope="module")
def model():
    return random_model(decoder=True, provenance=OWN, mean=(0.5,) * 3)


def random_norm_and_linear(width: int, classes: int = 5):
    """PyTorch's layers as MAE-CT's probes have them, in float64, every value random."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(width, eps=1e-5, affine=False).double().eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(1e-6, 2)
    return norm, torch.nn.Linear(width, classes).double()


def published(path, norm, linear, **changes):
    """A file as MAE-CT publishes its probes."""
    state = {f"layer.1.{name}": x for name, x in norm.state_dict().items()}
    state |= {f"layer.2.{name}": x for name, x in linear.state_dict().items()}
    state |= {f"norm.{name}": x for name, x in norm.state_dict().items()}
    state = {name: x.float() if x.is_floating_point() else x for name, x in state.items()} | changes
    torch.save({"state_dict": state, "ctor_kwargs": {"input_shape": (norm.num_features,)}}, path)
    return path


def outputs(model) -> dict[str, np.ndarray]:
    return ours(model, *pictures(model))


def note_for(model, **changes) -> dict:
    """The note on a head of `model`; see `evaluation.kept_heads`."""
    names = ("width", "depth", "heads", "patch", "image_size", "mlp_ratio")
    note = {"preset": "maect-linear", "feature": "mean", "epsilon": 1e-5, "classes": CLASSES, "trained_on": "pets"}
    note |= {"encoder": {name: getattr(model.encoder, name) for name in names}, "protocol": {"epochs": 3}}
    note |= {"encoder_sha256": weights_hash(model.params["encoder"]), "license": "unstated"}
    return note | {"mean": [0.4] * 3, "std": [0.3] * 3, "resize_ratio": 1.5} | changes


def kept_probe(path, model, tensors=None, **changes):
    """A probe as an evaluation keeps it."""
    random = np.random.default_rng(3)
    width = model.encoder.width
    drawn = {"mean": random.normal(size=width), "var": random.uniform(0.1, 2, width)}
    drawn |= {"kernel": random.normal(size=(width, 5)), "bias": random.normal(size=5)}
    drawn = {name: x.astype(np.float32) for name, x in drawn.items()} | (tensors or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(drawn, path, {"maect_jax": json.dumps(note_for(model, **changes))})
    return path


def kept_finetuning(folder, model, pooling: str, **changes):
    """A fine-tuning as it is left: its classifier, and the weights of update 12."""
    classifier = classifier_of(model.encoder, len(CLASSES), pooling)
    patches_bnp = jnp.zeros((1, model.encoder.grid**2, model.channels * model.encoder.patch**2))
    shapes = jax.eval_shape(lambda: classifier.init(jax.random.key(0), patches_bnp)["params"])
    random = np.random.default_rng(4)
    params = jax.tree.map(lambda x: (0.3 * random.normal(size=x.shape)).astype(np.float32), shapes)
    checkpoints = Checkpoints(folder / "chosen")
    checkpoints.save(12, {"params": params}, {"stage": "finetune-1pct"})
    checkpoints.close()
    protocol = {"name": "finetune-1pct", "ema_factor": 0.99}
    note = note_for(model, preset="finetune-1pct", feature=pooling, protocol=protocol, step=12)
    (folder / "classifier.json").write_text(json.dumps(note | {"sha256": weights_hash(params)} | changes))
    return classifier, params


# -------------------------------------------------------------------------------------------------------------- folding


@pytest.mark.parametrize("width", [48, 768])
def test_a_folded_probe_is_pytorchs_norm_and_linear_map(width):
    norm, linear = random_norm_and_linear(width)
    x = torch.randn(64, width, dtype=torch.float64) + norm.running_mean
    expected = linear(norm(x)).detach().numpy()
    probe = {"mean": norm.running_mean, "var": norm.running_var, "kernel": linear.weight.T, "bias": linear.bias}
    head = folded({name: x.detach().numpy() for name, x in probe.items()}, norm.eps)
    assert {leaf.dtype for leaf in head.values()} == {np.dtype(np.float32)}
    assert difference(x.numpy() @ head["kernel"].astype(np.float64) + head["bias"], expected) <= 1e-6


@pytest.mark.parametrize(
    "facts, file, pooling",
    [
        ({"width": 48}, "maect_large16_probe.th", "cls"),
        ({"width": 768, "depth": 1, "heads": 12}, "maect_base16_probe.th", "mean"),
        ({"width": 768, "depth": 1, "heads": 12}, "mae_reimpl_base16_probe.th", "cls"),
        ({"width": 768, "depth": 1, "heads": 12, "name": "mae_reimpl_base16"}, "probe.th", "cls"),
    ],
)
def test_a_published_probe_is_on_the_feature_it_was_trained_on(tmp_path, facts, file, pooling):
    model = random_model(provenance=OWN, **facts)
    norm, linear = random_norm_and_linear(model.encoder.width)
    found = open_head(published(tmp_path / file, norm, linear), model)
    assert found.pooling == pooling and found.classes == ()
    computed = outputs(found)
    tokens_bnd = torch.tensor(outputs(model)["tokens"], dtype=torch.float64)
    feature_bd = tokens_bnd[:, 0] if pooling == "cls" else tokens_bnd[:, 1:].mean(dim=1)
    assert difference(computed["logits"], linear(norm(feature_bd)).detach().numpy()) <= 2e-6


def test_a_published_probe_brings_its_licence_and_its_name(tmp_path, model):
    path = published(tmp_path / "maect_tiny_probe.th", *random_norm_and_linear(48))
    found = open_head(path, model).provenance
    assert found.license == "none stated" and "maect_tiny_probe.th" in found.license_source
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    origin = {"name": path.name, "sha256": sha256, "layout": "maect_probe", "license": "none stated"}
    assert found.derived_from == (origin,)
    assert (found.stage, found.step) == ("tune", 7), "the encoder is the one it was"


# ---------------------------------------------------------------------------------------------------------- kept probes


@pytest.mark.parametrize("feature", ["cls", "mean"])
@pytest.mark.parametrize("epsilon", [1e-5, 0.0])
def test_a_kept_probe_is_on_the_feature_that_its_note_names(tmp_path, model, feature, epsilon):
    path = kept_probe(tmp_path / "probe.safetensors", model, feature=feature, epsilon=epsilon)
    found = open_head(path, model)
    computed, probe = outputs(found), safetensors.numpy.load_file(path)
    probe = {name: x.astype(np.float64) for name, x in probe.items()}
    tokens_bnd = computed["tokens"].astype(np.float64)
    feature_bd = tokens_bnd[:, 0] if feature == "cls" else tokens_bnd[:, 1:].mean(axis=1)
    normal_bd = (feature_bd - probe["mean"]) / np.sqrt(probe["var"] + epsilon)
    assert difference(computed["logits"], normal_bd @ probe["kernel"] + probe["bias"]) <= 2e-6
    assert found.classes == tuple(CLASSES) and found.decoder is not None
    assert (found.mean, found.std, found.resize_ratio) == ((0.4,) * 3, (0.3,) * 3, 1.5)
    assert found.provenance.license == "mit" and found.provenance.derived_from[0]["layout"] == "maect_jax_probe"
    assert "head" not in model.params and model.pooling == "cls", "what was given stays as it was"


def test_the_stricter_licence_stays(tmp_path, model):
    path = kept_probe(tmp_path / "probe.safetensors", model, license="CC-BY-NC-4.0")
    assert open_head(path, model).provenance.license == "CC-BY-NC-4.0"
    strict = dataclasses.replace(model, provenance=Provenance("none stated", "MAE-CT"))
    found = open_head(path, strict).provenance
    assert (found.license, found.license_source) == ("none stated", "MAE-CT")


@pytest.mark.parametrize("feature", ["cls", "mean"])
def test_only_the_mean_goes_through_fc_norm(tmp_path, feature):
    model = random_model(fc_norm=True)
    sha256 = weights_hash(model.params["encoder"] | {"fc_norm": model.params["fc_norm"]})
    path = kept_probe(tmp_path / "probe.safetensors", model, feature=feature, encoder_sha256=sha256)
    found = open_head(path, model)
    assert ("fc_norm" in found.params) == (feature == "mean")
    computed = outputs(found)
    expected = computed["tokens"][:, 0] if feature == "cls" else outputs(model)["features"]
    assert difference(computed["features"], expected) <= 1e-6


# --------------------------------------------------------------------------------------------------------- fine-tunings


@pytest.mark.parametrize("feature", ["cls", "mean", "fc_norm"])
def test_a_fine_tuning_takes_the_place_of_the_encoder(tmp_path, model, feature, monkeypatch):
    classifier, params = kept_finetuning(tmp_path / "finetune-1pct_0", model, feature)
    monkeypatch.chdir(tmp_path)
    found = open_head("finetune-1pct_0", model)
    images_bchw, noise_bn = pictures(model)
    patches_bnp = patchify(jnp.asarray(images_bchw.transpose(0, 2, 3, 1)), model.encoder.patch)
    with jax.default_matmul_precision("highest"):
        expected, _ = jax.jit(classifier.apply)({"params": params}, patches_bnp)
    assert difference(ours(found, images_bchw, noise_bn)["logits"], np.asarray(expected)) <= 1e-6
    assert found.encoder.learned_positions and found.encoder.final_norm == (feature != "fc_norm")
    assert (found.decoder, found.pooling) == (None, "cls" if feature == "cls" else "mean")
    assert found.params.keys() == params.keys() and found.classes == tuple(CLASSES)
    origin = found.provenance
    assert (origin.stage, origin.step, origin.average) == ("finetune-1pct", 12, "exponential, 0.99")
    head, encoder = origin.derived_from
    assert (head["name"], head["layout"]) == ("finetune-1pct_0", "maect_jax_finetuned")
    assert head["sha256"] == weights_hash(params)
    assert (encoder["name"], encoder["stage"], encoder["step"]) == ("tune", "tune", 7)
    assert encoder["sha256"] == weights_hash(model.params["encoder"]) and origin.license == "mit"


def test_the_chosen_checkpoint_may_be_named_and_no_other(tmp_path, model):
    _, params = kept_finetuning(tmp_path, model, "cls")
    found = open_head(tmp_path / "chosen" / "12", model)
    np.testing.assert_array_equal(found.params["head"]["kernel"], params["head"]["kernel"])
    other = tmp_path / "chosen" / "6"
    other.mkdir()
    assert "is not the epoch that was chosen; give" in refusal(open_head, other, ConfigError, model=model)


def test_a_fine_tuning_that_is_not_what_its_note_says_is_refused(tmp_path, model):
    cases = {
        "does not hold the weights that were chosen": {"sha256": "0" * 64},
        "is of another architecture": {"classes": CLASSES[:4]},
        "was trained on other weights": {"encoder_sha256": "0" * 64},
        "is on the feature 'cls+mean', which no fine-tuning has": {"feature": "cls+mean"},
        "can not be read": {"step": 13},
    }
    for number, (words, changes) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        kept_finetuning(folder, model, "fc_norm", **changes)
        with pytest.raises(CheckpointError) as error:
            open_head(folder, model)
        text = str(error.value)
        assert words in text and text.isprintable() and text.startswith(str(folder)), text


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_head_of_another_encoder_is_refused_with_the_mend(tmp_path, model):
    shape = note_for(model)["encoder"]
    cases = {
        "is for an encoder with width 64; 'tune' has 48: give the --weights": {"encoder": shape | {"width": 64}},
        "with image_size 32; 'tune' has 16: give --image-size=32": {"encoder": shape | {"image_size": 32}},
        "with heads 2; 'tune' has 4: give --heads=2": {"encoder": shape | {"heads": 2}},
        "was trained on other weights (SHA-256 abcabcabcabc…)": {"encoder_sha256": "abc" * 20},
        "is on the feature 'cls@last4+mean', which no exported form has": {"feature": "cls@last4+mean"},
    }
    for words, changes in cases.items():
        path = kept_probe(tmp_path / "probe.safetensors", model, **changes)
        assert words in refusal(open_head, path, model=model)
    path = published(tmp_path / "probe.th", *random_norm_and_linear(64))
    assert "is a head on 64 channels; 'tune' has width 48: give" in refusal(open_head, path, model=model)
    path = published(tmp_path / "probe.th", *random_norm_and_linear(48))
    assert "with a norm after its last block" in refusal(open_head, path, model=random_model(fc_norm=True))


def test_a_file_without_a_head_is_refused_with_what_to_give(tmp_path, model):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    assert "holds no head; give a probe that" in refusal(open_head, tmp_path / "a.pth", model=model)
    tensors = to_layout({"encoder": model.params["encoder"]}, "timm_mae", patch=4, grid=4)
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "encoder.safetensors")
    assert "holds an encoder; give it as --weights" in refusal(open_head, tmp_path / "encoder.safetensors", model=model)
    assert "is no complete fine-tuning: it has no classifier.json" in refusal(open_head, tmp_path, model=model)
    assert "can not be read" in refusal(open_head, tmp_path / "nothing", model=model)


def test_tensors_that_are_no_probe_are_refused(tmp_path, model):
    path = tmp_path / "probe.safetensors"
    bad = {"bias": np.zeros(4, np.float32)}, {"mean": np.zeros((48, 1), np.float32)}, {"kernel": np.float32([1, 2])}
    for tensors in bad:
        assert "do not fit each other" in refusal(open_head, kept_probe(path, model, tensors), model=model)
    var = np.ones(48, np.float32)
    bad = {"var": -var}, {"var": 0 * var, "epsilon": 0.0}, {"mean": np.nan * var}, {"bias": np.zeros(5, np.int32)}
    for tensors in bad:
        changes = {"epsilon": tensors.pop("epsilon")} if "epsilon" in tensors else {}
        text = refusal(open_head, kept_probe(path, model, tensors, **changes), model=model)
        assert "no finite numbers" in text or "holds NaN" in text
    norm, linear = random_norm_and_linear(48)
    path = published(tmp_path / "probe.th", norm, linear, **{"norm.running_mean": torch.ones(48)})
    assert "norm.running_mean differs from the tensor that it repeats" in refusal(open_head, path, model=model)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        "{}",
        '{"feature": ["cls"]}',
        '{"epsilon": NaN}',
        '{"epsilon": "1e-5"}',
        '{"step": 1.5}',
        '{"encoder": {"width": "48"}}',
        '{"encoder": {}}',
        '{"protocol": []}',
    ],
    ids=lambda text: text[:20],
)
def test_a_note_that_is_nonsense_is_refused_in_one_line(tmp_path, model, text):
    probe, folder = kept_probe(tmp_path / "probe.safetensors", model), tmp_path / "finetuned"
    folder.mkdir()
    if text.startswith('{"'):
        text = json.dumps(note_for(model) | json.loads(text))
    safetensors.numpy.save_file(safetensors.numpy.load_file(probe), probe, {"maect_jax": text})
    (folder / "classifier.json").write_text(text)
    for path, named in ((probe, probe), (folder, folder / "classifier.json")):
        with pytest.raises(CheckpointError, match="the note on its head is missing or damaged") as error:
            open_head(path, model)
        assert str(error.value).startswith(str(named)) and str(error.value).isprintable()


def test_names_that_do_not_count_the_classes_are_left_out(tmp_path, model):
    path = kept_probe(tmp_path / "probe.safetensors", model, classes=CLASSES[:4], mean=[0.1], resize_ratio=99)
    found = open_head(path, model)
    assert (found.classes, found.mean, found.resize_ratio) == ((), model.mean, model.resize_ratio)


# -------------------------------------------------------------------------------------------------------------- finding


def test_the_newest_head_on_these_weights_is_found(tmp_path, model):
    old = kept_probe(tmp_path / "heads" / "tune" / "old.safetensors", model)
    new = kept_probe(tmp_path / "heads" / "pretrain" / "new.safetensors", model)
    other = kept_probe(tmp_path / "heads" / "tune" / "other.safetensors", model, encoder_sha256="0" * 64)
    joined = kept_probe(tmp_path / "heads" / "tune" / "joined.safetensors", model, feature="cls+mean")
    for age, path in enumerate((joined, other, new, old)):
        os.utime(path, (1000 - age, 1000 - age))
    assert find_head(tmp_path, "probe", model) == new
    for name, age in (("finetune-1pct_0", 5), ("mae-finetune_1", 9)):
        folder = tmp_path / "finetune" / name
        folder.mkdir(parents=True)
        (folder / "classifier.json").write_text(json.dumps(note_for(model, feature="cls", step=3)))
        os.utime(folder / "classifier.json", (age, age))
    (tmp_path / "finetune" / "interrupted").mkdir()
    assert find_head(tmp_path, "finetuned", model) == tmp_path / "finetune" / "mae-finetune_1"


def test_a_run_without_heads_is_told_how_to_make_one(tmp_path, model):
    for kind, evaluation in (("probe", "linear"), ("finetuned", "finetune")):
        with pytest.raises(ConfigError) as error:
            find_head(tmp_path, kind, model)
        command = f"python -m maect_jax evaluate --weights {tmp_path} --only {evaluation}"
        assert f"--head {kind}: " in str(error.value) and command in str(error.value)
