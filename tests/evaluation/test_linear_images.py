"""A probe trained from pictures: with an augmentation that changes nothing it is the probe on cached features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maect_jax.data.sources.base import ArraySource
from maect_jax.data.sources.open import open_source
from maect_jax.errors import DataError, Preempted
from maect_jax.evaluation.probes import linear, linear_images
from maect_jax.evaluation.probes.linear_heads import PRESETS
from maect_jax.models.patches import patchify
from maect_jax.models.vit import ViT
from maect_jax.parallel.mesh import make_mesh

SIDE, CLASSES = 8, 3
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
ENCODER = ViT(width=16, depth=2, heads=2, patch=4, image_size=SIDE)
FEATURES = ("cls", "cls@last+mean@last", "mean")
PRESET = dataclasses.replace(
    PRESETS["maect-linear"], features=FEATURES, base_rates=(0.5, 0.05), batch=16, epochs=3, epoch_updates=None
)
WHOLE = (1.0, 1.0)


def pictures_of(count: int, seed: int, symmetric: bool = True) -> ArraySource:
    """Noise on a colour of the class; symmetric pictures are their own mirror image."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % CLASSES
    colour = np.array([[150, 90, 90], [90, 150, 90], [90, 90, 150]])[label]
    images = np.clip(colour[:, None, None] + 60 * rng.normal(size=(count, SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
    if symmetric:
        images = np.concatenate([images[:, :, : SIDE // 2], images[:, :, : SIDE // 2][:, :, ::-1]], axis=2)
    return ArraySource("pictures", images, label, ("a", "b", "c"))


@pytest.fixture(scope="module")
def params():
    params = ENCODER.init(jax.random.key(1), jnp.zeros((1, 4, 48)))["params"]
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), params)


def features_of(params, source: ArraySource) -> dict[str, np.ndarray]:
    """FEATURES of the whole pictures, from the encoder's tokens and its last block's output."""
    x = jnp.asarray((source.images / 255 - np.array(MEAN)) / np.array(STD), jnp.float32)
    tokens, kept = ENCODER.apply(
        {"params": params}, patchify(x, 4), capture_intermediates=True, mutable="intermediates"
    )
    blocks = kept["intermediates"]["blocks"]
    last = [np.asarray(blocks[name][0][-1]) for name in ("cls_bd", "mean_bd")]
    tokens = np.asarray(tokens)
    parts = tokens[:, 0], np.concatenate(last, axis=1), tokens[:, 1:].mean(axis=1)
    return dict(zip(FEATURES, parts))


def from_images(params, source, *, features=None, preset=PRESET, **settings):
    """The probe trained from the source's pictures, measured on whole ones."""
    test = pictures_of(30, 9)
    features = features_of(params, source) if features is None else features
    given = {"preset": preset, "mean": MEAN, "std": STD} | settings
    return linear_images.evaluate_linear_images(
        ENCODER, params, source, features, features_of(params, test), test.labels, CLASSES, **given
    )


def losses(result) -> np.ndarray:
    return np.array([head["loss"] for head in result.table])


@pytest.mark.parametrize("resident_limit", [2 << 30, 0], ids=["resident", "streamed"])
def test_without_augmentation_it_is_the_probe_on_cached_features(params, resident_limit):
    """Whole symmetric pictures look the same however they are cropped and flipped."""
    source, test = pictures_of(60, 0), pictures_of(30, 9)
    cached = features_of(params, source)
    reference = linear.evaluate_linear(
        cached, source.labels, features_of(params, test), test.labels, CLASSES, preset=PRESET
    )
    found = from_images(params, source, crop_scale=WHOLE, resident_limit=resident_limit)
    np.testing.assert_allclose(losses(found), losses(reference), rtol=1e-4)
    assert (found.feature, found.base_rate, found.epoch) == (reference.feature, reference.base_rate, reference.epoch)
    np.testing.assert_allclose(found.probe.kernel_hcd, reference.probe.kernel_hcd, atol=1e-4)
    np.testing.assert_array_equal(found.correct, reference.correct)
    changed = {"augmentation"}
    assert {key for key in found.protocol if found.protocol[key] != reference.protocol[key]} == changed


def test_pictures_are_cropped_and_flipped_anew_in_every_epoch(params):
    """A head that stands still has the same loss in each epoch over the same pictures, and another over new crops."""
    still = dataclasses.replace(PRESET, base_rates=(0.0,), batch=1000)
    source = pictures_of(60, 0, symmetric=False)
    for scale in (WHOLE, linear_images.CROP_SCALE):  # the mirror image alone, and both
        moved = np.abs(np.diff(losses(from_images(params, source, preset=still, crop_scale=scale)), axis=1))
        assert moved.min() > 1e-6
    same = losses(from_images(params, pictures_of(60, 0), preset=still, crop_scale=WHOLE))
    np.testing.assert_allclose(same, np.repeat(same[:, :1], 3, axis=1), rtol=1e-5)


def test_the_protocol_names_the_augmentation(params):
    found = from_images(params, pictures_of(60, 0))
    assert found.protocol["augmentation"] == "random resized crop (0.08, 1), flip"
    assert (found.protocol["epochs"], found.protocol["preset_epochs"]) == (3, 50)
    assert found.accuracy > 0.6  # colours are easily told apart


def test_eight_devices_train_as_one(params):
    source = pictures_of(60, 0, symmetric=False)
    one, all_of_them = (from_images(params, source, mesh=mesh) for mesh in (None, make_mesh()))
    np.testing.assert_allclose(losses(all_of_them), losses(one), rtol=1e-4)
    np.testing.assert_allclose(all_of_them.probe.kernel_hcd, one.probe.kernel_hcd, atol=1e-4)
    np.testing.assert_array_equal(all_of_them.correct, one.correct)


def test_pictures_pass_the_encoder_in_chunks(params, monkeypatch):
    """A chunk that does not divide the batch changes nothing."""
    source = pictures_of(60, 0, symmetric=False)
    whole = from_images(params, source, seed=5)
    monkeypatch.setattr(linear_images, "CHUNK", 7)
    linear_images._step.clear_cache()
    np.testing.assert_allclose(losses(from_images(params, source, seed=5)), losses(whole), rtol=1e-5)
    linear_images._step.clear_cache()


def test_held_out_pictures_are_not_trained_on(params):
    """Their pixels do not matter, only their features do."""
    source = pictures_of(60, 0)
    features = features_of(params, source)
    reference = from_images(params, source, features=features)
    _, held_out = linear.hold_out(source.labels, seed=0)
    images = source.images.copy()
    images[held_out] = 255 - images[held_out]
    found = from_images(params, ArraySource("pictures", images, source.labels), features=features)
    np.testing.assert_array_equal(losses(found), losses(reference))
    assert found.held_out_accuracy == reference.held_out_accuracy


def test_files_of_several_sizes_are_streamed(params, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(40):
        path = tmp_path / "abc"[index % 3] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        size = 10 + index % 4, 9
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
    source = open_source(str(tmp_path), "train")
    features = {name: rng.normal(size=(40, 32 if "+" in name else 16)).astype(np.float32) for name in FEATURES}
    found = from_images(params, source, features=features)
    assert np.isfinite(losses(found)).all() and found.protocol["train_rows"] == 36


def test_a_stop_request_ends_the_training_within_an_epoch(params):
    asked = []

    def check():
        asked.append(1)
        if len(asked) == 2:
            raise Preempted("enough")

    with pytest.raises(Preempted):
        from_images(params, pictures_of(60, 0), check=check)
    assert len(asked) == 2


def test_features_of_other_pictures_are_refused(params):
    features = {name: x[:50] for name, x in features_of(params, pictures_of(60, 0)).items()}
    with pytest.raises(DataError, match=r"train labels: shape \(60,\) for 50 rows of features"):
        from_images(params, pictures_of(60, 0), features=features)
