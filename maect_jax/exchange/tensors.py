"""Weights files of any origin: their tensors by name, and what they say beside them.

A file is told by its content, never by its extension, and nothing in it is executed.
"""

import io
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import numpy as np
import safetensors

from maect_jax.errors import CheckpointError
from maect_jax.exchange.archive import MAGIC, MAX_FILE, Archive
from maect_jax.exchange.pth import Opaque, StoredTensor, describe, is_pth, read_pth, refusal

_WRAPPERS = ("model", "state_dict")
_MAX_HEADER = 1 << 24  # bytes; the format allows 100 MB, five thousand tensors need less than one
_MAX_TENSORS = 20_000
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")  # of safetensors
_SHOWN = 4  # names of a list in a message


def read_tensors(path: str | PathLike) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of a weights file.

    Args:
      path: a local file of safetensors, of `torch.save` (PyTorch 1.6 or later), or of NumPy (`.npz`). A dictionary
        under 'model' or 'state_dict' is taken for the tensors; what lies beside it (optimizer, arguments) is not read.

    Returns:
      name -> array, of the shapes and types in the file (bfloat16: that of ml_dtypes), and the kind of the file:
      'safetensors', 'torch' or 'npz'. Values that are no tensors, such as an epoch, are left out.

    Raises:
      CheckpointError: in one line, why the file can not be read or is not safe to read, or which tensors hold values
        that are not finite.
    """
    kind = kind_of(path)
    tensors = {"safetensors": _read_safetensors, "torch": _read_torch, "npz": read_npz}[kind](path)
    broken = [f"{name!a:.80}" for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if broken:
        raise refusal(path, f"holds NaN or infinity, which no model computes with, in {some(broken)}")
    return tensors, kind


def read_notes(path: str | PathLike) -> dict[str, Any]:
    """What a weights file says beside its tensors: the header of safetensors, or of `torch.save` the plain values and
    the types of all others, such as {'epoch': 399, 'optimizer': 'dict'}.

    Raises:
      CheckpointError: as `read_tensors`.
    """
    kind, notes = kind_of(path), {}
    if kind == "safetensors":
        with opened_safetensors(path) as file:
            notes = dict(file.metadata() or {})
    if kind == "torch":

        def collect(tree: dict) -> dict:
            wrapped = any(isinstance(tree.get(name), dict) for name in _WRAPPERS)
            for name, value in tree.items():
                if wrapped and isinstance(name, str) and name not in _WRAPPERS:
                    plain = value is None or isinstance(value, str | int | float)
                    notes[name[:80]] = value if plain else describe(value).strip("'")
            return {}

        read_pth(path, part=collect)
    return notes


def kind_of(path: str | PathLike) -> str:
    """The kind of a weights file: 'safetensors', 'torch' or 'npz'.

    Raises:
      CheckpointError: none of these, or no regular file: to open a pipe would wait for whoever writes to it.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError("is no regular file, and only these are read")
        with open(path, "rb") as file:
            start = file.read(9)
            if (length := file.seek(0, 2)) > MAX_FILE:
                raise CheckpointError(f"has {length} bytes; at most {MAX_FILE} are read")
            if start.startswith(MAGIC):
                return "torch" if is_pth(Archive(file)) else "npz"
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read ({error.strerror})") from None
    except CheckpointError as error:
        raise refusal(path, error) from None
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER:
        return "safetensors"
    if start[:1] == b"\x80":
        return "torch"  # before PyTorch 1.6; the reader says so
    raise CheckpointError(f"{path}: is neither safetensors, nor a file of torch.save, nor .npz")


def _read_safetensors(path: str | PathLike) -> dict[str, np.ndarray]:
    with opened_safetensors(path) as file:
        names = file.keys()
        odd = [f"{name!a:.80}: {kind}" for name in names if (kind := file.get_slice(name).get_dtype()) not in _DTYPES]
        if odd:
            raise ValueError(f"tensors of types that are not read: {some(odd)}; save them as F32")
        return {name: file.get_tensor(name) for name in names}


@contextmanager
def opened_safetensors(path: str | PathLike) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            if len(file.keys()) > _MAX_TENSORS:
                raise ValueError(f"it holds {len(file.keys())} tensors; at most {_MAX_TENSORS} are read")
            yield file
    except Exception as error:  # whatever the library raises on bytes that may be hostile
        raise refusal(path, f"is damaged, or no safetensors file ({error})") from None


def _read_torch(path: str | PathLike) -> dict[str, np.ndarray]:
    return read_pth(path, part=state_dict)


def state_dict(tree: dict) -> dict[str, StoredTensor]:
    """The tensors of what `torch.save` was given: those under the one known wrapper, else those of the tree itself."""
    wrappers = [name for name in _WRAPPERS if isinstance(tree.get(name), dict)]
    if len(wrappers) > 1:
        raise CheckpointError("holds both 'model' and 'state_dict'; save the one that is meant")
    found = tree[wrappers[0]] if wrappers else tree
    tensors = {name: value for name, value in found.items() if isinstance(value, StoredTensor)}
    lost = [
        f"{name!a}: {describe(value)}"
        for name, value in found.items()
        if (isinstance(value, Opaque) and value.name.startswith("torch._"))  # torch._utils._rebuild_qtensor, …
        or (isinstance(value, StoredTensor) and not isinstance(name, str))
    ]
    if lost:
        raise CheckpointError(f"holds what may be weights and is not read here: {some(lost)}; save plain tensors")
    if not tensors:
        entries = [f"{name!a}: {describe(value)}" for name, value in found.items()]
        raise CheckpointError(f"holds no tensors by name, but {some(entries)}; save the model's state_dict()")
    return tensors


def read_npz(path: str | PathLike) -> dict[str, np.ndarray]:
    """Arrays of numbers; arrays of Python objects would have to be unpickled and are refused."""
    try:
        with open(path, "rb") as file:
            archive, arrays = Archive(file), {}
            for name in archive.sizes:
                if not name.endswith(".npy"):
                    raise CheckpointError(f"is neither a file of torch.save nor .npz: it has a member {name!a}")
                arrays[name.removesuffix(".npy")] = _array(name, archive.read(name))
            return arrays
    except Exception as error:  # whatever NumPy raises on a header that may be hostile
        raise refusal(path, error) from None


def _array(name: str, content: bytes) -> np.ndarray:
    """The numbers in NumPy's format, read-only. NumPy's own reader makes room for whatever the header declares."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(
        version
    )
    if read_header is None:
        raise CheckpointError(f"has an array in version {version} of NumPy's format in {name!a}; 1 and 2 are read")
    shape, columns_first, dtype = read_header(stream)
    if dtype.kind not in "biuf":
        raise CheckpointError(f"has an array of {dtype} in {name!a}, not of real numbers; save it as float32")
    there = len(content) - stream.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != there:
        raise CheckpointError(f"has {there} bytes in {name!a}, and declares the shape {shape} of {dtype}")
    return np.ndarray(shape, dtype, content, stream.tell(), order="F" if columns_first else "C")


def some(items: list[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
