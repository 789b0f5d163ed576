"""Pickles, read without being run.

A pickle is a program for a stack machine that imports names and calls them. This machine knows plain containers and
values. It imports nothing and calls nothing: a name becomes an `Opaque`, and what becomes of a call is up to the reader
of the format (`exchange.pth`). An opcode that is not listed here is refused before its argument is looked at.

Time and memory are bounded whatever the program says: every operation takes constant time and makes one small object,
or consumes what others made; text, names and whole numbers can not grow.

Source: Python's documentation of `pickletools`.
"""

import io
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from maect_jax.errors import CheckpointError

_MAX_OPS = 500_000  # a training checkpoint of a ViT-H with its average needs 83,000
_MAX_TEXT = 1 << 22  # characters; NumPy's arrays are text in pickles of old protocols
_MAX_NAME = 250  # characters: names are joined, so that long ones would multiply
_MAX_KEY = 1_000  # characters
_MAX_NUMBERED = 20_000  # entries under numbers: unlike text's, their hashes can be chosen so that all fall together


@dataclass(frozen=True, eq=False, slots=True)
class Opaque:
    """Stands for an object that is not built; `name` is that of its class or function, such as 'argparse.Namespace'."""

    name: str


def describe(value: Any) -> str:
    """The type of a value, in quotes."""
    return ascii((value.name if isinstance(value, Opaque) else type(value).__name__)[:80])


def interpret(pickle: bytes, call: Callable[[Opaque, Any], Any], persistent: Callable[[Any], Any]) -> Any:
    """What a pickle describes.

    Args:
      pickle: the program; the reader of the format bounds its length.
      call: given a function's name and its arguments, the object that stands for the result.
      persistent: given the argument of a persistent id, the object that stands for it.

    Returns:
      Dicts, lists, tuples, text, bytes, numbers, booleans, None, `Opaque`, and what `call` and `persistent` return.
      Containers may be shared, many times over, and may hold themselves.

    Raises:
      CheckpointError, or LookupError, TypeError, ValueError, AttributeError: the program is damaged, does what is not
        done here, or is too large.
    """
    machine = _Machine(call, persistent)
    for name, argument in _operations(pickle):
        if name == "STOP":
            break
        _STEPS[name](machine, argument)
    return machine.stack.pop()


def _operations(pickle: bytes) -> Iterator[tuple[str, Any]]:
    stream = io.BytesIO(pickle)
    for _ in range(_MAX_OPS):
        code = stream.read(1)
        if not code:
            raise CheckpointError("is damaged: its pickle breaks off")
        op = pickletools.code2op.get(code.decode("latin-1"))
        if op is None or op.name not in _STEPS:
            shown = op.name if op else f"0x{code.hex()}"
            raise CheckpointError(f"has the pickle opcode {shown}, which torch.save does not write")
        if op.name == "GLOBAL":  # pickletools takes the backslashes in a name for escapes
            yield op.name, [stream.readline().removesuffix(b"\n").decode() for _ in range(2)]
        else:
            yield op.name, op.arg.reader(stream) if op.arg else None
    raise CheckpointError(f"has a pickle of more than {_MAX_OPS} operations")


