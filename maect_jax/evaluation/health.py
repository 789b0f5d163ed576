"""Is the representation alive? Figures that fall when embeddings collapse, cheap enough to log with the loss.

All functions take a global array [batch, width], possibly split by rows over devices, and return float32 scalars on
the device; a non-finite embedding gives a non-finite figure, never an error.
"""

import jax
import jax.numpy as jnp

from maect_jax.objectives.nnclr import unit

_EXACT = jax.lax.Precision.HIGHEST


def embedding_std(x_be: jax.Array) -> jax.Array:
    """Mean over dimensions of the standard deviation over the batch of unit-length rows.

    1 / sqrt(width) when the rows spread evenly over the sphere, 0 when all are equal.

    Source: SimSiam (Chen and He 2021), section 4.1.
    """
    return unit(x_be).std(axis=0).mean()


def effective_rank(x_be: jax.Array) -> jax.Array:
    """exp of the entropy of the normalised singular values of x, from 1 to min(batch, width); rows not centred.

    The singular values come from the smaller Gram matrix, which is one product over the split batch. Its float32
    eigenvalues carry a noise of about 1e-7 of the largest; those within that noise count as zero.

    Source: RankMe (Garrido et al. 2023), equation 1; effective rank of Roy and Vetterli (2007).
    """
    x = x_be.astype(jnp.promote_types(x_be.dtype, jnp.float32))
    x = x / jnp.maximum(jnp.abs(x).max(), jnp.finfo(x.dtype).tiny)  # squares neither overflow nor vanish
    rows, width = x.shape
    gram = jnp.matmul(x.T, x, precision=_EXACT) if width <= rows else jnp.matmul(x, x.T, precision=_EXACT)
    eigenvalue = jnp.linalg.eigvalsh(gram)
    noise = 8 * jnp.finfo(x.dtype).eps * eigenvalue[-1]
    singular = jnp.sqrt(jnp.where(eigenvalue > noise, eigenvalue, 0 * eigenvalue))  # 0 * keeps a NaN
    share = singular / jnp.maximum(singular.sum(), jnp.finfo(x.dtype).tiny)
    return jnp.exp(-jax.scipy.special.xlogy(share, share).sum())


def alignment(x_be: jax.Array, y_be: jax.Array) -> jax.Array:
    """Mean squared distance between the unit-length rows of positive pairs: 0 equal, 2 orthogonal, 4 opposite.

    Source: Wang and Isola (2020), equation 1 with alpha = 2.
    """
    return jnp.square(unit(x_be) - unit(y_be)).sum(axis=1).mean()


def uniformity(x_be: jax.Array, t: float = 2.0) -> jax.Array:
    """log of the mean of exp(-t * squared distance) over the pairs of different unit-length rows; lower is more even.

    0 when all rows are equal. Holds a [batch, batch] matrix.

    Source: Wang and Isola (2020), equation 2.
    """
    x = unit(x_be)
    batch = x.shape[0]
    distance_bb = 2 - 2 * jnp.matmul(x, x.T, precision=_EXACT)
    pairs_bb = jnp.where(jnp.eye(batch, dtype=bool), -jnp.inf, -t * distance_bb)
    return jax.nn.logsumexp(pairs_bb) - jnp.log(batch * (batch - 1.0))


@jax.jit
def health(embedding_be: jax.Array) -> dict[str, jax.Array]:
    """`embedding_std` and `effective_rank` of the embeddings [batch, width] of one update, as device scalars."""
    return {"embedding_std": embedding_std(embedding_be), "effective_rank": effective_rank(embedding_be)}
