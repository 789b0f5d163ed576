"""Features: what a name stands for, each picture once, whatever the devices; the cache returns what was extracted."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from maect_jax.data.batches.evaluation import EvaluationBatches
from maect_jax.data.sources.base import ArraySource
from maect_jax.errors import ConfigError
from maect_jax.evaluation.cache import FeatureCache
from maect_jax.evaluation.features import Features, elementary, extract, forward, make_extractor
from maect_jax.evaluation.suite import Place, make_task
from maect_jax.evaluation.task import Settings, Weights
from maect_jax.models.patches import patchify
from maect_jax.models.vit import ViT
from maect_jax.parallel.mesh import batch_sharding, make_mesh
from maect_jax.training.stop import StopRequest

DEPTH = 5
ENCODER = ViT(16, DEPTH, 2, 4, 16)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def params():
    tree = ENCODER.init(jax.random.key(0), jnp.zeros((1, 16, 48)))["params"]
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), tree)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (21, 16, 16, 3)).astype(np.uint8)


def tokens(params, images_bhwc, blocks):
    """Tokens of the first blocks, before any norm, from an encoder that has no others."""
    truncated = ViT(16, blocks, 2, 4, 16, final_norm=False)
    kept = {name: params[name] for name in ("patch_embed", "cls_token")}
    kept["blocks"] = jax.tree.map(lambda x: x[:blocks], params["blocks"])
    return np.asarray(truncated.apply({"params": kept}, patchify(images_bhwc, 4)), np.float64)


def norm(params, x):
    scale, bias = np.asarray(params["norm"]["scale"]), np.asarray(params["norm"]["bias"])
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias


def test_names_stand_for_blocks_norms_and_pooling(params):
    images = jax.random.normal(jax.random.key(2), (3, 16, 16, 3))
    last, second = tokens(params, images, DEPTH), tokens(params, images, 2)
    wanted = {
        "cls": norm(params, last)[:, 0],
        "mean": norm(params, last)[:, 1:].mean(1),
        "cls@last": last[:, 0],
        "cls@2": second[:, 0],
        "mean@2": second[:, 1:].mean(1),
        "both": np.concatenate([norm(params, last)[:, 0], norm(params, last)[:, 1:].mean(1)], 1),
        "cls@last4": np.concatenate([tokens(params, images, k)[:, 0] for k in (2, 3, 4, 5)], 1),
        "cls@norm4+mean": np.concatenate(
            [norm(params, tokens(params, images, k))[:, 0] for k in (2, 3, 4, 5)] + [norm(params, last)[:, 1:].mean(1)],
            1,
        ),
    }
    parts = tuple(dict.fromkeys(part for name in wanted for part in elementary(name, DEPTH)))
    found = jax.tree.map(np.asarray, forward(ENCODER, parts, params, images))
    features = Features(found, np.zeros(3), np.arange(3), np.zeros((3, 2)), DEPTH)
    for name, value in wanted.items():
        np.testing.assert_allclose(features.vectors(name), value, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", ["", "cls@", "cls@norm", "mean@norm4", "sum", "cls+", "cls@six", "cls@-1"])
def test_what_is_no_feature_is_refused_with_examples(name):
    with pytest.raises(ConfigError, match=f"'{name}' is none; features are 'cls', 'mean'".replace("+", r"\+")):
        elementary(name, DEPTH)


@pytest.mark.parametrize("name", ["cls@6", "cls@last6", "cls@0", "cls@norm6"])
def test_a_block_that_the_encoder_does_not_have_is_refused(name):
    with pytest.raises(ConfigError, match=r"asks for block \d of an encoder with 5 blocks"):
        elementary(name, DEPTH)


def extracted(params, pictures, devices, names=("cls",), **settings):
    mesh = make_mesh(devices=jax.devices()[:devices])
    source = ArraySource("made", pictures, np.arange(len(pictures)) % 3, ("a", "b", "c"))
    loader = EvaluationBatches(source, batch=8, image_size=16, sharding=batch_sharding(mesh), resize_ratio=1.0)
    return extract(make_extractor(ENCODER, names, MEAN, STD, mesh), params, loader, DEPTH, **settings)


def test_every_picture_counts_once_and_devices_change_nothing(params, pictures):
    one, eight = (extracted(params, pictures, devices) for devices in (1, 8))
    assert one.ids.tolist() == list(range(21)) and one.labels.tolist() == [i % 3 for i in range(21)]
    images = (jnp.asarray(pictures) / 255.0 - jnp.asarray(MEAN)) / jnp.asarray(STD)
    alone = np.concatenate([norm(params, tokens(params, images[i : i + 1], DEPTH))[:, 0] for i in range(21)])
    np.testing.assert_allclose(one.vectors("cls"), alone, atol=2e-5)
    np.testing.assert_allclose(eight.vectors("cls"), one.vectors("cls"), atol=1e-5)
    np.testing.assert_array_equal(eight.content, one.content)


def test_equal_pixels_have_equal_content_and_others_do_not(params, pictures):
    doubled = np.concatenate([pictures[:3], pictures[1:2], 255 - pictures[:1]])
    content = extracted(params, doubled, 1).content.tolist()
    assert content[1] == content[3]
    assert len({tuple(row) for row in content}) == 4


def test_bfloat16_features_are_the_rounded_ones(params, pictures):
    full, half = extracted(params, pictures, 1), extracted(params, pictures, 1, dtype=ml_dtypes.bfloat16)
    assert half.parts["cls"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(half.parts["cls"], full.parts["cls"].astype(ml_dtypes.bfloat16))


# ------------------------------------------------------------------------------------------------------------- cache


class Counting:
    """Makes features of ten pictures and remembers which parts were asked for."""

    def __init__(self, dtype=np.float32):
        self.asked, self.dtype, self.content = [], dtype, 1

    def __call__(self, parts):
        self.asked.append(parts)
        values = {part: np.random.default_rng(len(part)).random((10, 4)).astype(self.dtype) for part in parts}
        return Features(values, np.arange(10), np.arange(10), np.full((10, 2), self.content, np.uint32), DEPTH)


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(epath.Path(tmp_path) / "features")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_was_extracted_is_read_again(cache, dtype):
    make = Counting(dtype)
    first, hit = cache.features({"weights": "w"}, ("cls", "mean@2"), DEPTH, make)
    again, hit_again = cache.features({"weights": "w"}, ("mean@2", "cls"), DEPTH, make)
    assert (hit, hit_again, make.asked) == (False, True, [("cls", "mean@2")])
    for part in ("cls", "mean@2"):
        assert again.parts[part].dtype == dtype
        np.testing.assert_array_equal(again.parts[part], first.parts[part])
    for column in ("labels", "ids", "content"):
        np.testing.assert_array_equal(getattr(again, column), getattr(first, column))


def test_only_missing_parts_are_extracted(cache):
    make = Counting()
    cache.features({"weights": "w"}, ("cls",), DEPTH, make)
    found, hit = cache.features({"weights": "w"}, ("cls", "cls@3norm"), DEPTH, make)
    assert not hit and make.asked == [("cls",), ("cls@3norm",)]
    assert set(found.parts) == {"cls", "cls@3norm"}


@pytest.mark.parametrize("key", [{"weights": "v"}, {"weights": "w", "limit": 5}])
def test_another_key_is_another_entry(cache, key):
    make = Counting()
    cache.features({"weights": "w"}, ("cls",), DEPTH, make)
    _, hit = cache.features(key, ("cls",), DEPTH, make)
    assert not hit


@pytest.mark.parametrize("name", ["cls.safetensors", "rows.safetensors"])
@pytest.mark.parametrize("damage", [lambda content: content[:40], lambda content: b"", lambda content: b"\xff" * 90])
def test_damaged_files_are_extracted_anew(cache, name, damage):
    make = Counting()
    whole, _ = cache.features({"weights": "w"}, ("cls",), DEPTH, make)
    (path,) = cache.folder.glob(f"*/{name}")
    path.write_bytes(damage(path.read_bytes()))
    again, hit = cache.features({"weights": "w"}, ("cls",), DEPTH, make)
    assert not hit and len(make.asked) == 2
    np.testing.assert_array_equal(again.parts["cls"], whole.parts["cls"])
    assert cache.features({"weights": "w"}, ("cls",), DEPTH, make)[1]


def test_pictures_that_changed_behind_an_equal_key_leave_nothing_old(cache):
    before, after = Counting(), Counting()
    cache.features({"weights": "w"}, ("cls",), DEPTH, before)
    after.content = 7
    found, _ = cache.features({"weights": "w"}, ("cls", "mean"), DEPTH, after)
    assert after.asked == [("mean",), ("cls", "mean")]
    np.testing.assert_array_equal(found.content, 7)
    again, hit = cache.features({"weights": "w"}, ("cls", "mean"), DEPTH, Counting())
    assert hit and (again.content == 7).all()


def test_heads_are_part_of_what_is_cached(params, pictures, tmp_path):
    """No shape tells the heads: equal weights with other heads are another encoder."""
    source = ArraySource("made", pictures, np.arange(len(pictures)) % 3, ("a", "b", "c"))
    found = {}
    for heads in (2, 4):
        encoder = ViT(16, DEPTH, heads, 4, 16)
        weights = Weights("x", encoder, lambda: params, "cls", MEAN, STD, 1.0, 3, 0, {})
        place = Place(make_mesh(devices=jax.devices()[:1]), epath.Path(tmp_path), StopRequest(), lambda text: None)
        task = make_task(weights, source, source, Settings(batch=8), place)
        found[heads] = task.features_of(source, ["cls"]).vectors("cls")
    assert np.abs(found[2] - found[4]).max() > 1e-3
