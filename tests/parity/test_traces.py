"""Ten updates of pre-training and ten of contrastive tuning, by the real train steps, against the recorded ones."""

import re
from dataclasses import dataclass
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import arrays, below
from maect_jax.exchange.mapping import from_layout, to_layout
from maect_jax.models.nnclr import Predictor, Projector
from maect_jax.models.vit import join_blocks, split_blocks
from maect_jax.neighbors.queue import SupportQueue
from maect_jax.objectives.masking import random_mask
from maect_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from maect_jax.training import contrastive, optimizer
from maect_jax.training import pretraining as pretrain_module
from maect_jax.training.contrastive import make_contrastive_step
from maect_jax.training.optimizer import Group
from maect_jax.training.pretraining import make_pretrain_step, reconstruction_only
from maect_jax.training.schedule import peak_learning_rate
from maect_jax.training.state import TrainState, create_state
from maect_jax.training.steps import Clock
from small import cast, channels_last, encoder_of, mae_of

GEOMETRY = {"patch": 8, "grid": 4}  # of both traces


@dataclass
class Trace:
    """A run of ours: values of each step stacked, the first gradient and the last state in published layouts."""

    reference: dict
    f64: bool
    metrics: dict
    seen: dict
    gradient: dict
    initial: TrainState
    final: TrainState
    rates: dict
    decays: dict


def run(step, state, batches, reference, f64, seen=None, **plans) -> Trace:
    """Runs the compiled step over the batches; `seen` is filled by callbacks during each step."""
    initial, recorded, metrics, gradient = state, [], [], None
    for batch in batches:
        state, values, _ = step(state, batch)
        metrics.append(jax.device_get(values))
        jax.effects_barrier()
        recorded.append(dict(seen or {}))
        if gradient is None:  # the first moment after one step is a tenth of the gradient
            gradient = jax.tree.map(lambda m: m / (1 - optimizer.BETAS[0]), state.moments.mu)
    stack = [{key: np.stack([row[key] for row in rows]) for key in rows[0]} for rows in (metrics, recorded)]
    states = jax.device_get((gradient, initial, state))
    return Trace(reference, f64, *stack, *states, **plans)


def loose_parts(names) -> dict[str, slice]:
    """'a.b[48:96]' -> the slice of that tensor; a name alone means all of it."""
    matches = [re.fullmatch(r"([^\[]+)(?:\[(\d+):(\d+)\])?", str(name)).groups() for name in names]
    return {name: slice(int(a), int(b)) if a else slice(None) for name, a, b in matches}


def deviations(found: dict, expected: dict, loose: dict[str, slice]) -> tuple[np.ndarray, np.ndarray]:
    """Absolute deviations outside and inside the loose parts, all tensors together."""
    strict, listed = [], []
    for name, value in expected.items():
        error = np.abs(np.asarray(found[name], np.float64) - value)
        assert error.shape == value.shape, name
        inside = np.zeros(error.shape, bool)
        if name in loose:
            inside[loose[name]] = True
        strict.append(error[~inside])
        listed.append(error[inside])
    return np.concatenate(strict), np.concatenate(listed)


# -------------------------------------------------------------------------------------------------------- pre-training


def full(tree: dict) -> dict:
    return to_layout(jax.device_get(tree), "mae_official_full", **GEOMETRY)


