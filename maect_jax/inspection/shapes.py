"""Names, shapes and types of the tensors in a weights file, without their content."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from maect_jax.exchange.pth import StoredTensor, read_pth
from maect_jax.exchange.tensors import kind_of, opened_safetensors, read_npz, state_dict

_LETTERS = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "C": "complex"}  # of safetensors' types


@dataclass(frozen=True)
class Shape:
    """A tensor that is not read: its axes, its type ('float32', 'bfloat16', …), and the bytes it takes."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def shape_of(array: Any) -> Shape:
    """The shape of an array, or of whatever has a shape and a type."""
    shape, dtype = tuple(array.shape), np.dtype(array.dtype)
    return Shape(shape, dtype.name, math.prod(shape) * dtype.itemsize)


def read_shapes(path: str | PathLike) -> tuple[dict[str, Shape], str]:
    """The tensors of a weights file, by name; see `tensors.read_tensors`.

    Returns:
      name -> shape, and the kind of the file: 'safetensors', 'torch' or 'npz'. Only of the last are the arrays read,
      one after the other.

    Raises:
      CheckpointError: in one line, why the file can not be read or is not safe to read.
    """
    kind, found = kind_of(path), {}
    if kind == "safetensors":
        with opened_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(name)
                found[name] = _of_safetensors(part.get_shape(), part.get_dtype())
    elif kind == "torch":

        def collect(tree: dict) -> dict:
            for name, tensor in state_dict(tree).items():
                dtype = tensor.storage.dtype
                found[name] = Shape(tensor.shape, dtype.name, math.prod(tensor.shape) * dtype.itemsize)
            return {}

        read_pth(path, part=collect)
    else:
        found = {name: shape_of(array) for name, array in read_npz(path).items()}
    return found, kind


def read_some(path: str | PathLike, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those tensors of a weights file, with their content.

    Raises:
      CheckpointError: as `read_shapes`.
    """
    kind = kind_of(path)
    if kind == "safetensors":
        with opened_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in names}

    def choose(tree: dict) -> dict[str, StoredTensor]:
        tensors = state_dict(tree)
        return {name: tensors[name] for name in names}

    if kind == "torch":
        return read_pth(path, part=choose)
    arrays = read_npz(path)
    return {name: arrays[name] for name in names}


def _of_safetensors(shape: list[int], name: str) -> Shape:
    """'BF16' is bfloat16, 'F8_E4M3' float8_e4m3, 'BOOL' bool."""
    known = re.fullmatch(r"([A-Z]+)(\d+)(.*)", name)
    dtype = f"{_LETTERS.get(known[1], known[1])}{known[2]}{known[3].lower()}" if known else name.lower()
    return Shape(tuple(shape), dtype, math.prod(shape) * (int(known[2]) if known else 8) // 8)
