"""What a work folder holds, read without trust: whatever is missing, torn or of an unexpected shape costs its place
on the page and nothing else.
"""

import io
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import yaml
from etils import epath

STAGES = ("pretrain", "control", "head", "tune")  # in the order they are shown
KINDS = {"uint8": "u", "int": "iu", "float": "f", "bool": "b", "str": "U"}  # NumPy's letters for what is accepted


def read_text(path: epath.Path) -> str:
    """The file's text, or '' where there is none."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return ""


def parse_mapping(text: str, load: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """The mapping that a text holds, empty where it holds none."""
    try:
        value = load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        value = None
    return value if isinstance(value, dict) else {}


def read_lines(path: epath.Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of lines and how many lines are none: an interrupted run leaves a torn one."""
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    records = [record for line in lines if (record := parse_mapping(line))]
    return records, len(lines) - len(records)


def number(value: Any) -> float | None:
    """The finite number that a JSON value is, else None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def count_text(value: Any) -> str:
    """12345 -> '12,345'; '–' for None."""
    exact = number(value)
    return "–" if value is None else f"{exact:,.10g}" if exact is not None else str(value)


def read_arrays(path: epath.Path, names: Iterable[str], build: Callable[..., Any], absent: dict[str, str]) -> Any:
    """What `build` makes of the named arrays of an npz file, or None with the reason in `absent`."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return build(*(file[name] for name in names))
    except FileNotFoundError:
        absent[path.stem] = f"figures/{path.name} is not in this folder."
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile) as error:
        absent[path.stem] = f"figures/{path.name} could not be read ({type(error).__name__}: {error})."
    return None


def read_stages(
    folder: epath.Path, kind: str, names: Iterable[str], build: Callable[..., Any], absent: dict[str, str]
) -> Iterator[tuple[str, Any]]:
    """(stage, what `build` makes of it) of every readable `{kind}_{stage}.npz`, in the order stages are shown.

    Those before and after tuning are looked for even where they have no file, unless only other weights were evaluated.
    """
    found = {path.name.removeprefix(f"{kind}_").removesuffix(".npz") for path in folder.glob(f"{kind}_*.npz")}
    if not found or found & {"pretrain", "tune"}:
        found |= {"pretrain", "tune"}
    names = tuple(names)
    for stage in order_stages(found):
        if (built := read_arrays(folder / f"{kind}_{stage}.npz", names, build, absent)) is not None:
            yield stage, built


def order_stages(stages: Iterable[str]) -> list[str]:
    """Stages of a run as they follow each other, then all other weights by name."""
    return sorted(stages, key=lambda stage: (STAGES.index(stage) if stage in STAGES else len(STAGES), stage))


def check_arrays(**arrays: tuple[np.ndarray, str, str]) -> None:
    """Raise ValueError, naming the array, unless each has its type and axes.

    Args:
      arrays: name -> (array, one of `KINDS`, its axes in words; '2' is an axis of two). An axis has one length in all
        arrays. Only 'classes' may be empty: there are none of unlabelled pictures.
    """
    lengths = {"2": 2}
    for name, (array, kind, words) in arrays.items():
        shape, axes = array.shape, words.split()
        good = array.dtype.kind in KINDS[kind] and (kind != "uint8" or array.dtype == np.uint8)
        good &= len(shape) == len(axes) and (name == "classes" or 0 not in shape)
        if not good or any(lengths.setdefault(axis, length) != length for axis, length in zip(axes, shape)):
            known = {axis: lengths[axis] for axis in axes if axis in lengths}
            raise ValueError(f"{name} must be {kind} {axes} with {known}; it is {array.dtype} {list(shape)}")


def class_name(classes: np.ndarray, label: int) -> str:
    """The name of a class, or 'class 7' where it has none, or 'no label' for -1."""
    if label < 0:
        return "no label"
    return str(classes[label]) if label < len(classes) else f"class {label}"
