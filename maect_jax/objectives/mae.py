"""What the masked autoencoder minimises: squared error on the removed patches.

Source: MAE (He et al. 2022), section 3 and table 1d (normalised pixels).
"""

import jax
import jax.numpy as jnp


def pixel_targets(patches_bnp: jax.Array, normalise: bool) -> jax.Array:
    """Targets [batch, patches, values] in at least float32.

    With `normalise`, each patch has its own mean and unit variance: (x - mean) / sqrt(var + 1e-6) with the unbiased
    variance (divisor values - 1) over its values.
    """
    x = patches_bnp.astype(jnp.promote_types(patches_bnp.dtype, jnp.float32))
    if not normalise:
        return x
    return (x - x.mean(axis=-1, keepdims=True)) / deviation(x)


def deviation(patches_bnp: jax.Array) -> jax.Array:
    """What a patch was divided by in `pixel_targets`: sqrt(var + 1e-6), [batch, patches, 1]."""
    return jnp.sqrt(patches_bnp.var(axis=-1, ddof=1, keepdims=True) + 1e-6)


def reconstruction_loss(prediction_bmp: jax.Array, target_bmp: jax.Array) -> jax.Array:
    """Mean squared error over values and removed patches; both [batch, removed patches, values].

    Every picture has the same number of removed patches, so the plain mean equals the sum over all removed patches of
    the batch divided by their number.
    """
    return jnp.square(prediction_bmp.astype(target_bmp.dtype) - target_bmp).mean()
