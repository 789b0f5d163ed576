"""A run over pictures of which some can not be used: it goes on, says which, and counts no number over them."""

import json

import pytest

from maect_jax.results.record import read_records
from runs import launch, make_pictures

BROKEN = {"train/disc/003.png": b"", "test/bar/002.png": b"not a picture"}
GONE = "train/dot/001.png"  # a link to nowhere


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = make_pictures(tmp_path_factory.mktemp("pictures"))
    for name, content in BROKEN.items():
        (folder / name).write_bytes(content)
    (folder / GONE).unlink()
    (folder / GONE).symlink_to("nowhere")
    return folder


def lines(workdir):
    return [json.loads(line) for line in (workdir / "bad_images.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """A resident and a streamed run that allow a tenth of the pictures to be bad."""
    found = {}
    for path, gib in (("resident", 2.0), ("streamed", 0.0)):
        workdir = tmp_path_factory.mktemp(path)
        flags = (f"--config.data.train={pictures}", "--config.data.bad_limit=0.1", f"--config.data.resident_gib={gib}")
        process = launch(workdir, *flags)
        assert process.returncode == 0, process.stderr
        found[path] = workdir, process
    return found


@pytest.mark.parametrize("path", ["resident", "streamed"])
def test_run_goes_on_and_names_each_bad_picture_once(finished, path):
    workdir, process = finished[path]
    noted = lines(workdir)

    assert {name for name in BROKEN for line in noted if line["path"].endswith(name)} == set(BROKEN)
    assert len(noted) == 3
    train = next(line for line in noted if "train/disc" in line["path"])
    assert train["replaced_by"] == train["id"] + 1 and "not a readable picture" in train["reason"]
    assert next(line for line in noted if "test/bar" in line["path"])["replaced_by"] is None
    assert process.stderr.count("bad picture") == 3
    assert "ignored" not in process.stderr, "an error while something is closed"


@pytest.mark.parametrize("path", ["resident", "streamed"])
def test_every_number_is_over_the_rest_and_says_so(finished, path):
    records = read_records(finished[path][0] / "results.jsonl")
    assert records
    for record in records:
        assert (record["protocol"]["train"]["rows"], record["protocol"]["train"]["bad_pictures"]) == (62, 2)
        assert (record["protocol"]["test"]["rows"], record["protocol"]["test"]["bad_pictures"]) == (19, 1)


def test_second_start_adds_no_line_and_reads_what_is_there(finished, pictures):
    workdir, _ = finished["streamed"]
    flags = (f"--config.data.train={pictures}", "--config.data.bad_limit=0.1", "--config.data.resident_gib=0")
    process = launch(workdir, *flags, "--config.evaluate.only=knn,retrieval")
    assert process.returncode == 0, process.stderr
    assert len(lines(workdir)) == 3


def test_more_than_the_limit_ends_the_run_with_count_file_and_mend(pictures, tmp_path):
    process = launch(tmp_path, f"--config.data.train={pictures}", "--config.data.resident_gib=0")
    assert process.returncode == 3
    for text in (" of 64 pictures", "more than 0.1 %", ".png", "bad_images.jsonl", "data.bad_limit"):
        assert text in process.stderr, process.stderr


@pytest.mark.parametrize("gib", [2.0, 0.0])
def test_policy_error_ends_at_the_first_with_its_name(pictures, tmp_path, gib):
    flags = (f"--config.data.train={pictures}", "--config.data.bad=error", f"--config.data.resident_gib={gib}")
    process = launch(tmp_path, *flags)
    assert process.returncode == 3
    assert ": not a readable picture" in process.stderr and ("disc/003.png" in process.stderr or GONE in process.stderr)
    assert "Traceback" not in process.stderr


def test_metrics_tell_what_loading_costs(finished):
    found = {path: metrics(workdir) for path, (workdir, _) in finished.items()}
    for line in found["streamed"]:
        assert 0 <= line["data_wait"] <= 1
    assert {0 <= line["data_ready"] <= 2 for line in found["streamed"] if "data_ready" in line} == {True}
    loaded = [line for line in found["streamed"] if "decode_per_second" in line]  # not where all was loaded before
    assert loaded and all(line["decode_per_second"] > 10 and line["data_mb_per_second"] > 0 for line in loaded)
    for line in found["resident"]:
        assert 0 <= line["data_wait"] <= 1
        assert "data_ready" not in line and "decode_per_second" not in line, "nothing is read or decoded"


def metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "data_wait" in line]
