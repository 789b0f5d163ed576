"""Vision Transformer encoder as MAE and MAE-CT use it.

Pre-norm blocks, exact GELU, LayerNorm epsilon 1e-6, fused qkv, fixed sine-cosine positions, a CLS token without
position, final LayerNorm. Blocks are scanned, so parameters carry the block index as their first axis.

Source: MAE (He et al. 2022), section 3 and appendix A; MAE-CT (Lehner et al. 2023), section 4.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.models.patches import position_table

Dtype = Any


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape of an encoder: width, number of blocks, attention heads, patch side in pixels."""

    width: int
    depth: int
    heads: int
    patch: int


SIZES = {
    "S/16": Size(384, 12, 6, 16),
    "B/16": Size(768, 12, 12, 16),
    "L/16": Size(1024, 24, 16, 16),
    "H/16": Size(1280, 32, 16, 16),
    "H/14": Size(1280, 32, 16, 14),
}


def _at_least_float32(dtype: Dtype) -> Dtype:
    return jnp.promote_types(dtype, jnp.float32)


def layer_norm(dtype: Dtype, name: str) -> nn.LayerNorm:
    """LayerNorm with MAE's epsilon; statistics in at least float32, by the exact two-pass variance."""
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


class Dense(nn.Dense):
    """Linear map over all tokens as one matrix: on a CPU three times as fast in its gradient as 3-D inputs."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)


def dense(features: int, dtype: Dtype, name: str) -> Dense:
    """Linear map with MAE's initialisation: Xavier-uniform weight, zero bias."""
    return Dense(features, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)


class Attention(nn.Module):
    """Multi-head self-attention; the columns of the one qkv map are query, key, value, each head after head."""

    heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x_bnd: jax.Array) -> jax.Array:
        b, n, d = x_bnd.shape
        qkv = dense(3 * d, self.dtype, "qkv")(x_bnd).reshape(b, n, 3, self.heads, d // self.heads)
        query, key, value = qkv.transpose(2, 0, 3, 1, 4)  # each [batch, heads, tokens, width of a head]
        logits_bhnm = jnp.einsum(
            "bhne,bhme->bhnm",
            query * (d // self.heads) ** -0.5,
            key,
            preferred_element_type=_at_least_float32(self.dtype),
        )
        weights_bhnm = jax.nn.softmax(logits_bhnm)
        self.sow("intermediates", "cls_attention_bhn", weights_bhnm[:, :, 0])
        weights_bhnm = weights_bhnm.astype(self.dtype)
        mixed_bhne = jnp.einsum("bhnm,bhme->bhne", weights_bhnm, value)
        return dense(d, self.dtype, "proj")(mixed_bhne.swapaxes(1, 2).reshape(b, n, d))


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). Written as a scan body: returns (x, None).

    `branch_scale_2b` multiplies what attention and MLP add to each picture (drop path: 0, or 1 / share kept).
    """

    heads: int
    mlp_ratio: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x_bnd: jax.Array, branch_scale_2b: jax.Array | None = None) -> tuple[jax.Array, None]:
        d = x_bnd.shape[-1]

        def add(x_bnd, branch_bnd, which):
            if branch_scale_2b is not None:
                branch_bnd = branch_bnd * branch_scale_2b[which, :, None, None].astype(branch_bnd.dtype)
            return x_bnd + branch_bnd

        x_bnd = add(x_bnd, Attention(self.heads, self.dtype, name="attn")(layer_norm(self.dtype, "norm1")(x_bnd)), 0)
        y = dense(self.mlp_ratio * d, self.dtype, "fc1")(layer_norm(self.dtype, "norm2")(x_bnd))
        x_bnd = add(x_bnd, dense(d, self.dtype, "fc2")(jax.nn.gelu(y, approximate=False)), 1)
        for pooling in ("cls", "mean"):
            self.sow("intermediates", f"{pooling}_bd", pool(x_bnd, pooling))
        return x_bnd, None


def blocks(depth: int, heads: int, mlp_ratio: int, dtype: Dtype, remat: bool, name: str) -> nn.Module:
    """`depth` blocks run by one scan; `remat` recomputes activations in the backward pass."""
    body = nn.remat(Block, prevent_cse=False) if remat else Block
    axes = {"params": 0, "intermediates": 0}
    stack = nn.scan(body, variable_axes=axes, split_rngs={"params": True}, length=depth)
    return stack(heads, mlp_ratio, dtype, name=name)


def _patch_bias_init(fan_in: int):
    """PyTorch's default bias of a convolution, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which MAE keeps."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class ViT(nn.Module):
    """Encoder from patch vectors to tokens.

    With `mutable=["intermediates"]`, `apply` also returns what each block offers an evaluation, stacked by block:
    `cls_bd` and `mean_bd` [depth, batch, width], its pooled output before any norm, and `attn/cls_attention_bhn`
    [depth, batch, heads, tokens], the attention of the CLS token. Otherwise none of it is computed.

    Attributes:
      width, depth, heads, patch: see `Size`.
      image_size: side of the square picture in pixels, a multiple of `patch`.
      mlp_ratio: hidden width of the MLP over `width`.
      dtype: type of the computation; parameters, softmax and LayerNorm statistics stay float32.
      remat: recompute block activations in the backward pass.
      frozen: number of lower blocks kept apart under the name `frozen_blocks`. No gradient passes below them, so the
        compiler drops their backward pass when their parameters are not differentiated. See `split_blocks`.
      learned_positions: the position table is the parameter `pos_embed` [1, 1 + patches, width], its first row the CLS
        token's, and starts as the fixed table (fine-tuning). Otherwise it is the fixed table, CLS without position.
      final_norm: end with a LayerNorm, `norm`. Without it the tokens are those of the last block.
    """

    width: int
    depth: int
    heads: int
    patch: int
    image_size: int
    mlp_ratio: int = 4
    dtype: Dtype = jnp.float32
    remat: bool = False
    frozen: int = 0
    learned_positions: bool = False
    final_norm: bool = True

    @property
    def grid(self) -> int:
        return self.image_size // self.patch

    @nn.compact
    def __call__(
        self,
        patches_blp: jax.Array,
        index_bl: jax.Array | None = None,
        branch_scale_l2b: jax.Array | None = None,
    ) -> jax.Array:
        """Tokens after the final LayerNorm, where there is one.

        Args:
          patches_blp: patch vectors [batch, kept patches, values]; only these are embedded.
          index_bl: int32 [batch, kept patches], the place of each patch in row-major order; None = all, in order.
          branch_scale_l2b: float32 [depth, 2, batch], see `Block`; None = 1. Not with `frozen` blocks.

        Returns:
          [batch, 1 + kept patches, width]: the CLS token first, then the patches in the order given.
        """
        b, _, p = patches_blp.shape
        fixed_nd = position_table(self.width, self.grid).astype("float32")  # as published
        if self.learned_positions:
            start = np.concatenate([np.zeros((1, self.width), "float32"), fixed_nd])[None]
            table_nd = self.param("pos_embed", lambda key: jnp.asarray(start))[0].astype(self.dtype)
        else:
            table_nd = jnp.asarray(fixed_nd, self.dtype)
        x = Dense(
            self.width,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=_patch_bias_init(p),
            name="patch_embed",
        )(patches_blp)
        position_nd = table_nd[-(self.grid**2) :]
        x = x + (position_nd if index_bl is None else position_nd[index_bl])
        cls_token = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width)).astype(self.dtype)
        if self.learned_positions:
            cls_token = cls_token + table_nd[0]
        cls_token = jnp.broadcast_to(cls_token, (b, 1, self.width))
        x = jnp.concatenate([cls_token, x], axis=1)
        if self.frozen:
            shape = (self.heads, self.mlp_ratio, self.dtype)
            x, _ = blocks(self.frozen, *shape, remat=False, name="frozen_blocks")(x, None)
            x = jax.lax.stop_gradient(x)
        x, _ = blocks(self.depth - self.frozen, self.heads, self.mlp_ratio, self.dtype, self.remat, name="blocks")(
            x, branch_scale_l2b
        )
        return layer_norm(self.dtype, "norm")(x) if self.final_norm else x


