"""The linear probe against a recorded trace of twenty updates in PyTorch, and the recorded schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from maect_jax.evaluation.probes import linear_heads
from maect_jax.evaluation.probes.linear_heads import PRESETS


def preset_of(**changes):
    """The published recipe in the lengths of a reference."""
    return dataclasses.replace(PRESETS["maect-linear"].on("cls"), epochs=1, **changes)


@pytest.fixture(scope="module")
def trace():
    """(reference, preset, our probe after its updates, our losses [step, head])."""
    gold = golden.arrays("probe_trace")
    rates = tuple(gold["cfg/base_lr"].tolist())
    preset = preset_of(base_rates=rates, batch=int(gold["cfg/batch"]), epoch_updates=int(gold["cfg/steps"]))
    assert not gold["init_bias"].any()
    state = linear_heads.create_state(preset, {"cls": jnp.asarray(gold["init_weight"])})
    step = jax.jit(linear_heads.probe_step, static_argnames="preset")
    losses = []
    for x, y in zip(gold["train_x"], gold["train_y"]):
        state, loss_fh = step(state, {"cls": jnp.asarray(x)}, jnp.asarray(y, jnp.int32), preset=preset)
        losses.append(loss_fh[0])
    return gold, preset, state.probes["cls"], np.stack(losses)


def test_losses_follow_the_trace(trace):
    gold, _, _, losses = trace
    np.testing.assert_allclose(losses, gold["loss"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(losses, gold["loss_f64"], rtol=0, atol=5e-6)


def test_final_weights_are_those_of_the_trace(trace):
    gold, _, probe, _ = trace
    np.testing.assert_allclose(probe.kernel_hcd, gold["final_weight"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(probe.bias_hc, gold["final_bias"], rtol=0, atol=5e-6)


def test_running_statistics_take_the_unbiased_variance(trace):
    gold, _, probe, _ = trace
    np.testing.assert_allclose(probe.mean_d, gold["running_mean"], rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(probe.var_d, gold["running_var"], rtol=1e-5)


def test_evaluation_logits_use_the_running_statistics(trace):
    gold, _, probe, _ = trace
    logits_hbc = np.asarray(probe.logits(gold["test_x"])).swapaxes(0, 1)
    np.testing.assert_allclose(logits_hbc, gold["eval_logits"], rtol=0, atol=3e-5)


def test_each_heads_rate_is_the_recorded_one(trace):
    gold, preset, _, _ = trace
    factor = linear_heads.learning_rate_factor(np.arange(preset.updates), preset, np)
    np.testing.assert_allclose(factor[:, None] * gold["cfg/peak_lr"], gold["lr"], rtol=1e-12, atol=1e-16)


def test_schedule_is_the_recorded_one_at_every_length():
    for recorded in golden.constants("schedule")["probe"]:
        step, factor = np.array(recorded["factor"]).T
        preset = preset_of(epoch_updates=recorded["total_updates"])
        in_double = linear_heads.learning_rate_factor(step, preset, np)
        np.testing.assert_allclose(in_double, factor, rtol=1e-12, atol=1e-16)
        in_single = linear_heads.learning_rate_factor(jnp.asarray(step, jnp.int32), preset)
        np.testing.assert_allclose(in_single, factor, rtol=1e-6, atol=1e-6)
