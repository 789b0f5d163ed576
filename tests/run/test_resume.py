"""Interrupted runs: stopped politely, killed at any moment, continued, chained."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from etils import epath

from maect_jax.training.checkpoint import newest_step_folder
from runs import ROOT, final_states, launch, lines, make_pictures, start


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, pictures) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    done = launch(workdir, f"--config.data.train={pictures}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(workdir / "report.html")
    return workdir


def test_a_run_leaves_everything_a_person_needs(uninterrupted):
    names = ("config.resolved.yaml", "environment.json", "metrics.jsonl", "results.jsonl", "report.html")
    assert all((uninterrupted / name).stat().st_size for name in names)
    assert list((uninterrupted / "tensorboard").rglob("events*"))
    results = lines(uninterrupted / "results.jsonl")
    keys = {"stage", "evaluation", "metric", "value", "interval", "protocol", "weights", "seed", "software", "schema"}
    assert all(keys <= set(result) for result in results)
    found = {(result["stage"], result["evaluation"]) for result in results}
    evaluated = ("pretrain", "tune", "tune, raw")
    assert found == {(stage, evaluation) for stage in evaluated for evaluation in ("knn", "linear")}
    stages = [line["stage"] for line in lines(uninterrupted / "metrics.jsonl")]
    assert list(dict.fromkeys(stages)) == ["pretrain", "head", "tune"]
    tuned = [line for line in lines(uninterrupted / "metrics.jsonl") if line["stage"] == "tune"][-1]
    health = ("gradient_norm", "neighbor_accuracy", "embedding_std", "effective_rank", "queue_age", "data_wait")
    assert all(tuned[name] is not None for name in health)


def test_running_again_skips_what_is_done(uninterrupted, pictures):
    before = final_states(uninterrupted), (uninterrupted / "metrics.jsonl").read_text()
    again = launch(uninterrupted, f"--config.data.train={pictures}")
    assert again.returncode == 0
    assert all(f"{stage}: done already" in again.stdout for stage in ("pretrain", "head", "tune", "evaluate"))
    assert (final_states(uninterrupted), (uninterrupted / "metrics.jsonl").read_text()) == before


def wait_for(condition, process, seconds: float = 240) -> None:
    """Returns at the moment `condition()` holds; fails when the process ends or time is up before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the moment to interrupt never came"
        time.sleep(0.0005)


def stage_step(workdir: Path, stage: str, step: int):
    return lambda: (workdir / stage / "checkpoints" / str(step) / "meta").exists()


def saving(workdir: Path, stage: str):
    """A checkpoint is being written at this moment: its temporary folder is there."""
    folder = workdir / stage / "checkpoints"
    return lambda: folder.is_dir() and any(name.count("tmp") for name in os.listdir(folder))


