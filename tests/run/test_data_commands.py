"""python -m maect_jax data pack, verify, stats: what they print, write and return."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from maect_jax.commands import command_line
from maect_jax.config import apply_overrides, default, read_overrides
from maect_jax.data.sources.open import open_source
from runs import ROOT, environment, make_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """train/ and test/ of four classes, one training picture of which is bad and one is in the test split too."""
    folder = make_pictures(tmp_path_factory.mktemp("pictures"))
    (folder / "train/bar/003.png").write_bytes((folder / "train/bar/003.png").read_bytes()[:60])
    (folder / "test/dot/leak.png").write_bytes((folder / "train/dot/000.png").read_bytes())
    return folder


@pytest.fixture
def data(capsys):
    """data(arguments…) -> (exit status, standard output, standard error), in this process: a start takes seconds."""
    log = logging.getLogger("maect_jax")
    before = log.handlers[:], log.propagate

    def call(*arguments):
        status = command_line.main(["data", *map(str, arguments)])
        return status, *capsys.readouterr()

    yield call
    log.handlers[:], log.propagate = before


@pytest.fixture
def packed(tmp_path, pictures, data):
    status, _, errors = data("pack", pictures, tmp_path / "set", "--workers", 0)
    assert status == 0, errors
    return tmp_path / "set"


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_pack_ends_with_one_line_that_counts(pictures, tmp_path, data):
    status, printed, errors = data("pack", pictures, tmp_path / "set", "--workers", 1)
    assert status == 0, errors
    (line,) = printed.splitlines()
    assert line.startswith("84 pictures, ") and line.endswith("1 bad and left out (see manifest.json)")
    assert [len(open_source(str(tmp_path / "set"), split)) for split in ("train", "test")] == [63, 21]


def test_a_bad_picture_ends_it_where_that_is_asked_for(pictures, tmp_path, data):
    status, _, errors = data("pack", pictures, tmp_path / "set", "--workers", 0, "--bad", "error")
    assert status == 3 and str(pictures / "train/bar/003.png") in errors
    assert not (tmp_path / "set/manifest.json").exists()


def test_verify_lists_the_bad_ones_as_json_and_by_its_status(pictures, packed, tmp_path, data):
    status, printed, errors = data("verify", pictures, "--workers", 0)
    assert status == 3 and "1 of 85 pictures" in errors
    found = json.loads(printed)
    assert found["splits"] == {
        "train": {"pictures": 64, "bad": 1, "bad_files": 0},
        "test": {"pictures": 21, "bad": 0, "bad_files": 0},
    }
    (bad,) = found["bad"]
    assert bad["path"] == str(pictures / "train/bar/003.png") and bad["split"] == "train" and bad["reason"]
    status, printed, errors = data("verify", packed, "--workers", 0, "--json", tmp_path / "found.json")
    assert (status, printed) == (0, ""), errors
    assert json.loads((tmp_path / "found.json").read_text())["bad"] == []


def test_verify_lists_a_shard_that_is_cut_off(packed, data):
    (path,) = packed.glob("train-*.array_record")
    path.write_bytes(path.read_bytes()[:70_000])
    status, printed, errors = data("verify", packed, "--workers", 0)
    assert status == 3 and "truncated at byte 70000" in errors
    (bad,) = json.loads(printed)["bad"]
    assert bad["path"] == str(path) and bad["id"] is None and "truncated at byte 70000" in bad["reason"]


def test_verify_counts_a_flipped_bit_as_one_picture_and_one_file(packed, data):
    (path,) = packed.glob("train-*.array_record")
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    status, printed, errors = data("verify", packed, "--workers", 0)
    assert status == 3 and "1 of 84 pictures and 1 file bad" in errors
    found = json.loads(printed)
    assert found["splits"]["train"] == {"pictures": 63, "bad": 1, "bad_files": 1}
    assert [bad["path"].split(":")[0] for bad in found["bad"]] == [str(path)] * 2
    assert [bad["id"] is None for bad in found["bad"]] == [True, False]


def test_verify_looks_into_intact_shards_beside_one_that_is_cut_off(pictures, tmp_path, data, monkeypatch):
    monkeypatch.setattr("maect_jax.data.packing.plan.MEGABYTE", 1500)
    status, _, errors = data("pack", pictures, tmp_path / "set", "--workers", 0, "--shard-mb", 1)
    assert status == 0, errors
    _, second, third, *_ = sorted((tmp_path / "set").glob("train-*.array_record"))
    manifest = json.loads((tmp_path / "set/manifest.json").read_text())
    counts = [shard["records"] for shard in manifest["splits"]["train"]["shards"]]
    second.write_bytes(second.read_bytes()[:500])
    content = bytearray(third.read_bytes())
    content[1000] ^= 1
    third.write_bytes(content)
    status, printed, _ = data("verify", tmp_path / "set", "--workers", 0)
    found = json.loads(printed)
    files, (picture,) = ([bad for bad in found["bad"] if (bad["id"] is None) == kind] for kind in (True, False))
    assert status == 3 and [bad["path"] for bad in files] == [str(second), str(third)]
    shard, _, record = picture["path"].partition(": record ")
    assert shard == str(third) and picture["id"] == counts[0] + counts[1] + int(record)
    assert found["splits"]["train"] == {"pictures": sum(counts) - counts[1], "bad": 1, "bad_files": 2}
    assert found["splits"]["test"] == {"pictures": 21, "bad": 0, "bad_files": 0}


@pytest.mark.parametrize("content", [b'{"format": "maect_jax records", "ver', b"", None])
def test_verify_writes_json_for_a_damaged_manifest(packed, data, content):
    if content is None:
        content = (packed / "manifest.json").read_bytes().replace(b'"splits"', b'"parts"')
    (packed / "manifest.json").write_bytes(content)
    status, printed, errors = data("verify", packed, "--workers", 0)
    (bad,) = json.loads(printed)["bad"]
    assert status == 3 and bad["path"] == str(packed / "manifest.json") and "damaged" in bad["reason"]
    assert "manifest.json: damaged" in errors and "Traceback" not in errors


@pytest.mark.parametrize("source", ["nothing/here/", "{pictures}/train"])
def test_verify_writes_json_for_a_split_that_is_not_there(pictures, data, source):
    source = source.replace("{pictures}", str(pictures))
    status, printed, errors = data("verify", source, "--workers", 0, "--split", "test")
    (bad,) = json.loads(printed)["bad"]
    assert status == 3 and bad["split"] == "test" and bad["id"] is None and bad["path"] == source
    assert bad["reason"] in errors and len(errors.strip().splitlines()) == 2


def test_stats_give_json_and_settings_that_a_run_takes(pictures, data):
    status, printed, errors = data("stats", pictures, "--workers", 0)
    assert status == 0, errors
    found = json.loads(printed)
    assert found["duplicate_counts"] == {"train": 0, "test": 0, "between": 1}
    assert len(found["splits"]["train"]["bad"]) == 1
    assert "1 pictures of the test split are in the training split too" in errors
    (settings,) = [line for line in errors.splitlines() if line.startswith("--config.data.mean=")]
    config = default()
    overrides, problems = read_overrides(settings.split())
    assert not problems and not apply_overrides(config, overrides)
    paths = [path for path in (pictures / "train").rglob("*.png") if path != pictures / "train/bar/003.png"]
    values = np.concatenate([np.asarray(Image.open(path), np.float64).reshape(-1, 3) for path in paths]) / 255
    assert len(paths) == 63
    np.testing.assert_allclose(config.data.mean, values.mean(0), atol=5.1e-5)
    np.testing.assert_allclose(config.data.std, values.std(0), atol=5.1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pack", "{pictures}", "{pictures}"), "is or lies in SRC"),
        (("pack", "{pictures}", "{pictures}/packed"), "is or lies in SRC"),
        (("pack", "{pictures}", "{new}", "--quality", "0", "--workers", "-1"), "--quality 0: give 1..100"),
        (("pack", "{pictures}", "{new}", "--quality", "0", "--workers", "-1"), "--workers -1: give 0 or more"),
        (("pack", "nothing/here/", "{new}"), "no folder 'nothing/here/' on this machine"),
        (("verify", "{pictures}", "--split", "val"), "invalid choice: 'val'"),
        (
            ("verify", "{pictures}", "--json", "/nonexist/x.json"),
            "--json /nonexist/x.json: there is no folder '/nonexist'",
        ),
        (("stats", "{pictures}", "--json", "/"), "--json /: is a folder; give the name of a file"),
        (("stats", "{pictures}", "--channels", "0"), "--channels 0: give 1 or more"),
    ],
)
def test_what_can_not_be_done_is_said_in_a_line(pictures, tmp_path, data, arguments, message):
    names = {"{pictures}": str(pictures), "{pictures}/packed": str(pictures / "packed"), "{new}": str(tmp_path / "new")}
    status, printed, errors = data(*(names.get(argument, argument) for argument in arguments))
    assert status in (2, 3) and message in errors and printed == ""
    assert not (tmp_path / "new").exists() and not (pictures / "packed").exists()


def test_an_interrupted_pack_says_so_and_goes_on(tmp_path, data):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(60):
        Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(tmp_path / "in" / f"{number}.jpg")
    options = ["--shard-mb", "1", "--workers", "1", "--short-side", "200"]
    command = [sys.executable, "-m", "maect_jax", "data", "pack", tmp_path / "in", tmp_path / "out", *options]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), **piped)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out").glob("train-*.json")) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers hear it too
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 6 and "the same command goes on with the shards that are missing" in errors
    assert "Traceback" not in errors and not (tmp_path / "out/manifest.json").exists()
    for folder in ("out", "whole"):
        status, _, errors = data("pack", tmp_path / "in", tmp_path / folder, *options)
        assert status == 0, errors
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(list((tmp_path / "out").glob("*.array_record"))) > 1