@pytest.fixture(scope="module", params=["float32", "float64"])
def pretraining(request):
    reference, dtype = arrays("stage1_trace"), jnp.dtype(request.param)
    cfg = below(reference, "cfg/")
    f64 = request.param == "float64"
    batch, views, updates = (int(cfg[name]) for name in ("batch", "n_views", "steps"))
    peak = peak_learning_rate(float(cfg["base_lr"]), batch, views)
    group = Group(peak, float(cfg["weight_decay"]))
    groups = {"encoder": group, "decoder": group}
    with jax.enable_x64(f64), pytest.MonkeyPatch.context() as patched:
        model = mae_of(cfg, dtype=dtype)
        masks = random_mask(model.encoder.grid**2, float(cfg["mask_ratio"]))
        params = cast(from_layout(below(reference, "init/"), "mae_official_full"), dtype)
        noise = jnp.asarray(reference["noise"])
        # An epoch is one update here, so (epoch, id, view) names a row of the recorded noise.
        row_of = {"sample_keys": lambda seed, purpose, epoch, ids, view: noise[epoch, view * batch + ids]}
        for name, instead in (row_of | {"mask_noise": lambda rows, patches: rows}).items():
            patched.setattr(pretrain_module, name, instead)
        step = make_pretrain_step(
            model,
            lambda batch, epoch: batch["image"],
            clock=Clock(updates, int(cfg["warmup_steps"]), 1, seed=0),
            groups=groups,
            masks=masks,
            objective=reconstruction_only(masks),
            normalise_pixels=True,
        )
        batches = [
            {"image": channels_last(views).astype(dtype), "id": jnp.arange(batch, dtype=jnp.int32)}
            for views in reference["views"]
        ]
        rates, decays = optimizer.plan(params, groups, model.encoder.depth)
        return run(jax.jit(step), create_state(params), batches, reference, f64, rates=rates, decays=decays)


def test_pretraining_losses_and_rates(pretraining):
    suffix, atol = ("_f64", 1e-10) if pretraining.f64 else ("", 5e-6)
    reference = pretraining.reference
    np.testing.assert_allclose(pretraining.metrics["loss"], reference[f"loss{suffix}"], rtol=0, atol=atol)
    rtol = 1e-12 if pretraining.f64 else 1e-6
    np.testing.assert_allclose(pretraining.metrics["learning_rate"], reference["lr"], rtol=rtol, atol=rtol * 1e-3)


def test_pretraining_first_gradient(pretraining):
    expected = below(pretraining.reference, "grad0/")
    found = full(pretraining.gradient)
    assert expected.keys() == found.keys() - {"pos_embed", "decoder_pos_embed"}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=5e-7, err_msg=name)


def test_pretraining_decays_class_and_mask_tokens_but_no_bias_and_no_norm(pretraining):
    decays = full(jax.tree.map(lambda p, d: np.full(p.shape, d), pretraining.initial.params, pretraining.decays))
    for name, value in below(pretraining.reference, "wd/").items():
        assert np.all(decays[name] == value), name
    assert np.all(decays["cls_token"] > 0) and np.all(decays["mask_token"] > 0)


def test_pretraining_final_weights(pretraining):
    reference, found = pretraining.reference, full(pretraining.final.params)
    if pretraining.f64:
        for name, value in below(reference, "final_f64/").items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-7, err_msg=name)
    else:
        strict, listed = deviations(found, below(reference, "final/"), loose_parts(reference["rounding_only"]))
        assert strict.max() < 1e-4
        assert np.quantile(strict, 0.999) < 3e-6
        assert listed.max() < 2e-3


# -------------------------------------------------------------------------------------------------- contrastive tuning


def encoder_tensors(trained: dict, frozen: dict) -> dict:
    tree = {"encoder": jax.device_get(join_blocks(trained, frozen))}
    return {f"encoder.{k}": v for k, v in to_layout(tree, "mae_official_encoder", **GEOMETRY).items()}


def tensors_of(state: TrainState, params: dict | None = None) -> dict:
    """The whole state, or other values in the places of its trained parameters, under the reference's names."""
    params = state.params if params is None else params
    tree = {
        "params": {name: params[name] for name in ("projector", "predictor")},
        "batch_stats": state.batch_stats,
        "target": state.target,
        "queue": vars(state.queue),
    }
    head = to_layout(jax.device_get(tree), "maect_head_stage3", batches_tracked=2 * int(state.step))
    return encoder_tensors(params["encoder"], state.frozen["encoder"]) | head


