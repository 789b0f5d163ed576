"""Packing a data set: what is in the records, what is made smaller, and what an interruption costs."""

import fcntl
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from packs import contents, many_shards, natural, packed, write_folder, write_picture

from maect_jax.data.packing import plan, shard
from maect_jax.data.packing.pack import pack
from maect_jax.data.packing.plan import Settings
from maect_jax.data.packing.record import pack_record, record_name, unpack_record
from maect_jax.data.sources.base import ArraySource
from maect_jax.data.sources.open import open_source
from maect_jax.errors import BadPicture, DataError

ROOT = Path(__file__).resolve().parents[2]


def both(folder, **settings):
    return [open_source(str(folder), split, **settings) for split in ("train", "test")]


def test_a_packed_folder_holds_the_same_bytes_labels_names_and_classes(tmp_path, monkeypatch):
    many_shards(monkeypatch)
    result = packed(write_folder(tmp_path / "in"), tmp_path / "out", shard_mb=1)
    assert (result.pictures, result.bad) == (16, 0)
    for before, after in zip(both(tmp_path / "in"), both(tmp_path / "out")):
        assert len(after.split.shards) > 1 and len(before) == len(after)
        assert [before.read(i) for i in range(len(before))] == [after.read(i) for i in range(len(after))]
        assert before.classes == after.classes and before.file_names() == after.file_names()
        np.testing.assert_array_equal(before.labels, after.labels)


