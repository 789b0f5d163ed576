"""TFDS sets: what is read from their ArrayRecord files, what is kept of a whole set, what names are found."""

import os
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tfds_sets import Depths, batches, damage, pixels, prepare_all, shard_of, where_it_begins

from maect_jax.data.sources import kept
from maect_jax.data.sources import tfds as ours
from maect_jax.data.sources.open import open_source
from maect_jax.data.sources.shards import Shards
from maect_jax.errors import DataError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_all(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def noisy(prepared, tmp_path):
    """A copy of `Noisy` that a test may damage: its data_dir."""
    shutil.copytree(Path(prepared) / "noisy", tmp_path / "noisy")
    return str(tmp_path)


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
