"""Logistic regression against the optimum of the reference problem, found in float64."""

import jax
import numpy as np
import pytest
from scipy.special import logsumexp

import golden
from maect_jax.evaluation.probes import logistic
from maect_jax.evaluation.probes.logistic_solver import predict, solve
from maect_jax.parallel.mesh import make_mesh


def objective(x, y, weights, l2) -> float:
    logits = x.astype(np.float64) @ weights.astype(np.float64)
    loss = logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
    return loss.mean() + l2 / 2 * np.square(weights.astype(np.float64)).sum()


@pytest.mark.parametrize("devices", [1, 8])
def test_objective_weights_and_predictions_are_those_of_the_optimum(devices):
    gold = golden.arrays("logreg")
    mesh = make_mesh(devices=jax.devices()[:devices])
    x, y, l2 = gold["train_x_prep"], gold["train_y"], gold["lam"]
    solution = solve(mesh, x[None], y[None], l2, classes=6)
    weights = np.asarray(solution.weights_sdc)
    for i in range(2):
        assert objective(x, y, weights[i], l2[i]) == pytest.approx(gold["objective"][i], rel=1e-5)
        assert np.linalg.norm(weights[i] - gold["weights"][i]) < 2e-3 * np.linalg.norm(gold["weights"][i])
    np.testing.assert_allclose(solution.objective, gold["objective"], rtol=1e-5)
    np.testing.assert_array_equal(predict(mesh, solution.weights_sdc, gold["test_x"]), gold["pred_test_raw"])
    np.testing.assert_array_equal(predict(mesh, solution.weights_sdc, gold["test_x_prep"]), gold["pred_test_prep"])


def test_the_preset_gives_the_reference_predictions():
    """Row preprocessing, and l2 = 0.00025 / rows, from features as they come; test rows are left as they are."""
    gold = golden.arrays("logreg")
    preset = logistic.PRESETS["maect-logreg"]
    assert preset.strengths[0] / len(gold["train_y"]) == pytest.approx(gold["lam"][0])
    data = gold["train_x"], gold["train_y"], gold["test_x"], gold["test_y"]
    mesh = make_mesh(devices=jax.devices()[:1])
    scores = logistic.low_shot(mesh, *data, [np.arange(len(gold["train_y"]))], preset, classes=6)
    right = gold["pred_test_raw"][0] == gold["test_y"]
    np.testing.assert_array_equal(scores.correct, right.astype(np.float32))
    assert scores.accuracy == pytest.approx(right.mean())
    assert scores.found["objective"] == pytest.approx(gold["objective"][:1].tolist(), rel=1e-5)
