"""data verify: every bad picture and no other, of any source, and files that are not what a manifest says."""

import argparse
import io
import json
import shutil

import numpy as np
import pytest
from forms import write_parquet, write_tar_per_class, write_webdataset, write_zip_per_class
from packs import many_shards, natural, packed, write_folder, write_picture
from PIL import Image

from maect_jax.commands.data.verify import main
from maect_jax.data.packing.splits import open_splits
from maect_jax.data.packing.verify import CHUNK, bad_files, bad_pictures
from maect_jax.data.sources.base import ArraySource
from maect_jax.errors import BadPicture, DataError


@pytest.fixture
def damaged(tmp_path):
    """A folder of pictures, four of which are bad."""
    root = write_folder(tmp_path / "in")
    cut = root / "train/cat/001.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    (root / "train/cat/004.jpg").write_bytes(b"")
    (root / "train/dog/005.jpg").write_text("<html>not found</html>")
    (root / "val/dog/000.jpg").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_it_lists_what_is_bad_with_split_id_path_and_reason(damaged, workers):
    found = bad_pictures(open_splits(str(damaged)), workers)
    names = ("train/cat/001.jpg", "train/cat/004.jpg", "train/dog/005.jpg", "val/dog/000.jpg")
    assert [(bad["split"], bad["id"]) for bad in found] == [("train", 1), ("train", 4), ("train", 11), ("test", 2)]
    assert [bad["path"] for bad in found] == [str(damaged / name) for name in names]
    assert all(bad["reason"] and "\n" not in bad["reason"] for bad in found)
    assert json.loads(json.dumps(found)) == found


def test_every_picture_is_looked_at_once():
    class Counting(ArraySource):
        reads = ()

        def read(self, index):
            self.reads = (*self.reads, index)
            if index % 100 == 7:
                raise BadPicture(f"picture {index}", "broken")
            return super().read(index)

    source = Counting("counted", np.zeros((2 * CHUNK + 50, 2, 2, 3), np.uint8))
    found = bad_pictures({"train": source}, 0)
    assert sorted(source.reads) == list(range(len(source)))
    assert [bad["id"] for bad in found] == [7, 107, 207]


def test_one_split_alone_is_opened_when_it_is_asked_for(damaged):
    assert list(open_splits(str(damaged), split="test")) == ["test"]
    assert [bad["id"] for bad in bad_pictures(open_splits(str(damaged), split="test"), 0)] == [2]


def test_a_set_without_a_test_split_is_its_training_split_alone(tmp_path, caplog):
    root = write_folder(tmp_path / "in")
    assert list(open_splits(str(root / "train"))) == ["train"]
    assert "no test split" in caplog.text


def test_a_test_split_that_can_not_be_opened_is_no_missing_one(tmp_path):
    root = write_folder(tmp_path / "in")
    (root / "val/dog").rename(root / "val/wolf")
    with pytest.raises(DataError, match=r"class 'wolf' .* is not in the training set"):
        open_splits(str(root))


def test_a_class_whose_name_begins_as_a_test_split_s_is_no_test_split(tmp_path, caplog):
    for name in ("valley", "testudo", "Valve", "cat"):
        write_picture(tmp_path / "in" / name / "0.png", natural(len(name)))
    assert list(open_splits(str(tmp_path / "in"))) == ["train"]
    assert "no test split" in caplog.text


def test_pictures_of_another_number_of_channels_are_an_error_of_the_set(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "in").mkdir(exist_ok=True)
        np.save(tmp_path / "in" / f"{name}.npy", natural(1, 8, 8, 5))
    with pytest.raises(DataError, match="set channels to 5"):
        bad_pictures(open_splits(str(tmp_path / "in")), 0)
    assert bad_pictures(open_splits(str(tmp_path / "in"), channels=5), 0) == []
    packed(tmp_path / "in", tmp_path / "out")
    assert bad_pictures(open_splits(str(tmp_path / "out")), 0) == []  # the manifest says how many


