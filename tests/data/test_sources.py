"""Sources: what is found under a name, what a picture decodes to, and what an error tells the user."""

import pickle
import sys
import types

import numpy as np
import pytest
from PIL import Image

from maect_jax.data.batches.resident import load_resident
from maect_jax.data.sources.base import ArraySource
from maect_jax.data.sources.open import open_source
from maect_jax.errors import DataError


def pixels(value, height=6, width=8, channels=3):
    """A picture whose every pixel differs, different for each value."""
    count = height * width * channels
    return ((np.arange(count) * 7 + value * 13) % 256).astype(np.uint8).reshape(height, width, channels)


def write(path, value=0, height=6, width=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(value, height, width)).save(path)


@pytest.fixture
def pets(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for c, name in enumerate(("dog", "cat")):
            for i in range(count):
                write(tmp_path / "pets" / split / name / f"{i}.png", 10 * c + i)
    return tmp_path / "pets"


def test_folder_ids_are_sorted_by_class_then_file_name(pets):
    train = open_source(str(pets), "train")
    assert train.classes == ("cat", "dog")
    assert train.labels.dtype == np.int32
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(train.image(1), pixels(11))  # cat/1.png
    np.testing.assert_array_equal(train.image(3), pixels(0))  # dog/0.png


def test_test_split_is_found_as_test_then_val_then_validation(pets):
    (pets / "val").rename(pets / "validation")
    assert len(open_source(str(pets), "test")) == 4
    for c, name in enumerate(("dog", "cat")):
        write(pets / "test" / name / "0.png", c)
    assert len(open_source(str(pets), "test")) == 2


def test_test_labels_use_the_class_indices_of_training(pets):
    write(pets / "train" / "bird" / "0.png")
    test = open_source(str(pets), "test")
    assert test.classes == ("bird", "cat", "dog")
    assert test.labels.tolist() == [1, 1, 2, 2]
    alone = open_source(str(pets / "val"), "test")
    assert (alone.classes, alone.labels.tolist()) == (test.classes, test.labels.tolist())
    given = open_source(str(pets / "train"), "test", classes=("dog", "cat", "bird"))
    assert given.labels.tolist() == [2, 1, 1, 1, 0, 0, 0]


def test_test_class_unknown_to_training_is_named(pets):
    write(pets / "val" / "horse" / "0.png")
    with pytest.raises(DataError, match=r"data\.test: class 'horse' .* is not in the training set"):
        open_source(str(pets), "test")


def test_training_folder_without_test_folder_is_not_its_own_test_set(pets):
    with pytest.raises(DataError, match="has none of test/, val/, validation/"):
        open_source(str(pets / "train"), "test")


def test_extensions_in_any_case_hidden_files_skipped_nested_followed(tmp_path):
    for name in ("a/1.PNG", "a/deep/2.bmp", "b/3.JPeG", "b/4.tiff", "b/5.webp", "b/6.gif", "b/7.ppm"):
        write(tmp_path / name)
    for name in ("a/.hidden.png", ".cache/1.png"):
        write(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    source = open_source(str(tmp_path), "train")
    assert source.classes == ("a", "b")
    assert source.files == ["a/1.PNG", "a/deep/2.bmp", "b/3.JPeG", "b/4.tiff", "b/5.webp", "b/6.gif", "b/7.ppm"]
    assert all(source.image(i).shape == (6, 8, 3) and source.size(i) == (6, 8) for i in range(7))


def test_flat_folder_is_unlabelled_training_data(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.png", i)
    source = open_source(str(tmp_path), "train")
    assert (source.classes, source.labels.tolist()) == ((), [-1, -1, -1])
    with pytest.raises(DataError, match="has none of test/"):
        open_source(str(tmp_path), "test")


def test_one_class_is_an_error_that_tells_both_ways_out(tmp_path):
    write(tmp_path / "only" / "0.png")
    with pytest.raises(DataError, match=r"only one class, 'only'.*without labels, or add more classes"):
        open_source(str(tmp_path), "train")


def test_empty_missing_and_file_are_errors(tmp_path, pets):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in"):
        open_source(str(tmp_path / "empty"), "train")
    with pytest.raises(DataError, match=r"data\.train: no folder .*did you mean .*pets"):
        open_source(str(tmp_path / "pest"), "train")
    with pytest.raises(DataError, match="is a file"):
        open_source(str(pets / "train" / "cat" / "0.png"), "train")
    (pets / "train" / "bird").mkdir()
    with pytest.raises(DataError, match=r"class folder .*bird.* holds no pictures"):
        open_source(str(pets), "train")


def test_folder_with_only_a_test_split_is_not_two_classes(pets):
    (pets / "train").rename(pets / "test")
    with pytest.raises(DataError, match="has test/, val/ but no train/"):
        open_source(str(pets), "train")


def test_digits_come_from_the_embedded_set_in_the_channels_asked_for(monkeypatch):
    images = np.stack([pixels(i, 32, 32) for i in range(4)])
    digits = types.ModuleType("maect_jax.data.sources.digits")
    digits.load = lambda split, seed=0: (images, np.arange(4, dtype=np.int32), ("a", "b", "c", "d"))
    monkeypatch.setitem(sys.modules, "maect_jax.data.sources.digits", digits)
    monkeypatch.setattr("maect_jax.data.sources.digits", digits, raising=False)
    source = open_source("digits", "test")
    assert (len(source), source.classes) == (4, ("a", "b", "c", "d"))
    np.testing.assert_array_equal(source.image(2), images[2])
    grey = open_source("digits", "test", channels=1)
    np.testing.assert_array_equal(grey.image(1)[:, :, 0], np.asarray(Image.fromarray(images[1]).convert("L")))


def test_source_survives_the_way_to_a_loader_process(pets):
    source = open_source(str(pets), "train")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).image(2), source.image(2))


def test_resident_set_holds_every_picture_in_order(pets):
    source = open_source(str(pets), "train")
    images, used = load_resident(source)
    np.testing.assert_array_equal(used, np.arange(6))
    np.testing.assert_array_equal(images, np.stack([source.image(i) for i in range(6)]))
    assert load_resident(source, limit_bytes=images.nbytes) is not None
    assert load_resident(source, limit_bytes=images.nbytes - 1) is None


def test_resident_set_needs_one_size(tmp_path):
    for i in range(200):
        write(tmp_path / f"{i:03}.png", i)
    source = open_source(str(tmp_path), "train")
    assert load_resident(source)[0].shape == (200, 6, 8, 3)
    write(tmp_path / "001.png", 0, height=7)  # not among the headers that are asked first
    assert load_resident(source) is None
    images = np.zeros((3, 4, 4, 2), np.uint8)
    assert load_resident(ArraySource("memory", images))[0] is images
