"""Weights files of each kind, for tests of reading them."""

import argparse

import jax
import numpy as np
import pytest
import safetensors.numpy

from maect_jax.errors import CheckpointError
from maect_jax.exchange.layouts import LAYOUTS
from maect_jax.exchange.mapping import to_layout
from small import mae_tree
from torch_files import torch

CFG = dict(img_size=32, patch_size=8, dim=24, depth=3, heads=2, decoder_dim=16, decoder_depth=2, decoder_heads=2)


def random_tree() -> dict:
    """A small masked autoencoder, `fc_norm`, head and pooler, whose every leaf is random."""
    rng = np.random.default_rng(0)
    linear = {"kernel": np.zeros((24, 5)), "bias": np.zeros(5)}
    parts = {"fc_norm": {"scale": np.zeros(24), "bias": np.zeros(24)}, "head": linear, "pooler": linear}
    shapes = jax.eval_shape(lambda: mae_tree(CFG)) | parts
    return jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), shapes)


def tensors_of(tree: dict, layout: str) -> dict[str, np.ndarray]:
    """The parts of the tree that a layout has rows for, as its tensors."""
    paths = [row.path for row in LAYOUTS[layout] if row.path]
    part = {name: tree[name] for name in {path.split(".")[0] for path in paths}}
    if "encoder.norm.scale" not in paths:
        part["encoder"] = {name: leaf for name, leaf in part["encoder"].items() if name != "norm"}
    return {name: np.array(x) for name, x in to_layout(part, layout, patch=8, grid=4).items()}


def written(path, tensors, kind):
    """The tensors in a file of `kind`, under a name that tells nothing."""
    file = path / "weights"
    if kind == "safetensors":
        safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file)
    elif kind == "npz":
        with open(file, "wb") as stream:
            np.savez(stream, **tensors)
    else:
        state = {name: torch.tensor(x) for name, x in tensors.items()}
        args = argparse.Namespace(lr=1e-3)
        moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
        training = {"model": state, "optimizer": moments, "epoch": 3, "scaler": {"scale": 2.0}, "args": args}
        contents = {
            "flat": state,
            "model": {"model": state},
            "state_dict": {"state_dict": state, "ctor_kwargs": {"depth": 3}},
            "training": training,
        }
        torch.save(contents[kind], file)
    return file


def refusal(read, path, error=CheckpointError, **options) -> str:
    """The sentence with which a file is refused: one printable line that names it."""
    with pytest.raises(error) as caught:
        read(path, **options)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)