def test_files_of_a_packed_folder_are_compared_with_their_checksums(tmp_path, monkeypatch):
    many_shards(monkeypatch)
    packed(write_folder(tmp_path / "in"), tmp_path / "out", shard_mb=1)
    folder = tmp_path / "out"
    assert bad_files(folder, None) == []
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    assert len(files) > 6
    for path in files:
        data = path.read_bytes()
        for changed, reason in (
            (data[:-1] + bytes([data[-1] ^ 1]), "SHA-256 is "),
            (data[:50], "truncated at byte 50"),
        ):
            path.write_bytes(changed)
            (found,) = bad_files(folder, None)
            assert found["path"] == str(path) and found["id"] is None and reason in found["reason"]
            assert found["split"] == path.name.split("-")[0]
            other = {"train": "test", "test": "train"}[found["split"]]
            assert bad_files(folder, other) == [] and bad_files(folder, found["split"]) == [found]
        path.write_bytes(data)


def test_a_flipped_bit_of_a_record_is_listed_with_shard_and_record(tmp_path):
    packed(write_folder(tmp_path / "in"), tmp_path / "out")
    (path,) = (tmp_path / "out").glob("train-*.array_record")
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    (found,) = bad_pictures(open_splits(str(tmp_path / "out")), 0)
    assert found["path"] == f"{path}: record {found['id']}" and "damaged" in found["reason"]
    assert len(bad_files(tmp_path / "out", None)) == 1


def pictures_of_four_classes():
    """(class, file name, encoded) of 24 pictures of each; of noise, so that a shard is longer than its headers."""
    found = []
    for number in range(96):
        file = io.BytesIO()
        Image.fromarray(natural(number)).save(file, "PNG")
        found.append((("ant", "bee", "cow", "dog")[number // 24], f"{number:03}.png", file.getvalue()))
    return found


@pytest.mark.parametrize(
    ("write", "pattern"),
    [
        (write_tar_per_class, "train/*.tar"),
        (write_zip_per_class, "train/*.zip"),
        (write_webdataset, "train-*.tar"),
        (write_parquet, "data/*.parquet"),
    ],
)
def test_every_damaged_archive_or_shard_is_listed_as_json(tmp_path, capsys, write, pattern):
    source = write(tmp_path / "set", pictures_of_four_classes())
    files = sorted((tmp_path / "set").glob(pattern))
    assert len(files) == 4
    assert verify_json(source, capsys)["bad"] == []
    files[0].write_bytes(files[0].read_bytes()[:700])
    files[3].write_bytes(files[3].read_bytes()[:-15_000])
    with pytest.raises(DataError, match="2 files bad") as error:
        verify_json(source, capsys)
    found = json.loads(capsys.readouterr().out)
    assert [bad["path"] for bad in found["bad"]] == [str(files[0]), str(files[3])]
    assert all(bad["split"] == "train" and bad["id"] is None and bad["reason"] for bad in found["bad"])
    assert found["splits"] == {"train": {"pictures": 0, "bad": 0, "bad_files": 2}}
    assert "\n" not in str(error.value)


def verify_json(source, capsys):
    """What `data verify` prints."""
    main(argparse.Namespace(source=source, split=None, channels=None, workers=0, json="-"))
    return json.loads(capsys.readouterr().out)


def test_a_damaged_archive_of_one_split_leaves_the_other_to_be_looked_at(tmp_path, capsys):
    write_tar_per_class(tmp_path / "set", pictures_of_four_classes())
    shutil.copytree(tmp_path / "set/train", tmp_path / "set/val")
    path = tmp_path / "set/val/cow.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"cow\.tar: is cut off"):
        main(argparse.Namespace(source=str(tmp_path / "set"), split=None, channels=None, workers=0, json="-"))
    found = json.loads(capsys.readouterr().out)
    assert [(bad["split"], bad["path"]) for bad in found["bad"]] == [("test", str(path))]
    assert found["splits"]["train"] == {"pictures": 96, "bad": 0, "bad_files": 0}
