"""Packed records as a source: the same pictures in any order, by any thread, and damage that is called by its name."""

import json
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from packs import many_shards, natural, packed, write_folder, write_picture

from maect_jax.data.packing.record import pack_record
from maect_jax.data.packing.verify import bad_files
from maect_jax.data.sources.open import open_source
from maect_jax.errors import BadPicture, DataError

BLOCK = 1 << 16  # of ArrayRecord's files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of pictures, its packing in one shard of a few blocks)."""
    root = tmp_path_factory.mktemp("records")
    write_folder(root / "in", train=20, test=4, height=120, width=160)
    packed(root / "in", root / "out")
    return root / "in", root / "out"


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "out")


def only_shard(folder):
    (path,) = folder.glob("train-*.array_record")
    return path


def test_the_source_is_the_folder_that_was_packed(made):
    before, after = (open_source(str(folder), "train") for folder in made)
    assert after.fingerprint() != open_source(str(made[1]), "test").fingerprint() and len(after.digest()) > 10
    assert before.classes == after.classes == ("cat", "dog") and before.labels.tolist() == after.labels.tolist()
    for index in np.random.default_rng(0).permutation(len(before)):
        np.testing.assert_array_equal(before.image(index), after.image(index))
        assert before.size(index) == after.size(index) == (120, 160)


def test_it_is_read_after_pickling_and_by_many_threads_at_once(made, tmp_path, monkeypatch):
    many_shards(monkeypatch)
    packed(made[0], tmp_path / "shards", shard_mb=4)
    source = open_source(str(tmp_path / "shards"), "train")
    assert len(source.split.shards) > 2
    expected = [source.read(index) for index in range(len(source))]
    loaded = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) == len(pickle.dumps(loaded))
    order = np.random.default_rng(0).integers(0, len(source), 800).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(loaded.read, order)) == [expected[index] for index in order]


def test_labels_are_known_without_reading_a_record(made, monkeypatch):
    monkeypatch.setattr("maect_jax.data.sources.shards.Shards.read", None)
    source = open_source(str(made[1]), "train")
    assert source.labels.tolist() == [0] * 10 + [1] * 10 and source.labels.dtype == np.int32
    assert source.file_names()[0] == "cat/000.jpg"


def test_names_and_labels_of_unlabelled_pictures_survive(tmp_path):
    write_picture(tmp_path / "in" / b"\xff\xe4.png".decode(errors="surrogateescape"), natural(1))
    write_picture(tmp_path / "in/ö.png", natural(2))
    packed(tmp_path / "in", tmp_path / "out")
    before, after = (open_source(str(tmp_path / name), "train") for name in ("in", "out"))
    assert before.file_names() == after.file_names() and len(after) == 2
    assert after.classes == () and after.labels.tolist() == [-1, -1]
    with pytest.raises(DataError, match="has no test split, only train; pack a set that has one"):
        open_source(str(tmp_path / "out"), "test")


def test_a_test_set_of_its_own_takes_the_class_numbers_of_the_training_set(made):
    source = open_source(str(made[1]), "test", classes=("ape", "dog", "cat"))
    assert source.classes == ("ape", "dog", "cat") and source.labels.tolist() == [2, 2, 1, 1]
    assert [source.read(index)[1] for index in range(4)] == [2, 2, 1, 1]
    with pytest.raises(DataError, match=r"data\.test: class 'cat' of .* is not in the training set \(2 classes\)"):
        open_source(str(made[1]), "test", classes=("ape", "dog"))


def test_a_truncated_shard_is_refused_when_it_is_opened(copy):
    path = only_shard(copy)
    data = path.read_bytes()
    for length in [0, 1, 100, BLOCK, len(data) - BLOCK, len(data) - 1, *range(5000, len(data), 37_000)]:
        path.write_bytes(data[:length])
        with pytest.raises(DataError) as error:
            open_source(str(copy), "train")
        expected = f"{path}: {length} bytes, manifest.json says {len(data)}: truncated at byte {length}; "
        assert str(error.value).startswith(expected) and "\n" not in str(error.value)
    assert len(open_source(str(copy), "test")) == 4
    path.write_bytes(data + b"x")
    with pytest.raises(DataError, match=f"manifest.json says {len(data)}: it is another file"):
        open_source(str(copy), "train")
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: No such file or directory, manifest.json says {len(data)} bytes"):
        open_source(str(copy), "train")


