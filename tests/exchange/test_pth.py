"""PyTorch files: what torch.save writes is read exactly, and a damaged file is refused in one line."""

import argparse
import collections
import datetime
import functools
import pickle
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from maect_jax.errors import CheckpointError
from maect_jax.exchange.pth import Opaque, read_pth
from maect_jax.exchange.tensors import read_tensors
from torch_files import crafted, refusal, saved, torch

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def equal(array, tensor) -> bool:
    """Whether shape, type and every bit are the tensor's."""
    bits = tensor.contiguous().view(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)
    name = str(tensor.dtype).removeprefix("torch.")
    return array.shape == tuple(tensor.shape) and array.dtype.name == name and array.tobytes() == bits.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_read_bit_for_bit(dtype, tmp_path):
    x = torch.tensor(np.random.default_rng(0).normal(size=(3, 4, 5)) * 50).to(getattr(torch, dtype))
    read = read_pth(saved(tmp_path, {"x": x, "one": x[0, 0, 0], "none": x[:0]}))
    assert equal(read["x"], x) and equal(read["one"], x[0, 0, 0]) and equal(read["none"], x[:0])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_training_checkpoint_is_read_whatever_else_it_holds(protocol, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scaler": {"scale": 65536.0, "growth": None, "on": True, "names": ["a", ("b", -1, 2**40)], "raw": b"\x00\xff"},
        "args": argparse.Namespace(lr=1e-3, output_dir=Path("x"), betas=(0.9, 0.95)),
        "loss": np.float64(0.5),
        "classes": {3, 4},
        "keys": {(1, 2): "tuple"},
        "counts": collections.defaultdict(int, {"a": 1}),
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "criterion": functools.partial(pow, exp=2),
        "schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10).state_dict(),
        "amp": torch.amp.GradScaler("cpu").state_dict(),
        "random": {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()},
        "numpy": [np.arange(3), np.int64(3), np.random.default_rng(0)],
        "history": collections.deque([1, 2]),
        "when": datetime.datetime(2024, 1, 2),
        "complex": 1j,
        "module": torch.nn.Linear(2, 2),
    }
    read = read_pth(saved(tmp_path, content, pickle_protocol=protocol))
    assert read["epoch"] == 3
    assert {k: v for k, v in read["scaler"].items() if k != "raw"} == {
        k: v for k, v in content["scaler"].items() if k != "raw"
    }
    assert list(read["model"]) == list(content["model"])
    assert all(equal(read["model"][name], tensor) for name, tensor in content["model"].items())
    for i, moments in content["optimizer"]["state"].items():
        assert equal(read["optimizer"]["state"][i]["exp_avg"], moments["exp_avg"])
    assert read["args"].name == "argparse.Namespace" and read["counts"].name == "collections.defaultdict"
    opaque = ("loss", "classes", "device", "size", "dtype", "criterion", "history", "when", "complex", "module")
    assert all(isinstance(read[name], Opaque) for name in opaque)
    assert read["size"].name == "torch.Size" and read["dtype"].name == "torch.bfloat16"
    assert read["amp"] == content["amp"] and read["schedule"]["T_max"] == 10
    assert equal(read["random"]["torch"], content["random"]["torch"])
    assert read["random"]["python"] == random.getstate()
    assert all(isinstance(value, Opaque) for value in read["numpy"])


def test_views_parameters_and_shared_storages(tmp_path):
    x = torch.arange(60.0).reshape(3, 4, 5)
    content = {
        "transposed": x.permute(2, 0, 1),
        "strided": x[1:, ::2, 1::3],
        "parameter": torch.nn.Parameter(x[1]),
        "half": x.flatten()[30:],
        "last": x[2, 3, 4],
        "nothing at the end": x.flatten()[60:],
        "nothing in the middle": x[:, 2:2],
    }
    read = read_pth(saved(tmp_path, content))
    assert all(equal(read[name], tensor.detach()) for name, tensor in content.items())
    assert np.shares_memory(read["half"], read["strided"])
    assert not read["half"].flags.writeable


