"""python -m maect_jax convert, as its users start it: a run becomes what other libraries load, with a head or not."""

import json

import numpy as np
import pytest
import safetensors.numpy
import yaml

from maect_jax.exchange.files import open_model
from runs import launch, lines, maect, make_pictures

FORMS = ("timm", "hf-vit", "hf-vitmae", "mae", "maect", "onnx")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), train=40)


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures):
    """A run with all stages, on the class token, whose evaluation has left a probe and a fine-tuning."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    short = ("--config.evaluate.finetune_epochs=1", "--config.evaluate.finetune_batch=8", "--config.model.pooling=cls")
    done = launch(workdir, f"--config.data.train={pictures}", "--config.evaluate.only=knn,linear,finetune", *short)
    assert done.returncode == 0, done.stderr
    return workdir


def card_of(folder) -> tuple[dict, str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def convert(form, weights, out, *options):
    done = maect("convert", "--to", form, "--weights", weights, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    assert "checked against" in done.stdout and "not checked" not in done.stdout
    return done


def refused(*arguments) -> str:
    done = maect("convert", *arguments)
    assert done.returncode in (2, 4) and "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.parametrize("form", FORMS)
def test_a_run_becomes_each_form_with_the_proof_and_its_results_in_the_card(form, run, pictures, tmp_path):
    convert(form, run, tmp_path / "out")
    _, text = card_of(tmp_path / "out")
    results = [line for line in lines(run / "results.jsonl") if line["stage"] == "tune"]
    (knn,) = [line for line in results if line["protocol"]["name"] == "maect-knn"]
    assert "maect-knn" in text and f"{100 * knn['value']:.1f}" in text
    assert "exponential, 0.9" in text and "largest relative difference" in text
    assert str(pictures) not in text and str(run.parent) not in text
    assert {"README.md", "config.json", "preprocessor_config.json"} < {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_the_pre_training_has_its_decoder_unless_it_is_left_out(run, tmp_path):
    convert("hf-vitmae", run / "pretrain", tmp_path / "whole")
    convert("hf-vitmae", run / "pretrain", tmp_path / "half", "--encoder-only")
    assert "decoder.mask_token" in safetensors.numpy.load_file(tmp_path / "whole" / "model.safetensors")
    assert "embeddings.cls_token" in safetensors.numpy.load_file(tmp_path / "half" / "model.safetensors")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["norm_pix_loss"] is True


def test_the_average_is_converted_unless_the_trained_weights_are_asked_for(run, tmp_path):
    convert("timm", run / "tune", tmp_path / "average")
    convert("timm", run / "tune", tmp_path / "raw", "--raw")
    found = [open_model(tmp_path / name).model for name in ("average", "raw")]
    assert [model.provenance.average for model in found] == ["exponential, 0.9", "none"]
    upper, lower = ([model.params["encoder"]["blocks"]["fc1"]["kernel"][i] for model in found] for i in (1, 0))
    assert not np.array_equal(*upper) and np.array_equal(*lower)  # the lower block is frozen in tuning


def test_a_probe_and_a_fine_tuning_become_classifiers(run, tmp_path):
    import timm
    import torch

    for head in ("probe", "finetuned"):
        convert("timm", run, tmp_path / head, "--head", head)
        front, _ = card_of(tmp_path / head)
        assert front["pipeline_tag"] == "image-classification"
        model = timm.create_model(f"local-dir:{tmp_path / head}", pretrained=True).eval()
        with torch.no_grad():
            assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 4)
        settings = json.loads((tmp_path / head / "config.json").read_text())
        assert settings["label_names"] == ["<i>square", "bar", "disc", "dot"]
    convert("hf-vit", run, tmp_path / "hf", "--head", "probe")
    labels = json.loads((tmp_path / "hf" / "config.json").read_text())["id2label"]
    assert labels == {"0": "<i>square", "1": "bar", "2": "disc", "3": "dot"}


def test_what_was_converted_is_evaluated_to_the_same_numbers(run, pictures, tmp_path):
    convert("mae", run, tmp_path / "out")
    work = ("--train", pictures, "--only", "knn", "--workdir", tmp_path / "work", "--dtype", "float32")
    done = maect("evaluate", "--weights", tmp_path / "out", *work)
    assert done.returncode == 0, done.stderr
    mine = [line for line in lines(tmp_path / "work" / "results.jsonl") if line["protocol"]["name"] == "maect-knn"]
    theirs = [line for line in lines(run / "results.jsonl") if line["protocol"]["name"] == "maect-knn"]
    (theirs,) = [line for line in theirs if line["stage"] == "tune"]
    assert mine[0]["value"] == theirs["value"] and mine[0]["weights"]["sha256"] == theirs["weights"]["sha256"]


def test_licences_are_carried_and_loosened_only_with_a_reason(run, tmp_path):
    convert("mae", run / "pretrain", tmp_path / "a", "--license", "CC-BY-NC-4.0")
    again = ("--to", "timm", "--weights", tmp_path / "a", "--out", tmp_path / "b", "--license", "MIT")
    text = refused(*again)
    assert "--license 'MIT': looser than 'CC-BY-NC-4.0'" in text and "--license-reason" in text
    done = maect("convert", *again, "--license-reason", "I trained them")
    assert done.returncode == 0, done.stderr
    front, text = card_of(tmp_path / "b")
    assert front["license"] == "mit" and "I trained them" in text and "CC-BY-NC-4.0" in text


def test_what_can_not_be_converted_is_refused_before_anything_is_written(run, pictures, tmp_path):
    out = tmp_path / "out"
    for arguments, why in (
        (("--to", "tim", "--weights", run), "--to 'tim'"),
        (("--to", "timm", "--weights", tmp_path / "no"), "nothing at"),
        (("--to", "timm", "--weights", pictures), "is neither a work folder"),
        (("--to", "timm", "--weights", run / "pretrain", "--raw"), "has no moving average"),
        (("--to", "hf-vit", "--weights", run, "--head", run / "config.resolved.yaml"), "neither safetensors"),
        (("--to", "onnx", "--weights", run, "--dtype", "bfloat16"), "float32"),
        (("--to", "timm", "--weights", run, "--pixels", "plain"), "is a run, which knows"),
        (("--to", "timm", "--weights", run, "--image-size", "30"), "multiple of the patch"),
        (("--to", "timm", "--weights", run / "pretrain", "--decoder-heads", "4"), "is a run, which knows"),
        (("--to", "timm", "--weights", run, "--allow-missing", "decoder/*"), "is a run, which knows"),
        (("--to", "timm", "--weights", run, "--heads", "4"), "is a run, which knows"),
    ):
        assert why in refused(*arguments, "--out", out)
        assert not out.exists() and not list(tmp_path.glob(".out*"))
    assert "--out" in refused("--to", "timm", "--weights", run, "--out", run)
