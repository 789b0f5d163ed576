"""Random numbers as counters: every choice is a function of (seed, purpose, epoch, sample, view).

Nothing depends on the number of hosts, devices or workers, and there is no generator state to save.
"""

import zlib

import jax
import jax.numpy as jnp

PURPOSES = ("initialisation", "crop", "flip", "colour", "blur", "grey", "solarise", "mask", "neighbor")
PURPOSES += ("randaugment", "erasing", "mixing", "drop_path")
_PURPOSE_CODE = {name: zlib.crc32(name.encode()) & 0x7FFFFFFF for name in PURPOSES}


def stage_seed(seed: int, stage: str) -> int:
    """Seed of one stage: stages of a run draw from separate streams. Returns an int in [0, 2**31)."""
    return zlib.crc32(f"{seed}/{stage}".encode()) & 0x7FFFFFFF


def purpose_key(seed: int, purpose: str) -> jax.Array:
    """Key of one purpose; `purpose` is one of `PURPOSES`."""
    return jax.random.fold_in(jax.random.key(seed), _PURPOSE_CODE[purpose])


def sample_keys(seed: int, purpose: str, epoch: jax.Array, sample_id_b: jax.Array, view: int) -> jax.Array:
    """One key a sample.

    Args:
      seed: seed of the stage (`stage_seed`).
      purpose: what the key is for, one of `PURPOSES`.
      epoch: int32 scalar.
      sample_id_b: int32 [batch], stable ids of the pictures.
      view: index of the view.

    Returns:
      keys [batch].
    """
    key = jax.random.fold_in(jax.random.fold_in(purpose_key(seed, purpose), epoch), view)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, sample_id_b.astype(jnp.uint32))


def below(words: jax.Array, n: jax.Array | int) -> jax.Array:
    """Random words to whole numbers 0 <= x < n, each as likely to one part in 2^16 / n.

    In integers, because what a rounded product gives may depend on how the compiler fused it.

    Args:
      words: uint32 of any shape, from `jax.random.bits`.
      n: 1..2^16, of a shape that goes with `words`.

    Returns:
      int32.
    """
    return ((words >> 16) * jnp.asarray(n, jnp.uint32) >> 16).astype(jnp.int32)
