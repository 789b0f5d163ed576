"""What EMAE minimises: the reconstruction of the whole picture, and that its parts agree with each other.

The shuffled patches of a picture are cut into K blocks; part k sees block k and predicts the other K - 1
(`masking.parallel_masks`). So each block has K - 1 predictions, one of every part but its own. All arrays here are
ordered by block: [batch, block, predicting part, patch in block, value], and which parts overlap is in the shapes.

  reconstruction  mean over parts, removed patches and values of (prediction - target)^2: the mean of the K losses that
                  MAE would have with each part's mask
  disagreement    mean over pairs of parts i < j, over the patches hidden from both and their values, of
                  |prediction_i - prediction_j|
  loss            reconstruction + consistency_weight * z * disagreement

There is no official code, and what the paper leaves open is a setting. Defaults and their reasons:

  consistency_weight  1.0. The authors' value is not verified; with `all` below it has the gradient of the one
                      implementation by others that is known.
  consistency_norm    'all': the sum is divided by all patches of a picture, z = (K - 2) / K, as that implementation
                      does; 'overlap': by the patches hidden from both, z = 1, twice as much at K = 4.
  consistency_form    'symmetric'. A stop-gradient on either side in turn, |sg(a) - b| + |a - sg(b)|, has exactly the
                      gradient of |a - b| (and twice its value), so it is the same. 'one_sided' is another objective: of
                      two parts one is the target, the one whose own block lies nearer before the block in question; so
                      every part teaches as often as it learns.
  consistency_space   'targets': the space of the targets, normalised pixels. 'pixels': each patch's deviation undone.
  parts               4, a mask ratio of 0.75.
  batch_counting      'images': the linear rate scaling counts a picture once. 'parts' counts each of its parts,
                      'predicted' the patches hidden from some part over those hidden from one (DMJD's rule).

The disagreement has a gradient of constant size however near two predictions are; what keeps them from agreeing on
nothing is the reconstruction, so there is no teacher network.

Source: EMAE (Li et al. 2023, "Efficient Masked Autoencoders with Self-Consistency"), section 3.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

NORMS = ("all", "overlap")
FORMS = ("symmetric", "one_sided")
SPACES = ("targets", "pixels")
COUNTINGS = ("images", "parts", "predicted")


def by_block(prediction_bkmp: jax.Array) -> jax.Array:
    """Predictions of parts as predictions of blocks.

    Args:
      prediction_bkmp: [batch, K parts, (K - 1) * patches in a block, values]; part k predicts block k + 1 first, then
        the others in cyclic order.

    Returns:
      [batch, K blocks, K - 1, patches in a block, values]; the predictions of block c are of parts c - 1, c - 2, …
    """
    b, k, m, p = prediction_bkmp.shape
    ahead = prediction_bkmp.reshape(b, k, k - 1, m // (k - 1), p)
    return jnp.stack([jnp.roll(ahead[:, :, i], i + 1, axis=1) for i in range(k - 1)], axis=2)


def reconstruction(prediction_bcosp: jax.Array, target_bcsp: jax.Array) -> jax.Array:
    """Mean squared error over all parts, removed patches and values.

    Args:
      prediction_bcosp: from `by_block`.
      target_bcsp: [batch, blocks, patches in a block, values], at least float32.
    """

    def of_block(prediction_bosp, target_bsp):
        error_bosp = prediction_bosp.astype(target_bsp.dtype) - target_bsp[:, None]
        return jnp.square(error_bosp).mean(axis=(1, 2, 3))

    return _of_all_blocks(of_block, prediction_bcosp, target_bcsp).mean()


def disagreement(
    prediction_bcosp: jax.Array, form: str = "symmetric", scale_bcs1: jax.Array | None = None
) -> jax.Array:
    """Mean |a - b| over pairs of parts, patches hidden from both, and values; 0 for fewer than three parts.

    Args:
      prediction_bcosp: from `by_block`, of any float type; differences and sums are of at least float32.
      form: 'symmetric', or 'one_sided' (the value is the same, the gradient goes to one of the two).
      scale_bcs1: factor of each patch's differences, for instance its deviation; None = 1.
    """
    predictions, dtype = prediction_bcosp.shape[2], jnp.promote_types(prediction_bcosp.dtype, jnp.float32)
    if predictions < 2:
        return jnp.zeros((), dtype)
    pairs = predictions * (predictions - 1) // 2

    def of_block(prediction_bosp, scale_bs1):
        x, total_b = prediction_bosp.astype(dtype), 0.0
        for apart in range(1, predictions):  # all pairs of predictions so many parts apart at once
            near, far = x[:, :-apart], x[:, apart:]
            if form == "one_sided":
                near = jax.lax.stop_gradient(near)
            difference = near - far
            difference *= jax.lax.stop_gradient(jnp.sign(difference))  # abs, whose gradient at 0 would be 1
            if scale_bs1 is not None:
                difference = difference * scale_bs1[:, None]
            total_b += difference.mean(axis=(1, 2, 3)) * ((predictions - apart) / pairs)
        return total_b

    return _of_all_blocks(of_block, prediction_bcosp, scale_bcs1).mean()


def _of_all_blocks(of_block: Callable[..., jax.Array], *arrays_bc: jax.Array | None) -> jax.Array:
    """`of_block` of one block of the arrays after the other: [blocks, batch].

    A loop that is computed anew for the gradient, because compilers would keep all predictions in float32 and the
    differences of all pairs. One number a picture leaves it, because devices would add one a block in each round.
    """
    arrays_cb = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays_bc)
    recomputed = jax.checkpoint(of_block, prevent_cse=False)  # two loops share no expressions anyway
    return jax.lax.map(lambda arrays_b: recomputed(*arrays_b), arrays_cb)


def norm_factor(norm: str, parts: int) -> float:
    """z above: what the mean over the overlap is multiplied by."""
    return (parts - 2) / parts if norm == "all" else 1.0
