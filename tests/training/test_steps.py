"""The three train steps: what they must not change, and that devices and parts of a batch make no difference."""

import functools
import math
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax.data.device.augment import make_views
from maect_jax.models.nnclr import Predictor, Projector
from maect_jax.models.vit import split_blocks
from maect_jax.neighbors.queue import SupportQueue
from maect_jax.objectives.masking import random_mask
from maect_jax.parallel import mesh as meshes
from maect_jax.parallel.mesh import batch_sharding, make_mesh, replicated, state_sharding
from maect_jax.training.contrastive import make_contrastive_step
from maect_jax.training.optimizer import Group
from maect_jax.training.pretraining import make_pretrain_step, reconstruction_only
from maect_jax.training.state import create_state
from maect_jax.training.steps import Clock
from small import encoder_of, mae_of

CFG = dict(img_size=16, patch_size=4, dim=32, depth=4, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
BATCH, ROWS, FROZEN, UPDATES = 16, 208, 2, 3
HEAD = Projector(24, 8), Predictor(40, 8)
# Head rates are low: the bias before the predictor has no gradient but rounding, which Adam turns into whole steps.
GROUPS = {
    "encoder": Group(2e-3, 0.05, 0.65),
    "decoder": Group(2e-3, 0.05),
    "projector": Group(2e-4, 0.01),
    "predictor": Group(2e-4, 0.01),
}
MASKS = random_mask(16, 0.75)
CLOCK = Clock(updates=20, warmup=2, updates_per_epoch=2, seed=5)


def views_of(batch, epoch):
    """Two minimally augmented views, times a factor that a test can make infinite."""
    views = make_views(
        batch,
        seed=5,
        epoch=epoch,
        views=2,
        size=16,
        scale=(0.3, 1.0),
        augmentation="minimal",
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    return views * batch["factor"][None, :, None, None, None]


def batches():
    rng = np.random.default_rng(0)
    for update in range(UPDATES):
        yield {
            "image": rng.integers(0, 256, (BATCH, 20, 20, 3), np.uint8),
            "id": (np.arange(BATCH) + BATCH * (update % 2)).astype(np.int32),
            "label": rng.integers(0, 4, BATCH).astype(np.int32),
            "factor": np.ones(BATCH, np.float32),
        }


def select(*names):
    return {name: GROUPS[name] for name in names}


def make_step(stage, mesh, frozen=FROZEN, accumulate=1):
    model = mae_of(CFG)
    if stage == "pretrain":
        return make_pretrain_step(
            model,
            views_of,
            clock=CLOCK,
            groups=select("encoder", "decoder"),
            masks=MASKS,
            objective=reconstruction_only(MASKS),
            normalise_pixels=True,
            accumulate=accumulate,
        )
    tune = stage == "tune"
    return make_contrastive_step(
        encoder_of(CFG, frozen=frozen if tune else 0),
        *HEAD,
        views_of,
        mesh=mesh,
        clock=CLOCK,
        groups=select("encoder", "projector", "predictor") if tune else select("projector", "predictor"),
        pooling="mean",
        temperature=0.2,
        top_k=3 if tune else 1,
        target_factor=0.9 if tune else None,
        ema_factor=0.9 if tune else None,
    )


@functools.cache
def variables():
    """Fresh parameters of autoencoder and head, and a queue."""

    def create():
        keys = jax.random.split(jax.random.key(0), 4)
        order = jnp.arange(16, dtype=jnp.int32)[None]
        mae = mae_of(CFG).init(keys[0], jnp.zeros((1, 4, 48)), order)["params"]
        head = [m.init(k, jnp.zeros((2, d)), train=False) for m, k, d in zip(HEAD, keys[1:], (32, 8))]
        return mae, *head, SupportQueue.create(keys[3], ROWS, 8)

    return jax.device_get(jax.jit(create)())


def make_state(stage, frozen=FROZEN):
    mae, projector, predictor, queue = variables()
    if stage == "pretrain":
        return create_state(mae)
    params = {"projector": projector["params"], "predictor": predictor["params"]}
    stats = {"projector": projector["batch_stats"], "predictor": predictor["batch_stats"]}
    if stage == "head":
        return create_state(params, {"encoder": mae["encoder"]}, stats, queue=queue)
    trained, lower = split_blocks(mae["encoder"], frozen)
    params["encoder"] = trained
    return create_state(params, {"encoder": lower}, stats, dict(projector), queue, {"encoder": trained})


@functools.cache
def compiled(stage, devices=1, fsdp=1, accumulate=1):
    """Compiled step and the placed first state and batches."""
    mesh = make_mesh(fsdp, jax.devices()[:devices])
    state = make_state(stage)
    shardings = state_sharding(mesh, state)
    outputs = shardings, replicated(mesh), batch_sharding(mesh)
    step = jax.jit(make_step(stage, mesh, accumulate=accumulate), out_shardings=outputs)
    placed = jax.device_put(state, shardings), [jax.device_put(b, batch_sharding(mesh)) for b in batches()]
    return step.lower(placed[0], placed[1][0]).compile(), *placed


@functools.cache
def ran(stage, devices=1, fsdp=1):
    """Losses, gradient norms and the last state of a few updates."""
    step, state, data = compiled(stage, devices, fsdp)
    metrics = []
    for batch in data:
        state, values, _ = step(state, batch)
        metrics.append(jax.device_get(values))
    return [m["loss"] for m in metrics], [m["gradient_norm"] for m in metrics], state


@pytest.fixture
def split_everything(monkeypatch):
    """Lets the size rule split the small arrays of these tests; what was compiled under it is kept apart by fsdp."""
    monkeypatch.setattr(meshes, "SHARD_FROM", 2**8)


def same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# ------------------------------------------------------------------------------------------------------------- devices


def same_run(a, b):
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-4)
    for queue in (a[2].queue, b[2].queue):
        assert queue is None or int(queue.pointer) == UPDATES * BATCH % ROWS
    if a[2].queue is not None:
        np.testing.assert_array_equal(a[2].queue.id_q, b[2].queue.id_q)
        np.testing.assert_array_equal(a[2].queue.label_q, b[2].queue.label_q)
        np.testing.assert_allclose(a[2].queue.rows_qe, b[2].queue.rows_qe, atol=1e-3)


@pytest.mark.parametrize("stage", ["pretrain", "head", "tune"])
def test_eight_devices_train_as_one(stage):
    same_run(ran(stage, 8), ran(stage, 1))


@pytest.mark.parametrize(("stage", "fsdp"), [("pretrain", 4), ("tune", 2)])
def test_parameters_split_over_devices_train_as_copied_ones(stage, fsdp, split_everything):
    result = ran(stage, 8, fsdp)
    kernel = result[2].params["encoder"]["blocks"]["fc1"]["kernel"]
    moment = result[2].moments.mu["encoder"]["blocks"]["fc1"]["kernel"]
    for leaf in (kernel, moment):
        assert leaf.sharding.shard_shape(leaf.shape)[-1] == leaf.shape[-1] // fsdp, "the rule did not split it"
    same_run(result, ran(stage, 1))


def exchanged(program) -> list[tuple[int, ...]]:
    """Shapes of all arrays that devices gather or pass on in a compiled program; sums are left out."""
    kinds = "all-gather|all-to-all|collective-permute"
    results = re.findall(rf"^.*= (.*) (?:{kinds})(?:-start)?\(", program.as_text(), re.MULTILINE)
    shapes = [shape for result in results for shape in re.findall(r"\[([\d,]*)\]", result)]
    return [tuple(int(size) for size in shape.split(",") if size) for shape in shapes]


@pytest.mark.parametrize("stage", ["head", "tune"])
def test_only_embeddings_and_ids_of_a_batch_travel(stage):
    """No pictures, no tokens, no similarities; the queue's 208 rows are a size that nothing else here has."""
    shapes = exchanged(compiled(stage, 8)[0])
    assert (BATCH, 8) in shapes, "the targets enter the queue of each device"
    assert not [shape for shape in shapes if ROWS in shape]
    assert max(math.prod(shape) for shape in shapes) == BATCH * 8


def test_pretraining_exchanges_nothing_but_sums():
    assert exchanged(compiled("pretrain", 8)[0]) == []


# -------------------------------------------------------------------------------------------------------------- frozen


def test_frozen_parameters_keep_every_bit_and_have_no_moments():
    for stage in ("head", "tune"):
        state = ran(stage)[2]
        same_bits(state.frozen, make_state(stage).frozen)
        assert jax.tree.structure(state.moments.mu) == jax.tree.structure(state.params)
    assert set(ran("head")[2].params) == {"projector", "predictor"}
    assert set(ran("tune")[2].params["encoder"]) == {"blocks", "norm"}


def test_everything_trained_moves_but_the_projectors_last_bias():
    for stage in ("pretrain", "head", "tune"):
        before, after = make_state(stage).params, jax.device_get(ran(stage)[2].params)
        still = [
            jax.tree_util.keystr(path)
            for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after))
            if np.array_equal(a, b)
        ]
        assert still == ([] if stage == "pretrain" else ["['projector']['bn2']['bias']"])


