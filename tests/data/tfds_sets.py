"""Small TFDS sets of pictures, prepared by their builders, and the way to damage one."""

import io
from pathlib import Path

import jax
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from maect_jax.data.batches.training import training_batches


def pixels(value, height=6, width=8):
    """A picture whose every pixel differs, different for each value."""
    return ((np.arange(height * width * 3) * 7 + value * 13) % 256).astype(np.uint8).reshape(height, width, 3)


def png(pixels_hwc):
    encoded = io.BytesIO()
    Image.fromarray(pixels_hwc).save(encoded, "PNG")
    return encoded.getvalue()


class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["sun", "moon"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(12)), "validation": self._generate_examples(range(100, 104))}

    def _generate_examples(self, values):
        for value in values:
            yield value, {"image": png(pixels(value)), "label": value % 2}


class TinyHidden(Tiny):
    """As ImageNet: a test split whose labels are not published."""

    VERSION = tfds.core.Version("1.0.0")

    def _split_generators(self, dl_manager):
        hidden = ((key, example | {"label": -1}) for key, example in self._generate_examples(range(50, 53)))
        return super()._split_generators(dl_manager) | {"test": hidden}


class Depths(tfds.core.GeneratorBasedBuilder):
    """Pictures of floats, which have no fixed range."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 1), dtype=np.float32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        return iter(())


class Noisy(tfds.core.GeneratorBasedBuilder):
    """Records of some kilobytes that can not be compressed, so that the file has several blocks; names and labels."""

    VERSION = tfds.core.Version("1.0.0")
    COUNT = 40

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=5),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(self.COUNT):
            noise = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
            yield i, {"image": png(noise), "label": i % 5, "file_name": f"{i}.png"}


class Pictures(tfds.core.GeneratorBasedBuilder):
    """(class, file name, encoded) as they are; `GIVEN` is set by `write_tfds`."""

    VERSION = tfds.core.Version("1.0.0")
    GIVEN: tuple = ()

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=sorted({class_name for class_name, _, _ in self.GIVEN})),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for class_name, name, encoded in self.GIVEN:
            path = f"{class_name}/{name}"
            yield path, {"image": encoded, "label": class_name, "file_name": path}


def write_tfds(data_dir, pictures, monkeypatch):
    """Prepares pictures as the set 'pictures' with a train split; TFDS chooses their order."""
    monkeypatch.setattr(Pictures, "GIVEN", tuple(pictures))
    Pictures(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    return "pictures"


def prepare_all(folder):
    """Prepares Tiny, TinyHidden and Noisy; gives the data_dir."""
    for builder in (Tiny, TinyHidden, Noisy):
        builder(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return str(folder)


def shard_of(data_dir, name="noisy"):
    (shard,) = (Path(data_dir) / name / "1.0.0").glob("*-train.array_record-*")
    return shard


def damage(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << (position % 8)
    path.write_bytes(content)


def where_it_begins(path, index):
    """The place in a file of an incompressible record: of bytes in its middle that occur just once."""
    record = ArrayRecordReader(str(path)).read([index])[0]
    middle = record[len(record) // 2 : len(record) // 2 + 16]
    content = path.read_bytes()
    assert content.count(middle) == 1
    return content.index(middle)


def batches(source, **settings):
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"))
    settings = {"batch": 8, "seed": 1, "start_step": 0, "views": 2, "image_size": 16} | settings
    return training_batches(source, crop_scale=(0.2, 1.0), sharding=sharding, resident_limit=0, **settings)
