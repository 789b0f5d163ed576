"""NNCLR head: projector and predictor, with batch normalisation over the global batch.

Source: NNCLR (Dwibedi et al. 2021), section 3; MAE-CT (Lehner et al. 2023), section 4 and released recipes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from maect_jax.models.vit import Dtype


class BatchNorm(nn.Module):
    """Batch normalisation of [batch, features], statistics in at least float32.

    Under `jit` the batch axis is global, so statistics are those of all devices. As in PyTorch, the batch is
    normalised by its biased variance while the running variance takes the unbiased one.

    Attributes:
      affine: learn a scale and a bias.
      fixed_bias: the bias is a parameter, but no gradient reaches it.
      epsilon, momentum: momentum .9 keeps nine tenths of the running statistics (PyTorch calls this .1).
    """

    affine: bool = True
    fixed_bias: bool = False
    epsilon: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x_bd: jax.Array, train: bool) -> jax.Array:
        n, d = x_bd.shape
        x = x_bd.astype(jnp.promote_types(x_bd.dtype, jnp.float32))
        mean_var = self.variable("batch_stats", "mean", jnp.zeros, (d,))
        var_var = self.variable("batch_stats", "var", jnp.ones, (d,))
        if train:
            mean = x.mean(axis=0)
            var = jnp.square(x - mean).mean(axis=0)
            if not self.is_initializing():
                m = self.momentum
                mean_var.value = m * mean_var.value + (1 - m) * jax.lax.stop_gradient(mean)
                var_var.value = m * var_var.value + (1 - m) * jax.lax.stop_gradient(var) * (n / max(n - 1, 1))
        else:
            mean, var = mean_var.value, var_var.value
        y = (x - mean) * jax.lax.rsqrt(var + self.epsilon)
        if self.affine:
            bias = self.param("bias", nn.initializers.zeros, (d,))
            y = y * self.param("scale", nn.initializers.ones, (d,))
            y = y + (jax.lax.stop_gradient(bias) if self.fixed_bias else bias)
        return y.astype(x_bd.dtype)


def _linear(features: int, dtype: Dtype, name: str) -> nn.Dense:
    """Linear map without bias, PyTorch's default initialisation U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=init, name=name)


class Projector(nn.Module):
    """Three linear maps, each followed by batch normalisation, ReLU between them.

    The last bias has a gradient of exactly zero, because the predictor's batch normalisation takes every constant away.
    In float32 a rounding error would be left, which Adam turns into steps of full length, other ones on other numbers
    of devices; so it is held.

    Attributes:
      hidden, out: 2048 and 256 in the paper.
    """

    hidden: int = 2048
    out: int = 256
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features_bd: jax.Array, train: bool) -> jax.Array:
        """Pooled features [batch, width] -> embeddings [batch, out] of the compute dtype, not normalised."""
        x = features_bd.astype(self.dtype)
        for layer in (0, 1):
            x = _linear(self.hidden, self.dtype, f"linear{layer}")(x)
            x = nn.relu(BatchNorm(name=f"bn{layer}")(x, train))
        return BatchNorm(fixed_bias=True, name="bn2")(_linear(self.out, self.dtype, "linear2")(x), train)


class Predictor(nn.Module):
    """Linear, batch normalisation, ReLU, linear; takes the projector's output as it is.

    Attributes:
      hidden, out: 4096 and 256 in the paper.
    """

    hidden: int = 4096
    out: int = 256
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, embedding_be: jax.Array, train: bool) -> jax.Array:
        """Embeddings [batch, out] -> predictions [batch, out]."""
        x = _linear(self.hidden, self.dtype, "linear0")(embedding_be.astype(self.dtype))
        return _linear(self.out, self.dtype, "linear1")(nn.relu(BatchNorm(name="bn0")(x, train)))
