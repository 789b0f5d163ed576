"""A run that starts from anybody's weights file learns what one does that starts from the same weights of its own."""

import hashlib
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from needed import needed

from maect_jax.exchange.mapping import to_layout
from runs import launch, maect, make_pictures

torch = needed("torch")  # writes the files that these runs start from


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, pictures):
    """A run of our own that has pre-trained and trained a head on it."""
    workdir = tmp_path_factory.mktemp("earlier")
    done = launch(workdir, f"--config.data.train={pictures}", "--config.stages=pretrain,head")
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def params(earlier):
    """What the earlier run's pre-training ended with: encoder and decoder."""
    from etils import epath

    from maect_jax.handover import read_stage
    from maect_jax.parallel.mesh import make_mesh

    parts, _ = read_stage(epath.Path(earlier) / "pretrain", make_mesh(devices=jax.devices()[:1]))
    return jax.tree.map(np.asarray, parts["params"])


@pytest.fixture(scope="module")
def official(tmp_path_factory, params):
    """The same in a file of the form of MAE's full checkpoints."""
    tensors = to_layout(params, "mae_official_full", patch=4, grid=4)
    path = tmp_path_factory.mktemp("files") / "mae_full.pth"
    torch.save({"model": {name: torch.tensor(np.array(x)) for name, x in tensors.items()}}, path)
    return path


def refused(done) -> str:
    assert done.returncode in (2, 4) and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def weights_of(workdir, stage) -> str:
    return json.loads((workdir / stage / "DONE.json").read_text())["weights"]


def head_of(workdir) -> dict:
    from etils import epath

    from maect_jax.parallel.mesh import make_mesh, replicated
    from maect_jax.training.checkpoint import newest_step_folder, read_arrays

    folder = newest_step_folder(epath.Path(workdir) / "head")
    return read_arrays(folder, ("params", "queue"), replicated(make_mesh(devices=jax.devices()[:1])))


def provenance_of(workdir, stage) -> dict:
    from etils import epath

    from maect_jax.training.checkpoint import newest_step_folder, read_meta

    return read_meta(newest_step_folder(epath.Path(workdir) / stage))["provenance"]


def test_a_head_on_a_file_is_the_head_on_the_run_that_it_came_from(tmp_path, pictures, earlier, official):
    options = (f"--config.data.train={pictures}", "--config.stages=head,tune,evaluate", "--config.evaluate.only=knn")
    done = launch(tmp_path, f"--config.init_from={official}", *options)
    assert done.returncode == 0, done.stderr
    assert "starts from" in done.stdout and "mae_official_full" in done.stdout
    mine, theirs = head_of(tmp_path), head_of(earlier)
    assert jax.tree.all(jax.tree.map(np.array_equal, mine, theirs))
    first = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])  # what tuning is compared with
    assert first["stage"] == "pretrain" and first["weights"]["sha256"] == weights_of(earlier, "pretrain")
    tuned = provenance_of(tmp_path, "tune")
    origins = [origin["name"] for origin in tuned["derived_from"]]
    assert origins == ["tiny", "mae_full.pth"] and tuned["license"] == "unknown"
    assert tuned["derived_from"][1]["layout"] == "mae_official_full" and len(tuned["derived_from"][1]["sha256"]) == 64
    assert str(pictures.parent) not in json.dumps(tuned) and str(official.parent) not in json.dumps(tuned)
    own = provenance_of(earlier, "head")
    assert own["license"] == "unstated" and own["license_source"] == "trained from scratch"
    assert own["derived_from"][0]["sha256"] == weights_of(earlier, "pretrain")


