"""TFDS sets: what is read from their ArrayRecord files, how damage is named, what is kept of a whole set."""

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.batches.training import training_batches
from maect_jax.data.sources import kept
from maect_jax.data.sources import tfds as ours
from maect_jax.data.sources.open import open_source
from maect_jax.data.sources.shards import Shards
from maect_jax.errors import BadPicture, DataError


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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    for builder in (Tiny, TinyHidden, Noisy):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def noisy(prepared, tmp_path):
    """A copy of `Noisy` that a test may damage: its data_dir."""
    shutil.copytree(Path(prepared) / "noisy", tmp_path / "noisy")
    return str(tmp_path)


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


# ------------------------------------------------------------------------------------------------------------ reading


def test_records_are_read_without_tensorflow(prepared):
    train = open_source("tiny", "train", data_dir=prepared)
    assert (len(train), train.classes, train.labels.dtype) == (12, ("sun", "moon"), np.int32)
    expected = {pixels(value).tobytes(): value % 2 for value in range(12)}
    assert {train.image(i).tobytes(): int(train.labels[i]) for i in range(12)} == expected
    assert all(train.sample(i)[1] == train.labels[i] for i in range(12))
    assert train.size(0) == (6, 8)
    assert "tensorflow" not in sys.modules


def test_records_are_those_that_tfds_reads(prepared):
    ours_, theirs = open_source("noisy", "train", data_dir=prepared), tfds.data_source("noisy", data_dir=prepared)
    for i, record in enumerate(theirs["train"]):
        np.testing.assert_array_equal(ours_.image(i), record["image"])
        assert (ours_.read(i)[1], ours_.file_names()[i]) == (record["label"], record["file_name"].decode())


@pytest.mark.parametrize("name", ["tiny", "tiny_hidden"])
def test_test_split_falls_back_to_validation(prepared, name):
    test = open_source(name, "test", data_dir=prepared)
    assert {test.image(i).tobytes() for i in range(4)} == {pixels(value).tobytes() for value in range(100, 104)}


def test_first_record_of_a_test_split_may_be_damaged(prepared, tmp_path):
    shutil.copytree(Path(prepared) / "tiny_hidden", tmp_path / "tiny_hidden")
    (shard,) = (tmp_path / "tiny_hidden" / "1.0.0").glob("*-test.array_record-*")
    damage(shard, 120)  # beyond the headers of file and record
    with pytest.raises(BadPicture, match="record 0"):
        Shards([str(shard)], [3]).read(0)
    assert open_source("tiny_hidden", "test", data_dir=str(tmp_path)).split == "validation"


