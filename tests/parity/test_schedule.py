"""Learning rates, layer-wise factors and the peak rule against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import constants
from maect_jax.training.optimizer import layer_scales
from maect_jax.training.schedule import learning_rate_factor, peak_learning_rate


def parts(schedule: dict):
    """(name, recipe, settings) of every trained part of every published recipe."""
    for model, stages in schedule["recipes"].items():
        for stage, recipe in stages.items():
            for part in ("encoder", "decoder", "head"):
                if recipe and part in recipe:
                    yield f"{model} {stage} {part}", recipe, recipe[part]


def test_peaks_and_rates_of_every_recipe_in_float64_and_float32():
    count = 0
    factor32 = jax.jit(learning_rate_factor, static_argnums=(1, 2))
    for name, recipe, part in parts(constants("schedule")):
        peak = peak_learning_rate(part["base_lr"], recipe["batch"], recipe["n_views"])
        np.testing.assert_allclose(peak, part["peak_lr"], rtol=1e-12, err_msg=name)
        steps, rates = (np.array(column) for column in zip(*part["lr"]))
        shape = recipe["total_updates"], part["warmup_updates"]
        found = peak * learning_rate_factor(steps, *shape, xp=np)
        np.testing.assert_allclose(found, rates, rtol=1e-12, atol=1e-12 * peak, err_msg=name)
        found = peak * factor32(jnp.asarray(steps, jnp.int32), *shape)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, rates, rtol=1e-6, atol=1e-6 * peak, err_msg=name)
        assert learning_rate_factor(part["warmup_updates"], *shape, xp=np) == 1.0
        count += 1
    assert count == 30  # stage 1: 3 models of 2 parts, stage 2: 8 heads, stage 3: 8 of 2 parts


def test_short_runs_update_by_update():
    for run in constants("schedule")["synthetic"]:
        assert run["warmup_updates"] == run["total_updates"] * run["warmup_percent"] // 100
        steps = np.arange(run["total_updates"])
        factor = learning_rate_factor(steps, run["total_updates"], run["warmup_updates"], xp=np)
        np.testing.assert_allclose(run["peak_lr"] * factor, run["lr"], rtol=1e-12, atol=1e-12 * run["peak_lr"])


@pytest.mark.parametrize("number", range(3))
def test_layer_wise_factors(number):
    table = constants("schedule")["llrd"]
    assert len(table) == 3
    reference = table[number]
    scales = layer_scales(reference["depth"], reference["decay"])
    for ours, theirs in (("stem", "stem"), ("blocks", "blocks"), ("norm", "final_norm")):
        np.testing.assert_allclose(scales[ours], reference[theirs], rtol=1e-12)
