"""Data a user may have: unlabelled, of mixed sizes (streamed), grey; accumulation with fsdp and a control beside it."""

import shutil

import numpy as np
from PIL import Image

from runs import launch, lines, make_pictures


def test_a_flat_folder_trains_and_shows_neighbours_without_numbers(tmp_path):
    made = make_pictures(tmp_path / "made")
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((made / "train").rglob("*.png"))):
        shutil.copy(path, flat / f"{i:03}.png")
    done = launch(tmp_path / "run", f"--config.data.train={flat}")
    assert done.returncode == 0, done.stderr
    assert "numbers need labelled" in done.stdout
    assert "neighbor_accuracy" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    with np.load(tmp_path / "run" / "figures" / "neighbors_tune.npz") as file:
        query, neighbor = file["query"], file["neighbor"]
    assert not any((query[i] == neighbor[i]).all(axis=(1, 2, 3)).any() for i in range(len(query))), "its own neighbour"


def test_mixed_sizes_grey_two_parts_and_a_control_on_two_devices(tmp_path):
    pictures = make_pictures(tmp_path / "made")
    for path in sorted((pictures / "train").rglob("*.png"))[::2]:
        Image.open(path).convert("L").resize((21, 27)).save(path)
    grey = ("--config.model.channels=1", "--config.data.mean=[0.4]", "--config.data.std=[0.3]")
    parts = ("--config.pretrain.accumulate=2", "--config.mesh.fsdp=2", "--config.tune.batch=8")
    stages = "--config.stages=pretrain,control,head,tune,evaluate"
    done = launch(tmp_path / "run", f"--config.data.train={pictures}", *grey, *parts, stages, devices=2)
    assert done.returncode == 0, done.stderr
    stages = {record["stage"] for record in lines(tmp_path / "run" / "results.jsonl")}
    assert stages == {"pretrain", "control", "tune", "tune, raw"}