def test_a_flipped_bit_anywhere_is_named_or_harmless_and_never_other_pixels(copy):
    path = only_shard(copy)
    data = path.read_bytes()
    whole = open_source(str(copy), "train")
    expected = [whole.read(index) for index in range(len(whole))]
    rng = np.random.default_rng(7)
    used = int(np.flatnonzero(np.frombuffer(data, np.uint8)[:-BLOCK])[-1])  # then zeros up to the last block
    last = len(data) - BLOCK
    positions = [*range(140), *range(BLOCK, BLOCK + 24), *range(used - 300, used, 3), *range(last, last + 150)]
    positions += rng.integers(0, len(data), 250).tolist()
    outcomes = {"record": 0, "shard": 0, "harmless": 0}
    for position in positions:
        changed = bytearray(data)
        changed[position] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            source = open_source(str(copy), "train")
        except DataError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            outcomes["shard"] += 1
            continue
        bad = 0
        for index in range(len(source)):
            try:
                assert source.read(index) == expected[index]
            except BadPicture as error:
                assert error.where == f"{path}: record {index}" and "at byte" in error.reason
                bad += 1
        outcomes["record" if bad else "harmless"] += 1
        assert bad <= 2
    assert outcomes["record"] > 150 and outcomes["shard"] > 50 and outcomes["harmless"] > 0, outcomes


def test_a_damaged_record_leaves_its_neighbours_and_other_threads_alone(copy):
    path = only_shard(copy)
    data = bytearray(path.read_bytes())
    data[30_000] ^= 4
    path.write_bytes(data)
    source = open_source(str(copy), "train")
    seen, lock = {}, threading.Lock()

    def read(index):
        try:
            found = source.read(index)
        except BadPicture:
            found = "bad"
        with lock:
            seen.setdefault(index, set()).add(found)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, np.random.default_rng(0).integers(0, len(source), 1000).tolist()))
    assert all(len(found) == 1 for found in seen.values())
    assert sum(found == {"bad"} for found in seen.values()) == 1


def rewritten(folder, change, options="group_size:1,uncompressed"):
    """The folder's training shard with other records in it, whose ArrayRecord checksums are right."""
    path = only_shard(folder)
    source = open_source(str(folder), "train")
    records = [change(index, source.shards.read(index)) for index in range(len(source))]
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return open_source(str(folder), "train")


def test_a_record_with_a_wrong_checksum_of_ours_is_a_bad_picture(copy):
    source = rewritten(copy, lambda index, record: record[:-1] + bytes([record[-1] ^ 1]) if index == 3 else record)
    with pytest.raises(BadPicture, match=r"record 3: damaged \(CRC32 is [0-9a-f]{8}, the record says [0-9a-f]{8}\)"):
        source.read(3)
    assert source.read(4)[1] == 0


def test_a_record_that_lies_where_another_should_is_a_bad_picture(copy):
    stranger = pack_record(1, "dog/stranger.jpg", b"picture")
    source = rewritten(copy, lambda index, record: stranger if index == 3 else record)
    with pytest.raises(BadPicture, match=r"record 3: label 1, train-labels\.npy says 0; copy the folder anew"):
        source.read(3)


def test_compressed_records_are_refused_before_one_is_unpacked(copy):
    with pytest.raises(DataError, match=r"\.array_record: compressed, so not written by `data pack`"):
        rewritten(copy, lambda index, record: bytes(1 << 22) if index == 3 else record, "group_size:1,zstd")
    assert only_shard(copy).stat().st_size < 1 << 22  # four megabytes of zeros hardly show on the disk


