"""Hostile weights files of some megabytes become models, or are refused, within a small multiple of their own size."""

import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from torch_files import torch

WIDTH, DEPTH = 256, 18
SIZES = {"norm1.weight": (WIDTH,), "norm1.bias": (WIDTH,), "norm2.weight": (WIDTH,), "norm2.bias": (WIDTH,)}
for _name, _out, _in in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
    SIZES |= {f"{_name}.weight": (_out * WIDTH, _in * WIDTH), f"{_name}.bias": (_out * WIDTH,)}
TOP = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 17, WIDTH), "patch_embed.proj.weight": (WIDTH, 3, 8, 8)}
TOP |= {"patch_embed.proj.bias": (WIDTH,), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
ENCODER = TOP | {f"blocks.{i}.{name}": shape for i in range(DEPTH) for name, shape in SIZES.items()}
COUNT = sum(map(np.prod, ENCODER.values()))  # 14 million: 28 MB of float16

# Opens files as a process that can not have more than `room` bytes beside what an honest file has made it take.
CHILD = """
import resource, sys
from maect_jax.errors import CheckpointError
from maect_jax.exchange.files import open_model
honest, room, *paths = sys.argv[1:]
open_model(honest, heads=1)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + int(room),) * 2)
for path in paths:
    try:
        print("read", open_model(path, heads=1).layout)
    except CheckpointError as error:
        print(error)
"""


def saved(path, storage, names=ENCODER):
    """A file of torch.save whose tensors are taken from a storage one after the other, again from its start at its
    end.
    """
    tensors, at = {}, 0
    for name in names:
        size = int(np.prod(ENCODER[name]))
        at = 0 if at + size > len(storage) else at
        tensors[name] = storage[at : at + size].view(ENCODER[name])
        at += size
    torch.save({"model": tensors}, path)
    return path


def packed(path, source):
    """The file with its storages packed, and beside them bytes that nothing packs, as many as hide how small it is."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
        other.writestr("shared/data/filler", os.urandom(COUNT // 3))
    return path


def opened(tmp_path, room: int, *paths) -> list[str]:
    """What opening each file says: 'read' and the layout, or why it is refused."""
    names = [name for name in ENCODER if not name.startswith("blocks.") or name.startswith("blocks.0.")]
    honest = saved(tmp_path / "honest", torch.ones(COUNT // 10).half(), names)
    arguments = map(str, (honest, room, *paths))
    ran = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_file_of_torch_becomes_a_model_in_five_times_its_size(tmp_path):
    """The most that is read: float16 of which each is twice in the model, as far as that is allowed."""
    most = saved(tmp_path / "most", torch.zeros(int(COUNT / 1.5) + 4000).half())
    shared = saved(tmp_path / "shared", torch.zeros(COUNT // 4).half())
    lines = opened(tmp_path, int(5.5 * most.stat().st_size), most, shared, packed(tmp_path / "packed", shared))
    assert lines[0] == "read mae_official_encoder"
    assert lines[1] == f"{tmp_path / 'shared'}: has tensors that share their bytes too often to be weights"
    assert lines[2].startswith(f"{tmp_path / 'packed'}: packs 'shared/data/0'")


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_packed_file_of_numpy_becomes_a_model_in_twelve_times_its_size(tmp_path):
    """The most that is read: float16 zeros, packed to nothing, and a third of noise beside them."""
    rng, files = np.random.default_rng(0), []
    for name, share in (("most", 0.37), ("more", 0.2)):
        noise, tensors = int(share * COUNT), {}
        for key, shape in ENCODER.items():
            take = noise > 0
            tensors[key] = rng.standard_normal(shape).astype("f2") if take else np.zeros(shape, "f2")
            noise -= tensors[key].size
        np.savez_compressed(tmp_path / f"{name}.npz", **tensors)
        files.append(tmp_path / f"{name}.npz")
    lines = opened(tmp_path, 12 * files[0].stat().st_size, *files)
    assert lines[0] == "read mae_official_encoder"
    assert "too many to be weights" in lines[1]
