"""TFDS sets that are damaged: every changed byte is named by file and record, and one bad record costs one picture."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2
from tfds_sets import Noisy, batches, damage, prepare_all, shard_of, where_it_begins

from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.sources.open import open_source
from maect_jax.data.sources.shards import Shards
from maect_jax.errors import BadPicture, DataError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_all(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def noisy(prepared, tmp_path):
    """A copy of `Noisy` that a test may damage: its data_dir."""
    shutil.copytree(Path(prepared) / "noisy", tmp_path / "noisy")
    return str(tmp_path)


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


def test_first_record_of_a_test_split_may_be_damaged(prepared, tmp_path):
    shutil.copytree(Path(prepared) / "tiny_hidden", tmp_path / "tiny_hidden")
    (shard,) = (tmp_path / "tiny_hidden" / "1.0.0").glob("*-test.array_record-*")
    damage(shard, 120)  # beyond the headers of file and record
    with pytest.raises(BadPicture, match="record 0"):
        Shards([str(shard)], [3]).read(0)
    assert open_source("tiny_hidden", "test", data_dir=str(tmp_path)).split == "validation"


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
