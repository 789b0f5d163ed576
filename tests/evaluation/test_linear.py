"""The linear probe learns what it should, chooses without the test rows, and does not depend on the devices."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from maect_jax.errors import ConfigError, DataError
from maect_jax.evaluation import linear
from maect_jax.parallel.mesh import make_mesh

CLASSES, WIDTH = 5, 16
RATES = (0.5, 0.1, 0.02)
SHORT = {"epochs": 4, "batch": 32, "base_rates": RATES}


def rows_of(count: int, seed: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian classes, separable at small noise: float32 [count, width], labels [count]."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % CLASSES
    center = 3 * np.random.default_rng(99).normal(size=(CLASSES, WIDTH))
    return (center[label] + noise * rng.normal(size=(count, WIDTH)) * 3).astype(np.float32), label


def weights(probe: linear.LinearProbe) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(probe)]


@pytest.fixture(scope="module")
def result():
    return linear.evaluate_linear(*rows_of(300, 0), *rows_of(200, 1), CLASSES, **SHORT)


# ------------------------------------------------------------------------------------------------------------ schedule


@pytest.mark.parametrize("updates", [1, 2, 9, 10, 19, 20, 21, 1000])
def test_the_rate_is_finite_and_ends_at_zero_at_every_length(updates):
    factor = linear.learning_rate_factor(np.arange(updates), updates, np)
    assert np.isfinite(factor).all() and factor.min() >= 0 and factor.max() == 1
    assert updates == 1 or factor[-1] == 0
    assert factor[0] == (0 if updates >= 10 else 1)  # ten updates and more begin with a warm-up, from exactly 0


# ------------------------------------------------------------------------------------------------------------ training


def test_separable_classes_are_learned_as_by_logistic_regression():
    (x, y), (test_x, test_y) = rows_of(400, 0, noise=0.5), rows_of(300, 1, noise=0.5)
    reference = LogisticRegression(max_iter=1000).fit(x, y).score(test_x, test_y)
    found = linear.evaluate_linear(x, y, test_x, test_y, CLASSES, epochs=20, batch=64)
    assert reference > 0.97
    assert found.accuracy == pytest.approx(reference, abs=0.02)


def test_full_batches_equal_gradient_descent_in_float64():
    """One update an epoch over all rows: the order cannot matter, and NumPy can follow."""
    (x, y), epochs, rate = rows_of(40, 0), 12, 2.0
    setting = {"batch": 10_000, "seed": 3}
    start = weights(next(linear.train_epochs(x, y, CLASSES, epochs=10, base_rates=(0.0, rate), **setting))[0])[0][1]
    trained = linear.train_probe(x, y, CLASSES, epochs=epochs, base_rates=(0.0, rate), **setting)
    kernel, bias, velocity = start.astype(np.float64), np.zeros(CLASSES), 0
    x64 = x.astype(np.float64)
    normal = (x64 - x64.mean(axis=0)) / np.sqrt(x64.var(axis=0) + 1e-5)
    for step in range(epochs):
        logits = normal @ kernel + bias
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        error = (share / share.sum(axis=1, keepdims=True) - np.eye(CLASSES)[y]) / len(y)
        velocity = 0.9 * velocity + np.concatenate([normal.T @ error, error.sum(axis=0, keepdims=True)])
        lr = rate * len(y) / 256 * linear.learning_rate_factor(step, epochs, np)
        kernel, bias = kernel - lr * velocity[:-1], bias - lr * velocity[-1]
    np.testing.assert_allclose(trained.kernel_hdc[1], kernel, atol=1e-5)
    np.testing.assert_allclose(trained.bias_hc[1], bias, atol=1e-5)
    np.testing.assert_array_equal(trained.bias_hc[0], np.zeros(CLASSES))  # the head with rate 0 stays where it was


def test_a_head_does_not_depend_on_the_other_heads_rates():
    x, y = rows_of(100, 0)
    one = linear.train_probe(x, y, CLASSES, epochs=3, batch=32, base_rates=(0.3, 0.1))
    other = linear.train_probe(x, y, CLASSES, epochs=3, batch=32, base_rates=(5.0, 0.1))
    np.testing.assert_array_equal(one.kernel_hdc[1], other.kernel_hdc[1])
    assert not np.array_equal(one.kernel_hdc[0], other.kernel_hdc[0])


def test_training_repeats_with_the_seed_and_changes_with_it():
    x, y = rows_of(100, 0)
    first, again, other = (weights(linear.train_probe(x, y, CLASSES, seed=seed, **SHORT)) for seed in (0, 0, 1))
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], other[0])


def test_each_epoch_sees_another_order():
    """With a rate of 0 only the running mean moves: it remembers the order of the batches."""
    x, y = rows_of(90, 0)
    step = np.stack([np.asarray(p.mean_d) for p, _ in linear.train_epochs(x, y, CLASSES, epochs=3, batch=30)])
    decay = 0.9**3
    written = step[1:] - decay * step[:-1]  # what each epoch alone wrote
    assert np.abs(written[1] - written[0]).max() > 1e-4


def test_eight_devices_train_and_measure_as_one(result):
    data = *rows_of(300, 0), *rows_of(200, 1)
    split = linear.evaluate_linear(*data, CLASSES, mesh=make_mesh(), **SHORT)
    for a, b in zip(weights(result.probe), weights(split.probe)):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert split.accuracy == pytest.approx(result.accuracy) and split.protocol == result.protocol


@pytest.mark.parametrize("rows", [12, 33])
def test_few_rows_train_without_division_by_zero(rows):
    found = linear.evaluate_linear(*rows_of(rows, 0), *rows_of(20, 1), CLASSES, epochs=1, batch=1024)
    assert found.protocol["warmup_updates"] == 0 and found.protocol["batch"] == rows - rows // 10
    assert np.isfinite([head["loss"] for head in found.table]).all()


# ----------------------------------------------------------------------------------------------------------- selection


def test_a_tenth_of_each_class_is_held_out():
    labels = np.repeat([0, 1, 2], [100, 47, 53])
    kept, held_out = linear.hold_out(labels, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(200))
    assert len(held_out) == 20
    np.testing.assert_allclose(np.bincount(labels[held_out]), np.bincount(labels) / 10, atol=1)
    np.testing.assert_array_equal(held_out, linear.hold_out(labels, seed=0)[1])
    assert not np.array_equal(held_out, linear.hold_out(labels, seed=1)[1])


def test_the_choice_never_reads_the_test_rows(result):
    (x, y), (test_x, test_y) = rows_of(300, 0), rows_of(200, 1)
    poisoned = linear.evaluate_linear(x, y, -7 * test_x, (test_y + 1) % CLASSES, CLASSES, **SHORT)
    assert (poisoned.base_rate, poisoned.epoch) == (result.base_rate, result.epoch)
    assert poisoned.held_out_accuracy == result.held_out_accuracy
    for a, b in zip(weights(poisoned.probe), weights(result.probe)):
        np.testing.assert_array_equal(a, b)
    assert poisoned.accuracy < result.accuracy - 0.5  # it did reach the reported number


def test_no_head_is_trained_on_held_out_rows():
    (x, y), test = rows_of(300, 0), rows_of(50, 1)
    kept, held_out = linear.hold_out(y, seed=0)
    trained = linear.train_probe(x[kept], y[kept], CLASSES, **SHORT)
    result = linear.evaluate_linear(x, y, *test, CLASSES, **SHORT)
    last = [head["held_out"][-1] for head in result.table]
    measured = (np.asarray(trained.logits(x[held_out])).argmax(axis=2) == y[held_out]).mean(axis=1)
    np.testing.assert_allclose(last, measured)


def test_reported_numbers_are_those_of_the_returned_head(result):
    test_x, test_y = rows_of(200, 1)
    x, y = rows_of(300, 0)
    _, held_out = linear.hold_out(y, seed=0)
    logits_hbc = np.asarray(result.probe.logits(test_x))
    assert logits_hbc.shape == (1, 200, CLASSES)
    assert (logits_hbc[0].argmax(axis=1) == test_y).mean() == pytest.approx(result.accuracy)
    on_held_out = np.asarray(result.probe.logits(x[held_out]))[0].argmax(axis=1) == y[held_out]
    assert on_held_out.mean() == pytest.approx(result.held_out_accuracy)


def test_the_table_holds_every_candidate(result):
    assert [head["base_rate"] for head in result.table] == list(RATES)
    held_out, test = (np.array([head[name] for head in result.table]) for name in ("held_out", "test"))
    assert held_out.shape == test.shape == (3, 4)
    assert result.protocol["candidates"] == 12 and result.protocol["selection"] == "heldout"
    head = RATES.index(result.base_rate)
    assert held_out.max() == pytest.approx(result.held_out_accuracy) == held_out[head, result.epoch - 1]
    assert test[head, result.epoch - 1] == pytest.approx(result.accuracy)
    assert test[head, -1] == pytest.approx(result.last_epoch_accuracy)
    assert test.max() == pytest.approx(result.selected_on_test["accuracy"])
    assert result.selected_on_test["accuracy"] >= result.accuracy
    assert (result.protocol["train_rows"], result.protocol["held_out_rows"]) == (270, 30)
    assert (result.protocol["updates"], result.protocol["warmup_updates"]) == (32, 3)


def test_equal_accuracies_are_told_apart_by_cross_entropy():
    accuracy_h = np.array([0.5, 0.9, 0.9, 0.9])
    epochs = [(accuracy_h, np.array([0.1, 3.0, np.nan, 2.0])), (accuracy_h, np.array([0.1, 2.5, 2.0, np.inf]))]
    assert linear._best(epochs) == (0, 3)


def test_measured_accuracy_counts_every_row_once(monkeypatch):
    """Rows that do not fill the last chunk are neither dropped nor repeated."""
    monkeypatch.setattr(linear, "CHUNK", 16)
    mesh = make_mesh()
    (x, y), probe = rows_of(37, 0), linear.train_probe(*rows_of(100, 1), CLASSES, mesh=mesh, **SHORT)
    accuracy_h, loss_h = linear._measure(mesh, probe, linear._chunks(mesh, x, y.astype(np.int32)))
    logits = np.asarray(probe.logits(x), np.float64)
    np.testing.assert_allclose(accuracy_h, (logits.argmax(axis=2) == y).mean(axis=1), rtol=1e-6)
    own = np.take_along_axis(logits, y[None, :, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(loss_h, (np.log(np.exp(logits).sum(axis=2)) - own).mean(axis=1), rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------- errors


def test_errors_name_the_value():
    x, y = rows_of(9, 0)
    with pytest.raises(DataError, match="9 rows; at least 10"):
        linear.evaluate_linear(x, y, x, y, CLASSES)
    with pytest.raises(ConfigError, match="epochs 0, batch 8, 3 rates"):
        linear.train_probe(x, y, CLASSES, epochs=0, batch=8, base_rates=RATES)
    with pytest.raises(DataError, match=r"test labels: values 0..4, expected 0..3"):
        linear.evaluate_linear(x, np.minimum(y, 3), x, y, 4)
