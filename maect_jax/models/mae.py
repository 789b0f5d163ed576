"""Masked autoencoder: the encoder sees a quarter of the patches, the decoder predicts the rest.

Tokens stay in shuffled order from the encoder to the loss: blocks are permutation-equivariant, so only the decoder's
position rows and the targets are gathered, and every shape is static.

Source: MAE (He et al. 2022), section 3.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from maect_jax.models.patches import gather_rows, position_table
from maect_jax.models.vit import Dtype, ViT, blocks, dense, layer_norm


class Decoder(nn.Module):
    """From encoder tokens to pixel values.

    Attributes:
      width, depth, heads: shape of the decoder (512, 8, 16 in the paper).
      grid: patches a side.
      values: numbers to predict a patch, patch * patch * channels.
    """

    width: int
    depth: int
    heads: int
    grid: int
    values: int
    mlp_ratio: int = 4
    dtype: Dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, tokens_bld: jax.Array, shuffle_bn: jax.Array, only_masked: bool = True) -> jax.Array:
        """Predictions in shuffled order.

        Args:
          tokens_bld: encoder tokens [batch, 1 + kept, width of the encoder], CLS first.
          shuffle_bn: int32 [batch, patches], a permutation a picture whose first `kept` entries the encoder saw.
          only_masked: predict the removed patches only (what the loss needs), else all.

        Returns:
          [batch, removed or all patches, values], in the order of `shuffle_bn`.
        """
        b, n = shuffle_bn.shape
        kept = tokens_bld.shape[1] - 1
        x = dense(self.width, self.dtype, "embed")(tokens_bld)
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        removed = jnp.broadcast_to(mask_token.astype(self.dtype), (b, n - kept, self.width))
        table_nd = jnp.asarray(position_table(self.width, self.grid).astype("float32"), self.dtype)  # as published
        patches = jnp.concatenate([x[:, 1:], removed], axis=1) + table_nd[shuffle_bn]
        x = jnp.concatenate([x[:, :1], patches], axis=1)
        x, _ = blocks(self.depth, self.heads, self.mlp_ratio, self.dtype, self.remat, name="blocks")(x, None)
        x = x[:, 1 + kept :] if only_masked else x[:, 1:]
        return dense(self.values, self.dtype, "predict")(layer_norm(self.dtype, "norm")(x))


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder together; parameters under `encoder` and `decoder`."""

    encoder: ViT
    decoder: Decoder

    def __call__(
        self, patches_bnp: jax.Array, shuffle_bn: jax.Array, keep: int, only_masked: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Predictions of the removed patches and the encoder's tokens.

        Args:
          patches_bnp: all patch vectors [batch, patches, values], row-major.
          shuffle_bn: int32 [batch, patches], a permutation a picture; its first `keep` patches are visible.
          keep: number of visible patches (static).

        Returns:
          predictions [batch, patches - keep (or all), values] in shuffled order, and encoder tokens
          [batch, 1 + keep, width].
        """
        visible_bl = shuffle_bn[:, :keep]
        tokens_bld = self.encoder(gather_rows(patches_bnp, visible_bl), visible_bl)
        return self.decoder(tokens_bld, shuffle_bn, only_masked), tokens_bld