@pytest.mark.parametrize("moment", ["during pre-training", "while a checkpoint is written", "during tuning"])
def test_a_run_killed_and_started_again_ends_bit_identical(tmp_path, pictures, uninterrupted, moment):
    conditions = {
        "during pre-training": stage_step(tmp_path, "pretrain", 4),
        "while a checkpoint is written": saving(tmp_path, "head"),
        "during tuning": stage_step(tmp_path, "tune", 2),
    }
    process = start(tmp_path, f"--config.data.train={pictures}")
    wait_for(conditions[moment], process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "tune" / "DONE.json").exists()
    again = launch(tmp_path, f"--config.data.train={pictures}")
    assert again.returncode == 0, again.stderr
    assert final_states(tmp_path) == final_states(uninterrupted)
    steps = [(line["stage"], line["step"]) for line in lines(tmp_path / "metrics.jsonl")]
    assert len(steps) == len(set(steps)), "a step is recorded twice"
    assert set(steps) == {(line["stage"], line["step"]) for line in lines(uninterrupted / "metrics.jsonl")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_and_continues(tmp_path, pictures, uninterrupted, number):
    process = start(tmp_path, f"--config.data.train={pictures}", "--config.log_every=1")
    record = tmp_path / "metrics.jsonl"
    wait_for(lambda: record.exists() and '"pretrain", "step": 1' in record.read_text(), process)
    os.kill(process.pid, number)
    output = process.communicate()[0]
    assert process.returncode == 6, output
    assert f"{number.name}: stopped" in output and "Traceback" not in output
    again = launch(tmp_path, f"--config.data.train={pictures}")
    assert again.returncode == 0, again.stderr
    assert final_states(tmp_path) == final_states(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_job_leaves_the_loaders_to_the_run(tmp_path, pictures, number):
    settings = ("--config.data.workers=2", "--config.data.resident_gib=0", "--config.pretrain.epochs=500")
    settings += ("--config.checkpoint.every_updates=100000", "--config.log_every=1")
    process = start(tmp_path, f"--config.data.train={pictures}", *settings)
    record = tmp_path / "metrics.jsonl"
    wait_for(lambda: record.exists() and '"pretrain", "step": 1' in record.read_text(), process)
    os.killpg(process.pid, number)
    output = process.communicate()[0]
    assert process.returncode == 6, output
    assert f"{number.name}: stopped" in output and "Traceback" not in output and "KeyboardInterrupt" not in output
    assert newest_step_folder(epath.Path(tmp_path) / "pretrain") is not None


def test_a_second_signal_ends_at_once(tmp_path, pictures):
    process = start(tmp_path, f"--config.data.train={pictures}")
    wait_for(lambda: (tmp_path / "environment.json").exists(), process)
    for _ in range(2):  # the first state is being compiled now: Python itself would not notice
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGTERM)
    began = time.monotonic()
    output = process.communicate()[0]
    assert process.returncode in (128 + signal.SIGTERM, 6)
    assert time.monotonic() - began < 20, output


def test_stages_start_from_an_earlier_run(tmp_path, pictures, uninterrupted):
    workdir = tmp_path / "again"
    earlier, relative = (os.path.relpath(folder, ROOT) for folder in (uninterrupted, workdir))  # as people type them
    arguments = (f"--config.data.train={pictures}", "--config.stages=head,tune", f"--config.init_from={earlier}")
    done = launch(relative, *arguments)
    assert done.returncode == 0, done.stderr
    assert not (workdir / "pretrain").exists()
    mine, theirs = ((json.loads((folder / "tune" / "DONE.json").read_text())) for folder in (workdir, uninterrupted))
    assert mine["weights"] == theirs["weights"]


def test_saved_on_eight_devices_resumed_on_one(tmp_path, pictures, uninterrupted):
    process = start(tmp_path, f"--config.data.train={pictures}", devices=8)
    wait_for(stage_step(tmp_path, "tune", 2), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    again = launch(tmp_path, f"--config.data.train={pictures}")
    assert again.returncode == 0, again.stderr
    losses = [
        {(line["stage"], line["step"]): line["loss"] for line in lines(folder / "metrics.jsonl")}
        for folder in (tmp_path, uninterrupted)
    ]
    assert losses[0].keys() == losses[1].keys()
    assert all(abs(losses[0][key] - losses[1][key]) < 1e-5 for key in losses[0])


def test_evaluation_follows_what_was_trained_since(tmp_path, pictures, uninterrupted):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    arguments = (f"--config.data.train={pictures}", "--config.stages=pretrain,control,head,tune,evaluate")
    done = launch(workdir, *arguments)
    assert done.returncode == 0, done.stderr
    assert "evaluate: done already" not in done.stdout
    results = lines(workdir / "results.jsonl")
    assert {result["stage"] for result in results} == {"pretrain", "control", "tune", "tune, raw"}
    found: dict[tuple, set] = {}
    for result in results:
        found.setdefault((result["stage"], result["evaluation"], result["protocol"]["name"]), set()).add(
            result["value"]
        )
    assert all(len(values) == 1 for values in found.values()), "the same weights gave another number"


def test_a_damaged_last_checkpoint_is_trained_again_to_the_same_weights(tmp_path, pictures, uninterrupted):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    newest = max((int(p.name), p) for p in (workdir / "tune" / "checkpoints").iterdir() if p.name.isdigit())[1]
    for path in (newest / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    refused = launch(workdir, f"--config.data.train={pictures}", "--config.evaluate.probe_epochs=3")
    assert refused.returncode == 4 and str(newest) in refused.stderr and "DONE.json" in refused.stderr
    (workdir / "tune" / "DONE.json").unlink()
    done = launch(workdir, f"--config.data.train={pictures}")
    assert done.returncode == 0, done.stderr
    assert "can not be read; trying the one before" in done.stderr
    assert final_states(workdir) == final_states(uninterrupted)


def test_other_pictures_than_a_run_was_begun_with_are_refused(tmp_path, pictures, uninterrupted):
    workdir, more = tmp_path / "run", tmp_path / "more"
    shutil.copytree(uninterrupted, workdir)
    shutil.copytree(pictures, more)
    shutil.copy(more / "train" / "disc" / "000.png", more / "train" / "disc" / "zzz.png")
    config = workdir / "config.resolved.yaml"
    config.write_text(config.read_text().replace(str(pictures), str(more)))
    done = launch(workdir, f"--config.data.train={more}")
    assert done.returncode == 3 and "64 pictures" in done.stderr and "65 pictures" in done.stderr
