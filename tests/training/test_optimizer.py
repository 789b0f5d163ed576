"""AdamW with a rate and a decay for each parameter, against PyTorch's formula in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax.training import optimizer
from maect_jax.training.optimizer import Group
from maect_jax.training.schedule import learning_rate_factor


def params_of(rng):
    return {
        "encoder": {"blocks": {"fc1": {"kernel": rng.normal(size=(2, 3, 4)), "bias": rng.normal(size=(2, 4))}}},
        "projector": {"linear0": {"kernel": rng.normal(size=(4, 5))}},
    }


def test_updates_are_pytorchs_adamw_with_scaled_rates_and_decays():
    rng = np.random.default_rng(0)
    start = params_of(rng)
    gradients = [params_of(rng) for _ in range(5)]
    groups = {"encoder": Group(0.01, 0.3, layer_decay=0.5), "projector": Group(0.03, 0.1)}
    rates, decays = optimizer.plan(start, groups, depth=3)  # the two upper blocks of three

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    moments = optimizer.init(params)
    for s, gradient in enumerate(gradients):
        factor = learning_rate_factor(jnp.int32(s), 5, 2)
        gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
        params, moments = optimizer.update(gradient, moments, params, rates, decays, factor)

    def adamw(p, gradients, rate, decay):
        m = v = 0
        for s, g in enumerate(gradients):
            lr = rate * ((s + 1) / 3 if s < 2 else (1 + np.cos(np.pi * (s - 2) / 3)) / 2)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            p = p - lr * decay * p
            p = p - lr * (m / (1 - 0.9 ** (s + 1))) / (np.sqrt(v / (1 - 0.95 ** (s + 1))) + 1e-8)
        return p

    each = [tree["encoder"]["blocks"]["fc1"] for tree in (params, start, *gradients)]
    found, before, *slopes = each
    block_rate = 0.01 * np.array([0.5**2, 0.5**1])  # block 1 of 3, block 2 of 3
    expected = adamw(before["kernel"], [g["kernel"] for g in slopes], block_rate[:, None, None], 0.3)
    np.testing.assert_allclose(found["kernel"], expected, atol=1e-6)
    expected = adamw(before["bias"], [g["bias"] for g in slopes], block_rate[:, None], 0.0)
    np.testing.assert_allclose(found["bias"], expected, atol=1e-6)
    slopes = [g["projector"]["linear0"]["kernel"] for g in gradients]
    expected = adamw(start["projector"]["linear0"]["kernel"], slopes, 0.03, 0.1)
    np.testing.assert_allclose(params["projector"]["linear0"]["kernel"], expected, atol=1e-6)


def test_a_parameter_that_no_rule_covers_is_an_error():
    with pytest.raises(KeyError, match="gamma"):
        optimizer.plan({"projector": {"bn0": {"gamma": np.ones(3)}}}, {"projector": Group(1.0, 0.1)}, depth=2)


def test_moving_average_keeps_the_given_share_of_the_old():
    average = optimizer.moving_average({"a": jnp.ones(2)}, {"a": jnp.full(2, 3.0)}, 0.75)
    np.testing.assert_allclose(average["a"], 1.5)
