"""PyTorch's zip files, read without PyTorch and without unpickling.

`torch.save` writes a pickle that says what the file holds, and one zip member for the bytes of each storage. A pickle
is a program; here its opcodes are walked by a machine that knows plain containers and values, ordered dictionaries and
tensors. Every other name becomes an `Opaque`: it is neither imported nor called, and neither is anything else.

Sources: Python's documentation of `pickletools`; torch.serialization (PyTorch 1.6 to 2.13).
"""

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from maect_jax.errors import CheckpointError
from maect_jax.exchange.archive import MAGIC, Archive

_MAX_PICKLE = 1 << 24  # bytes; a training checkpoint of a ViT-H needs less than one million
_MAX_OPS = 1_000_000
_MAX_DEPTH = 64  # containers in containers
_MAX_AXES = 32
_MAX_SHARED = 4  # times that the tensors may exceed the bytes they are views of

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


@dataclass(frozen=True, eq=False)
class Opaque:
    """Stands for an object that is not built; `name` is that of its class or function, such as 'argparse.Namespace'."""

    name: str


@dataclass(frozen=True, eq=False)
class _Storage(Opaque):
    """The bytes that tensors are views of: member data/<key>, `count` elements."""

    dtype: np.dtype
    key: str
    count: int


@dataclass(frozen=True, eq=False)
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
        reason = error
    except OSError as error:
        reason = f"can not be read ({error.strerror})"
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"is damaged, or no file of torch.save ({type(error).__name__}: {error})"
    raise refusal(path, reason)


def refusal(path: str | PathLike, reason: Any) -> CheckpointError:
    """The error in one line that begins with the file. What the file itself says of names is made printable."""
    text = " ".join(str(reason).split())
    return CheckpointError(f"{path}: " + "".join(c if c.isprintable() else "?" for c in text[:1500]))


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
    tree = _interpret(archive.read(pickles[0]))
    if not isinstance(tree, dict):
        raise CheckpointError(f"holds {describe(tree)}, not a dictionary; save the model's state_dict()")
    return _Reader(archive, folder).arrays(part(tree))


def describe(value: Any) -> str:
    """The type of a value of the tree, in quotes."""
    return ascii((value.name if isinstance(value, Opaque) else type(value).__name__)[:80])


# ------------------------------------------------------------------------------------------------------------- machine


def _interpret(pickle: bytes) -> Any:
    """What the pickle describes, tensors as `StoredTensor`. Runs nothing; an opcode that is not listed is refused."""
    stack: list = []
    below: list[list] = []  # the stacks under each open mark
    memo: dict[int, Any] = {}

    def since_mark() -> list:
        nonlocal stack
        items, stack = stack, below.pop()
        return items

    for number, (op, arg, _) in enumerate(pickletools.genops(pickle)):
        if number >= _MAX_OPS:
            raise CheckpointError(f"has a pickle of more than {_MAX_OPS} operations")
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            # values
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                stack.append(arg)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(arg)
            # stack and memo
            case "MARK":
                below.append(stack)
                stack = []
            case "POP":
                stack.pop()
            case "POP_MARK":
                since_mark()
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            # containers
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(op.name[-1]))]
                stack.append(tuple(items[::-1]))
            case "TUPLE":
                items = since_mark()
                stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                _append(stack[-1], [item])
            case "APPENDS":
                items = since_mark()
                _append(stack[-1], items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case "SETITEMS":
                items = since_mark()
                _set(stack[-1], items)
            case "EMPTY_SET":
                stack.append(Opaque("builtins.set"))
            case "ADDITEMS":
                since_mark()
            case "FROZENSET":
                since_mark()
                stack.append(Opaque("builtins.frozenset"))
            # names, and what would be calls
            case "GLOBAL":
                stack.append(Opaque(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(Opaque(f"{_text(module)}.{_text(name)}"))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                stack.append(_reduce(function, args))
            case "NEWOBJ":
                _, cls = stack.pop(), stack.pop()
                stack.append(Opaque(cls.name))
            case "NEWOBJ_EX":
                _, _, cls = stack.pop(), stack.pop(), stack.pop()
                stack.append(Opaque(cls.name))
            case "BUILD":  # attributes of an object, of which there are none here
                stack.pop()
            case _:
                raise CheckpointError(f"has the pickle opcode {op.name}, which torch.save does not write")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a name is {describe(value)}")
    return value


def _append(target: Any, items: list) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Opaque):
        raise TypeError(f"items for {describe(target)}")


def _set(target: Any, items: list) -> None:
    """Keys that are neither short values nor None become `Opaque`: hashing others can take forever."""
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            simple = key is None or isinstance(key, str | float) or (isinstance(key, int) and abs(key) < 1 << 63)
            target[key if simple else Opaque(type(key).__name__)] = value
    elif not isinstance(target, Opaque):
        raise TypeError(f"entries for {describe(target)}")


def _storage(identifier: Any) -> Opaque:
    kind, cls, key, _, count = identifier
    if kind != "storage" or not isinstance(cls, Opaque) or type(count) is not int:
        raise CheckpointError("has a persistent id that is no storage")
    known = cls.name in _DTYPES
    return _Storage(cls.name, _DTYPES[cls.name], _text(key), count) if known else Opaque(cls.name)


def _reduce(function: Any, args: Any) -> Any:
    """The calls that are understood, done here; every other is an `Opaque` of the function's name."""
    match function.name, args:
        case "collections.OrderedDict", ():
            return {}
        case "torch._utils._rebuild_tensor_v2", (_Storage() as storage, offset, shape, strides, bool(), _):
            return _tensor(storage, offset, shape, strides)
        case "torch._utils._rebuild_parameter", (StoredTensor() as tensor, bool(), _):
            return tensor
    return Opaque(function.name)


def _tensor(storage: _Storage, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    """A tensor that lies within the elements its storage declares.

    Raises:
      CheckpointError: it does not, or holds more elements than there are.
    """
    good = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= _MAX_AXES
    if not good or any(type(n) is not int or not 0 <= n < 1 << 63 for n in (offset, *shape, *strides)):
        raise CheckpointError("has a tensor whose shape, strides or offset are no counts")
    count = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) if count else 0
    if last >= max(storage.count, 1) or count > storage.count:
        raise CheckpointError(f"has a tensor of shape {shape} beyond its storage of {storage.count} elements")
    return StoredTensor(storage, offset, shape, strides)


# -------------------------------------------------------------------------------------------------------------- arrays


class _Reader:
    """Reads the tensors of a tree; each storage once."""

    def __init__(self, archive: Archive, folder: str):
        self._archive, self._folder = archive, folder
        self._content: dict[str, bytes] = {}
        self._returned = 0  # bytes of the arrays so far
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
        name = f"{self._folder}data/{storage.key}"
        if self._archive.sizes.get(name) != storage.count * itemsize:
            found = self._archive.sizes.get(name, "no")
            raise CheckpointError(f"has {found} bytes in {name!a}, expected {storage.count} x {itemsize}")
        if name not in self._content:
            self._content[name] = self._archive.read(name)
        content = self._content[name]
        self._returned += math.prod(tensor.shape) * itemsize
        if self._returned > _MAX_SHARED * sum(map(len, self._content.values())):
            raise CheckpointError("has tensors that share their bytes too often to be weights")
        if not content:
            return np.zeros(tensor.shape, storage.dtype)
        strides = [stride * itemsize for stride in tensor.strides]
        return np.ndarray(tensor.shape, storage.dtype, content, tensor.offset * itemsize, strides)
