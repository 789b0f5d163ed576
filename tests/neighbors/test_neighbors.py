"""Neighbour search and support queue: the same on any number of devices, and as NumPy computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax.neighbors.queue import NOBODY, SupportQueue, age_in_updates, align, enqueue, find_neighbors
from maect_jax.neighbors.topk import OWN, top_k_replicated_bank, top_k_sharded_bank
from maect_jax.parallel.mesh import make_mesh

BATCH, ROWS, WIDTH, K = 16, 64, 8, 5


def unit_rows(seed, rows):
    x = np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module", params=[(1, 1), (8, 1), (8, 4)], ids=["1 device", "8 devices", "8 devices, fsdp 4"])
def mesh(request):
    devices, fsdp = request.param
    return make_mesh(fsdp, devices=jax.devices()[:devices])


@pytest.fixture(scope="module")
def data():
    query, bank = unit_rows(0, BATCH), unit_rows(1, ROWS)
    bank[3], bank[40] = query[3], query[9]  # without self-exclusion these would win
    ids = np.arange(BATCH, dtype=np.int32)
    bank_ids = np.random.default_rng(2).integers(0, 30, ROWS).astype(np.int32)
    bank_ids[[3, 40]] = 3, 9
    return query, ids, bank, bank_ids


@pytest.mark.parametrize("k", [1, K, ROWS])
def test_top_k_with_a_copied_bank_is_numpys(mesh, data, k):
    query, ids, bank, bank_ids = data
    similarity = query.astype(np.float64) @ bank.T.astype(np.float64)
    similarity[ids[:, None] == bank_ids] = -1
    found, index = jax.jit(lambda *x: top_k_replicated_bank(mesh, *x, k))(query, ids, bank, bank_ids)
    assert index.shape == (BATCH, k) and index.dtype == jnp.int32
    np.testing.assert_allclose(found, -np.sort(-similarity, axis=1)[:, :k], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(similarity, np.asarray(index), 1), found, atol=1e-6)
    if k == K:
        np.testing.assert_array_equal(index, np.argsort(-similarity, axis=1)[:, :k])
        assert not np.any(bank_ids[index] == ids[:, None])


def test_a_query_whose_every_row_is_its_own_still_gets_one(mesh, data):
    query, _, bank, _ = data
    own = np.zeros(ROWS, np.int32)
    found, index = top_k_replicated_bank(mesh, query, np.zeros(BATCH, np.int32), bank, own, 2)
    assert np.all(found == OWN) and np.all((index >= 0) & (index < ROWS))


def test_top_k_with_a_split_bank_is_numpys_and_never_returns_padding(mesh, data):
    query, _, bank, _ = data
    valid = np.arange(ROWS) < ROWS - 11
    bank = np.where(valid[:, None], bank, 10 * bank)  # padding that would win
    found, index = jax.jit(lambda *x: top_k_sharded_bank(mesh, *x, K))(query, bank, valid)
    similarity = np.where(valid, query @ bank.T, -np.inf)
    np.testing.assert_array_equal(index, np.argsort(-similarity, axis=1)[:, :K])
    np.testing.assert_allclose(found, -np.sort(-similarity, axis=1)[:, :K], atol=1e-6)


def queue_of(bank, bank_ids, pointer=0):
    labels = jnp.asarray(bank_ids % 7, jnp.int32)
    return SupportQueue(jnp.asarray(bank), jnp.asarray(bank_ids), labels, jnp.int32(pointer))


def test_the_pick_among_the_nearest_is_uniform_and_each_query_has_its_own(data):
    query, ids, bank, bank_ids = data
    mesh = make_mesh(devices=jax.devices()[:1])
    queue, draws = queue_of(bank, bank_ids), 2000
    nearest = np.asarray(top_k_replicated_bank(mesh, query, ids, bank, bank_ids, K)[1])

    def pick(key):
        return find_neighbors(mesh, queue, query, ids, K, jax.random.split(key, BATCH)).index_b

    picks = np.asarray(jax.jit(lambda keys: jax.lax.map(pick, keys))(jax.random.split(jax.random.key(0), draws)))
    rank = (picks[:, :, None] == nearest).argmax(-1)
    assert np.all((picks[:, :, None] == nearest).any(-1))
    counts = np.stack([(rank == r).sum() for r in range(K)])
    total = draws * BATCH
    assert np.abs(counts / total - 1 / K).max() < 5 * np.sqrt(0.2 * 0.8 / total)
    assert np.mean(rank[:, 0] == rank[:, 1]) == pytest.approx(1 / K, abs=0.05)


def test_a_neighbor_comes_with_its_row_label_and_similarity(mesh, data):
    query, ids, bank, bank_ids = data
    found = find_neighbors(mesh, queue_of(bank, bank_ids), jnp.asarray(query), jnp.asarray(ids), 1, None)
    np.testing.assert_array_equal(found.rows_be, bank[found.index_b])
    np.testing.assert_array_equal(found.label_b, bank_ids[found.index_b] % 7)
    np.testing.assert_allclose(found.similarity_b, (query * bank[found.index_b]).sum(1), atol=1e-6)


def test_a_new_queue_holds_unit_rows_of_nobody():
    queue = SupportQueue.create(jax.random.key(0), ROWS, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(queue.rows_qe, axis=1), 1, atol=1e-6)
    assert np.all(queue.id_q == NOBODY) and np.all(queue.label_q == NOBODY) and queue.pointer == 0


def test_the_ring_forgets_the_oldest_and_knows_the_age_of_each_row():
    queue = SupportQueue.create(jax.random.key(0), 12, WIDTH)
    for update in range(5):
        ids = jnp.arange(4, dtype=jnp.int32) + 4 * update
        queue = enqueue(queue, jnp.asarray(unit_rows(update, 4)), ids, ids)
    np.testing.assert_array_equal(queue.id_q, [12, 13, 14, 15, 16, 17, 18, 19, 8, 9, 10, 11])
    np.testing.assert_array_equal(queue.rows_qe[4:8], unit_rows(4, 4))
    np.testing.assert_array_equal(age_in_updates(queue, jnp.arange(12), 4), [2] * 4 + [1] * 4 + [3] * 4)


def test_a_batch_that_does_not_divide_the_queue_is_refused():
    queue = SupportQueue.create(jax.random.key(0), 10, WIDTH)
    ids = jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match="does not divide"):
        enqueue(queue, jnp.zeros((4, WIDTH)), ids, ids)


def test_a_ring_is_turned_only_where_the_new_batch_would_cross_its_end():
    queue = SupportQueue.create(jax.random.key(0), 12, 4)
    for step in range(3):  # pointer 6 after the first, third, … batch of 6
        ids = jnp.arange(6, dtype=jnp.int32) + 6 * step
        queue = enqueue(queue, jax.random.normal(jax.random.key(step), (6, 4)), ids, ids)
    assert int(queue.pointer) == 6
    same = align(queue, 3)
    assert int(same.pointer) == 6 and np.array_equal(same.id_q, queue.id_q)
    turned = align(queue, 4)
    assert int(turned.pointer) == 0
    assert np.array_equal(turned.id_q, np.roll(np.asarray(queue.id_q), -6))  # oldest first
    assert np.array_equal(turned.rows_qe, np.roll(np.asarray(queue.rows_qe), -6, axis=0))
