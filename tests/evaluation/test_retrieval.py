"""Retrieval measures by definition, in NumPy and scikit-learn; a row never retrieves itself."""

import jax
import numpy as np
import pytest
from sklearn import metrics

from maect_jax.errors import ConfigError, DataError
from maect_jax.evaluation.retrieval import confusion_matrix, retrieval
from maect_jax.parallel.mesh import make_mesh

CLASSES = 5


def mesh_of(devices: int):
    return make_mesh(devices=jax.devices()[:devices])


def features(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.choice(CLASSES, rows, p=[0.4, 0.3, 0.2, 0.07, 0.03])  # of the rarest there are fewer than k
    center = np.random.default_rng(99).normal(size=(CLASSES, 8))
    return (center[label] + rng.normal(size=(rows, 8))).astype(np.float32), label


def by_definition(bank, labels, query, query_labels, k: int, alone: bool) -> dict[str, np.ndarray]:
    """One query after the other, in float64."""
    bank, query = (x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (bank, query))
    found = {name: [] for name in ("precision@1", "precision@5", "precision@10", f"map@{k}", f"purity@{k}")}
    for i, row in enumerate(query):
        order = [j for j in np.argsort(-(bank @ row), kind="stable") if not (alone and j == i)]
        hits = [labels[j] == query_labels[i] for j in order]
        for rank in (1, 5, 10):
            found[f"precision@{rank}"].append(sum(hits[:rank]) / rank)
        found[f"purity@{k}"].append(sum(hits[:k]) / k)
        gain = sum(sum(hits[: rank + 1]) / (rank + 1) for rank in range(k) if hits[rank])
        found[f"map@{k}"].append(gain / max(1, min(k, sum(hits))))
    return found


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("k", [3, 10, 25])
@pytest.mark.parametrize("alone", [False, True], ids=["of another set", "of itself"])
def test_measures_are_those_of_the_definition(alone, k, devices):
    (bank, labels), (query, query_labels) = features(90, 0), features(90 if alone else 31, 0 if alone else 1)
    assert np.bincount(labels, minlength=CLASSES).min() < 10
    pair = (None, None) if alone else (query, query_labels)
    found = retrieval(mesh_of(devices), bank, labels, *pair, classes=CLASSES, k=k, chunk=16)
    expected = by_definition(bank, labels, query, query_labels, k, alone)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values.shape == (len(query),) and values.dtype == np.float32
        np.testing.assert_allclose(values, expected[name], atol=1e-6, err_msg=name)


def test_average_precision_over_the_whole_bank_is_scikit_learns():
    (bank, labels), (query, query_labels) = features(60, 0), features(20, 1)
    found = retrieval(mesh_of(1), bank, labels, query, query_labels, classes=CLASSES, k=60)["map@60"]
    bank, query = (x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (bank, query))
    expected = [metrics.average_precision_score(labels == of, bank @ row) for row, of in zip(query, query_labels)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_row_does_not_find_itself_among_many_equal_rows(devices):
    """More copies than neighbours: most rows are not among their own nearest, where lower rows come first."""
    bank, labels = np.ones((40, 4), np.float32), np.zeros(40, int)
    labels[7] = 1  # the only one of its class: any relevant neighbour would be itself
    found = retrieval(mesh_of(devices), bank, labels, classes=2, k=12)
    assert all(values[7] == 0 for values in found.values())
    purity = np.full(40, 11 / 12)  # of others, row 7 is one of the twelve lowest
    purity[7] = 0
    np.testing.assert_allclose(found["purity@12"], purity, atol=1e-6)


def test_a_query_of_a_class_that_the_bank_lacks_counts_as_nothing_found():
    bank, _ = features(20, 0)
    found = retrieval(mesh_of(1), bank, np.zeros(20, int), bank[:2], np.array([0, 1]), classes=2)
    np.testing.assert_array_equal(found["map@10"], [1, 0])
    np.testing.assert_array_equal(found["precision@1"], [1, 0])


def test_confusion_matrix_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 6, 200), rng.integers(0, 7, 200)
    found = confusion_matrix(labels, predictions, 8)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, metrics.confusion_matrix(labels, predictions, labels=range(8)))


def test_errors_say_what_is_too_few_or_out_of_range():
    bank, labels = features(12, 0)
    with pytest.raises(ConfigError, match=r"k = 12, .* of a bank of 12 rows, its own left out; k must lie in 1..11"):
        retrieval(mesh_of(1), bank, labels, classes=CLASSES, k=12)
    with pytest.raises(ConfigError, match=r"bank of 9 rows; .* at least 10 rows are needed"):
        retrieval(mesh_of(1), bank[:9], labels[:9], bank, labels, classes=CLASSES, k=3)
    with pytest.raises(DataError, match=r"query labels: shape \(3,\)"):
        retrieval(mesh_of(1), bank, labels, bank, labels[:3], classes=CLASSES)
    with pytest.raises(DataError, match=r"predictions 0..9, expected 0..4"):
        confusion_matrix(np.array([1, 2]), np.array([0, 9]), CLASSES)
    with pytest.raises(DataError, match=r"labels of shape \(2,\), predictions of shape \(3,\)"):
        confusion_matrix(np.zeros(2), np.zeros(3), CLASSES)
