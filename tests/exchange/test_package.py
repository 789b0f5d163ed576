"""The folder of a conversion: whole or not there, the same each time, and of use to those it is for."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import yaml
from test_transformers4 import ROOT

from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.exchange.export import card, package
from maect_jax.exchange.export.package import write_package
from maect_jax.exchange.export.proof import TOLERANCE, Proof, difference, ours, pictures
from maect_jax.exchange.export.targets import TARGETS
from maect_jax.exchange.files import open_model
from maect_jax.exchange.provenance import Provenance, from_dict
from models import photograph, random_model
from torch_files import torch

TIMM = TARGETS["timm"]
DECODED = {"mae", "hf-vitmae"}
RECIPE = {"seed": 3, "model": {"width": 48, "patch": 4}}


def the_model(**changes):
    origin = Provenance(license="CC-BY-NC-4.0", license_source="stated", recipe=RECIPE, stage="pretrain", step=7)
    return random_model(decoder=True, provenance=origin, **changes)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Folder and proof of each target."""
    root = tmp_path_factory.mktemp("packages")
    return {
        name: (root / name, write_package(the_model(), target, root / name, say=lambda line: None))
        for name, target in TARGETS.items()
    }


def read(folder) -> tuple[dict, dict]:
    """Tensors and notes of a package."""
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("name", TARGETS)
def test_folder_holds_weights_settings_preprocessing_card_and_their_proof(name, packages):
    folder, proof = packages[name]
    weights = "model.onnx" if name == "onnx" else "model.safetensors"
    assert {path.name for path in folder.iterdir()} == {weights, "config.json", "preprocessor_config.json", "README.md"}
    assert proof.differences.keys() >= {"tokens", "features"}
    assert ("predictions" in proof.differences) == (name in DECODED)
    assert max(proof.differences.values()) <= TOLERANCE
    text = (folder / "README.md").read_text()
    for output, largest in proof.differences.items():
        assert f"| `{output}` | {largest:.1e} |" in text
    for path in folder.iterdir():
        assert path.name == "README.md" or f"| `{path.name}` | {path.stat().st_size:,} | `" in text
    assert ("## What the decoder predicts" in text) == (name in DECODED)
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["library_name"]) == ("cc-by-nc-4.0", TARGETS[name].loader)


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"onnx"}))
def test_header_says_what_is_in_the_file_and_where_it_comes_from(name, packages):
    notes = read(packages[name][0])[1]
    said = json.loads(notes["maect_jax"])
    assert notes["format"] == "pt" and said["heads"] == 4
    assert said["provenance"]["license"] == "CC-BY-NC-4.0" and said["provenance"]["recipe"] == RECIPE
    assert ("decoder_heads" in said) == ("mask_ratio" in said) == (name in DECODED)


@pytest.mark.parametrize("name", TARGETS)
def test_lines_of_use_in_the_card_run(name, packages, tmp_path, monkeypatch):
    lines = re.search(r"```python\n(.*?)```", (packages[name][0] / "README.md").read_text(), re.DOTALL)[1]
    photograph().save(tmp_path / "picture.jpg")
    for path in packages[name][0].iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(lines, found)
    assert found["features"].shape == (1, 48)


# ------------------------------------------------------------------------------------------------------ all or nothing


def test_only_a_free_place_is_written_to(tmp_path, monkeypatch):
    file, full, volume = (tmp_path / name for name in ("file", "full", "volume"))
    file.write_text("x")
    (full / "x").mkdir(parents=True)
    volume.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == volume)
    for out, why in ((file, "is a file"), (full, "is not empty"), (volume, "is a mounted volume")):
        with pytest.raises(ConfigError, match=rf"--out: '{out}' {why}.*; give a "):
            write_package(random_model(), TIMM, out, prove=False)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "full", "x", "volume"}


def test_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    usual = (tmp_path / "empty").stat().st_mode
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        write_package(random_model(), TIMM, out, prove=False)
        assert (out / "model.safetensors").exists() and out.stat().st_mode == usual
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "a"}


