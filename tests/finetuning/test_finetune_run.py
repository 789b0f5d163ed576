"""A whole fine-tuning on small pictures: it learns, survives interruptions, and chooses without the test pictures."""

import dataclasses
import itertools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maect_jax
from maect_jax.data.device.randaugment import RandAugment
from maect_jax.data.sources.base import ArraySource
from maect_jax.errors import CheckpointError, ConfigError, DataError, Preempted
from maect_jax.exchange.provenance import Provenance
from maect_jax.finetuning.plan import split_rows
from maect_jax.finetuning.recipes import RECIPES
from maect_jax.finetuning.run import fine_tune
from maect_jax.models.patches import patchify
from maect_jax.parallel import mesh as meshes
from maect_jax.parallel.mesh import make_mesh
from maect_jax.results.record import weights_hash
from maect_jax.training.checkpoint import newest_step_folder, read_meta
from maect_jax.training.stop import StopRequest
from small import encoder_of

ENCODER = encoder_of(dict(img_size=16, patch_size=4, dim=16, depth=2, heads=2))
CLASSES = ("left", "right", "above")
PROXY = RECIPES["finetune-1pct"]["L/16"]
AUGMENTATIONS = dict(rand_augment=RandAugment(operations=1), erasing=0.25, mixup=0.8, cutmix=1.0, drop_path=0.1)
RECIPE = dataclasses.replace(
    PROXY, base_lr=0.1, layer_decay=0.9, crop_scale=(0.6, 1.0), pooling="mean", **AUGMENTATIONS
)
MEAN, STD = (0.5,) * 3, (0.25,) * 3
MAE = {"name": "mae.pth", "sha256": "1" * 64, "layout": "mae_official_full", "license": "CC-BY-NC-4.0"}
TUNED = Provenance(
    "CC-BY-NC-4.0", "its file", (MAE,), recipe={"name": "digits"}, stage="tune", step=7, code_version="0.1.0"
)


def pictures(name, count, seed):
    """A bright half on noise; which half is the class. `above` against the rest survives any flip, the others not."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (count, 16, 16, 3))
    labels = np.arange(count) % 3
    for image, label in zip(images, labels):
        bright = (image[:, :, :2], image[:, 4:12], image[:8])[label]
        bright += 100
    return ArraySource(name, images.astype(np.uint8), labels.astype(np.int32), CLASSES)


@pytest.fixture(scope="module")
def data():
    params = jax.jit(lambda: ENCODER.init(jax.random.key(0), jnp.zeros((1, 16, 48)))["params"])()
    return params, pictures("train", 96, 0), pictures("test", 33, 1)


ROWS = np.arange(90)


class StopAfter(StopRequest):
    """Stops when it was asked so often; the loop asks once an update, measuring once a batch."""

    def __init__(self, asked=None):
        self._left = itertools.count() if asked is None else iter([False] * asked)
        self._always = asked is None

    @property
    def signal(self):
        return None if self._always or next(self._left, True) is False else signal.SIGTERM


class Book:
    """A logbook that holds the losses; at line `last` the process dies, and nothing is saved."""

    def __init__(self, last=None):
        self.losses, self._lines, self._last = [], 0, last

    def start_stage(self, stage, step):
        pass

    def metrics(self, step, epoch, values):
        self._lines += 1
        self.losses += [values["loss"]] if "loss" in values else []
        if self._lines == self._last:
            raise KeyboardInterrupt


def run(data, folder, *, devices=1, fsdp=1, recipe=RECIPE, rows=ROWS, **changes):
    params, train, test = data
    settings = dict(
        epochs=4, batch=16, seed=1, stop=StopAfter(), mean=MEAN, std=STD, resize_ratio=1.0, provenance=TUNED
    )
    settings |= dict(save_every=2, log_every=1, evaluation_batch=16, say=lambda text: None)
    mesh = make_mesh(fsdp, jax.devices()[:devices])
    return fine_tune(params, ENCODER, train, test, rows, recipe, mesh=mesh, folder=folder, **settings | changes)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder, book = tmp_path_factory.mktemp("whole"), Book()
    return folder, run(data, folder, logbook=book), book.losses


def same(a, b):
    """Every number and every weight, to the last bit."""
    assert a.table == b.table
    assert (a.accuracy, a.epoch, a.last_epoch_accuracy) == (b.accuracy, b.epoch, b.last_epoch_accuracy)
    np.testing.assert_array_equal(a.correct, b.correct)
    np.testing.assert_array_equal(a.selected_on_test["correct"], b.selected_on_test["correct"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a.params), jax.device_get(b.params))


# ------------------------------------------------------------------------------------------------------------- numbers


def test_it_learns_and_its_numbers_fit_each_other(data, whole):
    _, found, _ = whole
    assert found.accuracy > 0.6, "chance is a third"
    assert len(found.table) == 4
    assert found.accuracy == found.correct.mean() == found.table[found.epoch - 1]["test"]
    best = max(row["held_out"] for row in found.table)
    assert found.held_out_accuracy == best == found.table[found.epoch - 1]["held_out"]
    on_test = found.selected_on_test
    assert on_test["accuracy"] == max(row["test"] for row in found.table) == on_test["correct"].mean()
    assert found.last_epoch_accuracy == found.table[-1]["test"]


def test_the_kept_weights_give_the_reported_pictures(data, whole):
    _, found, _ = whole
    _, _, test = data
    images_bhwc = (test.images / 255 - 0.5) / 0.25
    logits, _ = jax.jit(found.model.apply)({"params": found.params}, patchify(jnp.asarray(images_bhwc, jnp.float32), 4))
    np.testing.assert_array_equal(np.argmax(logits, axis=1) == test.labels, found.correct)
    assert (found.weights / "state").exists()


def test_the_encoder_that_was_given_is_still_there(data, whole):
    jax.block_until_ready(jax.tree.map(jnp.square, data[0]))  # an array whose memory was given away would raise


def test_the_protocol_says_what_was_done(whole):
    _, found, _ = whole
    wanted = {"name": "finetune-1pct", "source": "follow-up proxy", "recipe_size": "L/16", "epochs": 4, "batch": 16}
    wanted |= {"updates": 20, "warmup_updates": 2, "peak_lr": 0.1 * 16 / 256, "train_rows": 81, "held_out_rows": 9}
    wanted |= {"selection": "heldout", "candidates": 4, "test_rows": 33, "classes": 3, "compute": "float32"}
    assert {key: found.protocol[key] for key in wanted} == wanted
    published = {"base_lr": 3e-5, "batch": 512, "epochs": 50, "layer_decay": 0.75, "pooling": "cls"}
    changed = found.protocol["instead_of_published"]
    assert {key: changed[key] for key in published} == published


def test_every_checkpoint_says_where_it_comes_from_and_what_its_outputs_are(data, whole):
    folder, found, _ = whole
    encoder = {"name": "digits", "stage": "tune", "step": 7, "sha256": weights_hash(data[0]), "license": "CC-BY-NC-4.0"}
    about = {"license": "CC-BY-NC-4.0", "license_source": "its file", "derived_from": [encoder, MAE]}
    about |= {"stage": "finetune-1pct", "trained_on": "train", "average": "none", "code_version": maect_jax.__version__}
    for checkpoint in (found.weights, newest_step_folder(folder)):
        meta = read_meta(checkpoint)
        assert {name: meta["provenance"][name] for name in about} == about
        assert (meta["step"], meta["classes"]) == (int(checkpoint.name), list(CLASSES))
        recipe = meta["provenance"]["recipe"]
        assert (recipe["name"], recipe["epochs"], recipe["train_rows"]) == ("finetune-1pct", 4, 81)


def test_the_test_pictures_choose_nothing(data, whole, tmp_path):
    """Other test labels: the same epoch, the same weights, the same held-out accuracies; only the test's differ."""
    params, train, test = data
    shuffled = ArraySource("test", test.images, test.labels[::-1].copy(), CLASSES)
    found = run((params, train, shuffled), tmp_path)
    _, expected, _ = whole
    assert (found.epoch, found.held_out_accuracy) == (expected.epoch, expected.held_out_accuracy)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.params), jax.device_get(expected.params))
    assert found.accuracy != expected.accuracy


