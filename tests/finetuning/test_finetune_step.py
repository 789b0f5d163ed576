"""The update with every augmentation on: devices make no difference, and a bad batch changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.finetuning.model import classifier_of, start_params
from maect_jax.finetuning.recipes import RECIPES
from maect_jax.finetuning.step import clock_of, evaluated_params, first_state, make_finetune_step
from maect_jax.parallel import mesh as meshes
from maect_jax.parallel.mesh import batch_sharding, make_mesh, replicated, state_sharding
from small import encoder_of

SMALL = dict(img_size=16, patch_size=4, dim=32, depth=2, heads=2)
BATCH, CLASSES, UPDATES = 16, 4, 3
RECIPE = dataclasses.replace(RECIPES["mae-finetune"]["L/16"], base_lr=0.01, ema_factor=0.5)
CLOCK = clock_of(dataclasses.replace(RECIPE, warmup_epochs=1, epochs=4), BATCH, 2 * BATCH, seed=3)


@functools.cache
def start():
    encoder = encoder_of(SMALL)
    model = classifier_of(encoder, CLASSES, "fc_norm")

    def create():
        params = encoder.init(jax.random.key(0), jnp.zeros((1, 16, 48)))["params"]
        return first_state(start_params(model, params, 48, jax.random.key(1)), RECIPE)

    return model, jax.device_get(jax.jit(create)())


def batches():
    rng = np.random.default_rng(0)
    for update in range(UPDATES):
        ids = np.arange(BATCH, dtype=np.int32) + BATCH * (update % 2)
        yield {
            "image": rng.integers(0, 256, (BATCH, 20, 20, 3), np.uint8),
            "id": ids,
            "label": ids % CLASSES,
        }


@functools.cache
def ran(devices, fsdp=1):
    """Compiled step, metrics of each update, the last state, and the first batch on the devices."""
    model, state = start()
    mesh = make_mesh(fsdp, jax.devices()[:devices])
    step = make_finetune_step(model, RECIPE, batch=BATCH, clock=CLOCK, mean=(0.5,) * 3, std=(0.25,) * 3)
    shardings = state_sharding(mesh, state)
    step = jax.jit(step, out_shardings=(shardings, replicated(mesh), batch_sharding(mesh)))
    state, metrics = jax.device_put(state, shardings), []
    placed = [jax.device_put(batch, batch_sharding(mesh)) for batch in batches()]
    step = step.lower(state, placed[0]).compile()
    for batch in placed:
        state, found, _ = step(state, batch)
        metrics.append(jax.device_get(found))
    return step, metrics, state, placed[0]


def test_eight_devices_that_share_parameters_train_as_one(monkeypatch):
    monkeypatch.setattr(meshes, "SHARD_FROM", 2**8)
    found, expected = ran(8, 2), ran(1)
    kernel = found[2].moments.mu["encoder"]["blocks"]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[-1] == kernel.shape[-1] // 2, "the rule did not split it"
    for name, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-4)):
        np.testing.assert_allclose(*([m[name] for m in run[1]] for run in (found, expected)), rtol=tolerance)
    assert [float(m["skipped"]) for m in expected[1]] == [0, 0, 0]


def test_every_parameter_learns_and_the_average_follows():
    _, before = start()
    _, _, state, _ = ran(1)
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), before.params, state.params)
    assert all(jax.tree.leaves(moved))
    average = evaluated_params(state)["head"]["kernel"]
    first, last = (np.asarray(s.params["head"]["kernel"]) for s in (before, state))
    between = abs(average - first).max(), abs(last - first).max()
    assert 0 < between[0] < between[1]


def test_a_batch_that_is_not_finite_changes_nothing_but_the_clocks():
    step, _, state, batch = ran(1)
    head = state.params["head"]
    broken = state.replace(params=state.params | {"head": head | {"bias": head["bias"].at[1].set(jnp.nan)}})
    after, metrics, _ = step(broken, batch)
    assert not np.isfinite(metrics["loss"])
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (UPDATES + 1, 1, 1)
    for name in ("params", "moments", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(broken, name))