@pytest.fixture(scope="module", params=["float32 on 1 device", "float32 on 8 devices", "float64 on 1 device"])
def tuning(request):
    reference = arrays("stage3_trace")
    cfg = below(reference, "cfg/")
    f64 = request.param.startswith("float64")
    dtype = jnp.dtype("float64" if f64 else "float32")
    mesh = make_mesh(devices=jax.devices()[: 8 if "8 devices" in request.param else 1])
    batch, views, depth, frozen_blocks = (int(cfg[name]) for name in ("batch", "n_views", "depth", "n_frozen_blocks"))

    def group(part, decay=1.0):
        peak = peak_learning_rate(float(cfg[f"{part}_base_lr"]), batch, views)
        np.testing.assert_allclose(peak, cfg[f"{part}_peak_lr"], rtol=1e-12)
        return Group(peak, float(cfg[f"{part}_weight_decay"]), decay)

    groups = {"encoder": group("encoder", float(cfg["llrd"])), "projector": group("head"), "predictor": group("head")}
    seen, calls = {}, count()

    def recording(mesh, queue, target, *rest):
        found, view = find_neighbors(mesh, queue, target, *rest), next(calls) % 2

        def note(index, target):
            seen[f"nn_idx{view}"], seen[f"targets{view}"] = np.asarray(index), np.asarray(target)

        jax.debug.callback(note, found.index_b, target)
        return found

    find_neighbors = contrastive.find_neighbors
    with jax.enable_x64(f64), pytest.MonkeyPatch.context() as patched:
        patched.setattr(contrastive, "find_neighbors", recording)
        tensors = below(reference, "init/")
        encoder = from_layout(below(tensors, "encoder."), "mae_official_encoder")["encoder"]
        encoder = jax.tree.map(jnp.asarray, encoder)
        head = from_layout({k: v for k, v in tensors.items() if not k.startswith("encoder.")}, "maect_head_stage3")
        trained, frozen = split_blocks(encoder, frozen_blocks)
        state = create_state(
            params={"encoder": trained, **head["params"]},
            frozen={"encoder": frozen},
            batch_stats=head["batch_stats"],
            target=head["target"],
            queue=SupportQueue(**head["queue"]),
            ema={"encoder": trained},
        )
        state = jax.device_put(cast(state, dtype), replicated(mesh))
        hidden, out, predictor_hidden = (int(cfg[name]) for name in ("proj_hidden", "proj_out", "pred_hidden"))
        step = make_contrastive_step(
            encoder_of(cfg, dtype=dtype, frozen=frozen_blocks),
            Projector(hidden, out, dtype=dtype),
            Predictor(predictor_hidden, out, dtype=dtype),
            lambda batch, epoch: batch["image"],
            mesh=mesh,
            clock=Clock(int(cfg["steps"]), int(cfg["warmup_steps"]), 3, seed=0),
            groups=groups,
            pooling=str(cfg["pooling"]),
            temperature=float(cfg["temperature"]),
            top_k=int(cfg["topk"]),
            target_factor=float(cfg["target_factor"]),
            ema_factor=float(cfg["ema_factor_fast" if f64 else "ema_factor"]),
        )
        batches = [
            {
                "image": channels_last(views).astype(dtype),
                "id": jax.device_put(ids.astype(np.int32), batch_sharding(mesh)),
                "label": jax.device_put(labels.astype(np.int32), batch_sharding(mesh)),
            }
            for views, ids, labels in zip(reference["views"], reference["ids"], reference["labels"])
        ]
        rates, decays = optimizer.plan(state.params, groups, depth)
        return run(jax.jit(step), state, batches, reference, f64, seen, rates=rates, decays=decays)


