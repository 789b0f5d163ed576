"""python -m maect_jax inspect: runs, stages and checkpoints, written as a run writes them but without its training."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from etils import epath

from maect_jax import assemble, config_checks
from maect_jax.config import derive, load, plain
from maect_jax.errors import CheckpointError
from maect_jax.exchange.provenance import Provenance, trained
from maect_jax.handover import encoder_of, parts_of
from maect_jax.inspection.facts import facts_of
from maect_jax.inspection.text import as_text
from maect_jax.results.record import weights_hash
from maect_jax.training.checkpoint import Checkpoints, write_json
from runs import ROOT, TINY, environment
from small import one_device

PICTURES = 64
OTHERS = Provenance("CC-BY-NC-4.0", "stated beside the weights", ({"name": "mae.pth", "sha256": "c" * 64},))


@pytest.fixture(scope="module")
def settings():
    config = load(str(ROOT / TINY), {"data.train": "digits"})
    config.stages = ("pretrain", "control", "head", "tune")
    derive(config, PICTURES)
    assert config_checks.check(config) == []
    return config


@pytest.fixture(scope="module")
def states(settings):
    """A state of each stage: the shapes of its first, random numbers."""
    mesh, states, rng = one_device(), {}, np.random.default_rng(0)

    def first(stage: str, sources: dict) -> dict:
        shapes = jax.eval_shape(assemble.assemble(settings, stage, PICTURES, mesh).first_state, sources)
        states[stage] = jax.tree.map(lambda x: rng.integers(0, 9, x.shape).astype(x.dtype), shapes)
        return parts_of(states[stage])

    encoder = {"encoder": encoder_of(first("pretrain", {}))}
    head = first("head", encoder)
    first("tune", encoder | head | {"queue": vars(head["queue"])})
    return states


@pytest.fixture(scope="module")
def run(tmp_path_factory, settings, states):
    """Pre-training and head are complete, the latter by an older version; tuning is on its way; control not begun."""
    root = epath.Path(tmp_path_factory.mktemp("tiny"))
    (root / "config.resolved.yaml").write_text(yaml.safe_dump(plain(settings), sort_keys=False))
    for stage, steps in (("pretrain", (4, 12)), ("head", (8,)), ("tune", (2, 6))):
        checkpoints = Checkpoints(root / stage / "checkpoints")
        meta = {"stage": stage, "name": "tiny", "seed": 0, "seconds": 1.0}
        average = "exponential, 0.9" if stage == "tune" else "none"
        told = trained(OTHERS, None, stage=stage, recipe=plain(settings), trained_on="digits", average=average)
        if stage != "head":
            meta["provenance"] = json.loads(json.dumps(told.as_dict()))
        for step in steps:
            checkpoints.save(step, states[stage], meta)
        checkpoints.close()
        if stage != "tune":
            weights = weights_hash(encoder_of(parts_of(states[stage])))
            write_json(
                root / stage / "DONE.json", {"stage": stage, "step": steps[-1], "seconds": 1, "weights": weights}
            )
    (root / "control").mkdir()
    return root


def test_a_run_lists_its_stages(run, states):
    facts = facts_of(str(run))
    weights, of_head = (weights_hash(encoder_of(parts_of(states[stage]))) for stage in ("pretrain", "head"))
    rows = {row["stage"]: (row["complete"], row["step"], row["license"]) for row in facts["stages"]}
    assert rows == {
        "pretrain": (True, 12, "CC-BY-NC-4.0"),
        "control": (False, None, "unknown"),
        "head": (True, 8, "unknown"),
        "tune": (False, 6, "CC-BY-NC-4.0"),
    }
    assert [row["weights_sha256"] for row in facts["stages"]] == [weights, None, of_head, None]
    text = as_text(facts).splitlines()
    assert any(line.split() == ["pretrain", "complete", "12", "CC-BY-NC-4.0", weights] for line in text)
    assert any(line.split() == ["tune", "not", "complete", "6", "CC-BY-NC-4.0"] for line in text)
    assert any(line.split() == ["control", "not", "begun"] for line in text)
    assert "width 16, depth 2, 2 heads (by the run's settings)" in as_text(facts)
    sizes = {
        name: sum(x.size for x in jax.tree.leaves(states["pretrain"].params[name])) for name in facts["parameters"]
    }
    assert facts["parameters"] == sizes and sizes.keys() == {"encoder", "decoder"}


@pytest.mark.parametrize("stage", ["pretrain", "head", "tune"])
def test_a_stage_is_its_last_checkpoint(stage, run, states):
    facts = facts_of(str(run / stage))
    assert (facts["stage"], facts["complete"]) == (stage, stage != "tune")
    assert facts["checkpoints"] == {"pretrain": [4, 12], "head": [8], "tune": [2, 6]}[stage]
    assert facts["step"] == facts["checkpoints"][-1]
    encoder = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 64, "patch": 4, "image_size": 16, "channels": 3}
    assert encoder.items() <= facts["encoder"].items() and facts["encoder"]["positions"] == "fixed"
    assert facts["average"] == ("exponential, 0.9" if stage == "tune" else "none")
    assert facts["license"] == ("unknown" if stage == "head" else "CC-BY-NC-4.0")
    leaves = jax.tree_util.tree_flatten_with_path(states[stage].params)[0]
    expected = {"params/" + "/".join(key.key for key in path): (x.shape, x.dtype.name, x.nbytes) for path, x in leaves}
    found = {name: (x.shape, x.dtype, x.bytes) for name, x in facts["tensors"].items() if name.startswith("params/")}
    assert found == expected
    assert facts["bytes"] == sum(x.nbytes for x in jax.tree.leaves(states[stage]))
    text = as_text(facts)
    weights = weights_hash(encoder_of(parts_of(states[stage])))
    assert (weights in text) == (stage != "tune")
    assert ("mae.pth" in text) == (stage != "head")
    assert ("unknown (nothing says)" in text) == (stage == "head")


def test_a_checkpoint_on_the_way_has_no_hash_of_the_end(run):
    facts = facts_of(str(run / "pretrain" / "checkpoints" / "4"))
    assert facts["kind"] == "checkpoint" and facts["step"] == 4 and "weights_sha256" not in facts
    assert "weights_sha256" in facts_of(str(run / "pretrain" / "checkpoints" / "12"))


def test_a_moved_checkpoint_tells_what_it_carries(run, tmp_path):
    for stage, step in (("pretrain", "4"), ("head", "8")):
        shutil.copytree(run / stage / "checkpoints" / step, tmp_path / stage)
    facts = facts_of(str(tmp_path / "pretrain"))
    assert (facts["encoder"]["heads"], facts["encoder"]["patch"], facts["stage"]) == (2, 4, "pretrain")
    facts = facts_of(str(tmp_path / "head"))
    assert (facts["encoder"]["width"], facts["encoder"]["depth"], facts["encoder"]["heads"]) == (16, 2, None)
    assert "heads unknown" in as_text(facts) and facts["step"] == 8


def test_a_fine_tuned_checkpoint_tells_its_classes(run, states):
    folder = run / "finetune" / "mae-finetune_0" / "chosen"
    encoder = states["pretrain"].params["encoder"] | {"pos_embed": np.zeros((1, 26, 16), np.float32)}
    head = {"kernel": np.zeros((16, 7), np.float32), "bias": np.zeros(7, np.float32)}
    told = {"stage": "mae-finetune", "recipe": {"name": "mae-finetune"}, "trained_on": "digits"}
    provenance = json.loads(json.dumps(trained(OTHERS, None, average="exponential, 0.9", **told).as_dict()))
    for place, step, more in ((folder, 3, {}), (folder.parent / "checkpoints", 5, {"provenance": provenance})):
        checkpoints = Checkpoints(place)
        checkpoints.save(step, {"params": {"encoder": encoder, "head": head}}, {"stage": "mae-finetune"} | more)
        checkpoints.close()
    facts = facts_of(str(folder.parent))
    assert (facts["kind"], facts["complete"], facts["checkpoints"]) == ("fine-tuning", False, [5])
    assert "fine-tuning, not complete" in as_text(facts) and "chosen" not in facts
    facts = facts_of(str(folder / "3"))
    assert facts["head"] == {"width": 16, "classes": 7, "names": []} and facts["stage"] == "mae-finetune"
    assert facts["encoder"]["positions"] == "learned" and facts["encoder"]["image_size"] == 20
    write_json(folder.parent / "classifier.json", {"classes": list("abcdefg"), "step": 3})
    assert facts_of(str(folder / "3"))["head"]["names"] == list("abcdefg")
    facts = facts_of(str(folder.parent))
    assert (facts["complete"], facts["chosen"], facts["head"]["names"]) == (True, 3, list("abcdefg"))
    text = [line.split() for line in as_text(facts).splitlines()]
    assert ["chosen", "step", "3"] in text and ["trained", "on", "digits"] in text
    assert ["licence", "CC-BY-NC-4.0", "(stated", "beside", "the", "weights)"] in text
    assert facts["kind"] == "fine-tuning" and facts["average"] == "exponential, 0.9"


def test_a_moved_fine_tuned_checkpoint_tells_its_architecture_and_classes(states, tmp_path):
    head = {"kernel": np.zeros((16, 3), np.float32), "bias": np.zeros(3, np.float32)}
    recipe = {"name": "mae-finetune", "pooling": "mean"}
    provenance = trained(OTHERS, None, stage="mae-finetune", recipe=recipe, trained_on="digits").as_dict()
    meta = {"stage": "mae-finetune", "classes": ["x", "y", "z"], "provenance": json.loads(json.dumps(provenance))}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"params": {"encoder": states["pretrain"].params["encoder"], "head": head}}, meta)
    checkpoints.close()
    facts = facts_of(str(tmp_path / "3"))
    assert facts["head"] == {"width": 16, "classes": 3, "names": ["x", "y", "z"]}
    assert (facts["encoder"]["depth"], facts["encoder"]["heads"], facts["trained_on"]) == (2, None, "digits")
    assert facts["license"] == "CC-BY-NC-4.0" and facts["derived_from"][0]["name"] == "mae.pth"


def test_a_state_that_no_stage_here_has_is_shown_by_its_tensors(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"model": {"w": np.zeros((2, 3), np.float32)}}, {})
    checkpoints.close()
    text = as_text(facts_of(str(tmp_path / "checkpoints" / "1")))
    assert "model/w" in text and "2 x 3" in text and "encoder" not in text


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("config.resolved.yaml", "a: [\n b"),
        ("pretrain/DONE.json", "{"),
        ("pretrain/DONE.json", "[]"),
        ("pretrain/DONE.json", '{"step": "../../x"}'),
        ("pretrain/checkpoints/12/meta/metadata", "[1]"),
        ("pretrain/checkpoints/12/meta/metadata", "{"),
        ("pretrain/checkpoints/12/state/_METADATA", '{"tree_metadata": 3}'),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(path, content, run, tmp_path):
    from maect_jax.commands import inspect

    shutil.copytree(run, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / path).write_text(content)
    whole = "METADATA" not in path
    with pytest.raises(CheckpointError) as caught:
        file = tmp_path / "run" if whole else tmp_path / "run" / "pretrain"
        inspect.main(inspect.argparse.Namespace(file=str(file), all=False, json=False))
    assert str(caught.value).isprintable() and str(tmp_path / "run") in str(caught.value)


def test_no_accelerator_is_started(run):
    """JAX is told to use one that is not there: what starts it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "maect_jax", "inspect", "--json", os.fspath(run / "tune")],
        cwd=ROOT,
        env=environment() | {"JAX_PLATFORMS": "made_up"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and json.loads(done.stdout)["step"] == 6
