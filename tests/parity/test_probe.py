"""The linear probe against a recorded trace of twenty updates in PyTorch, and the recorded schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from maect_jax.evaluation import linear


@pytest.fixture(scope="module")
def trace():
    """(reference, our state after its updates, our losses [step, head])."""
    gold = golden.arrays("probe_trace")
    updates = int(gold["cfg/steps"])
    peak_h = jnp.asarray(gold["cfg/base_lr"] * gold["cfg/batch"] / 256, jnp.float32)
    state = linear.create_state(jnp.asarray(gold["init_weight"].transpose(0, 2, 1)), jnp.asarray(gold["init_bias"]))
    step = jax.jit(linear.probe_step, static_argnames="updates")
    losses = []
    for x, y in zip(gold["train_x"], gold["train_y"]):
        state, loss_h = step(state, jnp.asarray(x), jnp.asarray(y, jnp.int32), peak_h, updates=updates)
        losses.append(loss_h)
    return gold, state, np.stack(losses)


def test_losses_follow_the_trace(trace):
    gold, _, losses = trace
    np.testing.assert_allclose(losses, gold["loss"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(losses, gold["loss_f64"], rtol=0, atol=5e-6)


def test_final_weights_are_those_of_the_trace(trace):
    gold, state, _ = trace
    np.testing.assert_allclose(state.probe.kernel_hdc.transpose(0, 2, 1), gold["final_weight"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(state.probe.bias_hc, gold["final_bias"], rtol=0, atol=5e-6)


def test_running_statistics_take_the_unbiased_variance(trace):
    gold, state, _ = trace
    np.testing.assert_allclose(state.probe.mean_d, gold["running_mean"], rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(state.probe.var_d, gold["running_var"], rtol=1e-5)


def test_evaluation_logits_use_the_running_statistics(trace):
    gold, state, _ = trace
    np.testing.assert_allclose(state.probe.logits(gold["test_x"]), gold["eval_logits"], rtol=0, atol=3e-5)


def test_each_heads_rate_is_the_recorded_one(trace):
    gold, _, _ = trace
    updates = int(gold["cfg/steps"])
    factor = linear.learning_rate_factor(np.arange(updates), updates, np)
    np.testing.assert_allclose(factor[:, None] * gold["cfg/peak_lr"], gold["lr"], rtol=1e-12, atol=1e-16)


def test_schedule_is_the_recorded_one_at_every_length():
    for recorded in golden.constants("schedule")["probe"]:
        step, factor = np.array(recorded["factor"]).T
        updates = recorded["total_updates"]
        in_double = linear.learning_rate_factor(step, updates, np)
        np.testing.assert_allclose(in_double, factor, rtol=1e-12, atol=1e-16)
        in_single = linear.learning_rate_factor(jnp.asarray(step, jnp.int32), updates)
        np.testing.assert_allclose(in_single, factor, rtol=1e-6, atol=1e-6)
