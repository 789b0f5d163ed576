"""AdamW as PyTorch defines it, with a learning rate and a weight decay for each parameter.

Encoder and head have their own peak rates and decays but one schedule shape, and Adam works element by element; so one
optimiser with a plan of peaks and decays, shaped like the parameters, is the same as one optimiser for each group.

Source: MAE-CT (Lehner et al. 2023), released recipes; layer-wise decay as in BEiT (Bao et al. 2022).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

BETAS = (0.9, 0.95)
EPSILON = 1e-8

# Every leaf's last name must be listed here: a parameter that no rule covers is an error, not a guess.
DECAYED = {"kernel": True, "cls_token": True, "mask_token": True, "pos_embed": False, "bias": False, "scale": False}
_STEM = ("patch_embed", "cls_token", "pos_embed")


@dataclass(frozen=True)
class Group:
    """Settings of one part of the model: peak learning rate, weight decay, layer decay (1 = none).

    `undecayed` names parameters without weight decay beside those that never have any.
    """

    peak: float
    weight_decay: float
    layer_decay: float = 1.0
    undecayed: tuple[str, ...] = ()


def layer_scales(depth: int, decay: float) -> dict[str, np.ndarray]:
    """Factors on the learning rate: stem decay^(depth+1), block k decay^(depth-k), final norm 1, all float64."""
    return {
        "stem": np.float64(decay ** (depth + 1)),
        "blocks": decay ** (depth - np.arange(depth, dtype=np.float64)),
        "norm": np.float64(1.0),
    }


def plan(params: dict, groups: dict[str, Group], depth: int) -> tuple[dict, dict]:
    """Peak learning rates and weight decays, two trees shaped like `params`.

    Args:
      params: trained parameters {'encoder' | 'decoder' | 'projector' | 'predictor' | 'fc_norm' | 'head': ...}. The
        encoder's `blocks` may be the upper part of the stack only; its first axis says how many they are.
      groups: settings for each top-level name of `params`.
      depth: number of blocks of the whole encoder.

    Raises:
      KeyError: a parameter no rule covers.
    """

    def of_leaf(path, leaf):
        names = [part.key for part in path]
        group = groups[names[0]]
        scale = np.float64(1.0)
        if names[0] == "encoder":
            scales = layer_scales(depth, group.layer_decay)
            if names[1] == "blocks":
                scale = scales["blocks"][depth - leaf.shape[0] :].reshape((-1,) + (1,) * (leaf.ndim - 1))
            else:
                scale = {**dict.fromkeys(_STEM, scales["stem"]), "norm": scales["norm"]}[names[1]]
        decayed = DECAYED[names[-1]] and names[-1] not in group.undecayed
        return np.asarray(group.peak * scale), group.weight_decay if decayed else 0.0

    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    peaks, decays = zip(*(of_leaf(path, leaf) for path, leaf in leaves))
    return treedef.unflatten(peaks), treedef.unflatten(decays)


def _adam(betas: tuple[float, float]) -> optax.GradientTransformation:
    return optax.scale_by_adam(*betas, eps=EPSILON)


def init(params: dict) -> optax.OptState:
    """First and second moments, zero."""
    return _adam(BETAS).init(params)


def update(
    gradients: dict,
    moments: optax.OptState,
    params: dict,
    peaks: dict,
    decays: dict,
    factor: jax.Array,
    betas: tuple[float, float] = BETAS,
) -> tuple[dict, optax.OptState]:
    """One AdamW step: p <- p - lr * wd * p - lr * m / (sqrt(v) + eps) with lr = peak * factor.

    Args:
      peaks, decays: from `plan`.
      factor: share of the peak learning rate at this step, a scalar.
      betas: decay of the first and second moments.

    Returns:
      new parameters and moments.
    """
    directions, moments = _adam(betas).update(gradients, moments, params)

    def apply(param, direction, peak, decay):
        rate = jnp.asarray(peak, param.dtype) * factor.astype(param.dtype)
        return param - rate * (direction + decay * param)

    return jax.tree.map(apply, params, directions, peaks, decays), moments


def moving_average(average: dict, params: dict, factor: float) -> dict:
    """Exponential moving average, constant factor, no bias correction: a <- factor * a + (1 - factor) * p."""
    return jax.tree.map(lambda a, p: factor * a + (1 - factor) * p, average, params)
