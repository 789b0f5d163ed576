"""Masked autoencoder: the encoder sees a quarter of the patches, the decoder predicts the rest.

Tokens stay in the order they are given in, from the encoder to the loss: blocks are permutation-equivariant, so only
the decoder's position rows and the targets are gathered, and every shape is static.

Source: MAE (He et al. 2022), section 3.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from maect_jax.models.patches import position_table
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
    def __call__(self, tokens_bld: jax.Array, order_bm: jax.Array, only_removed: bool = True) -> jax.Array:
        """Predictions in the order given.

        Args:
          tokens_bld: encoder tokens [batch, 1 + kept, width of the encoder], CLS first.
          order_bm: int32 [batch, kept + removed], places of patches in row-major order: first those that the encoder
            saw, then those to predict, which need not be all the others.
          only_removed: predict the removed patches only (what the loss needs), else the kept ones too.

        Returns:
          [batch, removed (or kept + removed), values].
        """
        b, m = order_bm.shape
        kept = tokens_bld.shape[1] - 1
        x = dense(self.width, self.dtype, "embed")(tokens_bld)
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        removed = jnp.broadcast_to(mask_token.astype(self.dtype), (b, m - kept, self.width))
        table_nd = jnp.asarray(position_table(self.width, self.grid).astype("float32"), self.dtype)  # as published
        patches = jnp.concatenate([x[:, 1:], removed], axis=1) + table_nd[order_bm]
        x = jnp.concatenate([x[:, :1], patches], axis=1)
        x, _ = blocks(self.depth, self.heads, self.mlp_ratio, self.dtype, self.remat, name="blocks")(x, None)
        x = x[:, 1 + kept :] if only_removed else x[:, 1:]
        return dense(self.values, self.dtype, "predict")(layer_norm(self.dtype, "norm")(x))


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder together; parameters under `encoder` and `decoder`."""

    encoder: ViT
    decoder: Decoder

    def __call__(
        self, visible_blp: jax.Array, order_bm: jax.Array, only_removed: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Predictions of the removed patches and the encoder's tokens.

        Args:
          visible_blp: patch vectors that are seen, [batch, kept, values].
          order_bm: int32 [batch, kept + removed], places of the visible patches, in their order, then of those to
            predict; see `Decoder`.

        Returns:
          predictions [batch, removed (or kept + removed), values] in the order given, and encoder tokens
          [batch, 1 + kept, width].
        """
        tokens_bld = self.encoder(visible_blp, order_bm[:, : visible_blp.shape[1]])
        return self.decoder(tokens_bld, order_bm, only_removed), tokens_bld
