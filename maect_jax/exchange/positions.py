"""Position tables of others: the row of the class token, fixed or learned, and learned ones for another picture size.

A table here is [1, 1 + patches, width], its first row the class token's. Fixed ones are computed, never held; see
`models.patches.position_table`.
"""

import math

import numpy as np

from maect_jax.models.patches import position_table

RESIZED = "bicubic (a = -0.75), half-pixel centres, no antialiasing, as MAE's fine-tuning"
_A = -0.75  # of PyTorch's bicubic kernel


def fixed_table(width: int, grid: int) -> np.ndarray:
    """The fixed sine-cosine table, float32 [1, 1 + grid * grid, width], zeros for the class token."""
    table_nd = position_table(width, grid).astype(np.float32)
    return np.concatenate([np.zeros((1, width), np.float32), table_nd])[None]


def grid_of(table_1nd: np.ndarray) -> int:
    """Patches a side of a table with its class row."""
    return math.isqrt(table_1nd.shape[1] - 1)


def is_fixed(table_1nd: np.ndarray) -> bool:
    """Whether a table, of the type it has in its file, is the fixed one within the rounding of its type."""
    if not np.isfinite(table_1nd).all():
        return False
    tolerance = 1e-5 if table_1nd.dtype.itemsize >= 4 else 4e-3
    difference = table_1nd.astype(np.float64) - fixed_table(table_1nd.shape[2], grid_of(table_1nd))
    return bool(np.abs(difference).max() <= tolerance)


def resize_note(old: int, new: int) -> str:
    """What is said of a table that was resized, for records and cards."""
    return f"learned positions resized from {old} x {old} to {new} x {new} patches: {RESIZED}"


def resize(table_1nd: np.ndarray, grid: int) -> np.ndarray:
    """A learned table for another number of patches a side; see `RESIZED`. The class row stays as it is.

    Source: MAE (He et al. 2022), released fine-tuning code; the kernel is that of Keys 1981 with a = -0.75.
    """
    old = grid_of(table_1nd)
    matrix = _interpolation(old, grid)
    image_rcd = table_1nd[0, 1:].reshape(old, old, -1)
    resized_rcd = np.einsum("ri,cj,ijd->rcd", matrix, matrix, image_rcd.astype(np.float64), optimize=True)
    rows = resized_rcd.reshape(grid * grid, -1).astype(table_1nd.dtype)
    return np.concatenate([table_1nd[:, :1], rows[None]], axis=1)


def _interpolation(old: int, new: int) -> np.ndarray:
    """Weights float64 [new, old] of bicubic interpolation on a line; beyond the ends the last value goes on."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centres).astype(int) - 1
    matrix = np.zeros((new, old))
    for tap in range(4):
        at = first + tap
        x = np.abs(centres - at)
        near = ((_A + 2) * x - (_A + 3)) * x * x + 1
        far = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
        np.add.at(matrix, (np.arange(new), np.clip(at, 0, old - 1)), np.where(x <= 1, near, far))
    return matrix
