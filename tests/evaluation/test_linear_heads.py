"""Recipes of the linear probes: rates over time, and updates that are those of PyTorch in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from maect_jax.errors import ConfigError
from maect_jax.evaluation.probes import linear_heads
from maect_jax.evaluation.probes.linear_heads import PRESETS

BATCH, CLASSES, WIDTHS = 32, 5, {"a": 12, "b": 7}


def changed(name: str, **changes):
    """A preset on the features 'a' and 'b', of a few updates."""
    given = {"features": ("a", "b"), "batch": BATCH, "epochs": 2, "epoch_updates": 6} | changes
    return dataclasses.replace(PRESETS[name], **given)


def batches(count: int) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    rng = np.random.default_rng(0)
    rows = [{name: 3 * rng.normal(size=(BATCH, d)) + 1 for name, d in WIDTHS.items()} for _ in range(count)]
    return [({name: x.astype(np.float32) for name, x in row.items()}, rng.integers(0, CLASSES, BATCH)) for row in rows]


def kernels_of(preset) -> dict[str, np.ndarray]:
    drawn = linear_heads.initial_kernels(preset, WIDTHS, CLASSES, jax.random.key(0))
    return {name: np.array(kernel) for name, kernel in drawn.items()}


def train(preset, kernels, steps: int):
    step = jax.jit(linear_heads.probe_step, static_argnames="preset")
    state, losses = linear_heads.create_state(preset, {name: jnp.asarray(k) for name, k in kernels.items()}), []
    for features, label in batches(steps):
        state, loss_fh = step(state, features, jnp.asarray(label, jnp.int32), preset=preset)
        losses.append(loss_fh)
    return state, np.stack(losses)


def torch_head(preset, kernel: np.ndarray, rate: float, name: str, factors, steps: int):
    """One head in float64: (weight, bias, losses)."""
    norm = torch.nn.Identity()
    if preset.norm_epsilon is not None:
        norm = torch.nn.BatchNorm1d(kernel.shape[1], eps=preset.norm_epsilon, affine=False, dtype=torch.float64)
    weight = torch.tensor(kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    velocity, losses = [torch.zeros_like(weight), torch.zeros_like(bias)], []
    for (features, label), factor in zip(batches(steps), factors):
        logits = norm(torch.tensor(features[name], dtype=torch.float64)) @ weight.T + bias
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(label))
        gradients = torch.autograd.grad(loss, (weight, bias))
        losses.append(loss.item())
        with torch.no_grad():
            for parameter, gradient, v in zip((weight, bias), gradients, velocity):
                if preset.optimiser == "lars" and parameter.ndim > 1:
                    length, slope = parameter.norm(), gradient.norm()
                    gradient = gradient * (0.001 * length / slope if length > 0 and slope > 0 else 1.0)
                v.mul_(0.9).add_(gradient)
                parameter.sub_(rate * BATCH / 256 * factor * v)
    return weight.detach().numpy(), bias.detach().numpy(), losses


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("updates", [1, 2, 9, 10, 19, 20, 21, 1000])
def test_the_rate_is_finite_and_falls_to_zero_at_every_length(name, updates):
    preset = changed(name, epochs=1, epoch_updates=updates)
    factor = linear_heads.learning_rate_factor(np.arange(updates), preset, np)
    assert np.isfinite(factor).all() and factor.min() >= 0 and factor.max() == 1
    if preset.closed:
        assert updates == 1 or factor[-1] == 0
    else:  # one update later it would be 0
        following = linear_heads.learning_rate_factor(np.array([updates]), preset, np)
        assert 0 <= following < 1e-30 and factor[-1] > 0
    assert factor[0] == (0 if preset.warmup_updates else 1)


def test_maes_rate_follows_its_epochs():
    """MAE counts epochs in fractions: ten up, eighty down."""
    preset = changed("mae-linear", epochs=90, epoch_updates=7)
    epoch = np.arange(630) / 7
    fall = [0.5 * (1 + math.cos(math.pi * (e - 10) / 80)) for e in epoch]
    expected = np.where(epoch < 10, epoch / 10, fall)
    found = linear_heads.learning_rate_factor(np.arange(630), preset, np)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_dinov2s_rate_is_pytorchs_cosine():
    preset = changed("dinov2-linear", epochs=10, epoch_updates=5)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 50, eta_min=0)
    expected = []
    for _ in range(50):
        expected.append(cosine.get_last_lr()[0])
        optimiser.step(), cosine.step()
    found = linear_heads.learning_rate_factor(np.arange(50), preset, np)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_presets_have_the_published_lengths_and_rates():
    imagenet = {name: preset.on("mean").fit(1_281_167) for name, preset in PRESETS.items()}
    peaks = {name: [rate * p.batch / 256 for rate in p.base_rates] for name, p in imagenet.items()}
    assert peaks["mae-linear"] == [pytest.approx(6.4)]
    assert max(peaks["maect-linear"]) == pytest.approx(0.4) and len(peaks["maect-linear"]) == 10
    assert (imagenet["mae-linear"].updates, imagenet["mae-linear"].warmup_updates) == (90 * 78, 10 * 78)
    assert (imagenet["maect-linear"].updates, imagenet["maect-linear"].warmup_updates) == (50 * 1251, 6255)
    assert (imagenet["dinov2-linear"].updates, imagenet["dinov2-linear"].warmup_updates) == (12_500, 0)
    for name in ("dinov2-linear", "mimrefiner-linear"):
        assert len(peaks[name]) == 13 and len(imagenet[name].features) == 4
    assert imagenet["maect-linear"].features == ("mean",)


def test_small_data_has_a_batch_of_all_rows_at_most():
    fit = PRESETS["mae-linear"].fit
    assert (fit(100).batch, fit(100).epoch_updates, fit(100).updates) == (100, 1, 90)
    assert (fit(100, epochs=3, batch=30).batch, fit(100, epochs=3, batch=30).updates) == (30, 9)
    assert fit(100, multiple=8).batch == 96
    with pytest.raises(ConfigError, match="'mae-linear': epochs 0, batch 16384, 1 features, 1 rates"):
        fit(100, epochs=0)


# -------------------------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize("name, rates", [("mae-linear", (60.0, 20.0)), ("dinov2-linear", (1.0, 0.1, 0.03))])
def test_updates_are_those_of_pytorch_in_float64(name, rates):
    """LARS behind a batch norm, and plain SGD without one; each head is followed on its own."""
    preset, steps = changed(name, base_rates=rates), 12
    kernels = kernels_of(preset)
    state, losses = train(preset, kernels, steps)
    factors = linear_heads.learning_rate_factor(np.arange(steps), preset, np)
    for f, feature in enumerate(preset.features):
        probe = state.probes[feature]
        for h, rate in enumerate(rates):
            weight, bias, loss = torch_head(preset, kernels[feature][h], rate, feature, factors, steps)
            assert np.abs(weight - kernels[feature][h]).max() > 2e-4
            np.testing.assert_allclose(losses[:, f, h], loss, rtol=2e-5)
            np.testing.assert_allclose(probe.kernel_hcd[h], weight, rtol=1e-4, atol=2e-6)
            np.testing.assert_allclose(probe.bias_hc[h], bias, rtol=1e-4, atol=1e-5)


def test_lars_leaves_the_gradient_of_weights_without_length_as_it_is():
    preset = changed("mae-linear", base_rates=(1.0, 1.0))
    kernels = kernels_of(preset)
    kernels["a"][1] = 0
    state, _ = train(preset, kernels, 4)
    factors = linear_heads.learning_rate_factor(np.arange(4), preset, np)
    weight, _, _ = torch_head(preset, kernels["a"][1], 1.0, "a", factors, 4)
    assert np.abs(weight).max() > 0.01
    np.testing.assert_allclose(state.probes["a"].kernel_hcd[1], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mae-linear", "dinov2-linear"])
def test_a_head_of_the_grid_is_the_head_alone(name):
    rates = (5.0, 0.5)
    preset = changed(name, base_rates=rates)
    kernels = kernels_of(preset)
    grid, losses = train(preset, kernels, 8)
    for h, rate in enumerate(rates):
        alone_preset = changed(name, base_rates=(rate,), features=("b",))
        alone, loss = train(alone_preset, {"b": kernels["b"][h : h + 1]}, 8)
        np.testing.assert_allclose(
            alone.probes["b"].kernel_hcd[0], grid.probes["b"].kernel_hcd[h], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(loss[:, 0, 0], losses[:, 1, h], rtol=1e-5)


def test_a_head_that_diverges_takes_no_other_with_it():
    preset = changed("dinov2-linear", base_rates=(1e38, 0.1))
    calm = changed("dinov2-linear", base_rates=(0.0, 0.1))
    wild_state, losses = train(preset, kernels_of(preset), 8)
    calm_state, _ = train(calm, kernels_of(preset), 8)
    assert not np.isfinite(losses[-1, :, 0]).all()
    np.testing.assert_allclose(wild_state.probes["a"].kernel_hcd[1], calm_state.probes["a"].kernel_hcd[1], rtol=1e-6)
