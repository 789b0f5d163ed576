"""Weights files become encoders: told by content, fitted name for name, and the model computes what it did before."""

import argparse
import hashlib
import io
import struct
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.exchange.files import open_encoder, read_tensors
from maect_jax.exchange.layouts import LAYOUTS, to_layout
from maect_jax.models.vit import ViT
from small import encoder_of, mae_tree
from torch_files import torch

CFG = dict(img_size=32, patch_size=8, dim=24, depth=3, heads=2, decoder_dim=16, decoder_depth=2, decoder_heads=2)
ENCODERS = [layout for layout in LAYOUTS if not layout.startswith("maect_head")]
SAME_NAMES = {"timm_mae": "mae_official_encoder"}


@pytest.fixture(scope="module")
def tree():
    """A small masked autoencoder whose every leaf is random."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: mae_tree(CFG))
    return jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), shapes)


def tensors_of(tree, layout) -> dict[str, np.ndarray]:
    part = tree if layout.endswith(("full", "pretraining")) else {"encoder": tree["encoder"]}
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
            "state_dict": {"state_dict": state, "ctor_kwargs": {"depth": 3}},
            "training": training,
        }
        torch.save(contents[kind], file)
    return file


def refusal(read, path, error=CheckpointError, **options) -> str:
    with pytest.raises(error) as caught:
        read(path, **options)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("kind", ["safetensors", "npz", "flat", "state_dict", "training"])
def test_every_kind_of_file_gives_the_same_tensors(kind, tree, tmp_path):
    tensors = tensors_of(tree, "mae_official_full")
    read, found = read_tensors(written(tmp_path, tensors, kind))
    assert found == (kind if kind in ("safetensors", "npz") else "torch")
    assert read.keys() == tensors.keys()
    assert all(np.array_equal(read[name], x) and read[name].dtype == x.dtype for name, x in tensors.items())


def test_short_floats_keep_their_type(tmp_path):
    tensors = {"half": np.ones(3, np.float16), "brain": np.arange(3).astype(ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(tensors, tmp_path / "a")
    torch.save({"half": torch.ones(3).half(), "brain": torch.arange(3).bfloat16()}, tmp_path / "b")
    for name in "ab":
        read, _ = read_tensors(tmp_path / name)
        assert all(read[k].dtype == x.dtype and np.array_equal(read[k], x) for k, x in tensors.items())


def test_torch_files_that_hold_no_state_dictionary_say_what_they_hold(tmp_path):
    ones, path = {"w": torch.ones(2)}, tmp_path / "x"
    for content, why in (
        ({"model": torch.nn.Linear(2, 2), "epoch": 1}, "'model': 'torch.nn.modules.linear.Linear', 'epoch': 'int'"),
        ({"model": ones, "state_dict": ones}, "both 'model' and 'state_dict'"),
        ({"a": {"b": ones}}, "no tensors by name, but 'a': 'dict'"),
        (ones | {"v": torch.eye(2).to_sparse()}, "'v': 'torch._utils._rebuild_sparse_tensor'"),
        ({"state_dict": ones | {3: torch.ones(2)}}, "may be weights and is not read here: 3:"),
    ):
        torch.save(content, path)
        assert why in refusal(read_tensors, path)


def test_files_of_no_kind_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for content, why in ((b"", "is neither"), (b"<!DOCTYPE html>", "is neither"), (b"\x80\x02}.", "bare pickle")):
        path.write_bytes(content)
        assert why in refusal(read_tensors, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/weights.txt", "1 2 3")
    assert "has a member 'model/weights.txt'" in refusal(read_tensors, path)
    assert "No such file" in refusal(read_tensors, tmp_path / "absent")


def test_hostile_arrays_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    assert "Object arrays cannot be loaded" in refusal(read_tensors, path)
    content = io.BytesIO()
    np.save(content, np.zeros(16))
    for old, new in ((b"(16,)", b"(1<<9,)"), (b"(16,)", b"(9" + b"9" * 20 + b",)"), (b"{'descr'", b"{'descr(")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content.getvalue().replace(old, new))
        refusal(read_tensors, path)


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_flipped_bytes_and_cuts_are_read_or_refused(kind, tmp_path):
    path = written(tmp_path, {"w": np.ones((4, 3), np.float32), "n": np.arange(5)}, kind)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for i in range(400):
        changed = bytearray(content)
        for at in rng.integers(len(changed), size=rng.integers(1, 4)):
            changed[at] = rng.integers(256)
        path.write_bytes(changed if i % 4 else content[: rng.integers(len(content))])
        try:
            read_tensors(path)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()


def test_overlapping_safetensors_are_refused(tmp_path):
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    assert "no safetensors file" in refusal(read_tensors, tmp_path / "x")


# -------------------------------------------------------------------------------------------------------------- encoder


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *((layout, "safetensors") for layout in ENCODERS),
        ("mae_official_full", "training"),
        ("maect_encoder", "state_dict"),
    ],
)
def test_the_encoder_from_a_file_computes_what_the_original_does(layout, kind, tree, tmp_path):
    path = written(tmp_path, tensors_of(tree, layout), kind)
    opened = open_encoder(path, heads=2)
    sizes = (opened.width, opened.depth, opened.heads, opened.patch, opened.image_size, opened.channels)
    assert sizes == (24, 3, 2, 8, 32, 3)
    assert opened.layout == SAME_NAMES.get(layout, layout)
    assert opened.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (opened.decoder is not None) == layout.endswith(("full", "pretraining"))
    patches = jnp.asarray(np.random.default_rng(1).standard_normal((2, 16, 192)), jnp.float32)
    model = ViT(opened.width, opened.depth, opened.heads, opened.patch, opened.image_size)
    expected = jax.jit(encoder_of(CFG).apply)({"params": tree["encoder"]}, patches)
    np.testing.assert_array_equal(jax.jit(model.apply)({"params": opened.params}, patches), expected)
    if opened.decoder is not None:
        assert jax.tree.all(jax.tree.map(np.array_equal, opened.decoder, tree["decoder"]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_floats_become_float32(dtype, tree, tmp_path):
    state = {name: torch.tensor(x).to(getattr(torch, dtype)) for name, x in tensors_of(tree, "maect_encoder").items()}
    torch.save(state, tmp_path / "x.th")
    opened = open_encoder(tmp_path / "x.th", heads=2)
    kernel = opened.params["blocks"]["fc1"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[1], state["blocks.1.mlp.fc1.weight"].T.float().numpy())


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_heads_are_those_of_the_published_models(width, heads, tmp_path):
    model = ViT(width, 1, heads, 4, 4)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1, 48)))["params"])
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float16), shapes)
    path = tmp_path / "x"
    np.savez(path, **to_layout({"encoder": zeros}, "timm_mae", patch=4, grid=1))
    assert open_encoder(f"{path}.npz").heads == heads


def test_heads_and_picture_size_are_checked_against_the_file(tree, tmp_path):
    path = written(tmp_path, tensors_of(tree, "maect_encoder"), "safetensors")
    assert "heads: " in refusal(open_encoder, path, ConfigError)
    assert "5 does not divide" in refusal(open_encoder, path, ConfigError, heads=5)
    assert "image_size: 30" in refusal(open_encoder, path, ConfigError, heads=2, image_size=30)
    assert open_encoder(path, heads=2, image_size=64).image_size == 64


def test_what_differs_from_the_nearest_layout_is_counted_and_listed(tree, tmp_path):
    tensors = tensors_of(tree, "mae_official_encoder")
    finetuned = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: x for name, x in tensors.items()
    }
    text = refusal(
        open_encoder, written(tmp_path, finetuned | {"head.weight": np.ones((5, 24), np.float32)}, "training")
    )
    assert "mae_official_encoder: 2 missing: norm.bias, norm.weight; 3 unexpected: fc_norm.bias" in text
    prefixed = {f"module.{name}": x for name, x in tensors.items()}
    text = refusal(open_encoder, written(tmp_path, prefixed, "flat"))
    assert "42 unexpected: module.blocks.0.attn.proj.bias" in text and "and 38 more" in text
    narrow = tensors | {"blocks.1.mlp.fc1.bias": np.ones(95, np.float32)}
    text = refusal(open_encoder, written(tmp_path, narrow, "npz"))
    assert "1 misshaped: blocks.1.mlp.fc1.bias: (95,), expected (96,)" in text


def test_weights_that_the_model_would_not_compute_with_are_refused(tree, tmp_path):
    tensors = tensors_of(tree, "hf4_pretraining")
    table = "vit.embeddings.position_embeddings"
    learned = tensors | {table: tensors[table] + np.float32(1e-3)}
    assert f"{table} differs from the fixed" in refusal(open_encoder, written(tmp_path, learned, "npz"), heads=2)
    close = tensors | {table: tensors[table] + np.float32(5e-6)}
    assert open_encoder(written(tmp_path, close, "npz"), heads=2).image_size == 32
    integers = tensors | {"vit.layernorm.bias": np.zeros(24, np.int64)}
    assert "no real numbers: vit.layernorm.bias" in refusal(open_encoder, written(tmp_path, integers, "flat"), heads=2)
    tensors = tensors_of(tree, "timm_mae")
    double = {n: np.repeat(x, 2, axis=int("fc2" in n)) for n, x in tensors.items() if "fc1" in n or "fc2.w" in n}
    assert "MLP is 192 wide" in refusal(open_encoder, written(tmp_path, tensors | double, "npz"), heads=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"pos_embed": np.zeros((1, 17, 0), np.float32)},
        {"pos_embed": np.zeros((17, 24), np.float32)},
        {"pos_embed": np.zeros((1, 20, 24), np.float32)},
        {"patch_embed.proj.weight": np.zeros((24, 3, 0, 0), np.float32)},
        {"patch_embed.proj.weight": np.zeros((24, 3, 8, 4), np.float32)},
        {"blocks.999.norm1.bias": np.zeros(24, np.float32)},
        {f"blocks.{'9' * 5000}.norm1.bias": np.zeros(24, np.float32)},
        {"cls_token": np.zeros((), np.float32)},
    ],
    ids=lambda changes: next(iter(changes))[:30],
)
def test_shapes_and_names_made_to_confuse_are_refused(changes, tree, tmp_path):
    path = written(tmp_path, tensors_of(tree, "timm_mae") | changes, "npz")
    assert "fits no known layout" in refusal(open_encoder, path, heads=2)
