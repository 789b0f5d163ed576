"""An encoder with a classification head, and how much of it each picture skips in training.

Sources: MAE (He et al. 2022), appendix A.1; drop path: Huang et al. 2016, "Deep Networks with Stochastic Depth".
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.models.vit import ViT, layer_norm, pool
from maect_jax.randomness import sample_keys
from maect_jax.training.checkpoint import compare_trees

HEAD_STD = 2e-5  # the published normal is cut at +-2, a hundred thousand deviations away


class Classifier(nn.Module):
    """Encoder -> one vector a picture -> logits; parameters under `encoder`, `fc_norm` (if any) and `head`.

    Attributes:
      encoder: with learned positions, and without its final norm where `pooling` is 'fc_norm'; see `classifier_of`.
      classes: number of classes.
      pooling: see `Recipe.pooling`.
    """

    encoder: ViT
    classes: int
    pooling: str

    @nn.compact
    def __call__(
        self, patches_bnp: jax.Array, branch_scale_l2b: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Logits float32 [batch, classes] and the vectors they are made of, float32 [batch, width].

        Args:
          patches_bnp: all patch vectors of each picture, [batch, patches, values].
          branch_scale_l2b: from `branch_scales` in training; None = nothing is dropped.
        """
        tokens_bnd = self.encoder(patches_bnp, None, branch_scale_l2b)
        vector_bd = pool(tokens_bnd, "cls" if self.pooling == "cls" else "mean")
        if self.pooling == "fc_norm":
            vector_bd = layer_norm(jnp.float32, "fc_norm")(vector_bd)
        start = nn.initializers.normal(HEAD_STD)
        head = nn.Dense(self.classes, kernel_init=start, precision=jax.lax.Precision.HIGHEST, name="head")
        return head(vector_bd), vector_bd


def classifier_of(encoder: ViT, classes: int, pooling: str) -> Classifier:
    """The classifier over an encoder of this shape; the encoder's own switches for pre-training are left behind."""
    encoder = encoder.clone(frozen=0, learned_positions=True, final_norm=pooling != "fc_norm")
    return Classifier(encoder, classes, pooling)


def start_params(model: Classifier, encoder_params: dict, values: int, key: jax.Array) -> dict:
    """Parameters a fine-tuning starts from: the encoder as given, its positions or the fixed ones, a new head.

    Args:
      model: from `classifier_of`.
      encoder_params: tree of an encoder; where its positions are fixed, pre-trained with pictures of any size.
      values: numbers in a patch vector.
      key: of the head's start.

    Raises:
      CheckpointError: the encoder is of another architecture.
    """
    params = model.init(key, jnp.zeros((1, model.encoder.grid**2, values)))["params"]
    unused = ("fc_norm",) if model.encoder.final_norm else ("fc_norm", "norm")
    given = {name: leaf for name, leaf in encoder_params.items() if name not in unused}
    given.setdefault("pos_embed", params["encoder"]["pos_embed"])
    compare_trees(given, params["encoder"], "the encoder to fine-tune")
    return params | {"encoder": given}


def drop_path_rates(depth: int, rate: float) -> np.ndarray:
    """Share of pictures that skip a branch, float64 [depth]: linear from 0 in the first block to `rate` in the last."""
    return np.linspace(0.0, rate, depth)


def branch_scales(seed: int, epoch: jax.Array, sample_id_b: jax.Array, depth: int, rate: float) -> jax.Array:
    """Factors on each picture's branches, float32 [depth, 2, batch]: 0 where dropped, else 1 / share kept.

    Each picture and branch (attention, MLP) draws its own, by a key of the sample: see `randomness.sample_keys`.
    """
    keep_l = jnp.asarray(1 - drop_path_rates(depth, rate), jnp.float32)
    keys_b = sample_keys(seed, "drop_path", epoch, sample_id_b, 0)
    kept_bl2 = jax.vmap(lambda key: jax.random.bernoulli(key, keep_l[:, None], (depth, 2)))(keys_b)
    return (kept_bl2 / keep_l[:, None]).transpose(1, 2, 0)
