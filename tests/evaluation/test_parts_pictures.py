"""What EMAE's parts are shown to see, to make of it and to differ in, against a pass for each part by itself in NumPy;
and which weights a run shows so.
"""

import itertools
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from maect_jax import assemble, evaluate
from maect_jax import config as settings
from maect_jax.context import Run
from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.sources.open import open_source
from maect_jax.evaluation import pictures
from maect_jax.stages import run_training_stage
from maect_jax.training.logbook import Logbook
from maect_jax.training.stop import StopRequest
from small import mae_of, mae_tree, one_device

SHAPE = dict(dim=16, depth=2, heads=2, patch_size=4, img_size=16, decoder_dim=8, decoder_depth=1, decoder_heads=2)
MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)
GRID, PATCH, SIZE = 4, 4, 16
TINY = Path(__file__).resolve().parents[1] / "run" / "tiny.py"


@pytest.fixture(scope="module")
def params():
    """Random ones, far from fresh: parts that saw something else predict something else."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x + rng.normal(0, 0.2, x.shape), np.float32), mae_tree(SHAPE))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)


def shown(params, images, parts, normalised=True, **changes) -> dict[str, np.ndarray]:
    facts = dict(parts=parts, normalised_pixels=normalised, mean=MEAN, std=STD, seed=5) | changes
    with jax.default_matmul_precision("highest"):
        return pictures.reconstruct_parts(mae_of(SHAPE), params, images, **facts)


def patch_at(array, n):
    """View of the rows and columns of patch n, of a picture [size, size, 3]."""
    row, column = divmod(n, GRID)
    return array[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]


@jax.jit
def one_pass(params, visible_blp, order_bm):
    return mae_of(SHAPE).apply({"params": params}, visible_blp, order_bm)[0]


def by_definition(params, image, order, parts, normalised):
    """One picture, a part after the other; a patch that a part predicts comes in row-major order, float64."""
    keep = len(order) // parts
    pixels = (image / 255 - np.array(MEAN)) / np.array(STD)
    patches = np.stack([patch_at(pixels, n).reshape(-1) for n in range(len(order))])
    own_mean = patches.mean(1, keepdims=True)
    own_std = np.sqrt(((patches - own_mean) ** 2).sum(1, keepdims=True) / (patches.shape[1] - 1) + 1e-6)
    target = (patches - own_mean) / own_std if normalised else patches
    predicted, seen, completed, errors = [], [], [], []
    for k in range(parts):
        visible = order[k * keep : (k + 1) * keep]
        hidden = np.setdiff1d(order, visible)
        given = patches[visible][None].astype(np.float32), np.concatenate([visible, hidden])[None]
        with jax.default_matmul_precision("highest"):
            found = np.asarray(one_pass(params, *given)[0], np.float64)
        predicted.append(dict(zip(hidden.tolist(), found)))
        errors.append((found - target[hidden]) ** 2)
        part_seen, part_completed = image.astype(float), image.astype(float)
        for n, values in zip(hidden, found):
            values = values * own_std[n] + own_mean[n] if normalised else values
            values = (values.reshape(PATCH, PATCH, 3) * np.array(STD) + np.array(MEAN)) * 255
            patch_at(part_seen, n)[:] = 127.5
            patch_at(part_completed, n)[:] = np.clip(values, 0, 255)
        seen.append(part_seen)
        completed.append(part_completed)
    apart = np.zeros(len(order))
    for n in range(len(order)):
        pairs = [(a, b) for a, b in itertools.combinations(predicted, 2) if n in a and n in b]
        apart[n] = np.mean([np.abs(a[n] - b[n]).mean() for a, b in pairs]) if pairs else 0
    return np.stack(seen), np.stack(completed), apart.reshape(GRID, GRID), np.mean(errors)


@pytest.mark.parametrize(("parts", "normalised"), [(2, True), (4, False), (8, True)])
def test_parts_are_shown_as_passes_one_by_one_give_them(parts, normalised, params, images, monkeypatch):
    noise_bn = np.random.default_rng(2).random((len(images), GRID**2), np.float32)
    monkeypatch.setattr(pictures, "mask_noise", lambda keys, patches: jnp.asarray(noise_bn))
    found = shown(params, images, parts, normalised)
    expected = [by_definition(params, *of, parts, normalised) for of in zip(images, noise_bn.argsort(1))]
    np.testing.assert_array_equal(found["original"], images)
    for name, i in (("seen", 0), ("completed", 1)):
        assert found[name].dtype == np.uint8 and found[name].shape == (3, parts, SIZE, SIZE, 3)
        assert np.abs(found[name] - np.stack([of[i] for of in expected])).max() <= 0.51, name  # rounded
    apart = np.stack([of[2] for of in expected])
    assert found["disagreement"].dtype == np.float32
    np.testing.assert_allclose(found["disagreement"], apart, atol=2e-5)
    np.testing.assert_allclose(found["mean_disagreement"], apart.mean(), atol=2e-5)
    np.testing.assert_allclose(found["error"], np.sqrt(np.mean([of[3] for of in expected])), rtol=2e-5)
    assert (apart.min() > 0.05) == (parts > 2)  # there is something to be seen


def test_a_patch_is_seen_by_one_part_whatever_the_weights(params, images):
    found, other = shown(params, images, 4), shown(mae_tree(SHAPE), images, 4)
    np.testing.assert_array_equal(found["seen"], other["seen"])
    assert (shown(params, images, 4, seed=6)["seen"] != found["seen"]).any()
    grey_bknp = (found["seen"] // 2 == 63) | (found["seen"] == 128)
    grey_bkn = grey_bknp.reshape(3, 4, GRID, PATCH, GRID, PATCH, 3).all((3, 5, 6))
    assert (grey_bkn.sum(1) == 3).all() and (grey_bkn.sum((2, 3)) == 12).all()


def test_parts_that_do_not_divide_the_patches_are_refused(params, images):
    with pytest.raises(ValueError, match="3 parts do not divide 16 patches"):
        shown(params, images, 3)


# ------------------------------------------------------------------------------------------------------- those of a run


def write_pictures(folder):
    rng = np.random.default_rng(0)
    for split, name, i in itertools.product(("train", "test"), ("a", "b"), range(8)):
        path = folder / split / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@contextmanager
def run_in(root, data, **changes):
    """A run of an update of pre-training in the folder `root`."""
    overrides = {"data.train": str(data), "pretrain.epochs": "1", "pretrain.batch": "16"} | changes
    config = settings.load(str(TINY), overrides)
    train, test = (open_source(str(data), split, channels=3) for split in ("train", "test"))
    settings.derive(config, len(train))
    root = epath.Path(root)
    (root / "pretrain").mkdir(parents=True, exist_ok=True)
    logbook = Logbook(root, write=True)
    with StopRequest() as stop:
        try:
            yield Run(config, root, one_device(), train, test, logbook, stop, True, BadPictures("error"))
        finally:
            logbook.close()


def load(path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


IN_EIGHT = {"pretrain.method": "emae", "pretrain.emae.parts": "8"}


def test_pretraining_keeps_the_parts_before_and_after_and_when_resumed_those_before(data, tmp_path):
    before, after = (tmp_path / "figures" / f"parts_{when}.npz" for when in ("before", "after"))
    with run_in(tmp_path, data, **IN_EIGHT) as run:
        run_training_stage(run, "pretrain")
    fresh, trained = load(before), load(after)
    for name in ("original", "seen", "parts"):
        np.testing.assert_array_equal(fresh[name], trained[name])
    assert fresh["seen"].shape == fresh["completed"].shape == (6, 4, SIZE, SIZE, 3) and fresh["parts"] == 8
    params = assemble.assemble(run.config, "pretrain", 16, run.mesh).first_state({}).params
    facts = dict(normalised_pixels=True, mean=run.config.data.mean, std=run.config.data.std, seed=run.config.seed)
    model = assemble.build_autoencoder(run.config)
    expected = pictures.reconstruct_parts(model, params, fresh["original"], parts=8, **facts)
    np.testing.assert_allclose(fresh["disagreement"], expected["disagreement"], atol=1e-5)
    assert abs(trained["error"] - fresh["error"]) > 1e-3

    (tmp_path / "pretrain" / "DONE.json").unlink()
    before.write_bytes(b"kept")
    after.unlink()
    with run_in(tmp_path, data, **IN_EIGHT) as run:
        run_training_stage(run, "pretrain")
    assert before.read_bytes() == b"kept"
    for name, array in load(after).items():
        np.testing.assert_array_equal(array, trained[name])


@pytest.mark.parametrize("method", ["mae", "disjoint"])
def test_other_methods_have_no_parts_to_keep(method, data, tmp_path):
    with run_in(tmp_path, data, **{"pretrain.method": method}) as run:
        evaluate.save_parts(run, {}, "before")
    assert not (tmp_path / "figures").exists()
