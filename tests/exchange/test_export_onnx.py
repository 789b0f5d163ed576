"""Exports to ONNX: the graph computes what our model does, on batches of any size, and holds nothing of its making."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from needed import needed

from maect_jax.errors import ConfigError
from maect_jax.exchange.export.onnx import ONNX
from maect_jax.exchange.export.proof import TOLERANCE, compare, difference, ours, pictures
from models import photograph, random_model

KINDS = {
    "class token": dict(),
    "mean, decoder left out": dict(pooling="mean", decoder=True),
    "fine-tuned, one channel": dict(
        classes=7, fc_norm=True, learned_positions=True, channels=1, width=64, depth=3, heads=2, patch=8, image_size=24
    ),
}


@pytest.fixture(scope="module")
def onnx():
    for name in ("torch", "timm", "onnxscript", "onnxruntime"):
        needed(name)
    return needed("onnx")


def written(model, folder, **metadata):
    """The folder, with the model in it."""
    ONNX.check(model)
    ONNX.write(model, folder, {"format": "pt"} | metadata)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def case(request, onnx, tmp_path_factory):
    """A model, and a folder that it is written to."""
    model = random_model(**KINDS[request.param])
    return model, written(model, tmp_path_factory.mktemp("onnx"), note="é")


def test_the_runtime_computes_what_our_model_does(case):
    model, folder = case
    proof = compare(ONNX, model, folder)
    assert proof.differences.keys() == ({"logits"} if model.has_head else {"tokens", "features"})
    assert max(proof.differences.values()) <= TOLERANCE


def test_batches_of_any_size_run(case):
    model, folder = case
    images_bchw, noise_bn = pictures(model, 5)
    expected = ours(model, images_bchw, noise_bn)
    for batch in (1, 5):
        for name, found in ONNX.outputs(model, folder, images_bchw[:batch], noise_bn[:batch]).items():
            assert difference(expected[name][:batch], found) <= TOLERANCE


def test_the_graph_is_valid_and_names_what_goes_in_and_out(case, onnx):
    model, folder = case
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    graph = onnx.load(folder / "model.onnx").graph

    def shapes(values):
        return {x.name: [axis.dim_param or axis.dim_value for axis in x.type.tensor_type.shape.dim] for x in values}

    settings = json.loads((folder / "config.json").read_text())
    n, d = 1 + model.encoder.grid**2, model.encoder.width
    size = ["batch", model.channels, model.image_size, model.image_size]
    assert shapes(graph.input) == settings["inputs"] == {"pixel_values": size}
    result = {"logits": ["batch", 7]} if model.has_head else {"tokens": ["batch", n, d], "features": ["batch", d]}
    assert shapes(graph.output) == settings["outputs"] == result


def test_nothing_of_its_making_is_left_in_the_file(case, onnx):
    _, folder = case
    content = (folder / "model.onnx").read_bytes()
    here = [sys.prefix, str(Path.home()), str(Path(__file__).parents[2]), os.getcwd(), str(folder)]
    for text in (*here, "site-packages", ".py", "line ", "torch.", "timm", "aten", "pkg."):
        assert text.encode() not in content, text
    graph = onnx.load(folder / "model.onnx")
    assert {entry.key: entry.value for entry in graph.metadata_props} == {"note": "é"}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.onnx"]


def test_usage_runs_as_written(case, monkeypatch):
    model, folder = case
    photograph().save(folder.parent / f"{folder.name}.png")
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(ONNX.usage(model).replace("picture.jpg", f"../{folder.name}.png"), found)
    values = found["values"].astype(np.float32)
    expected = ours(model, values, pictures(model, 1)[1])
    for name in ["logits"] if model.has_head else ["tokens", "features"]:
        assert difference(expected[name], found[name]) <= TOLERANCE


@pytest.mark.parametrize("case", ["class token"], indirect=True)
def test_equal_models_give_equal_bytes(case, tmp_path):
    model, folder = case
    again = written(model, tmp_path, note="é")
    assert (again / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


@pytest.mark.parametrize("case", ["class token"], indirect=True)
def test_without_a_runtime_the_proof_says_so(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    proof = compare(ONNX, *case)
    assert proof.differences is None
    assert proof.reason.startswith("onnxruntime can not be imported")


def test_large_weights_lie_in_a_second_file(onnx, tmp_path, monkeypatch):
    monkeypatch.setattr("maect_jax.exchange.export.onnx._ONE_FILE", 1000)
    model = random_model(depth=1)
    written(model, tmp_path)
    moved = tmp_path.rename(tmp_path.parent / "moved")
    assert sorted(path.name for path in moved.iterdir()) == ["config.json", "model.onnx", "model.onnx.data"]
    assert max(compare(ONNX, model, moved).differences.values()) <= TOLERANCE


@pytest.mark.parametrize("missing", ["torch", "timm", "onnx", "onnxscript"])
def test_a_missing_package_is_named_with_all_that_are_needed(onnx, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError) as caught:
        ONNX.check(random_model())
    assert str(caught.value).startswith(f"--to onnx: {missing} can not be imported (ModuleNotFoundError")
    assert str(caught.value).endswith("the graph is made with torch, timm, onnx, onnxscript: install them with pip")
    assert "\n" not in str(caught.value)
