"""What contrastive tuning minimises: tell which prediction belongs to the neighbour of the other view.

Source: NNCLR (Dwibedi et al. 2021), equation 2, as used by MAE-CT (Lehner et al. 2023).
"""

import jax
import jax.numpy as jnp


def unit(x_be: jax.Array) -> jax.Array:
    """Rows of unit length, in at least float32; a zero row stays zero."""
    x = x_be.astype(jnp.promote_types(x_be.dtype, jnp.float32))
    return x / jnp.sqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


def one_sided_loss(prediction_be: jax.Array, neighbor_be: jax.Array, temperature: float) -> jax.Array:
    """Cross-entropy of each neighbour with its own prediction among all predictions of the global batch.

    Args:
      prediction_be: predictor outputs of one view, not normalised, [batch, width].
      neighbor_be: unit-length neighbours of the other view's targets, [batch, width]; gets no gradient.
      temperature: divisor of the cosine similarity.

    Returns:
      scalar, nats.
    """
    neighbor_be = jax.lax.stop_gradient(neighbor_be)
    logits_bb = jnp.matmul(neighbor_be, unit(prediction_be).T, precision=jax.lax.Precision.HIGHEST) / temperature
    return -jnp.diagonal(jax.nn.log_softmax(logits_bb, axis=-1)).mean()


def nnclr_loss(
    predictions: tuple[jax.Array, jax.Array], neighbors: tuple[jax.Array, jax.Array], temperature: float
) -> jax.Array:
    """Symmetric loss over two views: each view's predictions against the neighbours of the other view.

    `predictions` and `neighbors` hold [batch, width] for view 0 and view 1. Returns a scalar, nats.
    """
    first = one_sided_loss(predictions[0], neighbors[1], temperature)
    second = one_sided_loss(predictions[1], neighbors[0], temperature)
    return (first + second) / 2
