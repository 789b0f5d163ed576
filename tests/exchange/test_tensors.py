"""Weights files are told by content, and their tensors read with the types they have; what is hostile is refused."""

import io
import os
import socket
import struct
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from maect_jax.errors import CheckpointError
from maect_jax.exchange.files import open_model
from maect_jax.exchange.tensors import read_notes, read_tensors
from maect_jax.inspection.facts import facts_of
from torch_files import torch
from weight_files import random_tree, refusal, tensors_of, written


@pytest.fixture(scope="module")
def tree():
    return random_tree()


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


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    """To open a pipe would wait for a writer. This one has a writer, so that a reader that does open it fails."""
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    os.mkfifo("pipe")
    writer = os.open("pipe", os.O_RDWR)
    os.write(writer, struct.pack("<Q", 2) + b"{}" + bytes(1 << 14))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket")
    Path("link").symlink_to("pipe")
    try:
        for path in ("pipe", "socket", "link", "/dev/null", "."):
            for read in (read_tensors, read_notes, *([open_model, facts_of] if path != "." else [])):
                assert "is no regular file" in refusal(read, path)
    finally:
        os.close(writer)
        listener.close()
    safetensors.numpy.save_file({"w": np.ones(2)}, "x")
    Path("good").symlink_to("x")
    assert read_tensors("good")[0]["w"].tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["safetensors", "npz", "flat"])
def test_weights_that_are_not_finite_are_refused_by_name(kind, tree, tmp_path):
    tensors = tensors_of(tree, "mae_official_encoder")
    for value in (np.nan, np.inf, -np.inf):
        bias = np.full(24, value, np.float32)
        path = written(tmp_path, tensors | {"norm.bias": bias, "blocks.0.norm1.bias": bias}, kind)
        for read in (read_tensors, open_model):
            text = refusal(read, path)
            assert "NaN or infinity" in text and "'norm.bias'" in text and "'blocks.0.norm1.bias'" in text
        assert "norm.bias" in facts_of(path)["tensors"]
    (tmp_path / "short").mkdir()
    brain = {"w": np.full(3, np.inf, ml_dtypes.bfloat16), "n": np.arange(3), "b": np.ones(2, bool)}
    safetensors.numpy.save_file(brain, tmp_path / "short" / "x")
    assert refusal(read_tensors, tmp_path / "short" / "x").endswith("in 'w'")


def test_hostile_arrays_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    assert "an array of object in 'x.npy', not of real numbers" in refusal(read_tensors, path)
    np.savez(path, x=np.ones(3, ml_dtypes.bfloat16), y=np.ones(3, np.complex64))
    assert "an array of |V2 in 'x.npy'" in refusal(read_tensors, path)
    content = io.BytesIO()
    np.save(content, np.zeros(16))
    for shape in (b"(9999999999,)", b"(0, 9999999)", b"(-16, -1)", b"(15,)", b"()"):
        with zipfile.ZipFile(path, "w") as archive:
            header = content.getvalue()[:127].replace(b"(16,)", shape).rstrip().ljust(127) + b"\n"
            archive.writestr("x.npy", header + bytes(128))
        tracemalloc.start()
        assert "has 128 bytes in 'x.npy', and declares the shape" in refusal(read_tensors, path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
        tracemalloc.stop()
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


def test_hostile_headers_of_safetensors_are_refused(tmp_path):
    path, empty = tmp_path / "x", '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    for header, why in (
        (",".join(f'"{i}":{empty}' for i in range(20_001)), "it holds 20001 tensors; at most 20000"),
        ('"w":{"dtype":"F8_E4M3","shape":[0],"data_offsets":[0,0]}', "types that are not read: 'w': F8_E4M3"),
        ('"w":{"dtype":"C64","shape":[0],"data_offsets":[0,0]}', "types that are not read: 'w': C64"),
        (f'"w":{empty}' + " " * (1 << 24), "is neither safetensors"),
    ):
        path.write_bytes(struct.pack("<Q", len(header) + 2) + b"{" + header.encode() + b"}")
        assert why in refusal(read_tensors, path)
    os.truncate(path, 1 << 40)  # a sparse file: it takes no place on the disk
    assert "at most 68719476736 are read" in refusal(read_tensors, path)


def test_what_a_file_says_beside_its_tensors(tree, tmp_path):
    tensors = tensors_of(tree, "mae_official_encoder")
    notes = read_notes(written(tmp_path, tensors, "training"))
    assert notes == {"optimizer": "dict", "epoch": 3, "scaler": "dict", "args": "argparse.Namespace"}
    assert read_notes(written(tmp_path, tensors, "flat")) == {}
    assert read_notes(written(tmp_path, tensors, "npz")) == {}
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "x", {"format": "pt"})
    assert read_notes(tmp_path / "x") == {"format": "pt"}
