"""Health figures have the values that definition, NumPy and known spectra give them."""

import jax
import numpy as np
import pytest

from maect_jax.evaluation import health
from maect_jax.parallel.mesh import batch_sharding, make_mesh


def with_spectrum(singular: np.ndarray, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Random float32 [rows, width] with the given singular values."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(rows, len(singular))))
    right, _ = np.linalg.qr(rng.normal(size=(width, len(singular))))
    return (left * singular @ right.T).astype(np.float32)


def normal(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def rank_by_svd(x: np.ndarray) -> float:
    singular = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    share = singular / singular.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.parametrize("rank", [1, 2, 7, 32])
@pytest.mark.parametrize("rows, width", [(64, 32), (32, 64)])
def test_equal_singular_values_give_their_number(rank, rows, width):
    assert health.effective_rank(with_spectrum(np.ones(rank), rows, width)) == pytest.approx(rank, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e15])
def test_effective_rank_is_the_entropy_of_the_singular_values_at_any_scale(scale):
    singular = scale * np.array([8.0, 4.0, 2.0, 1.0, 1.0])
    share = singular / singular.sum()
    expected = np.exp(-(share * np.log(share)).sum())
    assert health.effective_rank(with_spectrum(singular, 100, 24)) == pytest.approx(expected, rel=1e-4)


def test_effective_rank_equals_singular_value_decomposition():
    x = normal(200, 48) * np.geomspace(1, 0.02, 48, dtype=np.float32)
    assert health.effective_rank(x) == pytest.approx(rank_by_svd(x), rel=1e-4)


def test_collapsed_embeddings_are_seen():
    collapsed = np.tile(normal(1, 32), (64, 1))
    assert health.effective_rank(collapsed) == pytest.approx(1, abs=1e-3)
    assert health.embedding_std(collapsed) == pytest.approx(0, abs=1e-6)
    assert health.effective_rank(np.zeros((64, 32), np.float32)) == pytest.approx(1)


def test_embedding_std_is_that_of_unit_rows():
    x = normal(500, 64) * np.linspace(0.5, 2, 500, dtype=np.float32)[:, None]
    assert health.embedding_std(x) == pytest.approx(unit(x).std(axis=0).mean(), rel=1e-5)
    assert health.embedding_std(x) == pytest.approx(1 / np.sqrt(64), rel=0.02)  # even on the sphere


def test_alignment_is_the_mean_squared_distance_of_pairs():
    x, y = normal(40, 8), normal(40, 8, seed=1)
    expected = ((unit(x) - unit(y)) ** 2).sum(axis=1).mean()
    assert health.alignment(x, y) == pytest.approx(expected, rel=1e-5)
    assert health.alignment(x, 3 * x) == pytest.approx(0, abs=1e-10)
    assert health.alignment(x, -x) == pytest.approx(4, rel=1e-5)


def test_uniformity_is_over_pairs_of_different_rows():
    x = unit(normal(40, 8))
    distances = [((a - b) ** 2).sum() for i, a in enumerate(x) for b in x[:i]]
    expected = np.log(np.exp(-2 * np.array(distances)).mean())
    assert health.uniformity(x.astype(np.float32)) == pytest.approx(expected, rel=1e-5)
    assert health.uniformity(np.ones((5, 8), np.float32)) == pytest.approx(0, abs=1e-5)


def test_a_batch_split_over_devices_gives_the_same_figures():
    x = normal(64, 16)
    split = jax.device_put(x, batch_sharding(make_mesh()))
    one, eight = health.health(x), health.health(split)
    assert set(one) == {"embedding_std", "effective_rank"}
    for name, value in one.items():
        assert eight[name].shape == () and eight[name].dtype == np.float32
        assert float(eight[name]) == pytest.approx(float(value), rel=1e-5)


def test_half_precision_is_measured_in_float32():
    x = jax.numpy.asarray(normal(64, 16), jax.numpy.bfloat16)
    figures = health.health(x)
    assert figures["effective_rank"].dtype == np.float32
    assert figures["effective_rank"] == pytest.approx(rank_by_svd(np.asarray(x, np.float32)), rel=1e-4)


def test_non_finite_embeddings_give_non_finite_figures():
    x = normal(64, 16)
    x[3, 5] = np.nan
    assert all(np.isnan(value) for value in health.health(x).values())