class Broken:
    """A target, one function of which does something more."""

    def __init__(self, step, action, target=TIMM):
        self.step, self.action, self.target = step, action, target
        self.name, self.loader = target.name, target.loader

    def __getattr__(self, step):
        def does(*arguments):
            result = getattr(self.target, step)(*arguments)
            return self.action(result) if step == self.step else result

        return does


def raises(error):
    def action(*arguments, **options):
        raise error

    return action


def wrong(outputs):
    return outputs | {"tokens": outputs["tokens"] * 1.001}


def no_number(outputs):
    return outputs | {"features": np.full_like(outputs["features"], np.nan)}


@pytest.mark.parametrize(
    ("step", "action", "error", "says"),
    [
        ("check", raises(ConfigError("no such form")), ConfigError, "no such form"),
        ("write", raises(OSError(28, "No space left on device")), OSError, "No space"),
        ("write", raises(KeyboardInterrupt("stop")), KeyboardInterrupt, "stop"),
        ("outputs", raises(CheckpointError("1 missing")), CheckpointError, "1 missing"),
        ("outputs", raises(RuntimeError("odd\nversion")), CheckpointError, "timm can not run .*: odd version"),
        ("outputs", wrong, CheckpointError, r"--to timm: .*: tokens by 1\.0e-03 of .* 1e-05 is allowed"),
        ("outputs", no_number, CheckpointError, "features by nan"),
        ("usage", raises(ValueError("no lines")), ValueError, "no lines"),
    ],
)
def test_failing_target_leaves_nothing(step, action, error, says, tmp_path):
    with pytest.raises(error, match=says) as caught:
        write_package(random_model(), Broken(step, action), tmp_path / "out", say=lambda line: None)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_empty_folder_is_still_there_and_empty_after_a_failure(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="full"):
        write_package(random_model(), Broken("write", raises(OSError("full"))), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize("step", ["_preprocessing", "_shorten", "_evaluated_hash", "card.render"])
def test_failure_of_any_other_step_leaves_nothing(step, tmp_path, monkeypatch):
    where = card if step.startswith("card.") else package
    monkeypatch.setattr(where, step.removeprefix("card."), raises(MemoryError("here")))
    with pytest.raises(MemoryError, match="here"):
        write_package(the_model(), TIMM, tmp_path / "out", dtype="bfloat16", prove=False, records=[{"value": 1}])
    assert not list(tmp_path.rglob("*"))


def test_folder_that_comes_into_being_meanwhile_is_kept(tmp_path):
    def occupies(result):
        (tmp_path / "out" / "mine").mkdir(parents=True)

    with pytest.raises(OSError):
        write_package(the_model(), Broken("write", occupies), tmp_path / "out", prove=False)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["out", "mine"]


def test_what_a_file_says_of_itself_and_can_not_be_written_is_refused(tmp_path):
    nested: dict = {}
    for _ in range(900):
        nested = {"a": nested}
    for said, why in (({"recipe": nested}, "nested too deeply"), ({"license": "\ud800"}, "half characters")):
        with pytest.raises(CheckpointError, match=f"'tune': .*{why}"):
            write_package(random_model(provenance=from_dict(said)), TIMM, tmp_path / "out", prove=False)
    assert not list(tmp_path.iterdir())


def test_missing_library_is_told_in_one_line_without_paths(tmp_path):
    error = ImportError("timm can not be imported (ImportError: cannot import name 'x' from 'timm' (/home/me/timm.py))")
    proof = write_package(the_model(), Broken("outputs", raises(error)), tmp_path / "out", say=lambda line: None)
    assert proof == Proof(None, str(error))
    text = (tmp_path / "out" / "README.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("Not checked: ")]
    assert line == r"Not checked: timm can not be imported (ImportError\: cannot import name 'x' from 'timm …."
    assert "home" not in text and "largest relative difference" not in text


def test_proof_can_be_left_out(tmp_path):
    target = Broken("outputs", raises(AssertionError("it ran")))
    assert write_package(the_model(), target, tmp_path / "out", prove=False).differences is None
    assert "Not checked: " in (tmp_path / "out" / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------- short types


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["hf-vit", "mae", "maect"])
def test_every_tensor_is_rounded_once_to_the_type(name, dtype, packages, tmp_path):
    proof = write_package(the_model(), TARGETS[name], tmp_path / "out", dtype=dtype, say=lambda line: None)
    assert max(proof.differences.values()) <= TOLERANCE
    short, notes = read(tmp_path / "out")
    whole, notes_of_whole = read(packages[name][0])
    assert notes == notes_of_whole and short.keys() == whole.keys()
    assert {tensor.dtype for tensor in short.values()} == {np.dtype(getattr(ml_dtypes, dtype, dtype))}
    for key, tensor in short.items():
        expected = torch.from_numpy(whole[key]).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(tensor.astype(np.float32), expected, err_msg=key)
    assert f"from the weights rounded to {dtype}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["timm", "maect"])
def test_proof_of_a_short_type_is_that_of_the_written_weights(name, tmp_path):
    model, seen = random_model(learned_positions=True), {}
    target = Broken("outputs", lambda outputs: seen.update(outputs) or outputs, TARGETS[name])
    write_package(model, target, tmp_path / "out", dtype="bfloat16", say=lambda line: None)
    tokens_bnd = ours(open_model(tmp_path / "out").model, *pictures(model))["tokens"]
    assert difference(tokens_bnd, seen["tokens"]) <= TOLERANCE
    assert difference(ours(model, *pictures(model))["tokens"], seen["tokens"]) > 100 * TOLERANCE


def test_types_that_can_not_be_are_refused(tmp_path):
    model = the_model()
    token = {"cls_token": np.full((1, 1, 48), 1e5, np.float32)}
    big = dataclasses.replace(model, params=model.params | {"encoder": model.params["encoder"] | token})
    for target, dtype, subject, says in (
        ("timm", "float64", model, "--dtype: no type 'float64'; there is float32, bfloat16, float16"),
        ("onnx", "bfloat16", model, "--dtype bfloat16: --to onnx writes a graph in float32"),
        ("timm", "float16", big, "--dtype float16: 'tune' has weights beyond its range; take bfloat16 or float32"),
    ):
        with pytest.raises(ConfigError, match=says):
            write_package(subject, TARGETS[target], tmp_path / "out", dtype=dtype)
    assert not list(tmp_path.iterdir())
    write_package(big, TIMM, tmp_path / "out", dtype="bfloat16", prove=False)


# -------------------------------------------------------------------------------------------------------- equal results

AGAIN = """
import sys
sys.path[:0] = ["tests", "tests/exchange"]
from pathlib import Path
from maect_jax.exchange.export.package import write_package
from maect_jax.exchange.export.targets import TARGETS
from models import random_model
model = random_model(decoder=True)
for name, dtype in (("timm", "float32"), ("hf-vitmae", "float32"), ("mae", "bfloat16")):
    write_package(model, TARGETS[name], Path(sys.argv[1]) / f"{name}-{dtype}", dtype=dtype, prove=False)
"""


def test_another_process_writes_the_same_bytes(tmp_path):
    command, environment = [sys.executable, "-c", AGAIN, str(tmp_path)], os.environ | {"PYTHONHASHSEED": "17"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 3
    for folder in folders:
        name, dtype = folder.name.rsplit("-", 1)
        here = tmp_path / "here" / folder.name
        write_package(random_model(decoder=True), TARGETS[name], here, dtype=dtype, prove=False)
        for file in ("model.safetensors", "config.json", "preprocessor_config.json", "README.md"):
            assert (here / file).read_bytes() == (folder / file).read_bytes(), f"{folder.name}/{file}"
