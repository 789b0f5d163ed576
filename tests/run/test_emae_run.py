"""EMAE from settings to a finished run: what is refused, what follows from what, and that a run can be interrupted."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import yaml
from etils import epath

from maect_jax import assemble, handover
from maect_jax import config as settings
from maect_jax.config_checks import check
from maect_jax.errors import ConfigError
from maect_jax.exchange.provenance import Provenance
from maect_jax.parallel.mesh import make_mesh
from maect_jax.report.names import method_of
from maect_jax.run import compare_with_earlier
from runs import ROOT, TINY, final_states, launch, lines, make_pictures, start

# ------------------------------------------------------------------------------------------------------------ settings


def tiny(**changes: str):
    """The tiny recipe, 16 patches a picture, with settings of pre-training: emae_parts=… is pretrain.emae.parts."""
    sections = ("emae_", "disjoint_")
    keys = {key: next((key.replace("_", ".", 1) for s in sections if key.startswith(s)), key) for key in changes}
    overrides = {f"pretrain.{keys[key]}": value for key, value in changes.items()}
    return settings.load(str(ROOT / TINY), {"data.train": "somewhere"} | overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(method="emae", emae_parts="2"),
            "config.pretrain.emae.parts = 2: no patch is hidden from both of 2 parts, so there is nothing to be "
            "consistent about; take at least 3, or set config.pretrain.emae.consistency_weight=0",
        ),
        (
            dict(method="emae", emae_parts="3"),
            "config.pretrain.emae.parts = 3: the parts must divide the 16 patches of a picture; 4, 8 or 16 do",
        ),
        (
            dict(method="emae", emae_parts="32"),
            "config.pretrain.emae.parts = 32: the parts must divide the 16 patches of a picture; 4, 8 or 16 do",
        ),
        (
            dict(method="emae", mask_ratio="0.5"),
            "config.pretrain.mask_ratio = 0.5: each of 4 parts hides 0.75 of the patches; leave it out, or change "
            "config.pretrain.emae.parts",
        ),
        (dict(method="emea"), "config.pretrain.method = 'emea': must be one of mae, emae, disjoint"),
        (
            dict(batch_counting="picture"),
            "config.pretrain.batch_counting = 'picture': must be one of images, parts, predicted",
        ),
        (
            dict(emae_consistency_norm="sum"),
            "config.pretrain.emae.consistency_norm = 'sum': must be one of all, overlap",
        ),
        (
            dict(emae_consistency_form="both"),
            "config.pretrain.emae.consistency_form = 'both': must be one of symmetric, one_sided",
        ),
        (
            dict(emae_consistency_space="pixel"),
            "config.pretrain.emae.consistency_space = 'pixel': must be one of targets, pixels",
        ),
        (
            dict(emae_consistency_weight="-0.5"),
            "config.pretrain.emae.consistency_weight = -0.5: must not be negative",
        ),
        (dict(decoded_share="0"), "config.pretrain.decoded_share = 0.0: must lie above 0 and at most at 1"),
        (
            dict(method="disjoint", disjoint_covered="0.75"),
            "config.pretrain.disjoint.covered = 0.75: must be more than the mask ratio of 0.75 by at least one of 16 "
            "patches, and at most 1",
        ),
    ],
)
def test_what_can_not_work_is_told_with_its_mend(changes, message):
    assert check(tiny(**changes)) == [message]


@pytest.mark.parametrize(
    "changes",
    [
        dict(method="emae"),
        dict(method="emae", mask_ratio="0.75"),
        dict(method="emae", emae_parts="2", emae_consistency_weight="0"),
        dict(method="emae", emae_parts="8", decoded_share="0.5"),
        dict(method="mae", emae_parts="3"),  # not used
        dict(method="disjoint", mask_ratio="0.5"),
    ],
)
def test_what_can_work_passes(changes):
    assert check(tiny(**changes)) == []


@pytest.mark.parametrize(
    ("method", "parts", "ratio"), [("emae", "4", 3 / 4), ("emae", "8", 7 / 8), ("mae", "8", 3 / 4)]
)
def test_the_mask_ratio_follows_from_the_parts(method, parts, ratio):
    config = tiny(method=method, emae_parts=parts)
    settings.derive(config, 64)
    assert config.pretrain.mask_ratio == pytest.approx(ratio)
    assert check(config) == []  # also after it was filled in


@pytest.mark.parametrize(
    ("method", "counting", "times"),
    [
        ("emae", "images", 1),
        ("emae", "parts", 4),
        ("emae", "predicted", 4 / 3),
        ("disjoint", "images", 1),
        ("disjoint", "parts", 2),
        ("disjoint", "predicted", 4 / 3),
        ("mae", "images", 1),
        ("mae", "parts", 1),
        ("mae", "predicted", 1),
    ],
)
def test_the_peak_rate_follows_what_is_counted(monkeypatch, method, counting, times):
    """Base rate 0.001 for 256 pictures; here 512 pictures of two views."""
    monkeypatch.setattr(assemble, "make_pretrain_step", lambda *_, **settings: settings)
    config = tiny(method=method, batch_counting=counting, base_lr="1e-3", batch="512", views="2")
    settings.derive(config, 10_000)
    groups = assemble.assemble(config, "pretrain", 10_000, make_mesh(devices=jax.devices()[:1])).step["groups"]
    for part in ("encoder", "decoder"):
        assert groups[part].peak == pytest.approx(1e-3 * 4 * times, rel=1e-12)


# ------------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def emae(pictures) -> tuple[str, ...]:
    return f"--config.data.train={pictures}", "--config.pretrain.method=emae"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, emae) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    done = launch(workdir, *emae)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(workdir / "report.html")
    return workdir


def told(workdir: Path) -> dict[int, dict]:
    """Lines of pre-training in the record, by step."""
    return {line["step"]: line for line in lines(workdir / "metrics.jsonl") if line["stage"] == "pretrain"}


def test_all_stages_follow_and_the_agreement_of_the_parts_is_recorded(uninterrupted):
    stages = [line["stage"] for line in lines(uninterrupted / "metrics.jsonl")]
    assert list(dict.fromkeys(stages)) == ["pretrain", "head", "tune"]
    assert {result["stage"] for result in lines(uninterrupted / "results.jsonl")} == {"pretrain", "tune", "tune, raw"}
    for line in told(uninterrupted).values():
        whole, apart = line["reconstruction_loss"], line["disagreement"]
        assert whole > 0 and apart > 0
        assert line["loss"] == pytest.approx(whole + 0.5 * apart, rel=1e-6)  # weight 1, z = 2/4
        assert line["disagreement_ratio"] == pytest.approx(apart / whole**0.5, rel=1e-6)


def test_a_run_killed_in_pretraining_and_started_again_ends_bit_identical(tmp_path, emae, uninterrupted):
    arguments = (*emae, "--config.stages=pretrain,head,tune")
    process = start(tmp_path, *arguments)
    end = time.monotonic() + 240
    while not (tmp_path / "pretrain" / "checkpoints" / "4" / "meta").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the moment to interrupt never came"
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "pretrain" / "DONE.json").exists()
    again = launch(tmp_path, *arguments)
    assert again.returncode == 0, again.stderr
    assert final_states(tmp_path) == final_states(uninterrupted)
    assert told(tmp_path).keys() == told(uninterrupted).keys()


def test_eight_devices_record_the_losses_of_one(tmp_path, emae, uninterrupted):
    done = launch(tmp_path, *emae, "--config.stages=pretrain", devices=8)
    assert done.returncode == 0, done.stderr
    one, eight = told(uninterrupted), told(tmp_path)
    assert one.keys() == eight.keys()
    for step, line in one.items():
        for name in ("loss", "reconstruction_loss", "disagreement", "disagreement_ratio"):
            assert eight[step][name] == pytest.approx(line[name], abs=1e-5), (step, name)


def test_the_digits_recipe_runs_through_all_stages(tmp_path):
    """`configs/digits.py:emae` with a narrow model and one epoch a stage, the control too."""
    shape = (
        "model.width=24",
        "model.depth=2",
        "model.decoder.width=16",
        "model.decoder.depth=1",
        "tune.frozen_blocks=1",
    )
    short = [f"{stage}.epochs=1" for stage in ("pretrain", "control", "head", "tune")]
    quick = ("tune.frozen_blocks=1", "pretrain.warmup_epochs=0", "evaluate.only=knn", "evaluate.every_epochs=0")
    overrides = [f"--config.{setting}" for setting in (*shape, *short, *quick)]
    done = launch(tmp_path, *overrides, config="configs/digits.py:emae")
    assert done.returncode == 0, done.stderr
    stages = ("pretrain", "control", "head", "tune")
    told = {stage: json.loads((tmp_path / stage / "DONE.json").read_text())["pretraining"] for stage in stages}
    assert told == dict.fromkeys(stages, "emae")
    assert {record["stage"] for record in lines(tmp_path / "results.jsonl")} >= {"pretrain", "control", "tune"}
    page = (tmp_path / "report.html").read_text()
    assert "EMAE-CT" in page and "Reconstruction by parts" in page


def test_a_folder_begun_before_there_was_a_choice_does_not_go_on_with_another_method(tmp_path):
    config = tiny()
    settings.derive(config, 64)
    earlier = settings.plain(config)
    del earlier["pretrain"]["method"], earlier["pretrain"]["emae"], earlier["pretrain"]["disjoint"]
    (tmp_path / "config.resolved.yaml").write_text(yaml.safe_dump(earlier))
    compare_with_earlier(config, {}, epath.Path(tmp_path))
    config.pretrain.method = "emae"
    with pytest.raises(ConfigError, match=r"config\.pretrain\.method = 'mae', not 'emae'"):
        compare_with_earlier(config, {}, epath.Path(tmp_path))


def test_weights_in_a_file_keep_how_they_were_pretrained():
    origin = Provenance(stage="pretrain", recipe={"pretrain": {"method": "emae"}}, code_version="1")
    opened = SimpleNamespace(model=SimpleNamespace(provenance=origin), sha256="1", layout="mae_official_full", notes=())
    assert handover._of_file(opened, "exported/model.safetensors")[1]["method"] == "emae"


@pytest.mark.parametrize(
    ("stages", "init_from", "told", "method"),
    [
        (["pretrain", "head"], "", [], "emae"),
        (["head", "tune"], "weights.pth", [], "mae"),
        (["head", "tune"], "weights.pth", [""], "mae"),
        (["head", "tune"], "earlier", ["disjoint"], "disjoint"),
    ],
)
def test_the_report_names_what_the_weights_were_and_not_what_the_settings_would_do(stages, init_from, told, method):
    config = {"stages": stages, "init_from": init_from, "pretrain": {"method": "emae"}}
    assert method_of(config, [{"pretraining": name} for name in told]) == method
