"""The step of stage 1 with several parts a picture: against MAE's step, the definition, and itself on more devices."""

import functools
import math
import re
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax.objectives.masking import disjoint_masks, parallel_masks, random_mask
from maect_jax.parallel import mesh as meshes
from maect_jax.parallel.mesh import batch_sharding, make_mesh, replicated, state_sharding
from maect_jax.training import optimizer, pretraining
from maect_jax.training.optimizer import Group
from maect_jax.training.pretraining import make_pretrain_step, reconstruction_only, self_consistent
from maect_jax.training.state import create_state
from maect_jax.training.steps import Clock
from small import cast, mae_of, mae_tree

PATCH, BATCH = 4, 16
CFG = dict(patch_size=PATCH, dim=16, depth=1, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2)
PLAIN = dict(weight=1.0, norm="all", form="symmetric", space="targets")
QUICK = {"xla_backend_optimization_level": 0}  # machine code is made twice as fast as it would be with all its polish


def views_of(batch, epoch):
    """The picture, and another one made of it where two views are asked for."""
    image = batch["image"]
    return jnp.stack([image, image[:, ::-1] ** 2][: batch["views"].shape[1]])


def pictures(grid: int, views: int = 1, batch: int = BATCH, first: int = 0, dtype: str = "float32") -> dict:
    rng = np.random.default_rng(first)
    return {
        "image": rng.normal(size=(batch, grid * PATCH, grid * PATCH, 3)).astype(dtype),
        "id": np.arange(first, first + batch, dtype=np.int32),
        "views": np.zeros((batch, views), np.int8),  # how many, as a shape
    }


def make_step(grid, masks, objective, accumulate=1, dtype="float32"):
    group = Group(1e-3, 0.05)
    return make_pretrain_step(
        mae_of(CFG | {"img_size": grid * PATCH}, dtype=jnp.dtype(dtype)),
        views_of,
        clock=Clock(updates=20, warmup=2, updates_per_epoch=2, seed=5),
        groups={"encoder": group, "decoder": group},
        masks=masks,
        objective=objective,
        normalise_pixels=True,
        accumulate=accumulate,
    )


@functools.cache
def parameters(grid: int) -> dict:
    """Fresh ones, moved so far that the loss depends on which patches are seen."""
    rng = np.random.default_rng(0)
    tree = jax.device_get(jax.jit(lambda: mae_tree(CFG | {"img_size": grid * PATCH}))())
    return jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(x.dtype), tree)


def emae_of(masks, **changes):
    return self_consistent(masks, normalised_pixels=True, **PLAIN | changes)


def use_orders(monkeypatch, orders_vrn: np.ndarray) -> None:
    """Has pictures shuffled by the row of their id: [views, ids, patches]."""
    noise = np.zeros(orders_vrn.shape, np.float32)
    np.put_along_axis(noise, orders_vrn, np.arange(orders_vrn.shape[-1], dtype=np.float32), axis=-1)
    rows = jnp.asarray(noise)
    monkeypatch.setattr(pretraining, "sample_keys", lambda seed, purpose, epoch, ids, view: rows[view, ids])
    monkeypatch.setattr(pretraining, "mask_noise", lambda rows, patches: rows)


# ------------------------------------------------------------------------------------------ the mean of MAE's losses


def evaluated(grid, masks, objective, batches, accumulate=1) -> list[tuple[float, np.ndarray]]:
    """Reconstruction loss and embedding of each batch; nothing of the update is compiled."""
    step = make_step(grid, masks, objective, accumulate)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def forward(params, batch):
        _, metrics, embedding_bd = step(create_state(params), batch)
        return metrics.get("reconstruction_loss", metrics["loss"]), embedding_bd

    return [jax.device_get(forward(parameters(grid), batch)) for batch in batches]


