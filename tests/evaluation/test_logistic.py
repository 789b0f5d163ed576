"""Logistic regression reaches the optimum of its objective, whatever is solved beside it and on how many devices."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from sklearn.linear_model import LogisticRegression

from maect_jax.errors import ConfigError, DataError
from maect_jax.evaluation.probes import logistic, logistic_solver
from maect_jax.evaluation.probes.logistic_solver import predict, solve
from maect_jax.evaluation.rows import hold_out
from maect_jax.evaluation.splits import generate
from maect_jax.parallel.mesh import make_mesh

CLASSES = 5
MAECT, DINOV2 = logistic.PRESETS["maect-logreg"], logistic.PRESETS["dinov2-logreg"]


def mesh_of(devices: int):
    return make_mesh(devices=jax.devices()[:devices])


def features(rows: int, seed: int, width: int = 10, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Clusters that overlap, in dimensions of very different scale around an offset: float32 [rows, width], labels."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, rows)
    center = np.random.default_rng(99).normal(size=(CLASSES, width))
    x = center[label] + spread * rng.normal(size=(rows, width))
    return (x * np.geomspace(0.3, 3, width) + np.linspace(-2, 2, width)).astype(np.float32), label


def objective(x, y, weights, l2) -> float:
    logits = x.astype(np.float64) @ np.asarray(weights, np.float64)
    loss = logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
    return loss.mean() + l2 / 2 * np.square(np.asarray(weights, np.float64)).sum()


def optimum(x, y, l2) -> np.ndarray:
    """scikit-learn's solution in float64 [width, classes]."""
    model = LogisticRegression(C=1 / (l2 * len(y)), fit_intercept=False, tol=1e-11, max_iter=100_000)
    return model.fit(x.astype(np.float64), y).coef_.T


@pytest.mark.parametrize("rows, width, devices", [(203, 10, 1), (203, 10, 8), (12, 40, 8)])  # also fewer than features
def test_objective_and_predictions_are_those_of_scikit_learn(rows, width, devices):
    (x, y), (test, _) = features(rows, 0, width), features(300, 1, width)
    y[:CLASSES] = np.arange(CLASSES)
    l2 = np.array([1.0, 1e-2, 1e-4])
    solution = solve(mesh_of(devices), x[None], y[None], l2, CLASSES)
    prediction = predict(mesh_of(devices), solution.weights_sdc, test)
    for i in range(len(l2)):
        best = optimum(x, y, l2[i])
        least = objective(x, y, best, l2[i])
        found = objective(x, y, solution.weights_sdc[i], l2[i])
        assert least * (1 - 1e-8) < found < least * (1 + 3e-6)
        assert solution.objective[i] == pytest.approx(found, rel=1e-5)
        logits = np.sort(test @ best, axis=1)
        sure = logits[:, -1] - logits[:, -2] > 2e-2
        assert sure.mean() > 0.9
        np.testing.assert_array_equal(prediction[i][sure], (test @ best).argmax(axis=1)[sure])
    assert solution.gap.max() < 2e-6


def test_the_told_gap_bounds_the_distance_to_the_optimum():
    x, y = features(203, 0)
    l2 = np.array([1.0, 1e-2, 1e-4])
    least = np.array([objective(x, y, optimum(x, y, value), value) for value in l2])
    above = []
    for iterations in (0, 1, 3, 6, 12):
        solution = solve(mesh_of(1), x[None], y[None], l2, CLASSES, max_iterations=iterations)
        found = np.array([objective(x, y, weights, l2[i]) for i, weights in enumerate(solution.weights_sdc)])
        above.append(found / least - 1)
        assert (1 - least / found <= solution.gap * (1 + 1e-4) + 1e-7).all()
        assert (solution.iterations <= iterations).all()
    assert (np.diff(above, axis=0) < 1e-7).all()


def test_the_told_gradient_is_that_of_the_objective():
    x, y = features(203, 0)
    l2 = np.array([1.0, 1e-2, 1e-4])
    solution = solve(mesh_of(8), x[None], y[None], l2, CLASSES, max_iterations=4)
    for i in range(1, 3):
        weights = np.asarray(solution.weights_sdc[i], np.float64)
        residual = softmax(x @ weights, axis=1) - np.eye(CLASSES)[y]
        gradient = x.T.astype(np.float64) @ residual / len(y) + l2[i] * weights
        assert solution.gradient_norm[i] == pytest.approx(np.linalg.norm(gradient), rel=1e-3)
        gap = np.square(gradient).sum() / (2 * l2[i]) / objective(x, y, weights, l2[i])
        assert solution.gap[i] == pytest.approx(gap, rel=2e-3)


