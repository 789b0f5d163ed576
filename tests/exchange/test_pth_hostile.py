"""PyTorch files made to harm: nothing in them is executed, taken on trust or unpacked without bound."""

import argparse
import contextlib
import copyreg
import functools
import importlib
import io
import marshal
import operator
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from hostile import greedy_programs, storage, tensor, whole, word

from maect_jax.exchange.pth import Opaque, read_pth
from torch_files import attempt, crafted, refusal, saved, torch

# ----------------------------------------------------------------------------------------------------- hostile programs


class Reduced:
    """Pickles as a call: function, arguments, and what may follow them. May be the function of another call."""

    def __init__(self, *call):
        self.call = call

    def __call__(self):
        raise AssertionError

    def __reduce__(self):
        return self.call


class Stateful:
    """A class that runs its state as a command."""

    def __init__(self, command):
        self.command = command

    def __setstate__(self, state):
        os.system(state["command"])


def run(_, command):
    os.system(command)


class Spawning:
    """A class that runs a command as soon as an object of it is made."""

    def __new__(cls, command):
        os.system(command)
        return super().__new__(cls)


def programs(command: str) -> dict[str, bytes]:
    """Pickles that run the shell command when they are unpickled."""
    python = f"__import__('os').system({command!r})"
    call = b"cos\nsystem\n" + word(command) + b"\x85R"
    shell = b"csubprocess\ncall\n](" + word("sh") + word("-c") + word(command) + b"e\x85"
    spawning = f"c{__name__}\nSpawning\n".encode() + word(command) + b"\x85"
    system = Reduced(os.system, (command,))
    code = marshal.dumps(compile(python, "", "eval"))
    return {
        "reduce": pickle.dumps({"model": Reduced(os.system, (command,))}, 2),
        "stack global": pickle.dumps({"model": Reduced(os.system, (command,))}, 4),
        "eval": pickle.dumps({"model": Reduced(eval, (python,))}, 2),
        "nested": pickle.dumps({"a": [({"b": Reduced(exec, (python,))},)]}, 2),
        "state": pickle.dumps({"a": Reduced(argparse.Namespace, (), {"x": system})}, 2),
        "state set by a method": pickle.dumps({"a": Stateful(command)}, 2),
        "state set by a function": pickle.dumps({"a": Reduced(set, (), command, None, None, run)}, 5),
        "items": pickle.dumps({"a": Reduced(list, (), None, iter([system]))}, 2),
        "entries": pickle.dumps({"a": Reduced(dict, (), None, None, iter([("k", system)]))}, 2),
        "set": pickle.dumps({"a": {1, system}}, 4),
        "frozen set": pickle.dumps({"a": frozenset([1, system])}, 4),
        "chain of attributes": pickle.dumps(
            {"a": Reduced(Reduced(getattr, (Reduced(importlib.import_module, ("os",)), "system")), (command,))}, 4
        ),
        "method by name": pickle.dumps(
            {"a": Reduced(Reduced(operator.methodcaller, ("system", command)), (Reduced(__import__, ("os",)),))}, 4
        ),
        "name with dots": b"\x80\x04}"
        + word("a")
        + word("builtins")
        + word("exec.__call__")
        + b"\x93"
        + word(python)
        + b"\x85Rs.",
        "partial": pickle.dumps({"a": Reduced(functools.partial(os.system, command), ())}, 4),
        "map": pickle.dumps({"a": Reduced(list, (Reduced(map, (os.system, [command])),))}, 4),
        "code": b"\x80\x04}"
        + word("a")
        + b"ctypes\nFunctionType\ncmarshal\nloads\nB"
        + struct.pack("<I", len(code))
        + code
        + b"\x85R}\x86R)Rs.",
        "pickle in a pickle": pickle.dumps({"a": Reduced(pickle.loads, (pickle.dumps(system, 2),))}, 2),
        "storage in bytes": pickle.dumps({"a": Reduced(torch.storage._load_from_bytes, (pickle.dumps(system, 2),))}, 2),
        "torch.load": pickle.dumps(
            {"a": Reduced(functools.partial(torch.load, weights_only=False), (io.BytesIO(pickle.dumps(system, 2)),))}, 4
        ),
        "hooks of a tensor": b"\x80\x02}" + word("x") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + call + call + b"tRs.",
        "arguments of an ordered dictionary": b"\x80\x02ccollections\nOrderedDict\n" + call + b"0)R.",
        "key of a dictionary": b"\x80\x02}" + call + b"Ns.",
        "memo": b"\x80\x02}cos\nsystem\nq\x000" + word("a") + b"h\x00" + word(command) + b"\x85Rs.",
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
    with contextlib.suppress(Exception):  # of what is done with the call's result, after the call
        pickle.loads(program)
    assert ran.exists()  # the program is what it claims to be


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (b"(" + word("touch x") + b"ios\nsystem\n.", "opcode INST"),
        (b"\x80\x02}" + word("a") + b"\x82\xf0s.", "opcode EXT1"),
        (b"\x80\x02(X\x01\0\0\0acos\nsystem\nX\x01\0\0\0bX\x01\0\0\0cK\x01tQ.", "persistent id"),
        (b"P0\n.", "opcode PERSID"),
        (b"\x80\x02}", "its pickle breaks off"),
        (b"\x80\x02}h\x05s.", "recalls object 5 of 0"),
        (b"\x80\x02s.", "takes more from its stack than is there"),
        (b"\x80\x02u.", "IndexError"),
        (b"\x80\x02Nq\x01.", "out of order, 1 before 0"),
        (b"\x80\x02}R.", "takes more"),
        (b"\x80\x02}}R.", "a call of 'dict'"),
        (b"\x80\x02}N\x81.", "a call of 'dict'"),
        (b"\x80\x02}NNs}u.", "IndexError"),
        (b"\x80\x02)NNs.", "entries for 'tuple'"),
        (b"\x80\x02)Na.", "items for 'tuple'"),
        (b"\x80\x02}(Nu.", "ValueError"),
        (b"\x80\x02\xff.", "opcode 0xff"),
        (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
        (b"S'\\d'\n.", "opcode STRING"),
        (b"I" + b"9" * 5000 + b"\n.", "opcode INT"),
        (b"c\n\n.", "a name that is no text"),
        (b"c\xff\nx\n.", "UnicodeDecodeError"),
        (b"\x80\x04NN\x93.", "a name that is no text"),
        (b"X\1\0\0\0\xff.", "UnicodeDecodeError"),
        (b"\x80\x02" + storage() + b".", "'torch.FloatStorage', not a dict"),
        (b"\x80\x02" + word("abcde") + b"Q.", "persistent id"),
        (b"\x80\x02NQ.", "TypeError"),
        (b"\x80\x02}X\xff\xff\xff\xff.", "expected 4294967295 bytes"),
        (b"\x80\x02}" + b"N" * (1 << 24) + b".", "at most 16777216"),
    ],
)
def test_programs_that_torch_save_does_not_write_are_refused(program, why, tmp_path):
    assert why in refusal(crafted(tmp_path, program))