def mean_of_mae(monkeypatch, grid, windows, keep, share, views, batch) -> tuple[float, np.ndarray]:
    """Loss of MAE's step on one view, the mean over parts and views, and its embedding of the first part and view.

    Args:
      windows: for each part the order in which MAE is to take the patches, as places in the shuffled order.
    """
    patches = grid**2
    rng = np.random.default_rng(3)
    shuffled_vbn = np.stack([[rng.permutation(patches) for _ in range(batch)] for _ in range(views)])
    mae = random_mask(patches, 1 - (keep + 0.5) / patches, share)
    assert mae.keep == keep
    both, orders, data = pictures(grid, views, batch), [], []
    for window in windows:
        for image, order_bn in zip(views_of(both, 0), shuffled_vbn):
            ids = np.arange(batch, dtype=np.int32) + len(orders) * batch
            data.append({"image": image, "id": ids, "views": both["views"][:, :1]})
            orders.append(order_bn[:, window])
    use_orders(monkeypatch, np.concatenate(orders)[None])
    found = evaluated(grid, mae, reconstruction_only(mae), data)
    use_orders(monkeypatch, shuffled_vbn)
    return np.mean([loss for loss, _ in found]), found[0][1]


def same_loss_and_embedding(found, expected) -> None:
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("grid", "parts", "views", "accumulate", "share", "shown"),
    [(6, 3, 1, 1, 1.0, 12), (6, 4, 2, 1, 1.0, 9), (7, 7, 1, 2, 1.0, 7), (6, 4, 1, 2, 2 / 3, 6)],
)
def test_reconstruction_is_the_mean_of_the_losses_of_mae_with_each_parts_mask(
    monkeypatch, grid, parts, views, accumulate, share, shown
):
    keep, batch = grid**2 // parts, 4
    windows = []
    for part in range(parts):
        blocks = [[(part + i) % parts * keep + s for s in range(keep)] for i in range(parts)]
        told = [place for block in blocks[1:] for place in block[:shown]]
        windows.append(blocks[0] + told + [place for block in blocks[1:] for place in block[shown:]])
    expected = mean_of_mae(monkeypatch, grid, windows, keep, share, views, batch)
    masks = parallel_masks(grid**2, parts, share)
    (found,) = evaluated(grid, masks, emae_of(masks), [pictures(grid, views, batch)], accumulate)
    same_loss_and_embedding(found, expected)


def test_disjoint_masks_have_the_mean_of_two_losses_of_mae(monkeypatch):
    """Half is hidden, three quarters in all: the second part begins a quarter later."""
    windows = [np.arange(36), (np.arange(36) + 9) % 36]
    expected = mean_of_mae(monkeypatch, 6, windows, keep=18, share=1.0, views=1, batch=4)
    masks = disjoint_masks(36, 0.5, 0.75)
    (found,) = evaluated(6, masks, reconstruction_only(masks), [pictures(6, batch=4)])
    same_loss_and_embedding(found, expected)


# -------------------------------------------------------------------------------------------------------- definition