def test_the_manifest_counts_and_hashes_what_is_there(tmp_path):
    packed(write_folder(tmp_path / "in"), tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    hashes = contents(tmp_path / "out")
    listed = set()
    for split, count in (("train", 12), ("test", 4)):
        found = manifest["splits"][split]
        assert found["records"] == count and found["class_counts"] == [count // 2] * 2 and not found["unlabelled"]
        folder = tmp_path / "in" / {"train": "train", "test": "val"}[split]
        assert found["bytes_before"] == sum(path.stat().st_size for path in folder.rglob("*.jpg"))
        for entry in (*found["shards"], found["labels"], found["names"]):
            assert hashes[entry["file"]] == entry["sha256"]
            assert (tmp_path / "out" / entry["file"]).stat().st_size == entry["bytes"]
            listed.add(entry["file"])
    assert set(hashes) == listed | {"manifest.json"}  # nothing of the work is left


def test_a_record_is_read_by_its_description_alone():
    record = pack_record(7, "cat/ä\udcff.jpg", b"picture")
    name = "cat/ä".encode() + b"\xff.jpg"
    assert record[:1] == b"\1" and struct.unpack("<I", record[1:5])[0] == zlib.crc32(record[5:])
    assert struct.unpack("<iH", record[5:11]) == (7, len(name)) and record[11:] == name + b"picture"
    assert unpack_record(record, "") == (b"picture", 7) and record_name(record) == "cat/ä\udcff.jpg"


def test_no_changed_bit_of_a_record_is_taken():
    record = pack_record(3, "a.jpg", bytes(range(50)))
    for position in range(len(record)):
        for bit in range(8):
            changed = bytearray(record)
            changed[position] ^= 1 << bit
            with pytest.raises(BadPicture, match=r"^set/5: (damaged|layout)"):
                unpack_record(bytes(changed), "set/5")
    for length in range(len(record)):
        with pytest.raises(BadPicture, match="damaged"):
            unpack_record(record[:length], "set/5")


def test_the_workers_change_no_byte(tmp_path, monkeypatch):
    many_shards(monkeypatch)
    root = write_folder(tmp_path / "in")
    packed(root, tmp_path / "alone", shard_mb=1, short_side=16)
    packed(root, tmp_path / "two", shard_mb=1, short_side=16, workers=2)
    assert contents(tmp_path / "alone") == contents(tmp_path / "two")


def test_an_interrupted_packing_goes_on_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    many_shards(monkeypatch)
    root = write_folder(tmp_path / "in")
    packed(root, tmp_path / "whole", shard_mb=1)

    written = []

    def interrupted(sources, task, tick):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard.write_shard(sources, task, tick))
        return written[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("maect_jax.data.packing.pack.write_shard", interrupted)
        packed(root, tmp_path / "parts", shard_mb=1)
    with pytest.raises(DataError, match="not packed to the end; start the same `data pack` again"):
        open_source(str(tmp_path / "parts"), "train")
    first = sorted((tmp_path / "parts").glob("*.array_record"))
    assert len(first) == 2
    times = [path.stat().st_mtime_ns for path in first]
    (tmp_path / "parts/train-00002-of-00009.array_record.unfinished").write_bytes(b"what a killed process leaves")
    packed(root, tmp_path / "parts", shard_mb=1)
    assert [path.stat().st_mtime_ns for path in first] == times  # kept, not written again
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def stop_before_the_manifest(root, folder, monkeypatch, **settings):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("maect_jax.data.packing.pack._manifest", stop)
        packed(root, folder, **settings)


@pytest.mark.parametrize("damage", ["cut", "no description", "half a description", "another footer"])
def test_a_shard_that_is_not_complete_is_written_again(tmp_path, monkeypatch, damage):
    many_shards(monkeypatch)
    root = write_folder(tmp_path / "in")
    packed(root, tmp_path / "whole", shard_mb=1)
    stop_before_the_manifest(root, tmp_path / "parts", monkeypatch, shard_mb=1)
    path = sorted((tmp_path / "parts").glob("train-*.array_record"))[1]
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "another footer":
        path.write_bytes(data[: -(1 << 16)] + bytes(1 << 16))
    elif damage == "no description":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_bytes(path.with_suffix(".json").read_bytes()[:100])
    packed(root, tmp_path / "parts", shard_mb=1)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.skipif(shutil.which("ps") is None, reason="ps is not installed")
def test_killed_processes_lose_only_the_shards_they_were_writing(tmp_path, monkeypatch):
    settings = {"shard_mb": 10, "short_side": 150}
    many_shards(monkeypatch)
    root = write_folder(tmp_path / "in", train=60, test=4, height=200, width=300)
    program = (
        "import sys; sys.path.insert(0, 'tests/data')\n"
        "from pathlib import Path; import packs; from maect_jax.data.packing import plan\n"
        "plan.MEGABYTE = 2000\n"
        f"if __name__ == '__main__': packs.packed(Path(sys.argv[1]), Path(sys.argv[2]), 2, **{settings})\n"
    )
    (tmp_path / "run.py").write_text(program)
    command = [sys.executable, tmp_path / "run.py", root, tmp_path / "killed"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "killed").glob("train-*.json")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 20
    while _alive(process.pid) and time.monotonic() < deadline:  # the workers follow their parent
        time.sleep(0.05)
    assert not _alive(process.pid)
    assert not (tmp_path / "killed/manifest.json").exists()
    for target in ("killed", "whole"):
        packed(root, tmp_path / target, **settings)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def _alive(session: int) -> list[str]:
    """Processes of a session that still run."""
    found = subprocess.run(["ps", "-s", str(session), "-o", "stat="], capture_output=True, text=True)
    return [state for state in found.stdout.split() if not state.startswith("Z")]


def test_other_settings_or_pictures_are_refused_by_what_differs(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "in")
    packed(root, tmp_path / "done", short_side=16)
    stop_before_the_manifest(root, tmp_path / "half", monkeypatch, short_side=16)
    for folder in (tmp_path / "done", tmp_path / "half"):
        before = contents(folder)
        with pytest.raises(
            DataError, match=r"short_side 16 there, 20 now\); choose another folder, or delete this one"
        ):
            packed(root, folder, short_side=20)
        with pytest.raises(DataError, match=r"\(quality 92 there, 50 now\)"):
            packed(root, folder, short_side=16, quality=50)
        assert contents(folder) == before
    write_picture(root / "train/cat/more.jpg", natural(99))
    for folder in (tmp_path / "done", tmp_path / "half"):
        with pytest.raises(DataError, match="train pictures 12 there, 13 now; train fingerprint"):
            packed(root, folder, short_side=16)


def test_a_second_packing_of_the_same_changes_nothing(tmp_path):
    root = write_folder(tmp_path / "in")
    first = packed(root, tmp_path / "out")
    before = contents(tmp_path / "out")
    again = packed(root, tmp_path / "out")
    assert contents(tmp_path / "out") == before and again.pictures == first.pictures


def without(*keys):
    """A damage: a manifest without what lies at these keys."""

    def change(text):
        content = json.loads(text)
        section = content
        for key in keys[:-1]:
            section = section[key]
        del section[keys[-1]]
        return json.dumps(content).encode()

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: b"",
        lambda text: text.replace(b'"source": {', b'"source": 5, "_": {'),
        without("settings"),
        without("source"),
        without("splits", "train", "bad"),
    ],
)
def test_a_packing_with_a_damaged_manifest_is_refused_in_one_line(tmp_path, damage):
    root = write_folder(tmp_path / "in")
    packed(root, tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    path.write_bytes(damage(path.read_bytes()))
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"manifest\.json: damaged \(.*delete the folder and pack anew") as error:
        packed(root, tmp_path / "out")
    assert "\n" not in str(error.value) and contents(tmp_path / "out") == before