class _Machine:
    """The stack, the memo, and the steps that change them."""

    def __init__(self, call: Callable[[Opaque, Any], Any], persistent: Callable[[Any], Any]):
        self.stack: list = []
        self._below: list[list] = []  # the stacks under each open mark
        self._memo: list = []
        self._call, self._persistent = call, persistent
        self._numbered = 0  # entries of dictionaries under keys that are no text

    # values

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_text(self, value: str) -> None:
        if len(value) > _MAX_TEXT:
            raise CheckpointError(f"has a text of {len(value)} characters in its pickle; at most {_MAX_TEXT} are read")
        self.push(value)

    def push_name(self, parts: list) -> None:
        if not all(isinstance(part, str) and 0 < len(part) <= _MAX_NAME for part in parts):
            raise CheckpointError(f"has a pickle with a name that is no text of 1 to {_MAX_NAME} characters")
        self.push(Opaque(".".join(parts)))

    # stack and memo

    def pop(self, count: int) -> list:
        if len(self.stack) < count:
            raise CheckpointError("has a pickle that takes more from its stack than is there")
        items, self.stack[-count:] = self.stack[-count:], []
        return items

    def mark(self) -> None:
        self._below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list:
        items, self.stack = self.stack, self._below.pop()
        return items

    def remember(self, index: int | None) -> None:
        """In a list, as objects are numbered one by one: in a dictionary, numbers could be chosen to collide."""
        index = len(self._memo) if index is None else index
        if index > len(self._memo):
            raise CheckpointError(
                f"has a pickle that numbers its objects out of order, {index} before {len(self._memo)}"
            )
        self._memo[index : index + 1] = [self.stack[-1]]

    def recall(self, index: int) -> None:
        if index >= len(self._memo):
            raise CheckpointError(f"has a pickle that recalls object {index} of {len(self._memo)}")
        self.push(self._memo[index])

    # containers

    def extend(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise TypeError(f"items for {describe(target)}")

    def update(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            self._numbered += sum(not isinstance(key, str) for key in items[::2])
            if self._numbered > _MAX_NUMBERED:
                raise CheckpointError(f"has more than {_MAX_NUMBERED} entries in its pickle whose keys are no text")
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[key if _plain(key) else Opaque(type(key).__name__)] = value
        elif not isinstance(target, Opaque):
            raise TypeError(f"entries for {describe(target)}")

    def frozen_set(self) -> None:
        self.since_mark()
        self.push(Opaque("builtins.frozenset"))

    # what would be calls

    def persistent_id(self) -> None:
        (identifier,) = self.pop(1)
        self.push(self._persistent(identifier))

    def reduce(self) -> None:
        function, arguments = self.pop(2)
        self.push(self._call(_named(function), arguments))

    def new(self, arguments: int) -> None:
        cls, *_ = self.pop(1 + arguments)
        self.push(Opaque(_named(cls).name))


def _plain(key: Any) -> bool:
    """Whether a key is what it stands for. Others become `Opaque`: to hash them, or to show them, can take forever."""
    if isinstance(key, str):
        return len(key) <= _MAX_KEY
    return key is None or isinstance(key, float | Opaque) or (isinstance(key, int) and abs(key) < 1 << 63)


def _named(function: Any) -> Opaque:
    if not isinstance(function, Opaque):
        raise TypeError(f"a call of {describe(function)}")
    return function


_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    # values
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys((*_NUMBERS, *_BYTES), _Machine.push),
    "BYTEARRAY8": lambda machine, value: machine.push(bytes(value)),
    **dict.fromkeys(_TEXTS, _Machine.push_text),
    # stack and memo
    "MARK": lambda machine, _: machine.mark(),
    "POP": lambda machine, _: machine.pop(1),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    # containers
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "SETITEM": lambda machine, _: machine.update(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.since_mark()),
    "EMPTY_SET": lambda machine, _: machine.push(Opaque("builtins.set")),
    "ADDITEMS": lambda machine, _: machine.since_mark(),
    "FROZENSET": lambda machine, _: machine.frozen_set(),
    # names, and what would be calls
    "GLOBAL": _Machine.push_name,
    "STACK_GLOBAL": lambda machine, _: machine.push_name(machine.pop(2)),
    "BINPERSID": lambda machine, _: machine.persistent_id(),
    "REDUCE": lambda machine, _: machine.reduce(),
    "NEWOBJ": lambda machine, _: machine.new(arguments=1),
    "NEWOBJ_EX": lambda machine, _: machine.new(arguments=2),
    "BUILD": lambda machine, _: machine.pop(1),  # attributes of an object, of which there are none here
}