def in_manifest(**changes):
    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        for dotted, value in changes.items():
            *path, last = dotted.split("__")
            section = manifest
            for key in path:
                section = section[int(key) if key.isdigit() else key]
            section[last] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def file_with(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (file_with("manifest.json", b'{"format": "maect_jax records", "ver'), r"manifest\.json: damaged"),
        (file_with("manifest.json", b""), r"manifest\.json: damaged"),
        (file_with("manifest.json", b"\xff\xfe"), r"manifest\.json: damaged"),
        (file_with("manifest.json", b"[" * 100_000), r"manifest\.json: damaged"),
        (file_with("manifest.json", b'["maect_jax records"]'), r"manifest\.json: damaged"),
        (in_manifest(version=2), r"manifest\.json: version 2, only 1 is known; update maect_jax"),
        (in_manifest(classes="cat"), r"'cat' is no list"),
        (in_manifest(classes=[1, 2]), r"'1' is no str"),
        (in_manifest(channels=True), r"'True' is no number of things"),
        (in_manifest(splits__train__shards__0__file="../../../etc/passwd"), r"is no name of a file in the folder"),
        (in_manifest(splits__train__labels__file="/etc/passwd"), r"is no name of a file in the folder"),
        (in_manifest(splits__train__labels__file=".."), r"is no name of a file in the folder"),
        (in_manifest(splits__train__shards__0__records=10**30), r"is no number of things"),
        (in_manifest(splits__train__shards__0__bytes=-1), r"'-1' is no number of things"),
        (in_manifest(splits__train__shards=[]), r"0 records in the shards, 20 in the split"),
        (in_manifest(splits__train__records=10**15), r"20 records in the shards, 10{15} in the split"),
        (in_manifest(splits__train={}), r"damaged \(no 'shards'\)"),
        (in_manifest(classes=["cat"]), r"train-labels\.npy: labels 0\.\.1 for 1 classes"),
        (file_with("train-labels.npy", b"x" * 208), r"train-labels\.npy: damaged"),
        (
            file_with("train-labels.npy", b""),
            r"train-labels\.npy: 0 bytes, manifest\.json says 208: truncated at byte 0",
        ),
    ],
)
def test_a_damaged_or_hostile_description_is_refused_in_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(DataError, match=message) as error:
        open_source(str(copy), "train")
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_more_records_than_a_shard_holds_are_refused(copy):
    in_manifest(splits__train__shards__0__records=21, splits__train__records=21)(copy)
    labels = np.zeros(21, "<i4")
    np.save(copy / "train-labels.npy", labels)
    in_manifest(splits__train__labels__bytes=(copy / "train-labels.npy").stat().st_size)(copy)
    with pytest.raises(DataError, match=r"\.array_record: \d+ bytes with 20 readable records, not 21"):
        open_source(str(copy), "train")


@pytest.mark.parametrize("content", [b'["a"]' + b" " * 299, b"{" * 304, b'"' + b"a" * 302 + b'"', b"1" * 304])
def test_damaged_names_are_refused_when_they_are_asked_for(copy, content):
    size = (copy / "train-names.json").stat().st_size
    (copy / "train-names.json").write_bytes(content[:size].ljust(size))
    source = open_source(str(copy), "train")
    with pytest.raises(DataError, match=r"train-names\.json: (damaged|not a list of 20 names)"):
        source.file_names()


@pytest.mark.parametrize(("kind", "name"), [("labels", "train-labels.npy"), ("names", "train-names.json")])
def test_a_file_that_claims_more_bytes_than_its_records_can_have_is_not_read(copy, kind, name):
    in_manifest(**{f"splits__train__{kind}__bytes": 1 << 41})(copy)
    os.truncate(copy / name, 1 << 41)  # sparse
    message = rf"manifest\.json: damaged \({name} has {1 << 41} bytes, more than the \d+ there can be\)"
    with pytest.raises(DataError, match=message):
        open_source(str(copy), "train")
    with pytest.raises(DataError, match=message):  # `data verify` does not read it for its checksum, either
        bad_files(copy, None)


def test_a_manifest_that_is_no_regular_file_is_not_waited_for(copy, tmp_path):
    root = write_folder(tmp_path / "in")
    for folder in (root, copy):
        (folder / "manifest.json").unlink(missing_ok=True)
        os.mkfifo(folder / "manifest.json")

    def open_both():
        assert len(open_source(str(root), "train")) == 12
        with pytest.raises(DataError, match=r"manifest\.json: damaged \(no regular file\)"):
            open_source(str(copy), "train")
        return True

    done = []
    thread = threading.Thread(target=lambda: done.append(open_both()), daemon=True)
    thread.start()
    thread.join(30)
    assert done == [True]


def test_labels_in_an_array_of_objects_are_not_unpickled(copy):
    class Trap:
        def __reduce__(self):
            return (open, (str(copy / "trapped"), "w"))

    np.save(copy / "train-labels.npy", np.array([Trap()] * 20, object), allow_pickle=True)
    in_manifest(splits__train__labels__bytes=(copy / "train-labels.npy").stat().st_size)(copy)
    with pytest.raises(DataError, match=r"train-labels\.npy: damaged"):
        open_source(str(copy), "train")
    assert not (copy / "trapped").exists()


def test_a_folder_of_pictures_with_a_manifest_of_its_own_is_a_folder_of_pictures(tmp_path):
    root = write_folder(tmp_path / "in")
    (root / "manifest.json").write_text('{"name": "a web page"}')
    assert len(open_source(str(root), "train")) == 12
