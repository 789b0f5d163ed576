"""Scores of a clustering against scikit-learn and by their own laws."""

import jax
import numpy as np
import pytest
from sklearn import metrics

from maect_jax.errors import DataError
from maect_jax.evaluation.clustering import cluster_scores as scores
from maect_jax.parallel.mesh import make_mesh
from small import one_device

AGAINST_CLASSES = {
    scores.normalized_mutual_information: metrics.normalized_mutual_info_score,
    scores.adjusted_mutual_information: metrics.adjusted_mutual_info_score,
    scores.adjusted_rand_index: metrics.adjusted_rand_score,
}


def partitions():
    """(what, cluster of each row, class of each row), ordinary and extreme."""
    rng = np.random.default_rng(0)
    label_n = rng.integers(0, 7, 300)
    yield "much alike", np.where(rng.random(300) < 0.7, label_n, rng.integers(0, 7, 300)), label_n
    yield "unlike sizes", np.minimum(rng.geometric(0.3, 300) - 1, 11), label_n
    yield "independent", rng.integers(0, 4, 300), label_n
    yield "renamed", 6 - label_n, label_n
    yield "one cluster", np.zeros(300, int), label_n
    yield "one cluster, one class", np.zeros(300, int), np.zeros(300, int)
    yield "a row a cluster", np.arange(300), label_n
    yield "a row a cluster and a class", np.arange(300), np.arange(300)


@pytest.mark.parametrize("assignment, labels", [pytest.param(a, y, id=what) for what, a, y in partitions()])
def test_scores_against_classes_are_those_of_scikit_learn(assignment, labels):
    table_kc = scores.contingency(assignment, labels, assignment.max() + 3, labels.max() + 2)  # some are empty
    for ours, theirs in AGAINST_CLASSES.items():
        assert ours(table_kc) == pytest.approx(theirs(labels, assignment), abs=1e-10), theirs.__name__


def test_many_rows_overflow_nothing():
    rng = np.random.default_rng(1)
    label_n, assignment_n = rng.integers(0, 3, 400_000), rng.integers(0, 2, 400_000)
    assignment_n = np.where(rng.random(400_000) < 0.5, label_n, assignment_n)
    table_kc = scores.contingency(assignment_n, label_n, 3, 3)
    for ours in (scores.normalized_mutual_information, scores.adjusted_rand_index):
        assert ours(table_kc) == pytest.approx(AGAINST_CLASSES[ours](label_n, assignment_n), abs=1e-10)


def test_a_cluster_is_matched_with_one_class_and_the_rest_are_errors():
    table_kc = np.array([[5, 0], [4, 1], [0, 3]])
    np.testing.assert_array_equal(scores.matched_classes(table_kc), [0, -1, 1])
    assert scores.accuracy(table_kc) == 8 / 13
    np.testing.assert_array_equal(scores.matched_classes(table_kc.T), [0, 2])
    assert scores.accuracy(table_kc.T) == 8 / 13


def features(rows=301, width=10, clusters=5, seed=2):
    """Overlapping groups, far from the origin, one of a single row."""
    rng = np.random.default_rng(seed)
    assignment_n = rng.integers(0, clusters - 1, rows)
    assignment_n[17] = clusters - 1
    x_nd = 20 + rng.standard_normal((clusters, width))[assignment_n] + rng.standard_normal((rows, width))
    return x_nd.astype(np.float32), assignment_n


@pytest.mark.parametrize("devices", [1, 8])
def test_silhouette_is_that_of_scikit_learn(devices):
    x_nd, assignment_n = features()
    mesh = make_mesh(devices=jax.devices()[:devices])
    expected = metrics.silhouette_score(x_nd.astype(np.float64), assignment_n)
    assert scores.silhouette(mesh, x_nd, assignment_n) == pytest.approx(expected, abs=1e-5)
    gaps = np.array([0, 3, 4, 9, 11])[assignment_n]  # clusters without rows change nothing
    assert scores.silhouette(mesh, x_nd, gaps) == pytest.approx(expected, abs=1e-5)


def test_silhouette_of_a_sample_is_that_of_its_rows_alone():
    x_nd, assignment_n = features()
    found = [scores.silhouette(one_device(), x_nd, assignment_n, rows=200, seed=seed) for seed in (0, 0, 1)]
    sample = np.random.default_rng(0).choice(301, 200, replace=False)
    expected = metrics.silhouette_score(x_nd[sample].astype(np.float64), assignment_n[sample])
    assert found[0] == found[1] == pytest.approx(expected, abs=1e-5)
    assert found[2] != found[0]


def test_davies_bouldin_is_that_of_scikit_learn():
    x_nd, assignment_n = features()
    expected = metrics.davies_bouldin_score(x_nd.astype(np.float64), assignment_n)
    assert scores.davies_bouldin(x_nd, assignment_n) == pytest.approx(expected, rel=1e-6)


def test_equal_rows_are_as_scikit_learn_has_them():
    x_nd = np.repeat(np.eye(3, 4, dtype=np.float32), 5, axis=0)
    apart_n, split_n = np.repeat(np.arange(3), 5), np.arange(15) % 3
    for assignment_n in (apart_n, split_n):
        expected = metrics.davies_bouldin_score(x_nd.astype(np.float64), assignment_n)
        assert scores.davies_bouldin(x_nd, assignment_n) == pytest.approx(expected, rel=1e-6)
        expected = metrics.silhouette_score(x_nd, assignment_n)
        assert scores.silhouette(one_device(), x_nd, assignment_n) == pytest.approx(expected, abs=1e-4)


def test_one_cluster_alone_has_no_score_of_its_own():
    x_nd = np.ones((6, 3), np.float32)
    assert np.isnan(scores.silhouette(one_device(), x_nd, np.zeros(6, int)))
    assert np.isnan(scores.davies_bouldin(x_nd, np.zeros(6, int)))


def test_check_may_stop_the_silhouette():
    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        scores.silhouette(one_device(), *features(), check=stop)


@pytest.mark.parametrize("labels, message", [([0, 1, -1], "labels: values -1..1"), ([0, 1], "shapes")])
def test_missing_labels_and_unlike_lengths_are_told(labels, message):
    with pytest.raises(DataError, match=message):
        scores.contingency([0, 0, 1], labels, 2, 2)
