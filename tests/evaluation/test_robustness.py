"""Other test sets of the same classes: matched by name, only present classes predicted, several labels allowed."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from maect_jax.data.sources.base import ArraySource
from maect_jax.data.sources.open import open_source
from maect_jax.errors import DataError
from maect_jax.evaluation.robustness import correct, match

TRAINED = ("cat", "dog", "bird", "fish")


def pictures(n):
    return np.zeros((n, 4, 4, 3), np.uint8)


def test_classes_are_matched_by_name_and_absent_ones_not_predicted():
    labels = np.array([0, 1, 1])  # fish, dog, dog
    target = match(TRAINED, ArraySource("set-a", pictures(3), labels, ("fish", "dog")), labels)
    assert target.present_c.tolist() == [False, True, False, True]
    logits = np.array([[9.0, 1, 9, 2], [9, 1, 9, 2], [0, 3, 5, 2]])  # the best present: fish, fish, dog
    assert correct(logits, target).tolist() == [True, False, True]


def test_a_set_with_all_classes_is_plain_accuracy():
    rng = np.random.default_rng(0)
    logits, labels = rng.random((50, 4)), rng.integers(0, 4, 50)
    labels[:4] = range(4)
    target = match(TRAINED, ArraySource("v2", pictures(50), labels, TRAINED), labels)
    assert correct(logits, target).tolist() == (logits.argmax(1) == labels).tolist()


def test_a_class_that_training_does_not_have_is_named():
    labels = np.array([0, 1])
    with pytest.raises(DataError, match="'sketches' has class 'horse', which the training set does not know"):
        match(TRAINED, ArraySource("sketches", pictures(2), labels, ("cat", "horse")), labels)


def test_a_class_name_without_pictures_does_no_harm():
    labels = np.array([0, 0])
    target = match(TRAINED, ArraySource("sketches", pictures(2), labels, ("cat", "horse")), labels)
    assert target.present_c.tolist() == [True, False, False, False]


class Relabelled(tfds.core.GeneratorBasedBuilder):
    """With the features of imagenet2012_real: one published label, and any number of right ones."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=["bird", "cat", "dog"])
        features = {
            "file_name": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "original_label": label,
            "real_label": tfds.features.Sequence(tfds.features.ClassLabel(names=["bird", "cat", "dog"])),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        for i, several in enumerate(([0], [1, 2], [], [2])):
            encoded = io.BytesIO()
            Image.fromarray(np.full((5, 6, 3), i, np.uint8)).save(encoded, "PNG")
            encoded.seek(0)
            yield i, {"file_name": f"{i}.png", "image": encoded, "original_label": 0, "real_label": several}


def test_any_of_several_labels_is_right_and_pictures_without_one_are_left_out(tmp_path):
    Relabelled(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = open_source("relabelled", "test", data_dir=str(tmp_path))
    order = [int(name.removesuffix(".png")) for name in source.file_names()]
    sets = {i: found.tolist() for i, found in zip(order, source.label_sets())}
    assert sets == {0: [0], 1: [1, 2], 2: [], 3: [2]}
    target = match(TRAINED, source, source.labels)
    logits = np.zeros((4, 4))
    logits[:, TRAINED.index("dog")] = 1  # every picture is taken for a dog
    wanted = [{0: False, 1: True, 3: True}[i] for i in order if i != 2]
    assert correct(logits, target).tolist() == wanted