def test_pre_training_goes_on_with_a_decoder_or_with_an_allowed_fresh_one(
    tmp_path, pictures, earlier, official, params
):
    options = (f"--config.data.train={pictures}", "--config.stages=control")
    by_file = launch(tmp_path / "file", f"--config.init_from={official}", *options)
    by_run = launch(tmp_path / "run", f"--config.init_from={earlier}", *options)
    assert (by_file.returncode, by_run.returncode) == (0, 0), by_file.stderr + by_run.stderr
    assert weights_of(tmp_path / "file", "control") == weights_of(tmp_path / "run", "control")
    folder = tmp_path / "encoder"
    folder.mkdir()
    tensors = to_layout({"encoder": params["encoder"]}, "hf4_encoder", patch=4, grid=4)
    whole = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    safetensors.numpy.save_file(whole, folder / "model.safetensors")
    text = refused(launch(tmp_path / "fresh", f"--config.init_from={folder}", *options))
    assert "has no decoder" in text and "--config.allow_missing='decoder/*'" in text
    done = launch(tmp_path / "fresh", f"--config.init_from={folder}", "--config.allow_missing=decoder/*", *options)
    assert done.returncode == 0, done.stderr
    assert weights_of(tmp_path / "fresh", "control") != weights_of(tmp_path / "run", "control")


def test_every_setting_that_the_file_has_otherwise_is_named_before_training(tmp_path, pictures, official):
    changes = ("--config.model.depth=3", "--config.model.patch=8", "--config.model.positions=learned")
    options = (f"--config.data.train={pictures}", f"--config.init_from={official}", *changes)
    text = refused(launch(tmp_path / "a", *options, "--config.stages=head"))
    for setting in ("set --config.model.depth=2", "set --config.model.patch=4", "set --config.model.positions=fixed"):
        assert setting in text
    assert not (tmp_path / "a").exists()
    options = (f"--config.data.train={pictures}", f"--config.init_from={official}")
    assert "add the stages between" in refused(launch(tmp_path / "b", *options, "--config.stages=tune"))


def test_a_run_from_our_own_export_names_the_file_and_what_it_came_from(tmp_path, pictures, earlier):
    done = maect("convert", "--to", "mae", "--weights", earlier / "pretrain", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    options = (f"--config.data.train={pictures}", f"--config.init_from={tmp_path / 'out'}", "--config.stages=control")
    text = refused(launch(tmp_path / "a", *options, "--config.pretrain.normalise_pixels=False"))
    assert "set --config.pretrain.normalise_pixels=True" in text
    done = launch(tmp_path / "a", *options)
    assert done.returncode == 0, done.stderr
    (origin,) = provenance_of(tmp_path / "a", "control")["derived_from"]
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert origin["sha256"] == hashlib.sha256(content).hexdigest() and origin["name"] == "out"
    assert (origin["stage"], origin["layout"]) == ("pretrain", "mae_official_full")


def test_learned_positions_are_kept_through_the_stages_and_resized_for_other_pictures(tmp_path, pictures, params):
    table = np.random.default_rng(0).standard_normal((1, 17, 16)).astype(np.float32)
    tensors = to_layout({"encoder": params["encoder"] | {"pos_embed": table}}, "timm_mae", patch=4, grid=4)
    path = tmp_path / "vit.safetensors"
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    options = (f"--config.data.train={pictures}", f"--config.init_from={path}", "--config.stages=head,tune,evaluate")
    assert "set --config.model.positions=learned" in refused(launch(tmp_path / "a", *options))
    options += ("--config.model.positions=learned", "--config.evaluate.only=knn")
    done = launch(tmp_path / "a", *options)
    assert done.returncode == 0, done.stderr

    from maect_jax.parallel.mesh import make_mesh
    from maect_jax.weights import Instead, open_weights

    mesh = make_mesh(devices=jax.devices()[:1])
    tuned = open_weights(str(tmp_path / "a" / "tune"), mesh)[0].load()
    np.testing.assert_array_equal(tuned["pos_embed"], table)
    larger = open_weights(str(tmp_path / "a" / "tune"), mesh, Instead(image_size=24))[0]
    assert larger.load()["pos_embed"].shape == (1, 37, 16)
    assert larger.origin["notes"][0].startswith("learned positions resized from 4 x 4 to 6 x 6 patches")
    done = launch(tmp_path / "b", *options, "--config.model.image_size=24")
    assert done.returncode == 0 and "learned positions resized from 4 x 4 to 6 x 6 patches: bicubic" in done.stdout, (
        done.stderr
    )
