"""Batches: their order, form and crops, and evaluation; see `test_counters` for what they do not depend on."""

import math

import jax
import numpy as np
import pytest
from PIL import Image

from maect_jax.data.batches.evaluation import EvaluationBatches
from maect_jax.data.batches.slots import Slots
from maect_jax.data.batches.training import ASPECT, training_batches
from maect_jax.data.host.counters import crop_box, epoch_order
from maect_jax.data.sources.base import ArraySource
from maect_jax.data.sources.open import open_source
from maect_jax.errors import ConfigError, DataError
from maect_jax.parallel.mesh import batch_sharding, make_mesh

SCALE = (0.2, 1.0)


@pytest.fixture(scope="module")
def sharding():
    return batch_sharding(make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """22 pictures of two classes, each of another size."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(22):
        path = root / "train" / ("ab"[i % 2]) / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = np.random.RandomState(i).randint(0, 256, (24 + i, 40 - i, 3)).astype(np.uint8)
        Image.fromarray(content).save(path)
    return str(root)


@pytest.fixture(scope="module")
def source(folder):
    return open_source(folder, "train")


def batches(source, sharding, count, start_step=0, **changes):
    settings = {"batch": 4, "seed": 7, "views": 2, "image_size": 16, "crop_scale": SCALE} | changes
    loader = training_batches(source, start_step=start_step, sharding=sharding, **settings)
    try:
        return [jax.tree.map(np.asarray, next(loader)) for _ in range(count)]
    finally:
        loader.close()


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
            assert a[key].dtype == b[key].dtype


def in_memory(n=22, size=8):
    images = np.random.RandomState(0).randint(0, 256, (n, size, size, 3)).astype(np.uint8)
    return ArraySource("memory", images, np.arange(n) % 3, ("a", "b", "c"))


def test_epoch_order_is_a_permutation_of_its_own_for_each_seed_and_epoch():
    orders = [epoch_order(seed, epoch, 100) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert order.dtype == np.int32
        np.testing.assert_array_equal(np.sort(order), np.arange(100))
    assert len({order.tobytes() for order in orders}) == 4


def test_epoch_order_and_crops_never_change():
    """Written down once: another NumPy or another release must not change what a resumed run sees."""
    assert epoch_order(3, 2, 8).tolist() == [7, 4, 3, 1, 2, 5, 6, 0]
    box = crop_box(300, 400, seed=3, epoch=2, sample_id=5, view=1, scale=SCALE, ratio=ASPECT)
    assert box == (3, 103, 163, 210)


@pytest.mark.parametrize("limit", [0, 2 << 30], ids=["streamed", "resident"])
def test_start_at_step_k_gives_what_follows_k_steps(sharding, limit):
    memory = in_memory()
    assert_equal(
        batches(memory, sharding, 9, resident_limit=limit)[6:],
        batches(memory, sharding, 3, start_step=6, resident_limit=limit),
    )


@pytest.mark.parametrize("limit", [0, 2 << 30], ids=["streamed", "resident"])
def test_an_epoch_shows_each_picture_at_most_once_and_drops_the_rest(sharding, limit):
    steps = batches(in_memory(), sharding, 10, resident_limit=limit)  # 22 pictures, batches of 4: 5 steps
    epochs = [np.concatenate([b["id"] for b in steps[e * 5 : e * 5 + 5]]) for e in (0, 1)]
    assert all(len(set(ids.tolist())) == 20 for ids in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_resident_batch_holds_the_whole_pictures_of_its_ids(sharding):
    memory = in_memory()
    loader = training_batches(
        memory, batch=4, seed=0, start_step=0, views=2, image_size=4, crop_scale=SCALE, sharding=sharding
    )
    assert (loader.resident, loader.steps_per_epoch) == (True, 5)
    batch = next(loader)
    ids = np.asarray(batch["id"])
    np.testing.assert_array_equal(batch["image"], memory.images[ids])
    np.testing.assert_array_equal(batch["label"], memory.labels[ids])
    assert loader.telemetry.wait_seconds > 0


def test_resident_and_streamed_see_the_same_samples(sharding):
    resident, streamed = (batches(in_memory(), sharding, 7, resident_limit=limit) for limit in (2 << 30, 0))
    for a, b in zip(resident, streamed):
        np.testing.assert_array_equal(a["id"], b["id"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_streamed_batch_has_the_shapes_and_types_of_the_interface(source, sharding):
    loader = training_batches(
        source, batch=4, seed=0, start_step=0, views=3, image_size=16, crop_scale=SCALE, sharding=sharding
    )
    assert (loader.resident, loader.steps_per_epoch) == (False, 5)
    batch = next(loader)
    loader.close()
    assert {key: (value.shape, str(value.dtype)) for key, value in batch.items()} == {
        "image": ((4, 3, 16, 16, 3), "uint8"),
        "id": ((4,), "int32"),
        "label": ((4,), "int32"),
    }
    assert all(value.sharding.is_equivalent_to(sharding, value.ndim) for value in batch.values())
    np.testing.assert_array_equal(batch["label"], source.labels[np.asarray(batch["id"])])


def test_streamed_crops_are_those_of_pillow_and_differ_by_view_and_epoch(source, sharding):
    steps = batches(source, sharding, 10)
    seen = {}
    for step, batch in enumerate(steps):
        for row, sample_id in enumerate(batch["id"].tolist()):
            picture = Image.open(source.path(sample_id)).convert("RGB")
            for view in range(2):
                top, left, height, width = crop_box(
                    picture.height,
                    picture.width,
                    seed=7,
                    epoch=step // 5,
                    sample_id=sample_id,
                    view=view,
                    scale=SCALE,
                    ratio=ASPECT,
                )
                cut = picture.crop((left, top, left + width, top + height))
                expected = np.asarray(cut.resize((16, 16), Image.Resampling.BICUBIC))
                error = np.abs(batch["image"][row, view].astype(int) - expected)
                assert error.mean() < 0.6, error.mean()  # white noise is the worst case; bilinear is 9 grey levels off
                seen[sample_id, step // 5, view] = expected.tobytes()
    assert len(set(seen.values())) == len(seen)


def test_crop_boxes_are_distributed_as_published():
    boxes = np.array(
        [
            crop_box(400, 500, seed=0, epoch=0, sample_id=i, view=0, scale=(0.2, 0.6), ratio=(0.75, 4 / 3))
            for i in range(4000)
        ]
    )
    top, left, height, width = boxes.T
    assert top.min() >= 0 and left.min() >= 0 and (top + height).max() <= 400 and (left + width).max() <= 500
    share, log_aspect = height * width / 200_000, np.log(width / height)
    assert share.min() > 0.198 and share.max() < 0.602
    assert abs(share.mean() - 0.4) < 4 * share.std() / math.sqrt(4000) + 0.005
    assert np.abs(log_aspect).max() < math.log(4 / 3) + 0.01
    assert abs(log_aspect.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01
    assert abs((top / (400 - height + 1)).mean() - 0.5) < 0.03
    assert abs((left / (500 - width + 1)).mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (1, 1, (0, 0, 1, 1))]
)
def test_crop_falls_back_to_the_central_box_when_no_try_fits(height, width, expected):
    box = crop_box(height, width, seed=0, epoch=0, sample_id=0, view=0, scale=(1, 1), ratio=(3 / 4, 4 / 3))
    assert box == expected


def test_fewer_pictures_than_a_batch_names_both_numbers(source, sharding):
    with pytest.raises(DataError, match=r"has 22 pictures, fewer than one batch of 32; set batch to at most 22"):
        batches(source, sharding, 1, batch=32)


def evaluated(source, sharding, **changes):
    settings = {"batch": 8, "image_size": 16} | changes
    return [jax.tree.map(np.asarray, b) for b in EvaluationBatches(source, sharding=sharding, **settings)]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_picture_exactly_once_in_order(source, sharding, workers):
    steps = evaluated(source, sharding, workers=workers)
    assert [b["valid"].sum() for b in steps] == [8, 8, 6]
    valid = np.concatenate([b["valid"] for b in steps])
    ids = np.concatenate([b["id"] for b in steps])
    np.testing.assert_array_equal(ids[valid], np.arange(22))
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in steps])[valid], source.labels)
    assert (ids[~valid] == -1).all()


def test_evaluation_pictures_equal_pillow(source, sharding):
    for batch in evaluated(source, sharding):
        for image, sample_id in zip(batch["image"], batch["id"].tolist()):
            if sample_id < 0:
                assert not image.any()
                continue
            picture = Image.open(source.path(sample_id)).convert("RGB")
            short = 18  # round(16 * 256 / 224)
            factor = short / min(picture.size)
            width, height = (short if side == min(picture.size) else int(side * factor) for side in picture.size)
            left, top = round((width - 16) / 2), round((height - 16) / 2)
            resized = picture.resize((width, height), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(image, np.asarray(resized.crop((left, top, left + 16, top + 16))))


def test_evaluation_leaves_pictures_of_the_right_size_alone(sharding):
    memory = in_memory(size=16)
    images = np.concatenate([b["image"] for b in evaluated(memory, sharding, resize_ratio=1.0)])
    np.testing.assert_array_equal(images[:22], memory.images)


def test_evaluation_limit_is_a_fixed_subset_over_all_classes(sharding):
    images = np.zeros((3000, 4, 4, 3), np.uint8)
    sorted_by_class = ArraySource("memory", images, np.arange(3000) // 300, tuple("abcdefghij"))
    loader = EvaluationBatches(sorted_by_class, batch=8, image_size=4, sharding=sharding, limit=200)
    assert len(loader) == 25
    assert (np.diff(loader.ids) > 0).all() and len(loader.ids) == 200
    assert np.bincount(sorted_by_class.labels[loader.ids], minlength=10).min() >= 8
    smaller = EvaluationBatches(sorted_by_class, batch=8, image_size=4, sharding=sharding, limit=50)
    assert set(smaller.ids.tolist()) < set(loader.ids.tolist())


def test_evaluation_is_the_same_on_any_number_of_devices(source, sharding):
    assert_equal(evaluated(source, sharding), evaluated(source, batch_sharding(make_mesh())))


def test_a_batch_that_does_not_divide_over_the_devices_is_told():
    with pytest.raises(ConfigError, match="batch: 6 does not divide over the 8 devices; set it to a multiple"):
        batches(in_memory(), batch_sharding(make_mesh()), 1, batch=6)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_that_is_left_early_closes_its_files_once(source, sharding, workers, monkeypatch):
    closed = []
    close = Slots.close
    monkeypatch.setattr(Slots, "close", lambda self: (closed.append(self), close(self)))
    batches = iter(EvaluationBatches(source, batch=4, image_size=8, sharding=sharding, workers=workers))
    next(batches)
    batches.close()
    assert len(closed) == 1


def test_a_loader_may_be_closed_twice(source, sharding):
    loader = training_batches(source, batch=4, seed=0, start_step=0, views=1, image_size=8, crop_scale=SCALE,
                              sharding=sharding, resident_limit=0)  # fmt: skip
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)
