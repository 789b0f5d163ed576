"""The probe on cached features learns what it should, chooses without the test rows, and is the same on all devices."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from maect_jax.errors import ConfigError, DataError, Preempted
from maect_jax.evaluation.probes import linear, linear_selection
from maect_jax.evaluation.probes.linear_heads import PRESETS, LinearProbe, learning_rate_factor
from maect_jax.evaluation.rows import hold_out
from maect_jax.parallel.mesh import make_mesh

CLASSES, WIDTH = 5, 16
RATES = (0.5, 0.1, 0.02)


def recipe(name: str = "maect-linear", **changes):
    """A preset on the feature 'x', with three rates, a short length and small batches."""
    given = {"features": ("x",), "base_rates": RATES, "epochs": 4, "batch": 32} | changes
    return dataclasses.replace(PRESETS[name], **given)


SHORT = recipe()


def rows_of(count: int, seed: int, noise: float = 1.0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Gaussian classes, separable at small noise: {'x': float32 [count, width]}, labels [count]."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % CLASSES
    center = 3 * np.random.default_rng(99).normal(size=(CLASSES, WIDTH))
    return {"x": (center[label] + noise * rng.normal(size=(count, WIDTH)) * 3).astype(np.float32)}, label


def trained(features, labels, preset=SHORT, **settings) -> LinearProbe:
    """The heads on 'x' after the last epoch."""
    return [probes["x"] for probes, _ in linear.train_epochs(features, labels, CLASSES, preset, **settings)][-1]


def weights(probe) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(probe)]


@pytest.fixture(scope="module")
def result():
    return linear.evaluate_linear(*rows_of(300, 0), *rows_of(200, 1), CLASSES, preset=SHORT)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    "preset",
    [
        recipe(base_rates=PRESETS["maect-linear"].base_rates, epochs=20, batch=64),
        recipe("mae-linear", base_rates=(0.1, 30.0), epochs=20, batch=64),
        recipe("dinov2-linear", base_rates=PRESETS["dinov2-linear"].base_rates, epochs=2, epoch_updates=60),
        recipe("mimrefiner-linear", base_rates=PRESETS["mimrefiner-linear"].base_rates, epochs=20, batch=64),
    ],
    ids=lambda preset: preset.name,
)
def test_separable_classes_are_learned_as_by_logistic_regression(preset):
    (x, y), (test_x, test_y) = rows_of(400, 0, noise=0.5), rows_of(300, 1, noise=0.5)
    reference = LogisticRegression(max_iter=1000).fit(x["x"], y).score(test_x["x"], test_y)
    found = linear.evaluate_linear(x, y, test_x, test_y, CLASSES, preset=preset)
    assert reference > 0.97
    assert found.accuracy == pytest.approx(reference, abs=0.02)


def test_full_batches_equal_gradient_descent_in_float64():
    """One update an epoch over all rows: the order cannot matter, and NumPy can follow."""
    (x, y), epochs, rate = rows_of(40, 0), 12, 2.0
    preset = recipe(base_rates=(0.0, rate), batch=10_000, epochs=epochs)
    start = weights(next(linear.train_epochs(x, y, CLASSES, preset, seed=3))[0]["x"])[0][
        1
    ]  # the first update has rate 0
    probe = trained(x, y, preset, seed=3)
    kernel, bias, velocity = start.T.astype(np.float64), np.zeros(CLASSES), 0
    x64 = x["x"].astype(np.float64)
    normal = (x64 - x64.mean(axis=0)) / np.sqrt(x64.var(axis=0) + 1e-5)
    for step in range(epochs):
        logits = normal @ kernel + bias
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        error = (share / share.sum(axis=1, keepdims=True) - np.eye(CLASSES)[y]) / len(y)
        velocity = 0.9 * velocity + np.concatenate([normal.T @ error, error.sum(axis=0, keepdims=True)])
        lr = rate * len(y) / 256 * learning_rate_factor(step, preset.fit(len(y)), np)
        kernel, bias = kernel - lr * velocity[:-1], bias - lr * velocity[-1]
    np.testing.assert_allclose(probe.kernel_hcd[1], kernel.T, atol=1e-5)
    np.testing.assert_allclose(probe.bias_hc[1], bias, atol=1e-5)
    np.testing.assert_array_equal(probe.bias_hc[0], np.zeros(CLASSES))  # the head with rate 0 stays where it was


def test_a_feature_of_the_grid_trains_as_it_would_alone():
    features, y = rows_of(100, 0)
    features["wide"] = np.concatenate([features["x"], features["x"] ** 2], axis=1)
    both = recipe("dinov2-linear", features=("wide", "x"), epoch_updates=3)
    *_, (probes, _) = linear.train_epochs(features, y, CLASSES, both)
    for a, b in zip(weights(probes["x"]), weights(trained(features, y, recipe("dinov2-linear", epoch_updates=3)))):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert probes["wide"].kernel_hcd.shape == (3, CLASSES, 2 * WIDTH)


def test_training_repeats_with_the_seed_and_changes_with_it():
    first, again, other = (weights(trained(*rows_of(100, 0), seed=seed)) for seed in (0, 0, 1))
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], other[0])


def test_each_epoch_sees_another_order():
    """The running mean alone remembers the order of the batches; what each epoch wrote to it differs."""
    x, y = rows_of(90, 0)
    epochs = linear.train_epochs(x, y, CLASSES, recipe(epochs=3, batch=30))
    mean = np.stack([np.asarray(probes["x"].mean_d) for probes, _ in epochs])
    written = mean[1:] - 0.9**3 * mean[:-1]
    assert np.abs(written[1] - written[0]).max() > 1e-4


def test_epochs_of_a_fixed_number_of_updates_pass_over_the_rows_again_and_again():
    """Three batches of 30 fill 90 rows; an epoch of 7 updates takes two passes and a third of the next."""
    x, y = rows_of(90, 0)
    x["x"] = np.zeros_like(x["x"])
    x["x"][:, 0] = np.arange(90)
    preset = recipe(epochs=1, batch=30, epoch_updates=7)
    (probes, _), *_ = linear.train_epochs(x, y, CLASSES, preset)
    order = [linear.step_ids(0, step, 30, 90) for step in range(7)]
    assert all(len(np.unique(np.concatenate(order[start : start + 3]))) == 90 for start in (0, 3))
    mean = 0.0
    for ids in order:
        mean = 0.9 * mean + 0.1 * ids.mean()
    assert np.asarray(probes["x"].mean_d)[0] == pytest.approx(mean, rel=1e-5)


def test_eight_devices_train_and_measure_as_one(result):
    data = *rows_of(300, 0), *rows_of(200, 1)
    split = linear.evaluate_linear(*data, CLASSES, preset=SHORT, mesh=make_mesh())
    for a, b in zip(weights(result.probe), weights(split.probe)):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert split.accuracy == pytest.approx(result.accuracy) and split.protocol == result.protocol
    np.testing.assert_array_equal(split.correct, result.correct)


@pytest.mark.parametrize("rows", [12, 33])
def test_few_rows_train_without_division_by_zero(rows):
    found = linear.evaluate_linear(*rows_of(rows, 0), *rows_of(20, 1), CLASSES, preset=SHORT, epochs=1, batch=1024)
    assert found.protocol["warmup_updates"] == 0 and found.protocol["batch"] == rows - rows // 10
    assert np.isfinite([head["loss"] for head in found.table]).all()


# ----------------------------------------------------------------------------------------------------------- selection


def test_a_tenth_of_each_class_is_held_out():
    labels = np.repeat([0, 1, 2], [100, 47, 53])
    kept, held_out = hold_out(labels, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(200))
    assert len(held_out) == 20
    np.testing.assert_allclose(np.bincount(labels[held_out]), np.bincount(labels) / 10, atol=1)
    np.testing.assert_array_equal(held_out, hold_out(labels, seed=0)[1])
    assert not np.array_equal(held_out, hold_out(labels, seed=1)[1])


@pytest.mark.parametrize("poison", ["labels", "features"])
def test_the_choice_never_reads_the_test_rows(result, poison):
    (x, y), (test_x, test_y) = rows_of(300, 0), rows_of(200, 1)
    test = (
        (test_x, (test_y + 1) % CLASSES) if poison == "labels" else ({"x": np.full_like(test_x["x"], np.nan)}, test_y)
    )
    poisoned = linear.evaluate_linear(x, y, *test, CLASSES, preset=SHORT)
    assert (poisoned.feature, poisoned.base_rate, poisoned.epoch) == (result.feature, result.base_rate, result.epoch)
    assert poisoned.held_out_accuracy == result.held_out_accuracy
    for a, b in zip(weights(poisoned.probe), weights(result.probe)):
        np.testing.assert_array_equal(a, b)
    assert poisoned.accuracy < result.accuracy - 0.5  # it did reach the reported number


def test_no_head_is_trained_on_held_out_rows():
    (x, y), test = rows_of(300, 0), rows_of(50, 1)
    kept, held_out = hold_out(y, seed=0)
    probe = trained({"x": x["x"][kept]}, y[kept])
    result = linear.evaluate_linear(x, y, *test, CLASSES, preset=SHORT)
    last = [head["held_out"][-1] for head in result.table]
    right_bh = np.asarray(probe.logits(x["x"][held_out])).argmax(axis=2) == y[held_out, None]
    np.testing.assert_allclose(last, right_bh.mean(axis=0))


def test_reported_numbers_are_those_of_the_returned_head(result):
    (test_x, test_y), (x, y) = rows_of(200, 1), rows_of(300, 0)
    _, held_out = hold_out(y, seed=0)
    logits_bhc = np.asarray(result.probe.logits(test_x["x"]))
    assert logits_bhc.shape == (200, 1, CLASSES)
    right = logits_bhc[:, 0].argmax(axis=1) == test_y
    np.testing.assert_array_equal(right, result.correct)
    assert right.mean() == pytest.approx(result.accuracy)
    on_held_out = np.asarray(result.probe.logits(x["x"][held_out]))[:, 0].argmax(axis=1) == y[held_out]
    assert on_held_out.mean() == pytest.approx(result.held_out_accuracy)


def test_the_table_holds_every_candidate():
    features, y = rows_of(300, 0)
    test, test_y = rows_of(200, 1)
    for rows in (features, test):
        rows["half"] = rows["x"][:, : WIDTH // 2]
    preset = recipe(features=("half", "x"))
    result = linear.evaluate_linear(features, y, test, test_y, CLASSES, preset=preset)
    names = [(head["feature"], head["base_rate"]) for head in result.table]
    assert names == [(feature, rate) for feature in ("half", "x") for rate in RATES]
    held_out, test = (np.array([head[name] for head in result.table]) for name in ("held_out", "test"))
    assert held_out.shape == test.shape == (6, 4)
    head = names.index((result.feature, result.base_rate))
    assert held_out.max() == pytest.approx(result.held_out_accuracy) == held_out[head, result.epoch - 1]
    assert test[head, result.epoch - 1] == pytest.approx(result.accuracy)
    assert test[head, -1] == pytest.approx(result.last_epoch_accuracy)
    on_test = result.selected_on_test
    head = names.index((on_test["feature"], on_test["base_rate"]))
    assert test.max() == pytest.approx(on_test["accuracy"]) == test[head, on_test["epoch"] - 1]
    assert on_test["correct"].dtype == bool and on_test["correct"].mean() == pytest.approx(on_test["accuracy"])
    assert on_test["accuracy"] >= result.accuracy


def test_the_protocol_tells_what_was_changed(result):
    protocol = result.protocol
    assert (protocol["preset"], protocol["selection"], protocol["candidates"]) == ("maect-linear", "heldout", 12)
    assert (protocol["epochs"], protocol["preset_epochs"], protocol["preset_batch"]) == (4, 50, 1024)
    assert (protocol["train_rows"], protocol["held_out_rows"], protocol["test_rows"]) == (270, 30, 200)
    assert (protocol["batch"], protocol["updates"], protocol["warmup_updates"]) == (32, 32, 3)
    assert protocol["augmentation"] == "none, cached features"
    assert json.loads(json.dumps(protocol)) == protocol


def test_the_best_candidate_is_told_apart_by_cross_entropy_then_by_its_place():
    def after(accuracy, loss):
        return linear_selection.Measured(None, np.array([accuracy]), np.array([loss]))

    best = linear_selection.Best()
    assert best.offer(0, after([0.5, 0.9, 0.9, 0.9], [0.1, 3.0, np.nan, 2.0])) and (best.epoch, best.place) == (
        0,
        (0, 3),
    )
    assert not best.offer(1, after([0.5, 0.9, 0.9, 0.9], [0.1, 2.5, 2.0, np.inf]))
    assert best.offer(2, after([0.0, 0.9, 0.9, 0.9], [0.1, 1.5, 1.5, np.nan])) and (best.epoch, best.place) == (
        2,
        (0, 1),
    )


def test_every_row_is_measured_once(monkeypatch):
    """Rows that do not fill the last chunk are neither dropped nor repeated."""
    monkeypatch.setattr(linear_selection, "CHUNK", 16)
    mesh = make_mesh()
    (x, y), probe = rows_of(37, 0), trained(*rows_of(100, 1), mesh=mesh)
    measured = linear_selection.MeasuredRows(mesh, x, y.astype(np.int32)).measure({"x": probe}, ("x",))
    logits = np.asarray(probe.logits(jnp.asarray(x["x"])), np.float64)
    right = logits.argmax(axis=2) == y[:, None]
    np.testing.assert_array_equal(measured.right_fhn[0], right.T)
    np.testing.assert_allclose(measured.accuracy_fh[0], right.mean(axis=0))
    own = np.take_along_axis(logits, y[:, None, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(measured.loss_fh[0], (np.log(np.exp(logits).sum(axis=2)) - own).mean(axis=0), rtol=1e-5)


def test_a_stop_request_ends_the_training():
    asked = []

    def check():
        asked.append(1)
        if len(asked) == 2:
            raise Preempted("enough")

    with pytest.raises(Preempted):
        linear.evaluate_linear(*rows_of(60, 0), *rows_of(20, 1), CLASSES, preset=SHORT, check=check)
    assert len(asked) == 2


# -------------------------------------------------------------------------------------------------------------- errors


def test_errors_name_the_value():
    x, y = rows_of(9, 0)
    with pytest.raises(DataError, match="9 rows; at least 10"):
        linear.evaluate_linear(x, y, x, y, CLASSES, preset=SHORT)
    with pytest.raises(ConfigError, match="'maect-linear': epochs 0, batch 32, 1 features, 3 rates"):
        list(linear.train_epochs(x, y, CLASSES, recipe(epochs=0)))
    with pytest.raises(DataError, match=r"test labels: values 0..4, expected 0..3"):
        linear.evaluate_linear(x, np.minimum(y, 3), x, y, 4, preset=SHORT)
    with pytest.raises(ConfigError, match="no train feature 'cls@norm4'; given are 'x'"):
        linear.evaluate_linear(x, y, x, y, CLASSES, preset=recipe(features=("cls@norm4",)))
