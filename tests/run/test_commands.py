"""python -m maect_jax evaluate, embed, compare: the real program on a small trained run, as its users start it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from runs import launch, lines, maect, make_pictures

EVERY = "knn,knn_layers,retrieval,linear,logreg,ridge,cluster,health,colour,finetune,robustness,pictures"
SHORT = ("--probe-epochs", "2", "--batch", "16", "--finetune-epochs", "2")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Per class 40 training pictures (so that splits of 1, 2, 5 and 10 % exist) and 5 test pictures."""
    return make_pictures(tmp_path_factory.mktemp("pictures"), train=40)


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures):
    """A run that was trained but not evaluated."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    settings = ("--config.stages=pretrain,head,tune", "--config.evaluate.every_epochs=3")
    done = launch(workdir, f"--config.data.train={pictures}", *settings)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def evaluated(run, pictures):
    """The same run with every evaluation there is."""
    done = maect("evaluate", "--weights", run, "--only", EVERY, "--robustness", pictures / "test", *SHORT)
    assert done.returncode == 0, done.stderr
    return done.stdout, lines(run / "results.jsonl")


def test_every_evaluation_of_every_stage_leaves_a_record(evaluated):
    _, records = evaluated
    for stage in ("pretrain", "tune", "tune, raw"):
        found = {record["evaluation"] for record in records if record["stage"] == stage}
        assert found == set(EVERY.split(",")) - {"pictures"}


def test_a_record_tells_protocol_data_weights_and_cost(evaluated):
    _, records = evaluated
    for record in records:
        protocol = record["protocol"]
        assert protocol["name"] and protocol["transform"]["image_size"] == 16 and protocol["classes"] == 4
        for what, rows in (("train", 160), ("test", 20)):
            assert protocol[what]["rows"] == rows and len(protocol[what]["hash"]) == 64
        assert len(record["weights"]["sha256"]) == 64 and record["model"]["width"] == 16
        assert record["cost"]["seconds"] >= 0 and np.isfinite(record["value"])
        if record["metric"] == "accuracy" and record["interval"]:
            low, high = record["interval"]
            assert low <= record["value"] <= high


def test_the_online_number_is_the_offline_one(evaluated, run):
    online = [line["knn"] for line in lines(run / "metrics.jsonl") if line["stage"] == "tune" and "knn" in line][-1]
    offline = [r for r in evaluated[1] if r["stage"] == "tune" and r["protocol"]["name"] == "maect-knn"]
    assert online == offline[0]["value"]


def test_the_first_call_encodes_and_says_so(evaluated):
    assert not any(record["cost"]["cache"] for record in evaluated[1] if record["evaluation"] == "knn")
    assert all(record["cost"]["features_seconds"] > 0 for record in evaluated[1])


def test_the_tuned_encoder_and_its_average_have_different_weights(evaluated):
    hashes = {record["stage"]: record["weights"]["sha256"] for record in evaluated[1]}
    assert len(set(hashes.values())) == 3


def test_the_report_shows_the_numbers(evaluated, run):
    stdout, records = evaluated
    report = Path(stdout.splitlines()[-1])
    assert report == run / "report.html"
    knn = next(r for r in records if r["stage"] == "tune" and r["protocol"]["name"] == "maect-knn")
    assert f"{100 * knn['value']:.1f}" in report.read_text()
    figures = {path.name for path in (run / "figures").iterdir()}
    assert {f"{what}_tune.npz" for what in ("neighbors", "clusters", "scatter", "attention", "confusion")} <= figures


def test_a_second_call_reads_the_features_and_finds_the_same(evaluated, run):
    again = maect("evaluate", "--weights", run, "--only", "knn,linear,cluster", *SHORT)
    assert again.returncode == 0, again.stderr
    assert "encoded in" not in again.stdout
    before, after = evaluated[1], lines(run / "results.jsonl")[len(evaluated[1]) :]
    assert all(record["cost"]["cache"] for record in after)

    def values(records):
        key = ("stage", "evaluation", "metric")
        return {(*(r[k] for k in key), r["protocol"]["name"]): r["value"] for r in records}

    assert after and values(after).items() <= values(before).items()


def test_eight_devices_find_what_one_finds(evaluated, run, tmp_path):
    eight = maect("evaluate", "--weights", run / "tune", "--only", "knn", "--workdir", tmp_path, *SHORT, devices=8)
    assert eight.returncode == 0, eight.stderr
    one = {r["protocol"]["name"]: r["value"] for r in evaluated[1] if r["stage"] == "tune" and r["evaluation"] == "knn"}
    assert {r["protocol"]["name"]: r["value"] for r in lines(tmp_path / "results.jsonl") if r["stage"] == "tune"} == one


def test_compare_puts_two_stages_side_by_side(evaluated, run):
    done = maect("compare", f"{run}:pretrain", run)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("knn accuracy, maect-knn "))
    for stage in ("pretrain", "tune"):
        value = next(r["value"] for r in evaluated[1] if r["stage"] == stage and r["protocol"]["name"] == "maect-knn")
        assert f"{100 * value:.2f}" in row


def test_compare_refuses_another_test_set_unless_told(evaluated, run, pictures, tmp_path):
    fewer = tmp_path / "fewer"
    shutil.copytree(pictures, fewer)
    for path in (fewer / "test").glob("*/000.png"):
        path.unlink()
    other = maect(
        "evaluate", "--weights", run / "tune", "--train", fewer, "--only", "knn", "--workdir", tmp_path / "w", *SHORT
    )
    assert other.returncode == 0, other.stderr
    refused = maect("compare", run, tmp_path / "w")
    assert refused.returncode == 2 and "test.hash = " in refused.stderr and "--anyway" in refused.stderr
    shown = maect("compare", run, tmp_path / "w", "--anyway")
    assert shown.returncode == 0 and "test.rows = 20 / 16" in shown.stdout


def test_embed_writes_features_with_file_names(evaluated, run, tmp_path):
    for name in ("f.parquet", "f.npz"):
        done = maect(
            "embed",
            "--weights",
            run,
            "--split",
            "test",
            "--feature",
            "mean,cls@1",
            "--out",
            tmp_path / name,
            "--batch",
            "16",
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(tmp_path / name)
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pydict()
    with np.load(tmp_path / "f.npz", allow_pickle=False) as arrays:
        assert arrays["mean"].shape == (20, 16) and arrays["cls@1"].dtype == np.float32
        for name in ("mean", "cls@1"):
            np.testing.assert_array_equal(np.array(table[name], np.float32), arrays[name])
        assert table["file_name"] == arrays["file_name"].tolist()
    assert table["file_name"][0] == "<i>square/000.png" and table["class"][0] == "<i>square"
    assert table["label"] == sorted(table["label"]) and table["id"] == list(range(20))


def test_a_file_in_a_foreign_layout_has_the_numbers_of_its_run(evaluated, run, pictures, tmp_path):
    import jax
    import safetensors.numpy

    from maect_jax.exchange.mapping import to_layout
    from maect_jax.parallel.mesh import make_mesh
    from maect_jax.weights import open_weights

    (subject, _) = open_weights(str(run / "tune"), make_mesh(devices=jax.devices()[:1]))
    params = jax.tree.map(np.asarray, subject.load())
    tensors = to_layout({"encoder": params}, "timm_mae", patch=4, grid=4)
    file = tmp_path / "tuned.safetensors"
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, file)
    options = (
        "--pooling",
        "mean",
        "--heads",
        "2",
        "--dtype",
        "float32",
        "--resize-ratio",
        "1",
        "--workdir",
        tmp_path / "w",
    )
    done = maect("evaluate", "--weights", file, "--train", pictures, "--only", "knn", *options, *SHORT)
    assert done.returncode == 0, done.stderr
    of_run = {
        r["protocol"]["name"]: r["value"] for r in evaluated[1] if r["stage"] == "tune" and r["evaluation"] == "knn"
    }
    assert {r["protocol"]["name"]: r["value"] for r in lines(tmp_path / "w" / "results.jsonl")} == of_run


# --------------------------------------------------------------------------------------------------------- bad input


def refused(status, *arguments):
    done = maect("evaluate", *arguments, *SHORT)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_shared_pictures_are_counted_named_and_recorded(run, pictures, tmp_path):
    leaky = tmp_path / "leaky"
    shutil.copytree(pictures, leaky)
    for i in range(3):
        with Image.open(leaky / "train" / "bar" / f"{i:03}.png") as image:
            image.save(leaky / "test" / "disc" / f"copy{i}.bmp")
    done = maect(
        "evaluate",
        "--weights",
        run / "pretrain",
        "--train",
        leaky,
        "--only",
        "knn",
        "--workdir",
        tmp_path / "w",
        *SHORT,
    )
    assert done.returncode == 0, done.stderr
    assert "3 of 23 test pictures" in done.stdout and "disc/copy0.bmp = bar/000.png" in done.stdout
    assert {r["protocol"]["test"]["shared_with_train"] for r in lines(tmp_path / "w" / "results.jsonl")} == {3}
    assert json.loads((tmp_path / "w" / "shared.json").read_text())["shared"] == 3
    assert "3 of" in (tmp_path / "w" / "report.html").read_text()


def test_a_test_class_that_training_does_not_have(run, pictures, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    (other / "test" / "bar").rename(other / "test" / "beam")
    error = refused(3, "--weights", run / "pretrain", "--train", other, "--workdir", tmp_path / "w")
    assert "--test: class 'beam'" in error and "not in the training set" in error


def test_a_class_without_a_test_picture(run, pictures, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    shutil.rmtree(other / "test" / "bar")
    error = refused(3, "--weights", run / "pretrain", "--train", other, "--workdir", tmp_path / "w")
    assert "data.test: class 'bar' of" in error and "has no test picture" in error


def test_more_neighbours_than_training_pictures(run, tmp_path):
    few = make_pictures(tmp_path / "few", train=3)
    error = refused(
        2,
        "--weights",
        run / "pretrain",
        "--train",
        few,
        "--only",
        "knn",
        "--preset",
        "dinov2",
        "--workdir",
        tmp_path / "w",
    )
    assert "dinov2-knn-20" in error and "20" in error and "12" in error


def test_labels_that_are_missing(run, pictures, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((pictures / "train").glob("*/*.png"))):
        shutil.copy(path, flat / f"{i}.png")
    error = refused(3, "--weights", run / "pretrain", "--train", flat, "--test", pictures, "--workdir", tmp_path / "w")
    assert f"'{flat}' has no labels" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "knn,lineer"), ("--only: no 'lineer'", "did you mean 'linear'?")),
        (("--preset", "dino"), ("--preset: no 'dino'", "did you mean 'dinov2'?")),
        (("--only", "robustness"), ("needs --robustness=DATA", "needs 'linear' or 'finetune' before it")),
        (("--only", "linear", "--robustness", "./nowhere"), ("--robustness: no folder './nowhere'",)),
        (("--lists", "./nowhere"), ("--lists: './nowhere' is no folder",)),
        (("--fsdp", "0", "--workers", "-1"), ("--fsdp 0: must be at least 1", "--workers -1: must be at least 0")),
        (("--image-size", "15"), ("--image-size 15: must be a multiple of the patch, 4",)),
        (("--heads", "4"), ("is a run, which knows",)),
        (("--batch", "0"), ("--batch 0: must be at least 1",)),
        (("--train", "imagenet20122"), ("--train: 'imagenet20122' is neither a folder nor a TFDS name",)),
        (("--nonsense",), ("unrecognized arguments: --nonsense",)),
    ],
)
def test_what_is_not_understood_is_named(run, tmp_path, arguments, words):
    done = maect("evaluate", "--weights", run / "pretrain", "--workdir", tmp_path / "w", *arguments)
    assert done.returncode in (2, 3) and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_weights_that_are_not_there_or_nothing_that_is_known(tmp_path):
    assert "nothing at" in refused(2, "--weights", tmp_path / "no", "--train", "digits")
    assert "neither a work folder" in refused(4, "--weights", tmp_path, "--train", "digits")
    (tmp_path / "x.pth").write_bytes(b"not weights" * 50)
    assert "x.pth" in refused(4, "--weights", tmp_path / "x.pth", "--train", "digits", "--workdir", tmp_path / "w")
    with open(tmp_path / "y.safetensors", "wb") as file:
        file.write(b"\x00" * 100)
    assert "--train is missing" in refused(2, "--weights", tmp_path / "y.safetensors")


def test_one_name_for_two_encoders_is_refused(run):
    assert "two of them are called 'pretrain'" in refused(2, "--weights", run / "pretrain", run / "pretrain")


def test_an_incomplete_folder_of_lists_is_refused(run, pictures, tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    names = [f"{path.parent.name}/{path.name}" for path in sorted((pictures / "train").glob("*/000.png"))]
    (lists / "1shot-1.txt").write_text("\n".join(names))
    error = refused(2, "--weights", run / "pretrain", "--only", "logreg", "--lists", lists, "--workdir", tmp_path / "w")
    assert "lacks 1shot-2.txt, 1shot-3.txt" in error