def test_tensors_that_no_numpy_array_stands_for_are_named(tmp_path):
    ones = torch.ones(2)
    float8, complex_, tagged = ones.to(torch.float8_e4m3fn), ones.to(torch.complex64), torch.nn.Parameter(ones)
    tagged.tag = "x"
    for tensor, kind in (
        (torch._neg_view(ones), "_rebuild_tensor_v2 of torch.FloatStorage"),
        (complex_, "_rebuild_tensor_v2 of torch.ComplexFloatStorage"),
        (torch.nn.Parameter(complex_), "_rebuild_tensor_v2 of torch.ComplexFloatStorage"),
        (float8, "_rebuild_tensor_v3 of torch.float8_e4m3fn"),
        (torch.arange(2).to(torch.uint16), "_rebuild_tensor_v3 of torch.uint16"),
        (torch.eye(2).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.ones(2, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (tagged, "_rebuild_parameter_with_state"),
    ):
        path = saved(tmp_path, {"w": ones, "v": tensor})
        assert read_pth(path)["v"].name == f"torch._utils.{kind}"
        assert f"may be weights and is not read here: 'v': 'torch._utils.{kind}'" in refusal(path, read_tensors)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_storages_without_a_shape_are_opaque(tmp_path):
    read = read_pth(saved(tmp_path, {"typed": torch.storage.TypedStorage([1.0]), "untyped": torch.UntypedStorage(3)}))
    assert isinstance(read["typed"], Opaque) and read["typed"].name == "torch.FloatStorage"
    assert read["untyped"].name == "torch.storage.UntypedStorage"


def test_only_the_part_asked_for_is_read_from_the_disk(tmp_path):
    path = saved(tmp_path, {"model": {"w": torch.ones(3)}, "optimizer": {"m": torch.full((1000,), 7.0)}})
    damaged = path.read_bytes().replace(struct.pack("<f", 7.0) * 1000, struct.pack("<f", 8.0) * 1000)
    path.write_bytes(damaged)
    assert read_pth(path, part=lambda tree: tree["model"])["w"].tolist() == [1, 1, 1]
    assert "CRC" in refusal(path)


def test_files_that_are_not_read_say_what_to_do(tmp_path):
    path = saved(tmp_path, {"x": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert "torch.save(torch.load(file, weights_only=True), new_file)" in refusal(path)
    assert "'torch.nn.modules.linear.Linear', not a dictionary" in refusal(saved(tmp_path, torch.nn.Linear(2, 2)))
    (tmp_path / "text.pth").write_text("<html>404</html>")
    assert "not a zip archive" in refusal(tmp_path / "text.pth")
    assert "No such file" in refusal(tmp_path / "absent.pth")
    assert "little-endian" in refusal(crafted(tmp_path, pickle.dumps({}, 2), byteorder=b"big"))


def small(tmp_path):
    """A file of torch.save with a bit of everything, and its content."""
    content = {
        "model": {"w": torch.randn(4, 3), "b": torch.ones(3, dtype=torch.bfloat16).t(), "n": torch.tensor(3)},
        "args": argparse.Namespace(a=1, b=[1.5, None, "x"]),
        "epoch": 7,
    }
    path = saved(tmp_path, content)
    return path, path.read_bytes()


def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path):
    path, content = small(tmp_path)
    for cut in range(0, len(content), 7):
        path.write_bytes(content[:cut])
        refusal(path)


def test_every_error_is_one_printable_line(tmp_path):
    odd = tmp_path / "a\nb\x1b[31m.pth"
    odd.write_bytes(b"PK")
    with pytest.raises(CheckpointError) as error:
        read_pth(odd)
    assert str(error.value) == f"{tmp_path}/a?b?[31m.pth: is no file of torch.save (not a zip archive)"
    assert "Is a directory" in refusal(tmp_path)

    def greedy(tree):
        raise MemoryError

    path, _ = small(tmp_path)
    assert "more memory than there is" in refusal(path, lambda path: read_pth(path, part=greedy))
