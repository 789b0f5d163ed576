"""What an evaluation keeps of its classifiers is the classifier it measured, picture for picture."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from etils import epath

from maect_jax.data.sources.base import ArraySource
from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.evaluation import on_pictures
from maect_jax.evaluation.kept_heads import keep_probe
from maect_jax.evaluation.probes import linear
from maect_jax.evaluation.probes.linear_heads import PRESETS
from maect_jax.evaluation.protocols import EVALUATIONS
from maect_jax.evaluation.suite import Place, make_task
from maect_jax.evaluation.task import Settings, Weights
from maect_jax.exchange.export.package import write_package
from maect_jax.exchange.export.proof import difference, ours
from maect_jax.exchange.export.targets import TARGETS
from maect_jax.exchange.heads import find_head, open_head
from maect_jax.exchange.model import Model
from maect_jax.exchange.provenance import Provenance
from maect_jax.finetuning.recipes import RECIPES
from maect_jax.training.checkpoint import read_meta
from maect_jax.training.stop import StopRequest
from small import encoder_of, one_device

ENCODER = encoder_of(dict(img_size=16, patch_size=4, dim=16, depth=2, heads=2))
CLASSES = ("left", "<i>right", "above")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
MIT = Provenance("mit", "stated", stage="tune", step=3, code_version="0.1.0")


def pictures(name, count, seed):
    """A bright half on noise; which half is the class."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (count, 16, 16, 3))
    labels = np.arange(count) % 3
    for image, label in zip(images, labels):
        bright = (image[:, :, :2], image[:, 4:12], image[:8])[label]
        bright += 60
    return ArraySource(name, images.astype(np.uint8), labels.astype(np.int32), CLASSES)


TRAIN, TEST = pictures("data/train", 96, 0), pictures("data/test", 60, 1)


@pytest.fixture(scope="module")
def params():
    started = ENCODER.init(jax.random.key(0), jnp.zeros((1, 16, 48)))["params"]
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), started)


def task_of(params, folder, *, pooling="mean", leader=True, **settings):
    weights = Weights("tune, raw", ENCODER, lambda: params, pooling, MEAN, STD, 1.0, 3, 0, {}, provenance=MIT)
    usual = {"batch": 16, "probe_batch": 32, "finetune_epochs": 1, "finetune_batch": 16, "finetune_base_lr": 0.02}
    place = Place(one_device(), epath.Path(folder), StopRequest(), lambda text: None, leader)
    return make_task(weights, TRAIN, TEST, Settings(**usual | settings), place)


def model_of(params, **changes):
    facts = {"name": "tiny", "encoder": ENCODER, "provenance": Provenance("unstated", "trained from scratch")}
    return Model(params={"encoder": jax.tree.map(np.asarray, params)}, **facts | changes)


def logits_of(model):
    images_bchw = ((TEST.images / 255 - model.mean) / model.std).transpose(0, 3, 1, 2).astype(np.float32)
    return ours(model, images_bchw, np.zeros((len(TEST), 16), np.float32))["logits"]


@pytest.fixture(scope="module")
def probed(params, tmp_path_factory):
    """(folder, task, measurements) after a probe on the patch mean, epsilon 1e-5, and one on the class token, 1e-6."""
    folder = tmp_path_factory.mktemp("probed")
    found = {}
    for preset, epochs in (("maect", 6), ("mae", 40)):
        task = task_of(params, folder, preset=preset, probe_epochs=epochs)
        found[f"{preset}-linear"] = task, list(EVALUATIONS["linear"](task))
    return folder, found


