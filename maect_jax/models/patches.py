"""Pictures as patch vectors, and the fixed table that says where each patch was.

Source: MAE (He et al. 2022), section 3 and the released position table.
"""

import jax
import jax.numpy as jnp
import numpy as np


def patchify(images_bhwc: jax.Array, patch: int) -> jax.Array:
    """Pictures to patch vectors [batch, patches, patch * patch * channels].

    Patches are in row-major order; inside one, values are (row, column, channel) with the channel fastest.
    Height and width must be multiples of `patch`.
    """
    b, h, w, c = images_bhwc.shape
    rows, columns = h // patch, w // patch
    x = images_bhwc.reshape(b, rows, patch, columns, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, patch * patch * c)


def unpatchify(patches_bnp: jax.Array, patch: int, channels: int) -> jax.Array:
    """Patch vectors of a square picture back to [batch, height, width, channels]; inverse of `patchify`."""
    b, n, _ = patches_bnp.shape
    grid = round(n**0.5)
    x = patches_bnp.reshape(b, grid, grid, patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, grid * patch, grid * patch, channels)


def position_table(width: int, grid: int) -> np.ndarray:
    """Fixed 2-D sine-cosine table, float64 [grid * grid, width], patches in row-major order.

    The row of cell (r, c) is [sin(c w), cos(c w), sin(r w), cos(r w)] with w_i = 10000^(-i / (width / 4)): the first
    half of the channels encodes the column. `width` must be a multiple of 4. The CLS token has no position (zeros).
    """
    quarter = width // 4
    frequency = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    row, column = np.divmod(np.arange(grid * grid), grid)
    angles = (np.outer(column, frequency), np.outer(row, frequency))
    return np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)


def gather_rows(x_bnd: jax.Array, index_bl: jax.Array) -> jax.Array:
    """Rows of each picture by its own indices: [batch, n, d], [batch, l] -> [batch, l, d]."""
    return jnp.take_along_axis(x_bnd, index_bl[..., None], axis=1)