def defined_loss(params, images_bhwc, perm, *, parts, shown, weight, norm, form, space):
    """EMAE's loss as it is defined: masks in picture order, a pass of the model for each part, a loop over pairs."""
    b, n = perm.shape
    grid = round(n**0.5)
    x = np.asarray(images_bhwc).reshape(b, grid, PATCH, grid, PATCH, 3).swapaxes(2, 3).reshape(b, n, -1)
    deviation = np.sqrt(x.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
    target = (x - x.mean(axis=-1, keepdims=True)) / deviation
    place = np.argsort(perm, axis=1)  # of each patch in the shuffled order
    block, asked = place // (n // parts), place % (n // parts) < shown
    apply = jax.jit(mae_of(CFG | {"img_size": grid * PATCH}, dtype=jnp.float64).apply)
    rows = np.arange(b)[:, None]
    mask, prediction = [], []
    for part in range(parts):
        mask.append((block != part) & asked)
        seen, removed = (np.stack([np.flatnonzero(row) for row in which]) for which in (block == part, mask[part]))
        found, _ = apply({"params": params}, x[rows, seen], np.concatenate([seen, removed], axis=1))
        prediction.append(jnp.zeros(x.shape).at[rows, removed].set(found))
    squares = [(m * jnp.square(p - target).mean(axis=-1)).sum() for m, p in zip(mask, prediction)]
    loss = sum(squares) / sum(m.sum() for m in mask)
    pairs = list(combinations(range(parts), 2))
    for i, j in pairs:
        both = mask[i] & mask[j]
        one, two = prediction[i], prediction[j]
        if form == "one_sided":  # the target is the part whose block comes sooner, going back from the patch's own
            sooner = ((block - i) % parts < (block - j) % parts)[..., None]
            stopped = jax.lax.stop_gradient
            one, two = jnp.where(sooner, stopped(one), one), jnp.where(sooner, two, stopped(two))
        apart = jnp.abs(one - two) * (deviation if space == "pixels" else 1)
        share = both.sum(axis=1) if norm == "overlap" else asked.sum(axis=1)
        loss += weight / len(pairs) * ((both * apart.mean(axis=-1)).sum(axis=1) / share).mean()
    return loss


@pytest.mark.parametrize(
    ("share", "settings"),
    [
        (1.0, dict(weight=0.7, norm="all", form="symmetric", space="pixels")),
        (0.5, dict(weight=1.5, norm="overlap", form="one_sided", space="targets")),
    ],
)
def test_gradients_of_all_parameters_follow_the_definition(monkeypatch, share, settings):
    rng = np.random.default_rng(4)
    perm = np.stack([rng.permutation(16) for _ in range(3)])
    use_orders(monkeypatch, perm[None])
    monkeypatch.setattr(pretraining, "finish", lambda old, new, metrics: (new, metrics))  # keeps what is not looked at
    masks = parallel_masks(16, 4, share)
    batch = pictures(4, batch=3, dtype="float64")
    with jax.enable_x64():
        params = cast(parameters(4), "float64")
        step = make_step(4, masks, emae_of(masks, **settings), dtype="float64")

        @functools.partial(jax.jit, compiler_options=QUICK)
        def loss_and_moments(params):
            state, metrics, _ = step(create_state(params), batch)
            return metrics["loss"], state.moments.mu

        found_loss, moments = loss_and_moments(params)
        found = jax.tree.map(lambda m: m / (1 - optimizer.BETAS[0]), moments)
        shown = round(4 * share)
        defined = functools.partial(defined_loss, images_bhwc=batch["image"], perm=perm, parts=4, shown=shown)
        loss, expected = jax.value_and_grad(functools.partial(defined, **settings))(params)
    np.testing.assert_allclose(found_loss, loss, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), found, expected)


# ------------------------------------------------------------------------------------------------- devices and groups

METHODS = {"emae": parallel_masks(16, 4), "disjoint": disjoint_masks(16, 0.75)}


@functools.cache
def compiled(method, devices=1, fsdp=1, accumulate=1):
    """Lowered and compiled step in double precision, so that Adam makes nothing of rounding; first state; batches."""
    with jax.enable_x64():
        mesh, masks = make_mesh(fsdp, jax.devices()[:devices]), METHODS[method]
        objective = emae_of(masks) if method == "emae" else reconstruction_only(masks)
        state = create_state(cast(parameters(4), "float64"))
        shardings = state_sharding(mesh, state)
        outputs = shardings, replicated(mesh), batch_sharding(mesh)
        step = jax.jit(make_step(4, masks, objective, accumulate, "float64"), out_shardings=outputs)
        data = [
            jax.device_put(pictures(4, 2, first=BATCH * update, dtype="float64"), batch_sharding(mesh))
            for update in range(3)
        ]
        state = jax.device_put(state, shardings)
        lowered = step.lower(state, data[0])
        return lowered, lowered.compile(compiler_options=QUICK), state, data


@functools.cache
def ran(method, devices=1, fsdp=1, accumulate=1):
    """All metrics and embeddings of three updates, and the last state."""
    _, step, state, data = compiled(method, devices, fsdp, accumulate)
    recorded = []
    for batch in data:
        state, metrics, embedding_bd = step(state, batch)
        recorded.append(jax.device_get(metrics | {"embedding": embedding_bd}))
    return recorded, state