def test_eight_devices_that_share_parameters_train_and_measure_as_one(data, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(meshes, "SHARD_FROM", 2**8)
    book = Book()
    found = run(data, tmp_path, devices=8, fsdp=2, logbook=book)
    _, expected, losses = whole
    np.testing.assert_allclose(book.losses[:4], losses[:4], rtol=1e-5)
    for part in ("held_out_nats", "test_nats"):
        np.testing.assert_allclose(found.table[0][part], expected.table[0][part], rtol=1e-4)
    assert len(found.correct) == 33


# ------------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("updates", [3, 5], ids=["amid an epoch", "before an epoch is measured"])
def test_a_stopped_run_continues_to_the_same_bits(data, whole, tmp_path, updates):
    with pytest.raises(Preempted):
        run(data, tmp_path, stop=StopAfter(updates - 1))
    same(run(data, tmp_path), whole[1])


def test_a_killed_run_continues_to_the_same_bits(data, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(
            data, tmp_path, logbook=Book(last=14)
        )  # after the second epoch's measurement, before what it chose is saved
    same(run(data, tmp_path), whole[1])


def test_running_again_reads_the_result(data, whole):
    folder, expected, _ = whole
    again = run(data, folder, stop=StopAfter(0))  # would stop at the first update or measurement
    same(again, expected)
    assert again.seconds == expected.seconds


def test_a_folder_of_another_fine_tuning_is_refused(data, whole):
    with pytest.raises(CheckpointError, match="holds a fine-tuning with another seed; give another folder"):
        run(data, whole[0], seed=2)


# ---------------------------------------------------------------------------------------------------------------- rows


def test_a_tenth_is_held_out_and_more_of_tiny_classes(data):
    _, train, _ = data
    kept, held_out = split_rows(train, np.arange(90), seed=0)
    assert (len(kept), len(held_out)) == (81, 9)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(90))
    np.testing.assert_array_equal(np.bincount(train.labels[held_out]), [3, 3, 3])
    rows = np.arange(30, 45)  # five of each class
    kept, held_out = split_rows(train, rows, seed=0)
    np.testing.assert_array_equal(np.bincount(train.labels[held_out]), [1, 1, 1])
    assert set(kept) | set(held_out) == set(rows)
    kept, held_out = split_rows(train, np.arange(6), seed=0)
    assert (len(kept), len(held_out)) == (5, 1)


def test_what_can_not_be_fine_tuned_on_is_said(data, tmp_path):
    params, train, test = data
    with pytest.raises(DataError, match="3 rows; at least 4 are needed"):
        run(data, tmp_path, rows=np.arange(3))
    with pytest.raises(ConfigError, match="0 epochs; give at least 1"):
        run(data, tmp_path, epochs=0)
    with pytest.raises(ConfigError, match="batch 100; give 1 to 81"):
        run(data, tmp_path, batch=100)
    unlabelled = ArraySource("train", train.images, None, CLASSES)
    with pytest.raises(DataError, match="90 of the pictures to fine-tune on have no label"):
        run((params, unlabelled, test), tmp_path)
    with pytest.raises(DataError, match=r"data\.test: 'test' has pictures without label"):
        run((params, train, ArraySource("test", test.images, None, CLASSES)), tmp_path)
