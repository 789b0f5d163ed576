"""The k-NN presets against recorded predictions of the reference protocol."""

import dataclasses

import jax
import numpy as np
import pytest

import golden
from maect_jax.evaluation import knn
from maect_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("standardised, name", [(0, "maect-knn"), (1, "maect-knn-std")])
def test_predictions_and_accuracy_are_those_of_the_reference(devices, standardised, name):
    gold = golden.arrays("knn")
    mesh = make_mesh(devices=jax.devices()[:devices])
    preset = knn.PRESETS[name]
    assert preset.temperature == gold["tau"]
    assert preset.epsilon == (gold["std_eps"] if standardised else 0)
    data = gold["train_x"], gold["train_y"], gold["test_x"]
    for i, k in enumerate(gold["ks"].tolist()):
        of_k = dataclasses.replace(preset, k=k)
        np.testing.assert_array_equal(knn.classify(mesh, *data, of_k, classes=10), gold["pred"][standardised, i])
        accuracy = knn.accuracy(mesh, *data, gold["test_y"], of_k, classes=10, chunk=32)
        assert accuracy == pytest.approx(gold["acc"][standardised, i], abs=1e-6)