def pool(tokens_bnd: jax.Array, pooling: str) -> jax.Array:
    """One float32 vector a picture from tokens [batch, 1 + patches, width].

    `pooling` is 'cls' (CLS token) or 'mean' (mean of the patch tokens).
    """
    tokens_bnd = tokens_bnd.astype(_at_least_float32(tokens_bnd.dtype))
    return tokens_bnd[:, 0] if pooling == "cls" else tokens_bnd[:, 1:].mean(axis=1)


def split_blocks(encoder: dict, frozen: int) -> tuple[dict, dict]:
    """Encoder parameters as (trained, frozen) trees for `ViT(frozen=frozen)`.

    Frozen are the patch embedding, the CLS token, learned positions and the blocks below index `frozen`; trained are
    the others and the final LayerNorm. `encoder` is the tree of `ViT(frozen=0)`.
    """
    lower = jax.tree.map(lambda x: x[:frozen], encoder["blocks"])
    upper = jax.tree.map(lambda x: x[frozen:], encoder["blocks"])
    stem = {name: encoder[name] for name in ("patch_embed", "cls_token", "pos_embed") if name in encoder}
    return {"blocks": upper, "norm": encoder["norm"]}, {
        **stem,
        **({"frozen_blocks": lower} if frozen else {}),
    }


def join_blocks(trained: dict, frozen: dict) -> dict:
    """Inverse of `split_blocks`: the tree of `ViT(frozen=0)`."""
    encoder = {**frozen, **trained}
    lower = encoder.pop("frozen_blocks", None)
    if lower is not None:
        encoder["blocks"] = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), lower, encoder["blocks"])
    return encoder
