"""The exact search finds what a full sort finds, ties by lower row, whatever its blocks, tiles, groups and devices."""

from functools import partial

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax.neighbors import topk
from maect_jax.parallel.mesh import make_mesh

faiss.omp_set_num_threads(2)


def mesh_of(devices: int):
    return make_mesh(devices=jax.devices()[:devices])


@pytest.fixture
def small_pieces(monkeypatch):
    """Blocks, tiles and groups so short that a small bank has many of each."""
    monkeypatch.setattr(topk, "BLOCK", 600)
    monkeypatch.setattr(topk, "TILE", 4)
    monkeypatch.setattr(topk, "GROUP", 16)


def tied(queries: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries and a bank whose similarities are small whole numbers, each half as frequent as the one below."""
    similarity = np.floor(-np.log2(np.random.default_rng(0).random((rows, queries))))
    return np.eye(queries, dtype=np.float32), similarity.astype(np.float32)


def full_sort(similarity: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    index = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, index, axis=1), index


def assert_equal(found, expected):
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("rows, k", [(5888, 1), (5888, 7), (5888, 150), (1000, 125), (1480, 3), (600, 9), (120, 15)])
def test_ties_in_a_split_bank_go_to_the_lower_row(small_pieces, rows, k, devices):
    """On one device 5888 rows are ten blocks of 592, the last of which reaches back; 150 is a quarter of a block."""
    query, bank = tied(30, rows)
    valid = np.random.default_rng(2).random(rows) < 0.9
    similarity = np.where(valid, query @ bank.T, -np.inf)
    found = jax.jit(partial(topk.top_k_sharded_bank, mesh_of(devices), k=k))(query, bank, valid_q=valid)
    assert found[1].dtype == jnp.int32
    assert_equal(found, full_sort(similarity, k))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("rows, k", [(4096, 1), (4096, 20), (1333, 20), (600, 9), (640, 640)])
def test_ties_in_a_copied_bank_go_to_the_lower_row_and_own_rows_score_least(small_pieces, rows, k, devices):
    query, bank = tied(24, rows)
    ids, bank_ids = np.arange(24, dtype=np.int32), np.random.default_rng(2).integers(0, 40, rows).astype(np.int32)
    similarity = np.where(ids[:, None] == bank_ids, topk.OWN, query @ bank.T)
    found = jax.jit(partial(topk.top_k_replicated_bank, mesh_of(devices), k=k))(query, ids, bank, bank_ids)
    assert_equal(found, full_sort(similarity, k))


def test_many_equal_rows_across_groups_blocks_and_devices_come_in_order(small_pieces):
    bank = np.ones((8 * 1280, 3), np.float32)
    for devices in (1, 8):
        search = jax.jit(partial(topk.top_k_sharded_bank, mesh_of(devices), k=100))
        _, index = search(bank[:2], bank, valid_q=np.ones(len(bank), bool))
        np.testing.assert_array_equal(index, np.tile(np.arange(100), (2, 1)))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("k", [10, 200])
def test_neighbors_are_those_of_faiss(k, devices):
    """At the lengths that are used: 20480 rows, in groups of up to 32 on one device."""
    rng = np.random.default_rng(0)
    bank, query = (rng.standard_normal((rows, 32)).astype(np.float32) for rows in (20480, 200))
    for x in (bank, query):
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    reference = faiss.IndexFlatIP(bank.shape[1])
    reference.add(bank)
    expected, expected_index = reference.search(query, k + 1)
    search = jax.jit(partial(topk.top_k_sharded_bank, mesh_of(devices), k=k))
    similarity, index = search(query, bank, valid_q=np.ones(len(bank), bool))
    np.testing.assert_allclose(similarity, expected[:, :k], atol=1e-6)
    apart = -np.diff(expected, axis=1) > 1e-6  # from the next neighbour, by more than two ways to sum may differ
    certain = apart & np.concatenate([np.ones((len(query), 1), bool), apart[:, :-1]], axis=1)
    assert certain.mean() > 0.98
    np.testing.assert_array_equal(np.asarray(index)[certain], expected_index[:, :k][certain])
