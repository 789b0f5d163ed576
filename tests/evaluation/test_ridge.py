"""Few-shot ridge regression equals the direct solution of its definition; the penalty is chosen on other train rows."""

import dataclasses

import jax
import numpy as np
import pytest

from maect_jax.errors import DataError
from maect_jax.evaluation.probes import ridge
from maect_jax.evaluation.splits import generate, list_hash
from maect_jax.parallel.mesh import make_mesh

CLASSES = 6
PRESET = dataclasses.replace(ridge.PRESET, shots=(2, 5), held_out=60)


def mesh_of(devices: int):
    return make_mesh(devices=jax.devices()[:devices])


def features(rows: int, seed: int, width: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, rows)
    center = np.random.default_rng(99).normal(size=(CLASSES, width))
    x = center[label] + 1.5 * rng.normal(size=(rows, width))
    return (x * np.geomspace(0.1, 10, width) + np.linspace(-5, 5, width)).astype(np.float32), label


def direct(x, y, penalty):
    """Weights (X'X + l2)^-1 X'Y, and what makes X of other features; float64."""
    x = x.astype(np.float64)
    mean, scale = x.mean(axis=0), np.sqrt(np.square(x - x.mean(axis=0)).mean(axis=0)) + 1e-5

    def prepare(z):
        return np.concatenate([(z - mean) / scale, np.full((len(z), 1), 100.0)], axis=1)

    gram = prepare(x).T @ prepare(x) + penalty * np.eye(x.shape[1] + 1)
    return np.linalg.solve(gram, prepare(x).T @ (2.0 * np.eye(CLASSES)[y] - 1)), prepare


@pytest.mark.parametrize("rows", [12, 21, 90])  # fewer than features, as many, more
def test_weights_are_the_direct_solution_for_every_penalty(rows):
    x, y = features(rows, 0)
    fit = ridge.fit(x, y, CLASSES)
    test, _ = features(40, 1)
    for penalty in ridge.PRESET.penalties:
        weights, prepare = direct(x, y, penalty)
        np.testing.assert_allclose(fit.prepare(test), prepare(test), rtol=1e-12)
        np.testing.assert_allclose(fit.weights(penalty), weights, rtol=1e-6, atol=1e-6 * abs(weights).max())


@pytest.mark.parametrize("devices", [1, 8])
def test_scores_are_those_of_the_definition(devices):
    (x, y), (test, label) = features(150, 0), features(203, 1)
    scores = ridge.few_shot(mesh_of(devices), x, y, test, label, CLASSES, "a", seed=4, preset=PRESET)
    assert list(scores) == [2, 5]
    for shots, found in scores.items():
        right, chosen = [], []
        for seed in (4, 5, 6):
            rows = generate(y, shots, seed, "a")
            held_out = np.setdiff1d(generate(y, shots + 10, seed, "a"), rows)
            accuracy = []
            for penalty in PRESET.penalties:
                weights, prepare = direct(x[rows], y[rows], penalty)
                accuracy.append(((prepare(x[held_out]) @ weights).argmax(axis=1) == y[held_out]).mean())
            chosen.append(max(l2 for l2, share in zip(PRESET.penalties, accuracy) if share == max(accuracy)))
            weights, prepare = direct(x[rows], y[rows], chosen[-1])
            right.append((prepare(test) @ weights).argmax(axis=1) == label)
        assert found.found["penalty"] == chosen
        np.testing.assert_allclose(found.correct, np.mean(right, axis=0), rtol=1e-6)
        assert found.accuracies == pytest.approx(np.mean(right, axis=1).tolist())
        assert (found.accuracy, found.std) == pytest.approx((np.mean(right), np.mean(right, axis=1).std()))
        assert found.protocol["splits"] == [list_hash(generate(y, shots, seed, "a")) for seed in (4, 5, 6)]
        assert found.protocol["held_out_rows"] == [60] * 3


def test_the_penalty_is_chosen_without_the_test_rows():
    (x, y), (test, label) = features(100, 0), features(50, 1)
    found = [
        ridge.few_shot(mesh_of(1), x, y, test, labels, CLASSES, "a", preset=PRESET) for labels in (label, 5 - label)
    ]
    for shots in PRESET.shots:
        assert found[0][shots].found == found[1][shots].found
        assert found[0][shots].accuracy != found[1][shots].accuracy


def test_a_feature_that_does_not_vary_does_no_harm():
    (x, y), (test, label) = features(100, 0), features(50, 1)
    dead = [np.concatenate([z, np.full((len(z), 3), 7.3, np.float32)], axis=1) for z in (x, test)]
    args = CLASSES, "a", 0, PRESET
    alive = ridge.few_shot(mesh_of(1), x, y, test, label, *args)
    both = ridge.few_shot(mesh_of(1), dead[0], y, dead[1], label, *args)
    for shots in PRESET.shots:
        np.testing.assert_array_equal(both[shots].correct, alive[shots].correct)


def test_only_shots_that_leave_rows_to_choose_on():
    y = np.repeat(np.arange(CLASSES), 11)
    x, (test, label) = features(len(y), 0)[0], features(20, 1)
    scores = ridge.few_shot(mesh_of(1), x, y, test, label, CLASSES, "a")
    assert list(scores) == [5, 10]
    assert scores[10].protocol["held_out_rows"] == [CLASSES] * 3
    unlabelled = np.where(np.arange(len(y)) % 11 < 5, -1, y)
    assert list(ridge.few_shot(mesh_of(1), x, unlabelled, test, label, CLASSES, "a")) == [5]
    with pytest.raises(
        DataError, match="a class has 5 train pictures; 6 are needed, 5 to learn from and one to choose"
    ):
        ridge.few_shot(mesh_of(1), x, np.where(np.arange(len(y)) % 11 < 6, -1, y), test, label, CLASSES, "a")


def test_shapes_and_labels_are_checked():
    (x, y), (test, label) = features(100, 0), features(50, 1)
    with pytest.raises(DataError, match=r"train labels: shape \(99,\) for 100 rows"):
        ridge.few_shot(mesh_of(1), x, y[:99], test, label, CLASSES, "a")
    with pytest.raises(DataError, match=r"test labels: values 0\.\.5, expected 0\.\.3"):
        ridge.few_shot(mesh_of(1), x, y % 4, test, label, 4, "a")
