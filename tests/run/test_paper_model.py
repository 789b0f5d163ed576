"""The paper's models pass through training and evaluation on this machine, with few pictures and updates."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from maect_jax.exchange.mapping import to_layout
from maect_jax.models.vit import SIZES, ViT
from runs import ROOT, environment, launch, lines, make_pictures


def test_vit_base_recipe_with_a_batch_of_eight(tmp_path):
    pictures = make_pictures(tmp_path / "pictures", size=64, train=4, test=1)
    small = [f"--config.{stage}.{key}" for stage in ("pretrain", "head", "tune") for key in ("batch=8", "epochs=1")]
    arguments = (f"--config.data.train={pictures}", *small, "--config.pretrain.warmup_epochs=0")
    quick = ("--config.data.workers=0", "--config.stages=pretrain,head,tune", "--config.log_every=1")
    done = launch(tmp_path / "run", *arguments, *quick, config="configs/mae_ct_vitb.py")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "tune" / "DONE.json").read_text())["step"] == 2
    losses = [(line["stage"], line["step"], line["loss"]) for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert [loss[:2] for loss in losses] == [(s, u) for s in ("pretrain", "head", "tune") for u in (1, 2)]
    assert all(0 < loss < 20 for *_, loss in losses)


def test_vit_large_of_random_weights_is_evaluated(tmp_path):
    pictures = make_pictures(tmp_path / "pictures", size=224, train=4, test=1)
    size, rng = SIZES["L/16"], np.random.default_rng(0)
    encoder = ViT(size.width, size.depth, size.heads, size.patch, 224)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 196, 768)))["params"]
    params = jax.tree.map(lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), shapes)
    file = tmp_path / "random_vit_large.safetensors"
    tensors = to_layout({"encoder": params}, "mae_official_encoder", patch=16, grid=14)
    safetensors.numpy.save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file)
    command = ["evaluate", "--weights", file, "--train", pictures, "--only", "knn,retrieval,health,pictures"]
    options = ["--batch", "4", "--dtype", "float32", "--workdir", tmp_path / "results"]
    done = subprocess.run(
        [sys.executable, "-m", "maect_jax", *map(str, command + options)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    file.unlink()
    assert done.returncode == 0, done.stderr
    records = lines(tmp_path / "results" / "results.jsonl")
    assert {record["model"]["depth"] for record in records} == {24}
    assert {"knn", "retrieval", "health"} == {record["evaluation"] for record in records}
    assert all(np.isfinite(record["value"]) for record in records)
