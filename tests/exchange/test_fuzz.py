"""Weights files changed and made up at random: they are read, or refused in one line; nothing else happens.

The same examples in every run. What is asserted of each stands in `torch_files.attempt`.
"""

import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hostile import tensor, whole, word
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maect_jax.exchange.pth import read_pth
from maect_jax.exchange.tensors import read_tensors
from torch_files import attempt, crafted, torch

WEIGHTS = {"blocks.0.w": np.arange(12, dtype="<f4").reshape(3, 4), "b": np.ones(3, "<f2"), "n": np.array(7)}
READERS = {"pth": (read_pth, ()), "tensors of pth": (read_tensors, ()), "safetensors": (read_tensors, ())}
# NumPy's reader parses a header with `ast.literal_eval`, which compiles it and executes nothing
READERS |= dict.fromkeys(["npz", "packed npz"], (read_tensors, ("compile",)))


def honest(kind: str) -> bytes:
    """A small weights file."""
    stream = io.BytesIO()
    if kind.endswith("pth"):
        state = {name: torch.tensor(x) for name, x in WEIGHTS.items()} | {"v": torch.ones(4, 3).bfloat16().T}
        torch.save(
            {"model": state, "epoch": 3, "args": {"lr": 1e-3, "betas": (0.9, 0.95)}, "size": torch.Size([1])}, stream
        )
    elif kind == "safetensors":
        stream.write(safetensors.numpy.save(WEIGHTS | {"v": np.ones(3, ml_dtypes.bfloat16)}, metadata={"format": "pt"}))
    else:
        (np.savez_compressed if kind == "packed npz" else np.savez)(stream, **WEIGHTS)
    return stream.getvalue()


def holds(property_: Callable[[object], bool], examples: st.SearchStrategy, count: int) -> None:
    """Tries a property on random examples. It says whether a file was read; some must be, and some refused."""
    outcomes = []

    @settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=count,
        suppress_health_check=list(HealthCheck),
    )
    @given(examples)
    def tried(example):
        outcomes.append(property_(example))

    tried()
    assert {True, False} == set(outcomes)


def changes(length: int) -> st.SearchStrategy:
    """Lists of changes to a file: a place, how many bytes are taken away there, and what is put in their place."""
    odd = [
        b"",
        b"\0",
        b"\xff",
        b"\xff" * 4,
        b"\xff" * 8,
        b"\x7f",
        b"\x80",
        b"\0" * 8,
        b"\n",
        b"PK\1\2",
        b"PK\5\6",
        b"9",
    ]
    content = st.one_of(st.sampled_from(odd), st.binary(min_size=1, max_size=4))
    flip = st.tuples(st.integers(0, length), st.just(1), st.binary(min_size=1, max_size=1))
    edit = st.tuples(st.integers(0, length), st.sampled_from([0, 1, 2, 4, 8, 100, length]), content)
    return st.one_of(st.lists(flip, min_size=1, max_size=3), st.lists(edit, min_size=1, max_size=3))


def changed(content: bytes, edits) -> bytes:
    for at, taken, put in edits:
        content = content[:at] + put + content[at + taken :]
    return content


@pytest.mark.parametrize("kind", READERS)
def test_changed_files(kind, tmp_path):
    content, path, (read, allowed) = honest(kind), tmp_path / "weights", READERS[kind]
    path.write_bytes(content)
    assert attempt(path, read, allowed)

    def is_read(edits):
        path.write_bytes(changed(content, edits))
        return attempt(path, read, allowed)

    holds(is_read, changes(len(content)), 150)


