"""Files of torch.save's form, honest and hostile, and what reading them must keep to."""

import contextlib
import os
import sys
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
from needed import needed

from maect_jax.errors import CheckpointError
from maect_jax.exchange.pth import read_pth

torch = needed("torch")  # writes the files that these tests read


def saved(path, content, **options):
    torch.save(content, path / "weights.pth", **options)
    return path / "weights.pth"


def crafted(path, program: bytes, storages=None, *, packing=zipfile.ZIP_STORED, **others):
    """A file of torch.save's form around any pickle."""
    with zipfile.ZipFile(path / "crafted.pth", "w", packing) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in others.items():
            archive.writestr(f"archive/{name}", content)
    return path / "crafted.pth"


def refusal(path, read=read_pth) -> str:
    """The sentence with which a file is refused: one line of moderate length that names it."""
    with pytest.raises(CheckpointError) as error:
        read(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and text.isprintable() and len(text) < len(str(path)) + 1600
    return text


_heard: list[tuple] | None = None  # events of Python's audit, while a test listens


def _listen(event, arguments):
    if _heard is not None:
        _heard.append((event, arguments))


sys.addaudithook(_listen)


@contextlib.contextmanager
def nothing_else(path, allowed=()):
    """Asserts that all that Python audits inside is that `path` is opened to be read: no other file, no import, no
    process, no socket, no compiled or executed code. Warnings are errors inside.
    """
    global _heard
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _heard = []
        try:
            yield
        finally:
            events, _heard = _heard, None
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    for event, arguments in events:
        if event == "open":
            assert arguments[0] == str(path) and not arguments[2] & writing
        else:
            assert event in {"builtins.id", *allowed}


def attempt(path, read=read_pth, allowed=(), memory=1 << 24) -> bool:
    """Whether a hostile file was read; if not, it was refused in one line.

    Meanwhile it did nothing but be read, and took less than `memory` bytes.
    """
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        with nothing_else(path, allowed):
            try:
                result = read(path)
                done = True
            except CheckpointError as error:
                text, done = str(error), False
        assert tracemalloc.get_traced_memory()[1] - before < memory
    finally:
        if started:
            tracemalloc.stop()
    if done:
        tree = result[0] if isinstance(result, tuple) else result
        for value in tree.values():
            assert not isinstance(value, np.ndarray) or len(value.tobytes()) == value.nbytes < memory
        return True
    assert text.startswith(f"{path}: ") and text.isprintable() and len(text) < len(str(path)) + 1600
    return False