def test_threads_read_what_one_thread_reads(prepared):
    source = open_source("noisy", "train", data_dir=prepared)
    expected = [source.read(i) for i in range(len(source))]
    order = np.random.default_rng(0).integers(0, len(source), 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [expected[i] for i in order]


def test_loader_processes_give_the_batches_of_threads(prepared):
    source = open_source("noisy", "train", data_dir=prepared)
    found = []
    for workers in (0, 1):
        stream = batches(source, workers=workers)
        found.append([jax.device_get(next(stream)) for _ in range(3)])
        stream.close()
    jax.tree.map(np.testing.assert_array_equal, *found)
    images = {source.labels[i] == label for batch in found[0] for i, label in zip(batch["id"], batch["label"])}
    assert images == {True}


def test_pickled_source_opens_its_files_again(prepared):
    source = open_source("noisy", "train", data_dir=prepared)
    again = pickle.loads(pickle.dumps(source))
    assert again.read(7) == source.read(7)
    assert again.where(7) == source.where(7) == f"{shard_of(prepared)}: record 7"


class SmallCifar(tfds.core.GeneratorBasedBuilder):
    """60 pictures of CIFAR-10 as the PNG files they are; `FILES` is {name: bytes}."""

    VERSION = tfds.core.Version("1.0.0")
    FILES: dict = {}  # noqa: RUF012

    def _info(self):
        names = sorted({name.split("/")[0] for name in self.FILES})
        features = {
            "image": tfds.features.Image(shape=(32, 32, 3)),
            "label": tfds.features.ClassLabel(names=names),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for name, content in self.FILES.items():
            yield name, {"image": content, "label": name.split("/")[0], "file_name": name}


def test_cifar_as_tfds_is_cifar_as_a_folder(tmp_path, monkeypatch):
    shared = Path(os.environ.get("MAECT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    archive = shared / "data" / "cifar10-part1.tar.gz"
    if not archive.is_file():
        pytest.skip("no CIFAR-10 pictures: set MAECT_SHARED to the folder that holds 'data'")
    files = {}
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            if member.isfile() and "/train/" in member.name:
                files["/".join(member.name.split("/")[-2:])] = tar.extractfile(member).read()
            if len(files) == 60:
                break
    for name, content in files.items():
        path = tmp_path / "folder" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr(SmallCifar, "FILES", files)
    SmallCifar(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()

    folder = open_source(str(tmp_path / "folder"), "train")
    source = open_source("small_cifar", "train", data_dir=str(tmp_path))
    assert (len(source), source.classes) == (60, folder.classes)
    assert sorted(source.file_names()) == sorted(folder.file_names())
    rows = {name: i for i, name in enumerate(folder.file_names())}
    for i, name in enumerate(source.file_names()):
        (image, label), (wanted, wanted_label) = source.sample(i), folder.sample(rows[name])
        np.testing.assert_array_equal(image, wanted)
        assert label == source.labels[i] == wanted_label


# ------------------------------------------------------------------------------------------------------------- damage


def test_every_flipped_byte_is_named_or_harmless(prepared, tmp_path):
    whole = shard_of(prepared).read_bytes()
    sound = Shards([str(shard_of(prepared))], [Noisy.COUNT])
    expected = [sound.read(i) for i in range(Noisy.COUNT)]
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))  # most of the zeros fill the file up
    rng = np.random.default_rng(5)
    positions = [*rng.choice(used, 150), *range(0, 300, 5), *rng.integers(0, len(whole), 30)]
    shard = tmp_path / "shard.array_record"
    at_open = in_record = 0
    for position in map(int, positions):
        content = bytearray(whole)
        content[position] ^= 1 << int(rng.integers(8))
        shard.write_bytes(content)
        try:
            shards = Shards([str(shard)], [Noisy.COUNT])
        except DataError as error:
            assert str(shard) in str(error) and "\n" not in str(error)
            at_open += 1
            continue
        bad = 0
        for i in range(Noisy.COUNT):
            try:
                assert shards.read(i) == expected[i]
            except BadPicture as error:
                assert error.where == f"{shard}: record {i}"
                assert "at byte" in error.reason
                bad += 1
        assert bad <= 2  # the others of the file are not lost
        in_record += bad > 0
    assert in_record > 100 and at_open > 0


def test_shard_that_is_cut_off_is_named_at_open(noisy):
    shard = shard_of(noisy)
    whole = shard.read_bytes()
    for length in [0, 1, 1000, 65536, len(whole) // 2, len(whole) - 65536, len(whole) - 1]:
        shard.write_bytes(whole[:length])
        with pytest.raises(DataError) as caught:
            open_source("noisy", "train", data_dir=noisy)
        assert str(shard) in str(caught.value) and f"{length} bytes" in str(caught.value)
        assert "\n" not in str(caught.value)
    shard.unlink()
    with pytest.raises(DataError, match=r"00000-of-00001: not a readable shard \(No such file"):
        open_source("noisy", "train", data_dir=noisy)


def test_shard_with_another_number_of_records_is_named(noisy):
    shard = shard_of(noisy)
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    writer.write(b"one record")
    writer.close()
    with pytest.raises(DataError, match=r"1 readable records, not 40 \(it is of another version"):
        open_source("noisy", "train", data_dir=noisy)


def test_damaged_record_gives_its_place_to_its_neighbour(noisy, tmp_path):
    damage(shard_of(noisy), where_it_begins(shard_of(noisy), 11))
    source = open_source("noisy", "train", data_dir=noisy)
    with pytest.raises(BadPicture, match=rf"{shard_of(noisy)}: record 11: damaged \(chunk data hash mismatch at byte"):
        source.image(11)
    bad = BadPictures("skip", limit=0.1, path=tmp_path / "bad_images.jsonl")
    stream = batches(source, bad=bad)
    seen = np.concatenate([np.asarray(next(stream)["id"]) for _ in range(stream.steps_per_epoch)])
    stream.close()
    assert sorted(seen.tolist()) == sorted([i for i in range(40) if i != 11] + [12])
    (line,) = (tmp_path / "bad_images.jsonl").read_text().splitlines()
    assert (json.loads(line)["id"], json.loads(line)["path"]) == (11, f"{shard_of(noisy)}: record 11")
    with pytest.raises(BadPicture, match="record 11"):
        stream = batches(source)
        for _ in range(stream.steps_per_epoch):
            next(stream)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xff no example", "not a tf.train.Example"),
        ({"label": 0}, "has no 'image' or no label"),
        ({"image": b"picture"}, "has no 'image' or no label"),
        ({"image": b"picture", "label": 7}, "label 7 of 2 classes"),
        ({"image": b"picture", "label": 1}, "not a readable picture"),
    ],
)
def test_record_that_is_no_labelled_picture_is_named(prepared, tmp_path, content, reason):
    shutil.copytree(Path(prepared) / "tiny", tmp_path / "tiny")
    writer = ArrayRecordWriter(str(shard_of(tmp_path, "tiny")), "group_size:1")
    for _ in range(12):
        if isinstance(content, dict):
            example = tf_example_pb2.Example()
            for key, value in content.items():
                feature = example.features.feature[key]
                (feature.bytes_list if isinstance(value, bytes) else feature.int64_list).value.append(value)
            writer.write(example.SerializeToString())
        else:
            writer.write(content)
    writer.close()
    source = open_source("tiny", "train", data_dir=str(tmp_path))
    with pytest.raises(BadPicture) as caught:
        source.sample(3)
    assert caught.value.where.endswith("00000-of-00001: record 3") and reason in caught.value.reason


# ---------------------------------------------------------------------------------------------- labels of all records


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """A cache folder of its own, in which sets of this size are kept; the ids of records that are read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ours, "KEPT_FROM", 10)
    ids, read = [], Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, index: (ids.append(index), read(self, index))[1])
    return ids


def test_labels_and_names_take_one_reading_of_the_set_ever(noisy, reads):
    first = open_source("noisy", "train", data_dir=noisy)
    labels, names = first.labels, first.file_names()
    assert labels.tolist() == [int(name.removesuffix(".png")) % 5 for name in names]
    assert sorted(names) == sorted(f"{i}.png" for i in range(40))
    assert sorted(reads) == list(range(40))
    second = open_source("noisy", "train", data_dir=noisy)
    np.testing.assert_array_equal(second.labels, labels)
    assert (second.file_names(), len(reads)) == (names, 40)


def test_shard_that_was_replaced_is_read_anew(noisy, reads):
    open_source("noisy", "train", data_dir=noisy).labels  # noqa: B018
    os.utime(shard_of(noisy), (1, 1))
    open_source("noisy", "train", data_dir=noisy).labels  # noqa: B018
    assert len(reads) == 80


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["cut off", "another set", "no arrays", "objects", "outside"])
def test_damaged_cache_is_made_anew_and_never_unpickled(noisy, reads, tmp_path, form):
    labels = open_source("noisy", "train", data_dir=noisy).labels
    (file,) = (kept.cache_folder() / "labels").iterdir()
    with np.load(file) as found:
        arrays = dict(found)
    if form == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif form == "another set":
        np.savez(file, **arrays | {"label": arrays["label"][:-1]})
    elif form == "no arrays":
        np.savez(file)
    elif form == "objects":
        np.savez(file, **arrays | {"label": np.array([Trap(tmp_path / "sprung")], object)})
    else:
        np.savez(file, **arrays | {"label": arrays["label"] + 5})
    np.testing.assert_array_equal(open_source("noisy", "train", data_dir=noisy).labels, labels)
    assert len(reads) == 80 and not (tmp_path / "sprung").exists()
    np.testing.assert_array_equal(open_source("noisy", "train", data_dir=noisy).labels, labels)
    assert len(reads) == 80


def test_label_of_a_damaged_record_is_unknown_and_not_kept(noisy, reads):
    damage(shard_of(noisy), where_it_begins(shard_of(noisy), 11))
    source = open_source("noisy", "train", data_dir=noisy)
    assert np.flatnonzero(source.labels < 0).tolist() == [11]
    assert source.file_names()[11] == "" and all(source.file_names()[i] for i in range(40) if i != 11)
    assert not (kept.cache_folder() / "labels").exists()


def test_read_only_cache_folder_costs_only_time(noisy, reads, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_source("noisy", "train", data_dir=noisy).labels) == 40


# ------------------------------------------------------------------------------------------------------------- names


def test_another_format_tells_to_prepare_it_anew(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "tiny" / "1.0.0").iterdir():
        if path.name == "dataset_info.json":
            path.write_text(path.read_text().replace("array_record", "tfrecord"))
        elif ".array_record" in path.name:
            path.rename(path.with_name(path.name.replace(".array_record", ".tfrecord")))
    with pytest.raises(DataError, match=r"not in the array_record format; .* data prepare tiny --"):
        open_source("tiny", "train", data_dir=str(tmp_path))


def test_set_that_is_not_prepared_tells_the_command(tmp_path):
    command = rf"python -m maect_jax data prepare cifar10 --data-dir {tmp_path}$"
    with pytest.raises(DataError, match=rf"'cifar10' is not prepared in {tmp_path}; prepare it once: {command}"):
        open_source("cifar10", "train", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("dataset_info.json", '"shardLengths"', '"shardLongs"'),
        ("dataset_info.json", "{FILEFORMAT}", "{NOTHING}"),
        ("dataset_info.json", "}", ""),
        ("features.json", "}", ""),
        ("features.json", "tensorflow_datasets.core.features.image_feature.Image", "os.system"),
    ],
)
def test_description_that_is_damaged_is_an_error_of_one_line(noisy, file, old, new):
    path = shard_of(noisy).parent / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(
        DataError, match=r"^data.train: TFDS 'noisy' can not be opened \(.*\); mend that or prepare it anew$"
    ):
        open_source("noisy", "train", data_dir=noisy)


def test_pictures_of_floats_are_refused(tmp_path):
    info = Depths(data_dir=str(tmp_path), file_format="array_record").info
    with pytest.raises(DataError, match="pictures of TFDS 'depths' are float32; only 8 and 16 bit"):
        ours.TfdsSource("depths", info, "train", 1, "data.train")


def test_unknown_names_come_with_a_suggestion(tmp_path):
    def message(name):
        with pytest.raises(DataError) as caught:
            open_source(name, "train", data_dir=str(tmp_path))
        return str(caught.value)

    unknown = "data.train: 'imagenet20122' is neither a folder nor a TFDS name; did you mean 'imagenet2012'?"
    assert message("imagenet20122") == unknown
    assert "'qqqqqq' is neither a folder nor a TFDS name" in message("qqqqqq")
    assert "did you mean 'imagenette/160px-v2'?" in message("imagenette/160px-v22")
    assert "neither a folder nor a TFDS name" in message("two words")
