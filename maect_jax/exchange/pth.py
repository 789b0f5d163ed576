"""PyTorch's zip files, read without PyTorch and without unpickling.

`torch.save` writes a pickle that says what the file holds, and one zip member for the bytes of each storage. The pickle
is walked, not run; of its calls those that make ordered dictionaries, tensors and parameters are understood, and every
other becomes an `Opaque`.

Source: torch.serialization (PyTorch 1.6 to 2.13).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from maect_jax.errors import CheckpointError
from maect_jax.exchange.archive import MAGIC, Archive
from maect_jax.exchange.pickle_machine import Opaque, describe, interpret

_MAX_PICKLE = 1 << 24  # bytes; a training checkpoint of a ViT-H with its average needs 230,000
_MAX_DEPTH = 64  # containers in containers
_MAX_AXES = 16
_MAX_TENSORS = 20_000  # a training checkpoint of a ViT-H with its average has 3,000
_MAX_SHARED = 1.5  # tensors to the bytes they are views of: tied weights repeat few of them
_SMALL = 1 << 16  # bytes of tensors that any file may hold
_MAX_REASON = 1_500  # characters of an error

_DTYPES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}


@dataclass(frozen=True, eq=False, slots=True)
class _Storage(Opaque):
    """The bytes that tensors are views of: member data/<key>, `count` elements."""

    dtype: np.dtype
    key: str
    count: int


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """A tensor that has not been read; offset and strides count elements of its storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pth(path: str | PathLike, part: Callable[[dict], dict] = lambda tree: tree) -> dict:
    """Content of a file that `torch.save` of PyTorch 1.6 or later wrote.

    Args:
      path: a local file; the extension does not matter.
      part: given the whole tree with a `StoredTensor` in the place of each tensor, returns what of it to read. The
        bytes of all others stay on the disk.

    Returns:
      Dicts, lists, tuples, text, bytes, numbers, booleans and None as saved. Tensors and parameters are read-only NumPy
      arrays of the type saved (bfloat16: that of ml_dtypes) and share memory where they did. An ordered dictionary is a
      dict; all other objects are `Opaque`.

    Raises:
      CheckpointError: in one line, why the file can not be read or is not safe to read.
    """
    try:
        with open(path, "rb") as file:
            return _read(file, part)
    except CheckpointError as error:
        reason = str(error)
    except OSError as error:
        reason = f"can not be read ({error.strerror})"
    except MemoryError:
        reason = "needs more memory than there is"
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"is damaged, or no file of torch.save ({type(error).__name__}: {error})"
    raise refusal(path, reason)


def refusal(path: str | PathLike, reason: Any) -> CheckpointError:
    """The error in one line that begins with the file. Names, that of the file too, are made printable."""
    text = f"{path}: {' '.join(str(reason)[:_MAX_REASON].split())}"
    return CheckpointError("".join(c if c.isprintable() else "?" for c in text))


def is_pth(archive: Archive) -> bool:
    """Whether a zip archive is a file of `torch.save`."""
    return any(name.endswith("/data.pkl") for name in archive.sizes)


def _read(file: BinaryIO, part: Callable[[dict], dict]) -> dict:
    start = file.read(len(MAGIC))
    if start[:1] == b"\x80":
        raise CheckpointError(
            "is a bare pickle, as torch.save wrote before PyTorch 1.6, which is not read here; where you trust it, "
            "save it again with PyTorch: torch.save(torch.load(file, weights_only=True), new_file)"
        )
    if start != MAGIC:
        raise CheckpointError("is no file of torch.save (not a zip archive)")
    archive = Archive(file)
    pickles = [name for name in archive.sizes if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"is no file of torch.save ({len(pickles)} members data.pkl, expected one)")
    folder = pickles[0].removesuffix("data.pkl")
    if archive.sizes[pickles[0]] > _MAX_PICKLE:
        raise CheckpointError(f"has a pickle of {archive.sizes[pickles[0]]} bytes; at most {_MAX_PICKLE} are read")
    order = f"{folder}byteorder"
    if archive.sizes.get(order, 6) != 6 or (order in archive.sizes and archive.read(order) != b"little"):
        raise CheckpointError("was not written on a little-endian machine; save it again on one")
    tree = interpret(archive.read(pickles[0]), _called, _storage)
    if not isinstance(tree, dict):
        raise CheckpointError(f"holds {describe(tree)}, not a dictionary; save the model's state_dict()")
    reader = _Reader(archive, folder)
    arrays = reader.arrays(part(tree))
    if reader.bytes > _MAX_SHARED * reader.bytes_read + _SMALL:
        raise CheckpointError("has tensors that share their bytes too often to be weights")
    return arrays