def test_keys_that_are_no_short_values_are_opaque(tmp_path):
    keys = [word("k" * 1000), word("k" * 1001), whole((1 << 63) - 1), whole(1 << 63), whole(-(1 << 2000)), b"]", b"N"]
    read = read_pth(crafted(tmp_path, b"\x80\x02}(" + b"".join(key + b"K\1" for key in keys) + b"u."))
    shown = [key.name if isinstance(key, Opaque) else key for key in read]
    assert shown == ["k" * 1000, "str", (1 << 63) - 1, "int", "int", "list", None]


def test_a_parameter_of_no_tensor_is_not_taken_for_its_content(tmp_path):
    program = b"\x80\x02}" + word("a") + b"ctorch._utils\n_rebuild_parameter\n(cos\nsystem\n\x89NtRs."
    assert read_pth(crafted(tmp_path, program))["a"].name == "torch._utils._rebuild_parameter"


def test_names_with_backslashes_are_not_other_names(tmp_path):
    """pickletools reads an escape where pickle reads a backslash."""
    read = read_pth(crafted(tmp_path, b"\x80\x02}" + word("a") + b"ccollections\n\\x4frderedDict\n)Rs."))
    assert read["a"].name == "collections.\\x4frderedDict"


def test_a_storage_that_is_a_pickle_is_bytes(tmp_path):
    ran = tmp_path / "ran"
    program = pickle.dumps(Reduced(os.system, (f"touch {ran}",)), 2)
    program += bytes(-len(program) % 4)
    read = read_pth(crafted(tmp_path, tensor(0, (len(program) // 4,), (1,), len(program) // 4), {"0": program}))
    assert read["x"].tobytes() == program and not ran.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_greedy_files_are_read_or_refused_within_little_memory_and_time(tmp_path):
    """In a process that can not have more: 200 MB above what Python and NumPy take, a minute of processor for all."""
    files = {}
    for name, (program, why) in greedy_programs().items():
        files[crafted(tmp_path, program, {"0": b""}).rename(tmp_path / f"{name}.pth")] = why
    child = """
import resource, sys
from maect_jax.errors import CheckpointError
from maect_jax.exchange.pth import Opaque, read_pth
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 200_000_000,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for path in sys.argv[1:]:
    try:
        print("read", len(read_pth(path)))
    except CheckpointError as error:
        print(error)
"""
    ran = subprocess.run([sys.executable, "-c", child, *files], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    for path, why, line in zip(files, files.values(), lines, strict=True):
        assert (line.startswith(f"{path}: ") and why in line) if why else line.startswith("read "), line


# ------------------------------------------------------------------------------------------------------ hostile tensors


SIX = np.arange(6, dtype="<f4").tobytes()


def test_a_tensor_inside_its_storage_is_read(tmp_path):
    read = read_pth(crafted(tmp_path, tensor(), {"0": SIX}))["x"]
    np.testing.assert_array_equal(read, np.arange(6).reshape(2, 3))
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
        (dict(count=1 << 62), "has 24 bytes"),
        (dict(count=1 << 63), "no storage"),
        (dict(count=1 << 2000), "no storage"),
        (dict(count=-6), "no storage"),
        (dict(shape=(0, 3), offset=1 << 40, count=1 << 41), "has 24 bytes"),
        (dict(shape=(1 << 31, 1 << 31, 1 << 31), strides=(0, 0, 0)), "beyond its storage"),
        (dict(kind="DoubleStorage"), "expected 6 x 8"),
        (dict(key="1"), "has no bytes in 'archive/data/1'"),
        (dict(key="../../etc/passwd"), "has no bytes"),
        (dict(key="\x1b\n" * 50_000), "has no bytes"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(changes, why, tmp_path):
    assert why in refusal(crafted(tmp_path, tensor(**changes), {"0": SIX}))


def test_an_empty_tensor_of_no_possible_shape_is_refused(tmp_path):
    assert "damaged" in refusal(crafted(tmp_path, tensor(0, (0, 1 << 62), (1, 1), 0), {"0": b""}))


def test_few_bytes_do_not_become_many_tensors(tmp_path):
    small, large = torch.zeros(1000), torch.zeros(1 << 18)
    assert len(read_pth(saved(tmp_path, {i: small for i in range(4)}))) == 4
    assert len(read_pth(saved(tmp_path, {"w": large, "tied": large, "more": torch.ones(1 << 18)}))) == 3
    assert "share their bytes too often" in refusal(saved(tmp_path, {i: small for i in range(100)}))
    assert "share their bytes too often" in refusal(saved(tmp_path, {i: large for i in range(2)}))
