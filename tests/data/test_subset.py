"""A subset shows the pictures that were asked for, in the order asked for, and reads none before they are needed."""

import pickle

import jax
import numpy as np
import pytest
from PIL import Image

from maect_jax.data.batches.resident import load_resident
from maect_jax.data.batches.training import training_batches
from maect_jax.data.sources.base import ArraySource
from maect_jax.data.sources.folder import FolderSource
from maect_jax.data.sources.open import open_source
from maect_jax.data.sources.subset import SubsetSource
from maect_jax.errors import DataError
from maect_jax.parallel.mesh import batch_sharding, make_mesh

ROWS = np.array([7, 2, 5, 0])


@pytest.fixture
def whole():
    images = np.random.default_rng(0).integers(0, 256, (9, 6, 8, 3), np.uint8)
    return ArraySource("memory", images, np.arange(9) % 3, ("a", "b", "c"))


@pytest.fixture
def folder(tmp_path, whole):
    for index, label in enumerate(whole.labels):
        path = tmp_path / whole.classes[label] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(whole.images[index]).save(path)
    return open_source(str(tmp_path), "train")


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_pictures_labels_and_names_are_those_of_the_rows(kind, whole, folder):
    source = whole if kind == "memory" else folder
    subset = SubsetSource(source, ROWS)
    assert len(subset) == 4 and subset.labels.dtype == np.int32
    assert (subset.classes, subset.channels, subset.name) == (source.classes, 3, source.name)
    for index, row in enumerate(ROWS):
        np.testing.assert_array_equal(subset.image(index), source.image(row))
        picture, label = subset.sample(index)
        np.testing.assert_array_equal(picture, source.image(row))
        assert label == subset.labels[index] == source.labels[row]
        assert subset.size(index) == (6, 8)
    np.testing.assert_array_equal(load_resident(subset)[0], np.stack([source.image(row) for row in ROWS]))


def test_subset_of_a_subset_counts_in_the_first(whole):
    inner = SubsetSource(SubsetSource(whole, ROWS), [3, 1])
    np.testing.assert_array_equal(np.stack([inner.image(0), inner.image(1)]), whole.images[[0, 2]])


def test_no_picture_is_read_before_it_is_asked_for(folder, monkeypatch):
    read = []
    monkeypatch.setattr(FolderSource, "read", lambda self, index: (np.zeros((1, 1, 3), np.uint8), read.append(index)))
    subset = pickle.loads(pickle.dumps(SubsetSource(folder, ROWS)))
    subset.labels, subset.digest(), subset.fingerprint(), subset.file_names()
    assert not read
    subset.image(1)
    assert read == [2]


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_processes_can_hold_one(folder, workers):
    subset = SubsetSource(folder, ROWS)
    mesh = make_mesh(devices=jax.devices()[:1])
    setting = {"views": 1, "image_size": 6, "crop_scale": (1.0, 1.0), "sharding": batch_sharding(mesh)}
    batches = training_batches(subset, batch=4, seed=0, start_step=0, workers=workers, resident_limit=0, **setting)
    batch = next(batches)
    batches.close()
    ids = np.asarray(batch["id"])
    np.testing.assert_array_equal(np.sort(ids), np.arange(4))
    np.testing.assert_array_equal(batch["label"], folder.labels[ROWS[ids]])


def test_digest_and_fingerprint_tell_other_rows_and_other_orders_apart(folder):
    subsets = [SubsetSource(folder, rows) for rows in (ROWS, ROWS[::-1], ROWS[:3])] + [folder]
    assert len({source.digest() for source in subsets}) == len({source.fingerprint() for source in subsets}) == 4
    again = SubsetSource(folder, ROWS.tolist())
    assert (again.digest(), again.fingerprint()) == (subsets[0].digest(), subsets[0].fingerprint())
    assert again.file_names() == [folder.file_names()[row] for row in ROWS]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "at least one"),
        ([0.5], "give integers"),
        ([3, 9], r"rows 3..9 of 9 pictures"),
        ([1, 1, 2], "1 rows are given twice"),
    ],
)
def test_impossible_rows_are_named(whole, rows, message):
    with pytest.raises(DataError, match=rf"subset of 'memory': .*{message}"):
        SubsetSource(whole, rows)
