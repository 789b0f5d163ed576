"""PyTorch files made to harm: nothing in them is executed, taken on trust or unpacked without bound."""

import argparse
import contextlib
import copyreg
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from maect_jax.errors import CheckpointError
from maect_jax.exchange.archive import Archive
from maect_jax.exchange.pth import read_pth
from torch_files import attempt, crafted, refusal, saved, torch

# ----------------------------------------------------------------------------------------------------- hostile programs


class Reduced:
    """Pickles as a call: function, arguments, and what may follow them."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


class Spawning:
    """A class that runs a command as soon as an object of it is made."""

    def __new__(cls, command):
        os.system(command)
        return super().__new__(cls)


def word(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def programs(command: str) -> dict[str, bytes]:
    """Pickles that run the shell command when they are unpickled."""
    python = f"__import__('os').system({command!r})"
    call = b"cos\nsystem\n" + word(command) + b"\x85R"
    shell = b"csubprocess\ncall\n](" + word("sh") + word("-c") + word(command) + b"e\x85"
    spawning = f"c{__name__}\nSpawning\n".encode() + word(command) + b"\x85"
    return {
        "reduce": pickle.dumps({"model": Reduced(os.system, (command,))}, 2),
        "stack global": pickle.dumps({"model": Reduced(os.system, (command,))}, 4),
        "eval": pickle.dumps({"model": Reduced(eval, (python,))}, 2),
        "nested": pickle.dumps({"a": [({"b": Reduced(exec, (python,))},)]}, 2),
        "state": pickle.dumps({"a": Reduced(argparse.Namespace, (), {"x": Reduced(os.system, (command,))})}, 2),
        "items": pickle.dumps({"a": Reduced(list, (), None, iter([Reduced(os.system, (command,))]))}, 2),
        "arguments of an ordered dictionary": b"\x80\x02ccollections\nOrderedDict\n" + call + b"0)R.",
        "key of a dictionary": b"\x80\x02}" + call + b"Ns.",
        "memo": b"\x80\x02}cos\nsystem\nq\x010" + word("a") + b"h\x01" + word(command) + b"\x85Rs.",
        "list of arguments": b"\x80\x02}" + word("a") + shell + b"Rs.",
        "instance": b"(" + word(command) + b"ios\nsystem\n.",
        "object": b"(cos\nsystem\n" + word(command) + b"o.",
        "new object": b"\x80\x02}" + word("a") + spawning + b"\x81s.",
        "new object with keywords": b"\x80\x04}" + word("a") + spawning + b"}\x92s.",
        "extension": b"\x80\x02}" + word("a") + b"\x82\xf0" + word(command) + b"\x85Rs.",
    }


@pytest.fixture
def extension():
    copyreg.add_extension("posix", "system", 0xF0)
    yield
    copyreg.remove_extension("posix", "system", 0xF0)


@pytest.mark.parametrize("kind", programs(""))
def test_no_program_in_a_pickle_is_run(kind, extension, tmp_path):
    ran = tmp_path / "ran"
    program = programs(f"touch {ran}")[kind]
    attempt(crafted(tmp_path, program))
    assert not ran.exists()
    with contextlib.suppress(TypeError):  # of the call's result, after the call
        pickle.loads(program)
    assert ran.exists()  # the program is what it claims to be


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (b"(" + word("touch x") + b"ios\nsystem\n.", "opcode INST"),
        (b"\x80\x02}" + word("a") + b"\x82\xf0s.", "opcode EXT1"),
        (b"\x80\x02(X\x01\0\0\0acos\nsystem\nX\x01\0\0\0bX\x01\0\0\0cK\x01tQ.", "persistent id"),
        (b"P0\n.", "opcode PERSID"),
        (b"\x80\x02}", "exhausted before seeing STOP"),
        (b"\x80\x02}h\x05s.", "KeyError"),
        (b"\x80\x02s.", "IndexError"),
        (b"\x80\x02}X\xff\xff\xff\xff.", "expected 4294967295 bytes"),
        (b"\x80\x02]q\0h\0a" + b"0}" + word("a") + b"h\0s.", "holds itself"),
        (b"\x80\x02}" + word("a") + b"]" * 100 + b"a" * 99 + b"s.", "nested more than 64"),
        (b"\x80\x02" + b"N0" * 600_000 + b"}.", "more than 1000000 operations"),
        (b"\x80\x02}" + b"N" * (1 << 24) + b".", "at most 16777216"),
    ],
)
def test_programs_that_torch_save_does_not_write_are_refused(program, why, tmp_path):
    assert why in refusal(crafted(tmp_path, program))


def test_keys_that_take_forever_to_hash_are_not_hashed(tmp_path):
    doubled = b")" + b"q\0h\0\x86" * 60  # 2^60 empty tuples, were they counted
    (key,) = read_pth(crafted(tmp_path, b"\x80\x02}" + doubled + b"Ns."))
    assert key.name == "tuple"


# ------------------------------------------------------------------------------------------------------ hostile tensors


def tensor(offset=0, shape=(2, 3), strides=(3, 1), count=6, key="0") -> bytes:
    """Pickle of {'x': a float32 tensor} whose storage declares `count` elements."""

    def whole(n):
        content = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(content)]) + content

    def wholes(values):
        return b"(" + b"".join(map(whole, values)) + b"t"

    storage = b"(" + word("storage") + b"ctorch\nFloatStorage\n" + word(key) + word("cpu") + whole(count) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + whole(offset) + wholes(shape) + wholes(strides)
    return b"\x80\x02}" + word("x") + rebuild + b"\x89" + hooks + b"tRs."


SIX = np.arange(6, dtype="<f4").tobytes()


def test_a_tensor_inside_its_storage_is_read(tmp_path):
    whole = read_pth(crafted(tmp_path, tensor(), {"0": SIX}))["x"]
    np.testing.assert_array_equal(whole, np.arange(6).reshape(2, 3))
    part = read_pth(crafted(tmp_path, tensor(1, (2, 2), (2, 1)), {"0": SIX}))["x"]
    np.testing.assert_array_equal(part, [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(shape=(3, 3)), "beyond its storage of 6"),
        (dict(offset=1), "beyond its storage"),
        (dict(strides=(4, 1)), "beyond its storage"),
        (dict(shape=(7, 2), strides=(0, 0)), "beyond its storage"),
        (dict(shape=(1 << 62, 1 << 62), strides=(0, 0)), "beyond its storage"),
        (dict(shape=(1 << 63,), strides=(1,)), "no counts"),
        (dict(strides=(-3, 1), offset=5), "no counts"),
        (dict(offset=-1), "no counts"),
        (dict(shape=(2, -3)), "no counts"),
        (dict(strides=(1,)), "no counts"),
        (dict(shape=(1,) * 40, strides=(1,) * 40), "no counts"),
        (dict(count=7), "has 24 bytes in 'archive/data/0', expected 7 x 4"),
        (dict(count=1 << 70), "has 24 bytes"),
        (dict(count=-6), "beyond its storage"),
        (dict(key="1"), "has no bytes in 'archive/data/1'"),
        (dict(key="../../etc/passwd"), "has no bytes"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(changes, why, tmp_path):
    assert why in refusal(crafted(tmp_path, tensor(**changes), {"0": SIX}))


def test_an_empty_tensor_of_no_possible_shape_is_refused(tmp_path):
    assert "damaged" in refusal(crafted(tmp_path, tensor(0, (0, 1 << 62), (1, 1), 0), {"0": b""}))


def test_few_bytes_do_not_become_many_tensors(tmp_path):
    x = torch.zeros(1000)
    assert len(read_pth(saved(tmp_path, {i: x for i in range(4)}))) == 4
    assert "share their bytes too often" in refusal(saved(tmp_path, {i: x for i in range(100)}))


# ----------------------------------------------------------------------------------------------------- hostile archives


def test_bombs_are_refused_before_they_unpack(tmp_path):
    zeros, count = bytes(1 << 26), 1 << 24
    bomb = crafted(tmp_path, tensor(0, (count,), (1,), count), {"0": zeros}, packing=zipfile.ZIP_DEFLATED)
    content = bomb.read_bytes()
    lying = content.replace(struct.pack("<I", 1 << 26), struct.pack("<I", 1 << 20))
    assert lying != content
    tracemalloc.start()
    try:
        assert "declares 67108864 bytes for 'archive/data/0'" in refusal(bomb)
        bomb.write_bytes(lying)  # a small size is declared, and the content is as large as before
        with open(bomb, "rb") as file:
            archive = Archive(file)
            with pytest.raises(CheckpointError, match="damaged"):
                archive.read("archive/data/0")
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


def test_packed_members_are_read(tmp_path):
    noise = np.random.default_rng(0).normal(size=(50, 40)).astype("<f4")
    program = tensor(0, noise.shape, (40, 1), noise.size)
    read = read_pth(crafted(tmp_path, program, {"0": noise.tobytes()}, packing=zipfile.ZIP_DEFLATED))
    np.testing.assert_array_equal(read["x"], noise)


@pytest.mark.parametrize("name", ["../x", "/x", "archive/..\\x", ""])
def test_members_that_leave_their_folder_are_refused(name, tmp_path):
    path = crafted(tmp_path, tensor(), {"0": SIX})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"")
    assert "leaves its folder" in refusal(path)


def test_archives_that_can_be_read_in_two_ways_are_refused(tmp_path):
    path = crafted(tmp_path, tensor(), {"0": SIX})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", bytes(24))
    assert "two members named 'archive/data/0'" in refusal(path)
    path = crafted(tmp_path, tensor(), {"0": SIX})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps({}, 2))
    assert "2 members data.pkl" in refusal(path)


def test_encrypted_overlapping_and_foreign_members_are_refused(tmp_path):
    path = crafted(tmp_path, tensor(), {"0": SIX})
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    for at, value, why in (
        (8, b"\x01", "encrypted"),
        (10, b"\x0c", "by method 12"),
        (20, b"\xff\xff\xff\x7f", "overlap"),
    ):
        changed = bytearray(content)
        changed[directory + at : directory + at + len(value)] = value
        path.write_bytes(changed)
        assert why in refusal(path)
