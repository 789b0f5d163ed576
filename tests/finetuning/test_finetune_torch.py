"""The same classifier, loss and optimiser written in PyTorch: forward and updates agree; and what a step must keep."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from maect_jax.finetuning.model import classifier_of
from maect_jax.finetuning.recipes import RECIPES
from maect_jax.finetuning.step import MaeClock, evaluated_params, first_state, make_finetune_step
from maect_jax.models.patches import patchify
from small import encoder_of

SMALL = dict(img_size=16, patch_size=4, dim=24, depth=3, heads=2)
PATCH, HEADS, DEPTH, CLASSES, BATCH = 4, 2, 3, 5, 8
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def leaves_of(params: dict) -> dict[str, torch.Tensor]:
    """Our tree as float64 leaves that take gradients, by dotted name; each block has its own: 'encoder.blocks.1.…'."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [part.key for part in path]
        if names[:2] == ["encoder", "blocks"]:
            found |= {".".join(["encoder.blocks", str(i), *names[2:]]): x for i, x in enumerate(np.asarray(leaf))}
        else:
            found[".".join(names)] = np.asarray(leaf)
    return {name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in found.items()}


def logits(w: dict[str, torch.Tensor], images_bhwc: np.ndarray, patch: int, heads: int, depth: int) -> torch.Tensor:
    """Logits of normalised pictures; the patch embedding is a convolution, as published."""
    x = torch.tensor(images_bhwc, dtype=torch.float64).permute(0, 3, 1, 2)
    kernel = w["encoder.patch_embed.kernel"]
    d, c = kernel.shape[1], x.shape[1]
    kernel = kernel.reshape(patch, patch, c, d).permute(3, 2, 0, 1)
    x = F.conv2d(x, kernel, w["encoder.patch_embed.bias"], stride=patch).flatten(2).transpose(1, 2)
    positions = w["encoder.pos_embed"]
    x = torch.cat([w["encoder.cls_token"].expand(len(x), 1, d), x], dim=1) + positions

    def norm(x, name):
        return F.layer_norm(x, (d,), w[f"{name}.scale"], w[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return x @ w[f"{name}.kernel"] + w[f"{name}.bias"]

    for i in range(depth):
        block = f"encoder.blocks.{i}"
        b, n, _ = x.shape
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(b, n, 3, heads, d // heads)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(b, n, d)
        x = x + linear(mixed, f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.fc1")), f"{block}.fc2")
    return linear(norm(x[:, 1:].mean(dim=1), "fc_norm"), "head")


@functools.cache
def model_and_params():
    """A classifier with weights that are none of their special starting values."""
    model = classifier_of(encoder_of(SMALL), CLASSES, "fc_norm")
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 48)))["params"])()
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype("float32"), params)


@functools.cache
def step_and_batch():
    """A compiled step, its first state and a batch.

    The crops are made ahead and symmetric, so that crop and flip change nothing; the rest is off but smoothing.
    """
    model, params = model_and_params()
    off = dict(rand_augment=None, mixup=0.0, cutmix=0.0, erasing=0.0, drop_path=0.0)
    recipe = dataclasses.replace(
        RECIPES["mae-finetune"]["L/16"], base_lr=0.032, weight_decay=0.3, ema_factor=0.5, **off
    )
    clock = MaeClock(updates=5, warmup=1, updates_per_epoch=5, seed=0, floor=0.1)
    step = jax.jit(make_finetune_step(model, recipe, batch=BATCH, clock=clock, mean=MEAN, std=STD))
    rng = np.random.default_rng(2)
    half = rng.integers(0, 256, (BATCH, 16, 8, 3), np.uint8)
    images = np.concatenate([half, half[:, :, ::-1]], axis=2)
    label = rng.integers(0, CLASSES, BATCH).astype(np.int32)
    batch = {"image": images[:, None], "id": np.arange(BATCH, dtype=np.int32), "label": label}
    return step, first_state(params, recipe), batch


def test_forward_is_pytorchs_with_mean_pooling_and_a_norm_of_its_own():
    model, params = model_and_params()
    images_bhwc = np.random.default_rng(1).normal(size=(BATCH, 16, 16, 3)).astype("float32")
    found, _ = jax.jit(model.apply)({"params": params}, patchify(jnp.asarray(images_bhwc), PATCH))
    expected = logits(leaves_of(params), images_bhwc, PATCH, HEADS, DEPTH)
    np.testing.assert_allclose(found, expected.detach(), atol=1e-5)


def test_updates_are_pytorchs_adamw_with_a_group_for_each_layer():
    _, params = model_and_params()
    step, state, batch = step_and_batch()
    images, label = batch["image"][:, 0], batch["label"]
    weights = leaves_of(params)
    peak = 0.032 * BATCH / 256

    def layer(name):  # 0 the stem, depth + 1 what is new
        return 1 + int(name.split(".")[2]) if ".blocks." in name else 0 if name.startswith("encoder") else DEPTH + 1

    groups = []
    for name, leaf in weights.items():
        decayed = leaf.ndim > 1 and name not in ("encoder.pos_embed", "encoder.cls_token")
        scale = 0.75 ** (DEPTH + 1 - layer(name))
        groups.append({"params": [leaf], "weight_decay": 0.3 if decayed else 0.0, "scale": scale})
    adamw = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999), eps=1e-8)

    average = start = leaves_of(params)
    normal = ((images / 255 - MEAN) / STD).astype("float64")
    for s in range(4):
        state, metrics, _ = step(state, batch)
        adamw.zero_grad()
        found = logits(weights, normal, PATCH, HEADS, DEPTH)
        loss = F.cross_entropy(found, torch.tensor(label, dtype=torch.int64), label_smoothing=0.1)
        loss.backward()
        factor = 0.0 if s == 0 else 0.1 + 0.9 * (1 + np.cos(np.pi * (s - 1) / 4)) / 2
        for group in adamw.param_groups:
            group["lr"] = peak * factor * group["scale"]
        adamw.step()
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
        norm = sum((leaf.grad**2).sum() for leaf in weights.values()).sqrt()
        np.testing.assert_allclose(metrics["gradient_norm"], norm.item(), rtol=1e-4)
        np.testing.assert_allclose(metrics["learning_rate"], peak * factor, rtol=1e-6)
        average = {name: 0.5 * leaf + 0.5 * weights[name].detach() for name, leaf in average.items()}

    end, kept = leaves_of(jax.device_get(state.params)), leaves_of(jax.device_get(evaluated_params(state)))
    for name, leaf in weights.items():
        moved, expected = ((x - start[name]).detach().numpy() for x in (end[name], leaf))
        if name.endswith("qkv.bias"):  # the keys' part has no gradient but rounding, which Adam turns into steps
            moved, expected = (np.delete(x, slice(24, 48)) for x in (moved, expected))
        unit = peak * 0.75 ** (DEPTH + 1 - layer(name))
        assert np.quantile(abs(moved - expected), 0.99) < 2e-3 * unit, name
        assert abs(moved - expected).max() < 0.1 * unit, name
        assert abs(moved).max() > unit, f"{name} does not learn"
        if not name.endswith("qkv.bias"):
            assert abs(kept[name] - average[name]).max() < 0.1 * unit, name


def test_a_batch_that_is_not_finite_changes_nothing_but_the_clocks():
    step, state, batch = step_and_batch()
    head = state.params["head"]
    broken = state.replace(params=state.params | {"head": head | {"bias": head["bias"].at[1].set(jnp.nan)}})
    after, metrics, _ = step(broken, batch)
    assert not np.isfinite(metrics["loss"])
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (1, 1, 1)
    for name in ("params", "moments", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(broken, name))