@pytest.fixture(scope="module")
def finetuned(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuned")
    task = task_of(params, folder, preset="mae")
    plain = dataclasses.replace(RECIPES["mae-finetune"]["B/16"], rand_augment=None, mixup=0.0, cutmix=0.0, erasing=0.0)
    with pytest.MonkeyPatch.context() as patch:  # without the augmentations, which take long to compile
        patch.setattr(on_pictures, "recipe_for", lambda *arguments: plain)
        return folder, task, list(EVALUATIONS["finetune"](task))


@pytest.mark.parametrize("name, pooling", [("maect-linear", "mean"), ("mae-linear", "cls")])
def test_a_kept_probe_classifies_as_it_was_measured(probed, params, name, pooling):
    folder, found = probed
    task, measured = found[name]
    model = open_head(folder / "heads" / "tune__raw" / f"{name}.safetensors", model_of(params))
    logits_bc = logits_of(model)
    predicted = logits_bc.argmax(axis=1)
    right = predicted == TEST.labels
    assert len(np.unique(predicted)) > 1 and 0 < right.mean() < 1
    np.testing.assert_array_equal(right, measured[0].per_picture)
    assert right.mean() == measured[0].value
    assert difference(logits_bc, task.results["classifiers"][name](TEST)) < 1e-5
    assert (model.pooling, model.classes) == (pooling, CLASSES)
    assert (model.mean, model.std, model.resize_ratio) == (MEAN, STD, 1.0)


def test_a_kept_probe_says_what_it_is(probed):
    folder, found = probed
    task, (measured, _) = found["maect-linear"]
    with safetensors.safe_open(folder / "heads" / "tune__raw" / "maect-linear.safetensors", "np") as file:
        note, shapes = json.loads(file.metadata()["maect_jax"]), {k: file.get_tensor(k).shape for k in file.keys()}  # noqa: SIM118
        assert {str(file.get_tensor(k).dtype) for k in shapes} == {"float32"}
    assert shapes == {"mean": (16,), "var": (16,), "kernel": (16, 3), "bias": (3,)}
    assert note["preset"] == "maect-linear" and note["feature"] == "mean" and note["epsilon"] == 1e-5
    assert note["encoder_sha256"] == task.sha256 and note["encoder"] == task.shape()
    assert note["protocol"] == json.loads(json.dumps(measured.protocol)) and note["transform"] == task.transform()
    assert (note["test_accuracy"], note["held_out_accuracy"]) == (measured.value, measured.found["held_out_accuracy"])
    assert (note["trained_on"], note["tested_on"], note["license"]) == ("data/train", "data/test", "mit")


def kept_without_norm(params, folder, feature):
    """The result of a probe without batch normalisation, its file, and the test features."""
    preset = dataclasses.replace(PRESETS["dinov2-linear"], features=(feature,), epoch_updates=None, epochs=3)
    task = task_of(params, folder)
    train, test = (rows.vectors(feature) for rows in task.features([feature]))
    rows = {feature: train}, TRAIN.labels, {feature: test}, TEST.labels
    found = linear.evaluate_linear(*rows, 3, preset=preset)
    keep_probe(task, "own", found)
    return found, folder / "heads" / "tune__raw" / "own.safetensors", test


def test_a_probe_without_a_norm_is_kept_as_it_is(params, tmp_path):
    found, path, test = kept_without_norm(params, tmp_path, "cls")
    model = open_head(path, model_of(params))
    np.testing.assert_array_equal(model.params["head"]["kernel"], np.asarray(found.probe.kernel_hcd[0]).T)
    np.testing.assert_array_equal(model.params["head"]["bias"], found.probe.bias_hc[0])
    assert difference(logits_of(model), np.asarray(found.probe.logits(test)[:, 0])) < 1e-5


def test_a_probe_on_a_feature_without_a_form_is_kept_and_not_exported(params, tmp_path):
    _, path, _ = kept_without_norm(params, tmp_path, "cls+mean")
    with pytest.raises(CheckpointError, match=r"is on the feature 'cls\+mean', which no exported form has"):
        open_head(path, model_of(params))
    with pytest.raises(ConfigError, match=r"--head probe: .* evaluate --weights \S+ --only linear`"):
        find_head(tmp_path, "probe", model_of(params))


def test_a_fine_tuning_classifies_as_it_was_measured(finetuned, params):
    folder, task, measured = finetuned
    (path,) = (folder / "finetune").iterdir()
    before = model_of(params, provenance=MIT)
    model = open_head(path, before)
    logits_bc = logits_of(model)
    assert difference(logits_bc, task.results["classifiers"]["mae-finetune"](TEST)) < 1e-5
    np.testing.assert_array_equal(logits_bc.argmax(axis=1) == TEST.labels, measured[0].per_picture)
    assert (model.pooling, model.classes, model.resize_ratio) == ("mean", CLASSES, 1.0)
    assert model.encoder.learned_positions and not model.encoder.final_norm and "fc_norm" in model.params
    kernels = [m.params["encoder"]["blocks"]["fc1"]["kernel"] for m in (before, model)]
    assert np.abs(kernels[1] - kernels[0]).max() > 1e-4, "the whole encoder is the fine-tuned one"
    assert (model.provenance.stage, model.provenance.trained_on) == ("mae-finetune", "data/train")
    kept = read_meta(path / "chosen" / str(model.provenance.step))["provenance"]
    head, encoder = model.provenance.derived_from
    assert kept["derived_from"] == [encoder] and encoder["sha256"] == task.sha256 and head["name"] == path.name
    assert (kept["license"], model.provenance.license) == ("mit", "mit")
    assert model.provenance.recipe["epochs"] == 1 and model.provenance.recipe["pooling"] == "fc_norm"


def test_the_card_of_a_fine_tuned_model_shows_what_was_measured(finetuned, params, tmp_path):
    folder, task, measured = finetuned
    facts = {"stage": "tune, raw", "seed": 0, "evaluation": "finetune", "weights": {"sha256": task.sha256}}
    records = [
        facts | {name: getattr(number, name) for name in ("metric", "value", "unit", "protocol", "found")}
        for number in measured
    ]
    records.append(records[0] | {"evaluation": "knn", "value": 0.987, "found": {}})
    model = open_head(next((folder / "finetune").iterdir()), model_of(params, provenance=MIT))
    write_package(model, TARGETS["timm"], tmp_path / "out", records=records, prove=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| Fine-tuning | `mae-finetune` | – | – | accuracy | {100 * measured[0].value:.1f} % |" in card
    assert "98.7" not in card and "selected on test" not in card
    assert "fine-tuned with labels ('mae-finetune') from weights of MAE-CT" in card


def test_only_the_leading_process_keeps(params, tmp_path):
    list(EVALUATIONS["linear"](task_of(params, tmp_path, probe_epochs=1, leader=False)))
    assert not (tmp_path / "heads").exists()


def test_heads_are_found_by_the_weights_they_are_on(probed, finetuned, params):
    folder, _ = probed
    model = model_of(params)
    newest = folder / "heads" / "tune__raw" / "mae-linear.safetensors"
    assert find_head(folder, "probe", model) == newest
    assert find_head(finetuned[0], "finetuned", model) == next((finetuned[0] / "finetune").iterdir())
    others = model_of(jax.tree.map(lambda x: x + 1, params))
    for where, kind, evaluation in ((folder, "probe", "linear"), (finetuned[0], "finetuned", "finetune")):
        with pytest.raises(ConfigError, match=rf"--head {kind}: .* --only {evaluation}`"):
            find_head(where, kind, others)
    with pytest.raises(CheckpointError, match="was trained on other weights"):
        open_head(newest, others)
