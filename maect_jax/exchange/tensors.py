"""Weights files of any origin: their tensors by name, and what they say beside them.

A file is told by its content, never by its extension, and nothing in it is executed.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import numpy as np
import safetensors

from maect_jax.errors import CheckpointError
from maect_jax.exchange.archive import MAGIC, Archive
from maect_jax.exchange.pth import Opaque, StoredTensor, describe, is_pth, read_pth, refusal

_WRAPPERS = ("model", "state_dict")
_MAX_HEADER = 100_000_000  # bytes; the bound of the safetensors format
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
      CheckpointError: in one line, why the file can not be read or is not safe to read.
    """
    kind = kind_of(path)
    return {"safetensors": _read_safetensors, "torch": _read_torch, "npz": _read_npz}[kind](path), kind


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
    try:
        with open(path, "rb") as file:
            start = file.read(9)
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
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


@contextmanager
def opened_safetensors(path: str | PathLike) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
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


def _read_npz(path: str | PathLike) -> dict[str, np.ndarray]:
    """Arrays of numbers; arrays of Python objects would have to be unpickled and are refused."""
    try:
        with open(path, "rb") as file:
            archive, arrays = Archive(file), {}
            for name in archive.sizes:
                if not name.endswith(".npy"):
                    raise CheckpointError(f"is neither a file of torch.save nor .npz: it has a member {name!a}")
                content = io.BytesIO(archive.read(name))
                arrays[name.removesuffix(".npy")] = np.lib.format.read_array(content, allow_pickle=False)
            return arrays
    except Exception as error:  # whatever NumPy raises on a header that may be hostile
        raise refusal(path, error) from None


def some(items: list[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