def test_float32_suffices_for_nearly_separable_rows():
    """The weakest penalty of the sweep: every row is fitted, and 1 - p of the own class is 1e-5 and below."""
    x, y = features(50, 0, width=20, spread=0.5)
    l2 = DINOV2.strengths[-1] / len(y)

    def value(flat):
        weights = flat.reshape(20, CLASSES)
        logits = x.astype(np.float64) @ weights
        gradient = x.T.astype(np.float64) @ (softmax(logits, axis=1) - np.eye(CLASSES)[y]) / len(y) + l2 * weights
        return objective(x, y, weights, l2), gradient.ravel()

    solution = solve(mesh_of(1), x[None], y[None], [l2], CLASSES)
    found = objective(x, y, solution.weights_sdc[0], l2)
    start = np.asarray(solution.weights_sdc[0], np.float64).ravel()
    options = {"maxiter": 10_000, "maxfun": 100_000, "gtol": 1e-14, "ftol": 1e-16}
    further = minimize(value, start, jac=True, method="L-BFGS-B", options=options)
    assert found < 1e-3
    assert found - further.fun < 1e-5 * found  # float64 starts here and finds next to nothing


def test_a_problem_in_a_batch_is_as_if_alone():
    """Splits of different sizes, one finished long before the other."""
    (x0, y0), (x1, y1) = features(60, 0), features(33, 1, spread=0.3)
    x, y = np.full((2, 60, 10), 1e3, np.float32), np.full((2, 60), -1)  # padding, whatever is in it
    x[0], x[1, :33], y[0], y[1, :33] = x0, x1, y0, y1
    l2 = np.array([1.0, 1e-4])
    both = solve(mesh_of(1), x, y, l2, CLASSES)
    assert both.iterations[0] < both.iterations[1]
    alone = solve(mesh_of(1), x1[None], y1[None], l2[1:], CLASSES)
    assert both.objective[1] == pytest.approx(alone.objective[0], rel=3e-6)
    distance = np.linalg.norm(both.weights_sdc[1] - alone.weights_sdc[0])
    assert distance < 5e-3 * np.linalg.norm(alone.weights_sdc[0])
    best = optimum(x0, y0, l2[0])  # the one that stood still
    np.testing.assert_allclose(both.weights_sdc[0], best, atol=2e-3 * abs(best).max())


def test_the_same_value_on_one_and_eight_devices():
    (x, y), (test, label) = features(120, 0), features(90, 1)
    splits = [generate(y, 4, seed, "a") for seed in range(3)]
    one, eight = (logistic.low_shot(mesh_of(n), x, y, test, label, splits, MAECT, CLASSES) for n in (1, 8))
    assert one.accuracies == eight.accuracies
    np.testing.assert_array_equal(one.correct, eight.correct)
    np.testing.assert_allclose(one.found["objective"], eight.found["objective"], rtol=3e-6)


def test_other_values_of_the_same_shapes_compile_nothing():
    (x, y), (z, _) = features(203, 0), features(203, 5)
    solve(mesh_of(1), x[None], y[None], [1e-2, 1e-3, 1e-4], CLASSES)
    before = logistic_solver._solve._cache_size()
    solve(mesh_of(1), z[None], y[None], [1e-4, 1.0, 0.5], CLASSES, max_iterations=3)
    assert logistic_solver._solve._cache_size() == before


def test_predictions_are_the_highest_logit_the_lowest_class_of_equals():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(1030, 6)).astype(np.float32), rng.normal(size=(3, 6, 4)).astype(np.float32)
    weights[:, :, 3] = weights[:, :, 1]  # a tie wherever one of the two is highest
    expected = np.einsum("nd,sdc->snc", x, weights, dtype=np.float64)[:, :, :3].argmax(axis=2)
    for devices in (1, 8):
        np.testing.assert_array_equal(predict(mesh_of(devices), weights, x), expected)