def test_changed_pickles(tmp_path):
    with zipfile.ZipFile(io.BytesIO(honest("pth"))) as archive:
        parts = {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
    program = parts.pop("data.pkl")
    storages = {name.removeprefix("data/"): part for name, part in parts.items() if name.startswith("data/")}
    assert attempt(crafted(tmp_path, program, storages))
    holds(lambda edits: attempt(crafted(tmp_path, changed(program, edits), storages)), changes(len(program)), 250)


def written_opcodes() -> list[pickletools.OpcodeInfo]:
    """The opcodes in files of torch.save, by any protocol that it takes."""
    content, found = (
        {"a": [1, (2, 3, 4, 5), {6}, frozenset([7]), b"8", None, True, 1 << 40, 0.5], "b": torch.ones(2)},
        {},
    )
    for protocol in range(2, 6):
        stream = io.BytesIO()
        torch.save(content | {"c": content}, stream, pickle_protocol=protocol)
        with zipfile.ZipFile(stream) as archive:
            program = archive.read("archive/data.pkl")
        found |= {op.name: op for op, *_ in pickletools.genops(program) if op.name not in ("STOP", "FRAME")}
    return list(found.values())


def operations(opcodes: list[pickletools.OpcodeInfo]) -> st.SearchStrategy:
    """Single operations of a pickle, with arguments that fit or nearly fit."""
    names = ["torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"]
    names += ["torch FloatStorage", "torch HalfStorage", "os system", "builtins eval", "builtins getattr", "a b"]
    texts = [*" ".join(names).split(), "storage", "0", "cpu", "x", "touch x", "../0", "\0", "é\U0001f600\n"]
    numbers = st.sampled_from([0, 1, 2, 3, 6, 24, 255, 1 << 31, 1 << 62, 1 << 63, -1, 1 << 2000])
    index = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 255])
    by_argument = {
        None: st.just(b""),
        "uint1": index.map(lambda n: bytes([n])),
        "uint2": index.map(lambda n: struct.pack("<H", n)),
        "uint4": index.map(lambda n: struct.pack("<I", n)),
        "int4": numbers.map(lambda n: struct.pack("<I", n & 0xFFFFFFFF)),
        "uint8": st.sampled_from([0, 7, 1 << 31, (1 << 64) - 1]).map(lambda n: struct.pack("<Q", n)),
        "long1": numbers.map(lambda n: whole(n)[1:]),
        "float8": st.floats().map(lambda x: struct.pack(">d", x)),
        "bytes1": st.binary(max_size=9).map(lambda part: bytes([len(part)]) + part),
        "unicodestring1": st.sampled_from(texts).map(lambda text: bytes([len(text.encode())]) + text.encode()),
        "unicodestring4": st.sampled_from(texts).map(lambda text: word(text)[1:]),
        "stringnl_noescape_pair": st.sampled_from(names).map(lambda name: name.replace(" ", "\n").encode() + b"\n"),
    }
    line = st.sampled_from([b"0\n", b"9" * 5000 + b"\n", b"'x'\n", b"'\\x\n", b"os\n", b"\n", b"\xff\n", b"1"])
    other = st.one_of(line, st.binary(max_size=9))
    return st.sampled_from(opcodes).flatmap(
        lambda op: by_argument.get(op.arg and op.arg.name, other).map(op.code.encode("latin-1").__add__)
    )


def test_random_programs(tmp_path):
    """They start with a dictionary and other objects, and end with that dictionary or with what they have made."""
    six, program = np.arange(6, dtype="<f4").tobytes(), tensor()
    rebuilt = program[program.index(b"ctorch._utils") : -2]
    objects = b"(}q\0]q\1(h\0)q\2" + rebuilt + b"q\3cos\nsystem\nq\4" + word("x") + b"q\5h\0"
    common = st.sampled_from(
        [rebuilt, b"}", b"(", *(b"h" + bytes([i]) for i in range(6)), b"h\5h\3s", b"h\1a", b"u", b"R"]
    )
    written = operations(written_opcodes())
    part = st.one_of(common, written, written, operations(pickletools.opcodes))
    programs = st.tuples(st.lists(part, max_size=12), st.sampled_from([b"", b"h\0", b"h\0"]))
    holds(lambda p: attempt(crafted(tmp_path, objects + b"".join(p[0]) + p[1] + b".", {"0": six})), programs, 300)


