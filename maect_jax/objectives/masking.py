"""Which patches are seen: one permutation a picture, never shared by a batch.

Source: MAE (He et al. 2022), section 3.
"""

import jax
import jax.numpy as jnp


def patches_to_keep(patches: int, mask_ratio: float) -> int:
    """Number of visible patches, by float truncation as in MAE (100 patches at 0.9 keep 9)."""
    return int(patches * (1 - mask_ratio))


def mask_noise(keys_b: jax.Array, patches: int) -> jax.Array:
    """Uniform noise float32 [batch, patches] from one key a picture."""
    return jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(keys_b)


def shuffle(noise_bn: jax.Array) -> jax.Array:
    """Permutation int32 [batch, patches] by ascending noise: the first patches are the visible ones."""
    return jnp.argsort(noise_bn, axis=1).astype(jnp.int32)