def test_tuning_losses_and_rates(tuning):
    suffix, atol = ("_f64", 1e-9) if tuning.f64 else ("", 2e-4)
    np.testing.assert_allclose(tuning.metrics["loss"], tuning.reference[f"loss{suffix}"], rtol=0, atol=atol)
    rtol = 1e-12 if tuning.f64 else 1e-6
    rates = tuning.metrics["learning_rate"]  # the metric is the larger one, the head's
    np.testing.assert_allclose(rates, tuning.reference["lr_head"], rtol=rtol, atol=rtol * 2e-3)
    ratio = tuning.reference["cfg/encoder_peak_lr"] / tuning.reference["cfg/head_peak_lr"]
    np.testing.assert_allclose(rates * ratio, tuning.reference["lr_encoder"], rtol=rtol, atol=rtol * 1e-3)


def test_tuning_picks_the_recorded_neighbors_of_the_recorded_targets(tuning):
    for view in (0, 1):
        np.testing.assert_array_equal(tuning.seen[f"nn_idx{view}"], tuning.reference[f"nn_idx{view}"])
        found, expected = (trace[f"targets{view}"] for trace in (tuning.seen, tuning.reference))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)
    np.testing.assert_allclose(tuning.metrics["neighbor_accuracy"], tuning.reference["nn_accuracy"], atol=1e-6)


def test_tuning_first_gradient(tuning):
    found = tensors_of(tuning.initial, tuning.gradient)
    for name, value in below(tuning.reference, "grad0/").items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=3e-5, err_msg=name)


def test_tuning_rates_and_decays_of_every_tensor(tuning):
    def spread(values):
        params = jax.tree.map(lambda p, v: np.broadcast_to(v, p.shape), tuning.initial.params, values)
        return tensors_of(tuning.initial, params)

    rates, decays = spread(tuning.rates), spread(tuning.decays)
    for name, value in below(tuning.reference, "wd/").items():
        np.testing.assert_allclose(decays[name], value, rtol=1e-6, err_msg=name)
    for name, scale in below(tuning.reference, "lr_scale/").items():
        part = "encoder" if name.startswith("encoder") else "head"
        np.testing.assert_allclose(
            rates[name], scale * tuning.reference[f"cfg/{part}_peak_lr"], rtol=1e-6, err_msg=name
        )


def test_tuning_final_state(tuning):
    reference, found = tuning.reference, tensors_of(tuning.final)
    expected = below(reference, "final/")
    assert expected.keys() - found.keys() == set()
    whole = {name: value for name, value in expected.items() if value.dtype.kind == "i"}
    assert len(whole) == 3 + 7  # labels, ids and pointer of the queue; counters
    for name, value in whole.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    if tuning.f64:
        for name, value in below(reference, "final_f64/").items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-7, err_msg=name)
        return
    derived = loose_parts(reference["rounding_derived"])
    real = {name: value for name, value in expected.items() if name not in whole}
    strict, listed = deviations(
        found, {k: v for k, v in real.items() if k not in derived}, loose_parts(reference["rounding_only"])
    )
    assert strict.max() < 3e-5
    assert listed.max() < 2e-2
    np.testing.assert_allclose(found["queue"], expected["queue"], rtol=0, atol=2e-3)
    for name in derived.keys() - {"queue"}:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-2, err_msg=name)


def test_tuning_target_projector_copies_running_statistics(tuning):
    """Copied, not averaged: equal but for a last bit, as the compiler may compute the same value twice."""
    copied, own = tuning.final.target["batch_stats"], tuning.final.batch_stats["projector"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), copied, own)


def test_tuning_encoder_average(tuning):
    reference = below(tuning.reference, "ema_fast/" if tuning.f64 else "ema/")
    found = encoder_tensors(tuning.final.ema["encoder"], tuning.final.frozen["encoder"])
    strict, listed = deviations(found, reference, loose_parts(tuning.reference["rounding_only"]))
    assert strict.max() < 3e-5
    assert listed.max() < 2e-2


def test_tuning_leaves_frozen_tensors_bitwise_unchanged(tuning):
    found = tensors_of(tuning.final)
    for name in tuning.reference["frozen_names"]:
        np.testing.assert_array_equal(found[f"encoder.{name}"], tuning.reference[f"init/encoder.{name}"])