@pytest.mark.parametrize("pattern", ["train-00001-*.array_record", "test-labels.npy", "train-names.json"])
def test_a_packing_that_lost_a_file_is_not_taken_for_complete(tmp_path, monkeypatch, pattern):
    many_shards(monkeypatch)
    root = write_folder(tmp_path / "in")
    packed(root, tmp_path / "out", shard_mb=1)
    (path,) = (tmp_path / "out").glob(pattern)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{path.name}: .* truncated at byte \d+; .*delete the folder and pack anew"):
        packed(root, tmp_path / "out", shard_mb=1)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: No such file .*delete the folder and pack anew"):
        packed(root, tmp_path / "out", shard_mb=1)


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    root = write_folder(tmp_path / "in")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("important")
    with pytest.raises(DataError, match=r"holds 'thesis\.txt', which is no packing; give a new folder"):
        packed(root, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    with pytest.raises(DataError, match="is a file; give a new folder"):
        packed(root, tmp_path / "other/thesis.txt")


def test_two_packings_do_not_write_to_one_folder(tmp_path):
    root = write_folder(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/packing.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another `data pack` is writing to it"):
            packed(root, tmp_path / "out")
    packed(root, tmp_path / "out")


def test_bad_pictures_are_left_out_and_listed_or_end_it(tmp_path, monkeypatch):
    many_shards(monkeypatch)
    root = write_folder(tmp_path / "in")
    bad = root / "train/dog/002.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(BadPicture, match=r"train/dog/002\.jpg"):
        packed(root, tmp_path / "out", skip=False, shard_mb=1)
    result = packed(root, tmp_path / "out", shard_mb=1)  # what is there already is as good for this
    assert (result.pictures, result.bad) == (15, 1) and "1 bad and left out (see manifest.json)" in str(result)
    listed = json.loads((tmp_path / "out/manifest.json").read_text())["splits"]["train"]["bad"]
    assert listed["count"] == 1 and listed["pictures"][0]["path"] == str(bad) and listed["pictures"][0]["reason"]
    source = open_source(str(tmp_path / "out"), "train")
    assert len(source) == 11 and "dog/002.jpg" not in source.file_names()
    assert source.labels.tolist() == [0] * 6 + [1] * 5


def test_a_set_without_one_good_picture_is_refused(tmp_path):
    for number in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of 3 pictures can be read"):
        packed(tmp_path / "in", tmp_path / "out")


def test_a_full_disk_ends_it_with_the_shards_name_and_the_next_start_goes_on(tmp_path, monkeypatch):
    many_shards(monkeypatch)
    root = write_folder(tmp_path / "in")
    packed(root, tmp_path / "whole", shard_mb=1)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may be longer: as if the disk were full
    try:
        with pytest.raises(DataError, match=r"train-00000-of-\d+.array_record: can not be written .*make room there"):
            packed(root, tmp_path / "out", shard_mb=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [plan.PLAN]
    packed(root, tmp_path / "out", shard_mb=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_pictures_of_different_numbers_of_channels_are_refused(tmp_path):
    for channels in (4, 5):
        (tmp_path / "in").mkdir(exist_ok=True)
        np.save(tmp_path / "in" / f"{channels}.npy", natural(1, 8, 8, channels))
    with pytest.raises(DataError, match="pictures of 4, 5 channels; pack them by themselves"):
        packed(tmp_path / "in", tmp_path / "out")


def test_pictures_with_several_labels_are_not_packed_with_one(tmp_path):
    class Several(ArraySource):
        def label_sets(self):
            return [np.array([0, 1])] * len(self)

    source = Several("real", np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2), ("a", "b"))
    with pytest.raises(DataError, match="several labels each"):
        pack("real", {"test": source}, tmp_path / "out", Settings())