def test_changed_fields_of_zip_files(tmp_path):
    """Whole numbers of the zip format, at every place they have in the directory, before the members and at the end."""
    content, path = honest("pth"), tmp_path / "weights"
    fields = []
    for magic, types in (
        (b"PK\3\4", "HHHHHLLLHH"),
        (b"PK\1\2", "HHHHHHLLLHHHHHLL"),
        (b"PK\5\6", "HHHHLLH"),
        (b"PK\6\6", "QHHLLQQQQ"),
        (b"PK\6\7", "LQL"),
    ):
        sizes = [{"H": 2, "L": 4, "Q": 8}[type_] for type_ in types]
        starts = [at for at in range(len(content)) if content[at : at + 4] == magic]
        assert starts
        fields += [(at + 4 + sum(sizes[:i]), size) for at in starts for i, size in enumerate(sizes)]
    odd = [0, 1, 2, 8, 0x7F, 0xFF, 0xFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1]
    number = st.one_of(st.sampled_from(odd), st.integers(0, len(content)))

    def is_read(edits):
        edited = bytearray(content)
        for (at, size), value in edits:
            edited[at : at + size] = value.to_bytes(8, "little")[:size]
        path.write_bytes(edited)
        return attempt(path)

    holds(is_read, st.lists(st.tuples(st.sampled_from(fields), number), min_size=1, max_size=3), 200)


def test_changed_arrays_in_npz_files(tmp_path):
    """The checksums of the zip file are right, so that NumPy's own header is reached."""
    stream, path = io.BytesIO(), tmp_path / "weights.npz"
    np.save(stream, WEIGHTS["blocks.0.w"])
    content = stream.getvalue()
    header = content[: content.index(b"\n") + 1]
    words = [b"'<f4'", b"(3, 4)", b"False", b"'descr'", b" ", b"}", b"\x01\x00v\x00"]
    values = [b"'|O'", b"'<f8'", b"'|S0'", b"'|V0'", b"[('a', '<f4')]", b"(12,)", b"(4, 3)", b"(-1,)", b"(0, 1)", b"()"]
    values += [
        b"True",
        b"None",
        b"1",
        b"(" * 50,
        b"(12L,)",
        b"__import__('os').system('x')",
        b"{}",
        b"(9" + b"9" * 30 + b",)",
    ]
    replaced = st.tuples(st.sampled_from(words), st.sampled_from(values)).map(
        lambda pair: header.replace(*pair, 1).rstrip().ljust(len(header))[: len(header)]
    )
    flipped = changes(len(header)).map(lambda edits: changed(header, edits))

    def is_read(header):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("w.npy", header + content[len(header) :])
        return attempt(path, *READERS["npz"])

    holds(is_read, st.one_of(replaced, flipped), 150)


def test_made_up_headers_of_safetensors_files(tmp_path):
    path = tmp_path / "weights"
    number = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 16, -1, 1 << 31, 1 << 62, 1 << 64, 1e300, "1", None, []])
    field = st.one_of(
        st.tuples(
            st.just("dtype"), st.sampled_from(["I32", "BOOL", "F16", "BF16", "F64", "F8_E4M3", "F4", "C64", "Q", 1])
        ),
        st.tuples(st.just("shape"), st.one_of(st.lists(number, max_size=3), number)),
        st.tuples(st.just("data_offsets"), st.one_of(st.tuples(number, number), number)),
        st.tuples(st.just("x"), number),
    )
    right = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    odd = st.one_of(field.map(lambda pair: right | dict([pair])), st.just(right | {"data_offsets": [12, 24]}), number)
    names = st.sampled_from(["b", "__metadata__", "\n\x1b[31m", "é" * 2000, ""])
    headers = st.one_of(
        odd.map(lambda entry: {"a": entry}), st.tuples(names, odd).map(lambda b: {"a": right, b[0]: b[1]})
    )

    def is_read(header):
        header = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(24 if len(header) > 70 else 12))
        return attempt(path, read_tensors)

    holds(is_read, headers, 150)