def unit_rows(x) -> np.ndarray:
    x = x.astype(np.float64) - x.mean(axis=1, keepdims=True, dtype=np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_the_maect_protocol_by_scikit_learn():
    (x, y), (test, label) = features(120, 0), features(90, 1)
    splits = [generate(y, 4, seed, "a") for seed in range(3)]
    scores = logistic.low_shot(mesh_of(8), x, y, test, label, splits, MAECT, CLASSES)
    right = []
    for rows in splits:
        weights = optimum(unit_rows(x[rows]), y[rows], 0.00025 / len(rows))
        right.append((test @ weights).argmax(axis=1) == label)
    assert scores.accuracies == pytest.approx(np.mean(right, axis=1).tolist())
    assert (scores.accuracy, scores.std) == pytest.approx((np.mean(right), np.mean(right, axis=1).std()))
    np.testing.assert_allclose(scores.correct, np.mean(right, axis=0), rtol=1e-6)
    assert scores.protocol["split_rows"] == [20, 20, 20]
    assert scores.protocol["splits"] == [logistic.list_hash(rows) for rows in splits]
    treated = dataclasses.replace(MAECT, preprocess_test=True)
    both = logistic.low_shot(mesh_of(8), x, y, test, label, splits, treated, CLASSES)
    np.testing.assert_array_equal(both.correct, scores.correct)


def few_strengths():
    """A preset with five of the strengths, from the strongest, and data on which the best is neither of the ends."""
    (x, y), (test, label) = features(100, 0, spread=2.0), features(200, 1, spread=2.0)
    return x, y, test, label, [np.arange(100)], dataclasses.replace(DINOV2, strengths=DINOV2.strengths[4::9]), CLASSES


def test_dinov2_chooses_its_strength_on_held_out_rows_and_learns_from_all():
    x, y, test, label, _, preset, _ = args = few_strengths()
    scores = logistic.low_shot(mesh_of(1), *args, seed=3)
    kept, held_out = hold_out(y, 3)
    models = [optimum(x[kept], y[kept], strength / len(kept)) for strength in preset.strengths]
    accuracy = [((x[held_out] @ weights).argmax(axis=1) == y[held_out]).mean() for weights in models]
    strength = preset.strengths[int(np.argmax(accuracy))]  # descending: the strongest of equals
    assert scores.found["strength"] == [strength]
    right = (test @ optimum(x, y, strength / len(y))).argmax(axis=1) == label
    assert scores.accuracy == pytest.approx(right.mean(), abs=0.006)
    assert scores.protocol["selection"] == "heldout" and scores.protocol["candidates"] == 5


def test_the_strength_is_chosen_without_the_test_rows():
    x, y, test, label, *rest = few_strengths()
    scores = [logistic.low_shot(mesh_of(1), x, y, test, labels, *rest) for labels in (label, (label + 1) % CLASSES)]
    assert scores[0].found == scores[1].found
    assert scores[0].accuracy != scores[1].accuracy


def test_strengths_in_several_groups_are_as_in_one(monkeypatch):
    args, calls = few_strengths(), []
    whole = logistic.low_shot(mesh_of(1), *args)
    monkeypatch.setattr(logistic, "AT_ONCE", 2)
    parts = logistic.low_shot(mesh_of(1), *args, check=lambda: calls.append(1))
    assert whole.found == parts.found
    assert len(calls) == 4  # five strengths in three groups, and the final one


def test_presets_are_the_published_ones():
    assert MAECT.strengths == (0.00025,) and MAECT.feature == "cls@last" and MAECT.unit_rows
    c = 1 / np.array(DINOV2.strengths)
    np.testing.assert_allclose(np.log10(c), np.linspace(-6, 5, 45), atol=1e-12)


def test_errors_say_what_is_wrong():
    (x, y), (test, label) = features(30, 0), features(10, 1)
    with pytest.raises(ConfigError, match="no split"):
        logistic.low_shot(mesh_of(1), x, y, test, label, [], MAECT, CLASSES)
    with pytest.raises(DataError, match="split 2 asks for row 30 of 30 train rows"):
        logistic.low_shot(mesh_of(1), x, y, test, label, [np.arange(9), np.array([4, 30])], MAECT, CLASSES)
    with pytest.raises(DataError, match=r"split 1 labels: values -1\.\.4"):
        logistic.low_shot(mesh_of(1), x, np.where(y == 0, -1, y), test, label, [np.arange(30)], MAECT, CLASSES)
    with pytest.raises(DataError, match=r"split 1 features: shape \(0, 10\)"):
        logistic.low_shot(mesh_of(1), x, y, test, label, [np.arange(0)], MAECT, CLASSES)
    with pytest.raises(DataError, match="at least 10 are needed"):
        logistic.low_shot(mesh_of(1), x, y, test, label, [np.arange(8)], DINOV2, CLASSES)
