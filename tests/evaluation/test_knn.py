"""Nearest-neighbour classification equals a brute-force search in float64, however bank and queries are cut."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax.errors import ConfigError, DataError
from maect_jax.evaluation import knn
from maect_jax.parallel.mesh import make_mesh

CLASSES = 7
PRESETS = knn.PRESETS
PLAIN, STANDARDISED = PRESETS["maect-knn"], PRESETS["maect-knn-std"]


def mesh_of(devices: int):
    return make_mesh(devices=jax.devices()[:devices])


def features(rows: int, seed: int, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Clusters that overlap, in dimensions of very different scale and offset: float32 [rows, width], labels [rows]."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, rows)
    center = np.random.default_rng(99).normal(size=(CLASSES, width))
    x = center[label] + rng.normal(size=(rows, width))
    return (x * np.geomspace(0.1, 10, width) + np.linspace(-5, 5, width)).astype(np.float32), label


def brute_force(bank, labels, query, preset: knn.KnnPreset) -> np.ndarray:
    """Votes float64 [queries, classes] by definition, one query after the other."""
    bank, query = bank.astype(np.float64), query.astype(np.float64)
    if preset.standardise:
        mean, scale = bank.mean(axis=0), bank.std(axis=0, ddof=1) + preset.epsilon
        bank, query = (bank - mean) / scale, (query - mean) / scale
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    votes = np.zeros((len(query), CLASSES))
    for i, row in enumerate(query):
        similarity = bank @ (row / np.linalg.norm(row))
        for j in np.argsort(-similarity, kind="stable")[: preset.k]:
            votes[i, labels[j]] += np.exp(similarity[j] / preset.temperature)
    return votes


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("k, chunk", [(1, 256), (10, 16), (37, 7)])
@pytest.mark.parametrize("preset", [PLAIN, STANDARDISED], ids=lambda preset: preset.name)
def test_predictions_equal_brute_force(preset, k, chunk, devices):
    preset = dataclasses.replace(preset, k=k)
    (bank, labels), (query, _) = features(203, 0), features(50, 1)  # 203 rows: eight devices need padding
    votes = brute_force(bank, labels, query, preset)
    best, second = np.sort(votes, axis=1)[:, :-3:-1].T
    assert ((best - second) / best).min() > 1e-5  # no tie that float32 may break otherwise
    predicted = knn.classify(mesh_of(devices), bank, labels, query, preset, CLASSES, chunk=chunk)
    assert predicted.dtype == np.int32
    np.testing.assert_array_equal(predicted, votes.argmax(axis=1))


@pytest.mark.parametrize("devices, chunk", [(1, 256), (8, 16)])
def test_every_preset_equals_brute_force_and_many_share_their_searches(monkeypatch, devices, chunk):
    (bank, labels), (query, _) = features(421, 0), features(40, 1)
    expected = []
    for preset in PRESETS.values():
        votes = brute_force(bank, labels, query, preset)
        best, second = np.sort(votes, axis=1)[:, :-3:-1].T
        assert ((best - second) / best).min() > 1e-5
        expected.append(votes.argmax(axis=1))
    banks = []
    monkeypatch.setattr(knn, "_Search", lambda *args, made=knn._Search: banks.append(args) or made(*args))
    mesh, presets = mesh_of(devices), list(PRESETS.values())
    predicted = knn.classify_many(mesh, bank, labels, query, presets, CLASSES, chunk=chunk)
    np.testing.assert_array_equal(predicted, expected)
    assert sorted((k, epsilon or 0) for _, _, k, epsilon in banks) == [(10, 1e-5), (20, 1e-6), (200, 0)]


def test_presets_are_those_of_the_published_protocols():
    table = {name: (p.k, p.temperature, p.epsilon if p.standardise else None, p.feature) for name, p in PRESETS.items()}
    assert table == {
        "maect-knn": (10, 0.07, None, "configured"),
        "maect-knn-std": (10, 0.07, 1e-5, "configured"),
        "mimrefiner-knn": (10, 0.07, 1e-6, "cls@last"),
        "mimrefiner-knn-mean": (10, 0.07, 1e-6, "mean@last"),
        "mimrefiner-hub-knn": (20, 0.07, 1e-6, "cls"),
        "dinov2-knn-10": (10, 0.07, None, "cls"),
        "dinov2-knn-20": (20, 0.07, None, "cls"),
        "dinov2-knn-100": (100, 0.07, None, "cls"),
        "dinov2-knn-200": (200, 0.07, None, "cls"),
        "lightly-knn": (200, 0.07, None, "configured"),
    }


def test_no_presets_no_predictions():
    bank, labels = features(9, 0)
    assert knn.classify_many(mesh_of(1), bank, labels, bank, [], CLASSES) == []


@pytest.mark.parametrize("devices", [1, 8])
def test_neighbors_are_the_most_similar_rows_in_order(devices):
    (bank, _), (query, _) = features(61, 0), features(9, 1)
    similarity, index = knn.neighbors(mesh_of(devices), bank, query, k=20, chunk=4)
    unit_bank, unit_query = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, query))
    full = unit_query.astype(np.float64) @ unit_bank.astype(np.float64).T
    np.testing.assert_array_equal(index, np.argsort(-full, axis=1)[:, :20])
    np.testing.assert_allclose(similarity, np.take_along_axis(full, index, axis=1), atol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_tied_votes_go_to_the_lowest_class(devices):
    bank = np.eye(4, dtype=np.float32)
    query = np.ones((3, 4), np.float32)
    preset = dataclasses.replace(PLAIN, k=4)
    predicted = knn.classify(mesh_of(devices), bank, np.array([3, 2, 6, 5]), query, preset, CLASSES)
    np.testing.assert_array_equal(predicted, [2, 2, 2])


@pytest.mark.parametrize("devices", [1, 8])
def test_equal_rows_are_taken_in_bank_order(devices):
    bank = np.ones((20, 3), np.float32)
    _, index = knn.neighbors(mesh_of(devices), bank, bank[:1], k=5)
    np.testing.assert_array_equal(index, [[0, 1, 2, 3, 4]])


@pytest.mark.parametrize("preset", [PLAIN, STANDARDISED], ids=lambda preset: preset.name)
def test_every_row_may_vote_and_padding_never_does(preset):
    """k = bank: padding rows, zero before standardisation, would be as near as real ones."""
    (bank, labels), (query, _) = features(11, 0), features(6, 1)
    preset = dataclasses.replace(preset, k=11)
    _, index = knn.neighbors(mesh_of(8), bank, query, k=11)
    np.testing.assert_array_equal(np.sort(index, axis=1), np.tile(np.arange(11), (6, 1)))
    predicted = knn.classify(mesh_of(8), bank, labels, query, preset, CLASSES)
    np.testing.assert_array_equal(predicted, brute_force(bank, labels, query, preset).argmax(axis=1))


def test_dead_dimensions_do_not_disturb_standardised_similarity():
    """A float32 mean of equal values may be off by more than epsilon; unrefined, each would act as a feature."""
    (bank, labels), (query, _) = features(1001, 0), features(50, 1)
    dead = np.linspace(1000, 2000, 64, dtype=np.float32)
    alive = knn.classify(mesh_of(1), bank, labels, query, STANDARDISED, CLASSES)
    bank, query = (np.concatenate([x, np.tile(dead, (len(x), 1))], axis=1) for x in (bank, query))
    np.testing.assert_array_equal(knn.classify(mesh_of(1), bank, labels, query, STANDARDISED, CLASSES), alive)


def test_accuracy_is_the_share_of_own_labels():
    (bank, labels), (query, query_labels) = features(120, 0), features(45, 1)
    votes = brute_force(bank, labels, query, PLAIN)
    measured = knn.accuracy(mesh_of(8), jnp.asarray(bank), labels, jnp.asarray(query), query_labels, PLAIN, CLASSES)
    assert measured == pytest.approx((votes.argmax(axis=1) == query_labels).mean())


def test_features_are_left_as_they_are():
    """The bank is donated on the device; on the CPU a device array may share the caller's memory."""
    (bank, labels), (query, _) = features(64, 0, width=64), features(8, 1, width=64)
    before = bank.copy(), query.copy()
    for mesh in (mesh_of(1), mesh_of(8)):
        knn.classify(mesh, bank, labels, query, STANDARDISED, CLASSES)
        np.testing.assert_array_equal(bank, before[0])
        np.testing.assert_array_equal(query, before[1])