# ------------------------------------------------------------------------------------------------- what stands for what


def _storage(identifier: Any) -> Opaque:
    """A storage; a plain `Opaque` where its type is not read."""
    kind, cls, key, _, count = identifier
    if kind != "storage" or not isinstance(cls, Opaque) or not isinstance(key, str) or not _is_count(count):
        raise CheckpointError("has a persistent id that is no storage")
    return _Storage(cls.name, _DTYPES[cls.name], key, count) if cls.name in _DTYPES else Opaque(cls.name)


def _called(function: Opaque, arguments: Any) -> Any:
    """The calls that are understood, done here; every other is an `Opaque` of the function's name."""
    match function.name, arguments:
        case "collections.OrderedDict", ():
            return {}
        case "torch._utils._rebuild_tensor_v2", (_Storage() as storage, offset, shape, strides, bool(), _):
            return _tensor(storage, offset, shape, strides)
        case "torch._utils._rebuild_parameter", (StoredTensor() as tensor, bool(), _):
            return tensor
        # tensors of types that are not read: their types are named
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_qtensor", (Opaque() as kind, *_):
            return Opaque(f"{function.name} of {kind.name}")
        case "torch._utils._rebuild_tensor_v3", (_, _, _, _, _, _, Opaque() as kind, *_):
            return Opaque(f"{function.name} of {kind.name}")
        case "torch._utils._rebuild_parameter", (Opaque() as tensor, bool(), _) if tensor.name.startswith("torch._"):
            return tensor
    return Opaque(function.name)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _tensor(storage: _Storage, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    """A tensor that lies within the elements its storage declares.

    Raises:
      CheckpointError: it does not, or holds more elements than there are.
    """
    good = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= _MAX_AXES
    if not good or not all(map(_is_count, (offset, *shape, *strides))):
        raise CheckpointError("has a tensor whose shape, strides or offset are no counts")
    count = math.prod(shape)
    end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) + 1 if count else 0
    if max(count, end) > storage.count:
        raise CheckpointError(f"has a tensor of shape {shape} beyond its storage of {storage.count} elements")
    return StoredTensor(storage, offset, shape, strides)


# -------------------------------------------------------------------------------------------------------------- arrays


class _Reader:
    """Reads the tensors of a tree; each storage once.

    Attributes:
      bytes, bytes_read: of the arrays so far, which are views, and of what they are views of.
    """

    def __init__(self, archive: Archive, folder: str):
        self._archive, self._folder = archive, folder
        self._content: dict[str, bytes] = {}
        self.bytes = self.bytes_read = self._tensors = 0
        self._walked: dict[int, Any] = {}  # by identity: the arrays of a container, None while it is being walked

    def arrays(self, node: Any, depth: int = 0) -> Any:
        """The tree with arrays for tensors.

        Raises:
          CheckpointError: a tensor can not be read, or the tree is too deep or holds itself.
        """
        if isinstance(node, StoredTensor):
            return self._array(node)
        if not isinstance(node, dict | list | tuple):
            return node
        if id(node) not in self._walked:
            if depth > _MAX_DEPTH:
                raise CheckpointError(f"holds containers nested more than {_MAX_DEPTH} deep")
            self._walked[id(node)] = None
            if isinstance(node, dict):
                walked = {key: self.arrays(value, depth + 1) for key, value in node.items()}
            else:
                walked = type(node)(self.arrays(value, depth + 1) for value in node)
            self._walked[id(node)] = walked
        if self._walked[id(node)] is None:
            raise CheckpointError("holds a container that holds itself")
        return self._walked[id(node)]

    def _array(self, tensor: StoredTensor) -> np.ndarray:
        storage, itemsize = tensor.storage, tensor.storage.dtype.itemsize
        self._tensors += 1
        if self._tensors > _MAX_TENSORS:
            raise CheckpointError(f"holds more than {_MAX_TENSORS} tensors")
        name = f"{self._folder}data/{storage.key}"
        if self._archive.sizes.get(name) != storage.count * itemsize:
            found = self._archive.sizes.get(name, "no")
            raise CheckpointError(f"has {found} bytes in {name!a}, expected {storage.count} x {itemsize}")
        if name in self._archive.packed:
            raise CheckpointError(f"packs {name!a}, which torch.save does not; save it again with PyTorch")
        if name not in self._content:
            self._content[name] = self._archive.read(name)
            self.bytes_read += len(self._content[name])
        self.bytes += math.prod(tensor.shape) * itemsize
        strides = [stride * itemsize for stride in tensor.strides]
        return np.ndarray(tensor.shape, storage.dtype, self._content[name], tensor.offset * itemsize, strides)
