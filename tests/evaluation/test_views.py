"""Two views compared and colours read: against histograms counted by NumPy, and features that know or ignore colour."""

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.evaluation.views import histogram, invariance, probe_colours


def test_histograms_are_numpys():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    found = np.asarray(jax.jit(histogram)(images))
    for i in range(3):
        for c in range(3):
            counted, _ = np.histogram(images[i, :, :, c], bins=64, range=(0, 256))
            np.testing.assert_allclose(found[i, c], counted / 64, atol=1e-7)


def test_equal_views_are_perfectly_aligned_and_opposite_ones_not():
    x = np.random.default_rng(1).normal(size=(40, 8)).astype(np.float32)
    same, opposite = (jax.tree.map(float, invariance(x, sign * x)) for sign in (1, -1))
    np.testing.assert_allclose([same["alignment"], same["cosine_invariance"]], [0, 1], atol=1e-6)
    np.testing.assert_allclose([opposite["alignment"], opposite["cosine_invariance"]], [4, -1], atol=1e-6)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(same["cosine_of_others"], (unit * np.roll(unit, 1, 0)).sum(1).mean(), atol=1e-6)


def test_colours_are_read_from_features_that_hold_them_and_not_from_noise():
    rng = np.random.default_rng(2)
    shade = rng.integers(8, 16, (400, 3))
    counts = np.zeros((400, 3, 64), np.float32)
    for channel in range(3):
        counts[np.arange(400), channel, shade[:, channel]] = 1
    knows = np.concatenate([np.eye(64, dtype=np.float32)[shade[:, c]] for c in range(3)], axis=1)
    ignores = rng.normal(size=(400, 192)).astype(np.float32)
    errors = {}
    for name, x in (("knows", knows), ("ignores", ignores)):
        found = probe_colours(x[:300], counts[:300], x[300:], counts[300:], lambda: None)
        errors[name] = float(found.error.mean()) / found.baseline
        assert found.error.shape == (100,)
    assert errors["knows"] < 0.1 and errors["ignores"] > 0.9
    assert jnp.isclose(found.baseline, np.abs(counts[300:] - counts[:300].mean(0)).mean())
