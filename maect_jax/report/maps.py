"""The chapters of a report that show how classes lie to each other: a map of the features, and confusions."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image
from scipy.spatial import cKDTree

from maect_jax.report.figures import OTHER_CLASS, SAME_CLASS, data_address
from maect_jax.report.files import check_arrays, class_name, read_stages
from maect_jax.report.pictures import called, main_and_more

COLORS = 20  # in the style sheet; class 20 has the colour of class 0
MAX_DOTS = 4000
MAX_NUMBERS = 20  # classes; a matrix of more is a picture
MAX_CELLS = 500  # pixels a side of that picture; a larger matrix is summed in blocks
MOST_FREQUENT = 5
SIDE, MARGIN = 400, 10  # of the map, in units of its own


def scatters(folder: epath.Path, names: Mapping[str, str], absent: dict[str, str]) -> dict[str, Any] | None:
    """Maps of the same test pictures, a map a stage, with one legend."""
    parts: list[dict[str, Any]] = []
    for stage, part in read_stages(folder, "scatter", ("xy", "label", "classes"), _scatter, absent):
        if parts and part["classes"] != parts[0]["classes"]:
            absent[f"scatter_{stage}"] = f"figures/scatter_{stage}.npz has other classes than the maps before it."
        else:
            parts.append(called(stage, names) | part)
    return main_and_more(parts) | {"classes": parts[0]["classes"]} if parts else None


def _scatter(xy: np.ndarray, label: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    """Dots of every class as one path in a square of `SIDE`, and how often a dot's nearest one is of its class."""
    check_arrays(xy=(xy, "float", "pictures 2"), label=(label, "int", "pictures"), classes=(classes, "str", "classes"))
    finite = np.isfinite(xy).all(axis=1)
    xy, label = xy[finite].astype(np.float64), label[finite]
    if not len(xy):
        raise ValueError("no point is finite")
    shown = np.random.default_rng(0).permutation(len(xy))[:MAX_DOTS]  # every n-th would meet some classes only
    low, span = xy.min(0), np.ptp(xy, axis=0)
    scale = (SIDE - 2 * MARGIN) / (span.max() or 1.0)
    place = (xy - low - span / 2) * scale * (1, -1) + SIDE / 2
    paths = []
    for value in np.unique(label[shown]).tolist():
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in place[shown[label[shown] == value]])
        color = value % COLORS if value >= 0 else "none"
        paths.append({"d": dots, "color": color, "name": class_name(classes, value)})
    width = float(np.clip(170 / np.sqrt(len(shown)), 3, 8))
    return {
        "paths": paths,
        "width": f"{width:.1f}",
        "count": len(xy),
        "shown": len(shown),
        "same": _nearest_of_same_class(xy, label),
        "classes": classes.tolist(),
    }


def _nearest_of_same_class(xy: np.ndarray, label: np.ndarray) -> str:
    """The share of labelled points whose nearest labelled point is of their class, in %; '' where there are none."""
    xy, label = xy[label >= 0], label[label >= 0]
    if len(xy) < 2:
        return ""
    first, second = cKDTree(xy).query(xy, k=2)[1].T
    nearest = np.where(first == np.arange(len(xy)), second, first)
    return f"{100 * (label[nearest] == label).mean():.0f}"


def confusions(
    folder: epath.Path, names: Mapping[str, str], absent: dict[str, str]
) -> dict[str, list[dict[str, Any]]] | None:
    """What was taken for what, a matrix a stage."""
    parts = read_stages(folder, "confusion", ("matrix", "classes", "source"), _confusion, absent)
    found = [called(stage, names) | part for stage, part in parts]
    return main_and_more(found) if found else None


def _confusion(matrix: np.ndarray, classes: np.ndarray, source: np.ndarray) -> dict[str, Any]:
    """A matrix as cells with numbers, or as a picture, and its largest errors in words."""
    check_arrays(
        classes=(classes, "str", "classes"), matrix=(matrix, "int", "classes classes"), source=(source, "str", "")
    )
    matrix = matrix.astype(np.int64)
    if (matrix < 0).any() or not matrix.any():
        raise ValueError("matrix must hold counts, and of at least one picture")
    total_c, names = matrix.sum(1), [class_name(classes, c) for c in range(len(matrix))]
    wrong = matrix * ~np.eye(len(matrix), dtype=bool)
    sentences = []
    for flat in np.argsort(-wrong, axis=None, kind="stable")[:MOST_FREQUENT].tolist():
        true, predicted = divmod(flat, len(matrix))
        if count := int(wrong[true, predicted]):
            of = int(total_c[true])
            sentences.append({"true": names[true], "predicted": names[predicted], "count": count, "of": of})
    small = len(matrix) <= MAX_NUMBERS
    return {
        "source": str(source),
        "classes": names,
        "right": f"{100 * np.trace(matrix) / matrix.sum():.1f}",
        "rows": _cells(matrix, names) if small else [],
        "picture": None if small else _picture(matrix),
        "sentences": sentences,
    }


def _tone(matrix: np.ndarray) -> np.ndarray:
    """How strongly a cell is coloured, 0..1: the square root of its share of its row, so that rare errors show."""
    return np.sqrt(matrix / np.maximum(matrix.sum(1, keepdims=True), 1))


def _cells(matrix: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    """A row a true class; of each cell its count, tone and whether it lies on the diagonal."""
    tone = _tone(matrix)
    return [
        {"name": name, "cells": [(int(n), f"{tone[i, j]:.2f}", i == j) for j, n in enumerate(matrix[i])]}
        for i, name in enumerate(names)
    ]


def _picture(matrix: np.ndarray) -> str:
    """The matrix as a picture of a pixel a cell, or a block of cells, on a transparent ground."""
    start = np.arange(0, len(matrix), -(-len(matrix) // MAX_CELLS))
    blocks = np.add.reduceat(np.add.reduceat(matrix, start, axis=0), start, axis=1)
    rgba = np.empty((*blocks.shape, 4), np.uint8)
    rgba[..., :3] = np.where(np.eye(len(blocks), dtype=bool)[..., None], SAME_CLASS, OTHER_CLASS)
    rgba[..., 3] = np.round(255 * _tone(blocks))
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG", optimize=True)
    return data_address(buffer.getvalue())