def matrix_flops(jaxpr) -> int:
    """Operations of all matrix products of a program, those of a loop's body as often as it runs.

    (XLA's own cost analysis counts the body of a loop once, whatever its length.)
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            total += 2 * out * math.prod(left[axis] for axis in contracted)
        inner = sum(matrix_flops(sub) for sub in jax.extend.core.jaxprs_in_params(equation.params))
        total += inner * equation.params.get("length", 1)
    return total


def test_frozen_blocks_cost_no_backward_pass():
    """Freezing saves twice the forward work of the lower blocks (the stem is frozen in either case)."""
    mesh, batch = make_mesh(devices=jax.devices()[:1]), next(batches())

    def flops(frozen):
        return matrix_flops(jax.make_jaxpr(make_step("tune", mesh, frozen))(make_state("tune", frozen), batch).jaxpr)

    d, tokens = CFG["dim"], 17
    block = 2 * BATCH * tokens * (24 * d**2 + 4 * tokens * d)
    assert flops(0) - flops(FROZEN) == 2 * FROZEN * block


# ----------------------------------------------------------------------------------------------------- non-finite batch


@pytest.mark.parametrize("stage", ["pretrain", "tune"])
def test_a_batch_that_is_not_finite_changes_nothing_but_the_clocks(stage):
    step, state, data = compiled(stage)
    state, _, _ = step(state, data[0])
    bad = data[1] | {"factor": data[1]["factor"].at[3].set(jnp.nan)}
    after, metrics, _ = step(state, bad)
    assert not np.isfinite(metrics["loss"])
    clocks = ("step", "skipped", "skipped_in_a_row")
    assert [int(getattr(after, name)) for name in clocks] == [2, 1, 1]
    restored = after.replace(**{name: getattr(state, name) for name in clocks})
    same_bits(restored, state)
    after, _, _ = step(after, bad)
    assert [int(getattr(after, name)) for name in clocks] == [3, 2, 2]
    after, metrics, _ = step(after, data[2])
    assert [int(getattr(after, name)) for name in clocks] == [4, 2, 0]
    assert np.isfinite(metrics["loss"])


# ---------------------------------------------------------------------------------------------------------------- parts


def test_a_batch_in_parts_gives_the_gradient_of_the_whole_batch():
    (whole, state, data), (parts, _, _) = compiled("pretrain"), compiled("pretrain", accumulate=4)
    (a, metrics_a, _), (b, metrics_b, embedding) = whole(state, data[0]), parts(state, data[0])
    np.testing.assert_allclose(metrics_a["loss"], metrics_b["loss"], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-7), a.moments.mu, b.moments.mu)
    assert embedding.shape == (BATCH, CFG["dim"])