def test_small_temperature_does_not_overflow():
    (bank, labels), (query, _) = features(60, 0), features(20, 1)
    cold = dataclasses.replace(PLAIN, temperature=0.005)
    nearest = knn.neighbors(mesh_of(1), bank, query, k=1)[1][:, 0]
    predicted = knn.classify(mesh_of(1), bank, labels, query, cold, CLASSES)
    np.testing.assert_array_equal(predicted, brute_force(bank, labels, query, cold).argmax(axis=1))
    assert (predicted == labels[nearest]).mean() > 0.8


def test_the_compiled_search_gathers_no_similarity_matrix():
    """Only the candidates of each device travel: no array of queries x bank leaves a device."""
    bank, _ = features(8 * 100, 0)
    search = knn._Search(mesh_of(8), bank, 5)
    query = knn.copy(mesh_of(8), features(16, 1)[0])
    args = query, search.bank_qd, search.valid_q, search.mean_d, search.scale_d
    text = knn._nearest.lower(*args, mesh=search.mesh, k=5).compile().as_text()
    assert "[16,100]" in text and "[16,800]" not in text


def test_errors_name_the_value_and_the_limit():
    bank, labels = features(5, 0)
    with pytest.raises(ConfigError, match=r"preset 'maect-knn': k = 10 neighbours of a bank of 5 rows; .* 1\.\.5"):
        knn.classify(mesh_of(1), bank, labels, bank, PLAIN, CLASSES)
    with pytest.raises(ConfigError, match="queries of width 3 for a bank of width 12"):
        knn.neighbors(mesh_of(1), bank, bank[:, :3], k=1)
    with pytest.raises(DataError, match=r"bank labels: shape \(4,\) for 5 rows"):
        knn.classify(mesh_of(1), bank, labels[:4], bank, PLAIN, CLASSES)
    with pytest.raises(DataError, match=r"bank labels: values -1..-1, expected 0..6"):
        knn.classify(mesh_of(1), bank, np.full(5, -1), bank, PLAIN, CLASSES)
    with pytest.raises(DataError, match=r"query features: shape \(0, 12\)"):
        knn.neighbors(mesh_of(1), bank, bank[:0], k=1)
