"""Training and test pictures that do not fit each other are named; shared pictures are found and counted."""

import numpy as np
import pytest

from maect_jax.data.batches.samples import content_hash
from maect_jax.data.sources.base import ArraySource
from maect_jax.errors import DataError
from maect_jax.evaluation.data_checks import check_classes, check_labels, describe_shared, shared_pictures
from maect_jax.evaluation.features import Features

PICTURES = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3)).astype(np.uint8)


def source(images, classes=("cat", "dog"), name="pets", labels=None):
    return ArraySource(name, images, np.arange(len(images)) % 2 if labels is None else labels, classes)


def features(images):
    n = len(images)
    return Features({}, np.zeros(n), np.arange(n), np.stack([content_hash(image) for image in images]), 1)


def test_shared_pictures_are_found_by_their_pixels_and_named():
    train, test = PICTURES[:8], np.concatenate([PICTURES[8:], PICTURES[[5, 2, 5]]])
    found = shared_pictures(features(train), features(test))
    assert found.tolist() == [[4, 5], [5, 2], [6, 5]]
    text = describe_shared(source(train), source(test, name="held"), found, (np.arange(8), np.arange(7)))
    assert "3 of 7 test pictures of 'held' are also training pictures of 'pets'" in text
    assert "held/4 = pets/5; held/5 = pets/2; held/6 = pets/5" in text


def test_nothing_is_found_where_nothing_is_shared():
    assert len(shared_pictures(features(PICTURES[:6]), features(PICTURES[6:]))) == 0


def test_pictures_of_other_shape_with_equal_bytes_are_different():
    flat = PICTURES[0].reshape(2, 8, 3)
    assert content_hash(flat).tolist() != content_hash(PICTURES[0]).tolist()


@pytest.mark.parametrize(("what", "pair"), [("train", ((), ("a", "b"))), ("test", (("a", "b"), ()))])
def test_unlabelled_data_is_named(what, pair):
    train, test = (source(PICTURES[:4], classes) for classes in pair)
    with pytest.raises(DataError, match=rf"data\.{what}: 'pets' has no labels"):
        check_classes(train, test)


def test_a_test_class_that_training_does_not_have_is_named():
    with pytest.raises(DataError, match="'held': class 'bird' is not in the training set 'pets'"):
        check_classes(source(PICTURES[:4]), source(PICTURES[4:], ("cat", "dog", "bird"), "held"))


def test_classes_in_another_order_are_refused():
    with pytest.raises(DataError, match="in another order"):
        check_classes(source(PICTURES[:4]), source(PICTURES[4:], ("dog", "cat")))


def test_a_class_without_a_test_picture_is_named():
    test = source(PICTURES[:3], ("cat", "dog", "bird"), labels=np.array([0, 0, 1]))
    with pytest.raises(DataError, match=r"data\.test: class 'bird' of 'pets' has no test picture"):
        check_labels("test", test, test.labels)


def test_pictures_without_label_are_counted():
    train = source(PICTURES[:4], labels=np.array([0, -1, 1, -1]))
    with pytest.raises(DataError, match=r"data\.train: 2 of 4 pictures of 'pets' have no label"):
        check_labels("train", train, train.labels)