def same_run(a, b):
    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-10)

    assert all(np.isfinite(metrics["loss"]) for metrics in a[0])
    jax.tree.map(close, a[0], b[0])
    jax.tree.map(close, jax.device_get(a[1].params), jax.device_get(b[1].params))


@pytest.fixture
def split_everything(monkeypatch):
    """Lets the size rule split the small arrays of these tests; what was compiled under it is kept apart by fsdp."""
    monkeypatch.setattr(meshes, "SHARD_FROM", 2**8)


@pytest.mark.parametrize("method", METHODS)
def test_eight_devices_train_as_one(method):
    same_run(ran(method, devices=8), ran(method))


def test_parameters_split_over_devices_train_as_copied_ones(split_everything):
    result = ran("emae", devices=8, fsdp=2)
    kernel = result[1].params["encoder"]["blocks"]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[-1] == kernel.shape[-1] // 2, "the rule did not split it"
    same_run(result, ran("emae"))


def test_a_batch_in_groups_trains_as_a_whole_one():
    """All of it: also the ratio of two means, which is not the mean of the groups' ratios."""
    same_run(ran("emae", accumulate=2), ran("emae"))


def test_what_is_told_of_an_update():
    first = ran("emae")[0][0]
    np.testing.assert_allclose(first["loss"], first["reconstruction_loss"] + 0.5 * first["disagreement"], rtol=1e-12)
    ratio = first["disagreement"] / first["reconstruction_loss"] ** 0.5
    np.testing.assert_allclose(first["disagreement_ratio"], ratio, rtol=1e-12)
    assert not {"disagreement", "disagreement_ratio", "reconstruction_loss"} & ran("disjoint")[0][0].keys()


# ------------------------------------------------------------------------------------------------ the compiled program


def results_of(program: str, kinds: str) -> list[tuple[int, ...]]:
    """Shapes of what the instructions of these kinds return in a compiled program."""
    lines = re.findall(rf"^.*= (.*?) (?:{kinds})(?:-start)?\(", program, re.MULTILINE)
    shapes = [shape for line in lines for shape in re.findall(r"\[([\d,]*)\]", line)]
    return [tuple(int(size) for size in shape.split(",") if size) for shape in shapes]


@pytest.mark.parametrize("method", METHODS)
def test_all_parts_come_from_one_sort_of_each_picture_without_scatter(method):
    lowered, program, *_ = compiled(method)
    assert results_of(program.as_text(), "sort") == [(2 * BATCH, 16)] * 2  # noise and places of two views
    assert "scatter" not in lowered.as_text()  # before a compiler writes them as loops


@pytest.mark.parametrize("method", METHODS)
def test_devices_exchange_sums_of_gradients_and_nothing_else(method):
    _, program, state, _ = compiled(method, devices=8)
    text = program.as_text()
    assert results_of(text, "all-gather|all-to-all|collective-permute|reduce-scatter") == []
    summed = [math.prod(shape) for shape in results_of(text, "all-reduce")]
    sizes = [leaf.size for leaf in jax.tree.leaves(state.params)]
    assert max(summed) == max(sizes)
    assert sum(sizes) < sum(summed) < sum(sizes) + 10  # and the metrics


@pytest.mark.parametrize("method", METHODS)
def test_predictions_stay_in_half_precision_until_the_loss(method):
    masks, seen = METHODS[method], []
    objective = emae_of(masks) if method == "emae" else reconstruction_only(masks)

    def watched(prediction_bkmp, target_bnp, *rest):
        seen.append((prediction_bkmp.shape, prediction_bkmp.dtype, target_bnp.dtype))
        return objective(prediction_bkmp, target_bnp, *rest)

    step = make_step(4, masks, watched, dtype="bfloat16")
    _, metrics, _ = jax.eval_shape(step, create_state(parameters(4)), pictures(4))
    assert seen == [((BATCH, masks.parts, 12, 48), jnp.bfloat16, jnp.float32)]
    assert {metrics[name].dtype for name in metrics if not name.startswith("skipped")} == {jnp.dtype("float32")}
