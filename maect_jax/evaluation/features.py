"""From pictures to feature vectors, once for every set of weights; every protocol runs on these.

A feature is named by parts joined with '+' (their vectors are concatenated):

  cls, mean            CLS token, or mean of the patch tokens, after the final LayerNorm (of a classifier that has its
                       LayerNorm after the mean: the mean through that)
  cls@7, mean@7        the same at the output of block 7 (counted from 1), before any norm; '@last' is the last block
  cls@last4            CLS tokens of the last four blocks, before any norm
  cls@norm4            CLS tokens of the last four blocks, each through the final LayerNorm
  both                 short for cls+mean

`elementary` spells a name out in parts that are extracted and cached on their own: 'cls', 'mean', 'cls@7', 'mean@7' and
'cls@7norm' (block 7 through the final LayerNorm). One forward pass of the whole, unmasked picture yields any of them.

Source: MAE-CT (Lehner et al. 2023), section 5; DINOv2 (Oquab et al. 2023), section 7 for the last four blocks.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.data.device.augment import normalise
from maect_jax.errors import ConfigError
from maect_jax.models.patches import patchify
from maect_jax.models.vit import ViT, layer_norm, pool
from maect_jax.parallel.mesh import replicated

Extractor = Callable[[dict, jax.Array], dict[str, jax.Array]]

_PART = re.compile(r"(?P<pooling>cls|mean)(@((?P<last>last|norm)(?P<count>\d*)|(?P<block>\d+)(?P<norm>norm)?))?")
_KNOWN = "'cls', 'mean', 'both', 'cls@7', 'mean@last', 'cls@last4', 'cls@norm4', or some of them joined with '+'"


def elementary(name: str, depth: int) -> tuple[str, ...]:
    """The parts whose concatenation is the feature `name` of an encoder with `depth` blocks.

    Raises:
      ConfigError: not a feature, or a block that the encoder does not have.
    """
    return tuple(part for text in name.split("+") for part in _expand(text, name, depth))


def _expand(text: str, name: str, depth: int) -> list[str]:
    if text == "both":
        return ["cls", "mean"]
    found = _PART.fullmatch(text)
    pooling, last, count, block, norm = (
        found.group("pooling", "last", "count", "block", "norm") if found else [None] * 5
    )
    norm = norm or last == "norm"
    if not found or (norm and pooling == "mean") or (last == "norm" and not count):
        raise ConfigError(f"feature: '{name}' is none; features are {_KNOWN}")
    if not (last or block):
        return [pooling]
    number = int(block or count or 1)
    if not 1 <= number <= depth:
        raise ConfigError(f"feature: '{name}' asks for block {number} of an encoder with {depth} blocks")
    blocks = range(depth - number + 1, depth + 1) if last else [number]
    return [f"{pooling}@{block}{'norm' if norm else ''}" for block in blocks]


@dataclass(frozen=True)
class Features:
    """What was extracted from n pictures.

    Attributes:
      parts: elementary name -> float32 or bfloat16 [n, width].
      labels: int32 [n]; -1 = none.
      ids: int32 [n], the pictures' sample ids.
      content: uint32 [n, 2], hash of the decoded pixels.
      depth: number of blocks of the encoder.
    """

    parts: dict[str, np.ndarray]
    labels: np.ndarray
    ids: np.ndarray
    content: np.ndarray
    depth: int

    def vectors(self, name: str) -> np.ndarray:
        """The feature `name`, float32 [n, width of all its parts]."""
        parts = [self.parts[part] for part in elementary(name, self.depth)]
        return np.concatenate([np.asarray(part, np.float32) for part in parts], axis=1)

    def take(self, rows: np.ndarray) -> "Features":
        """The features of some rows."""
        parts = {name: part[rows] for name, part in self.parts.items()}
        return Features(parts, self.labels[rows], self.ids[rows], self.content[rows], self.depth)


def make_extractor(
    encoder: ViT, names: Iterable[str], mean: tuple[float, ...], std: tuple[float, ...], mesh: jax.sharding.Mesh
) -> Extractor:
    """Jitted (encoder parameters, pictures uint8 [batch, size, size, c]) -> {elementary name: float32 [batch, width]}.

    The pictures are split over the devices; the features come back on every one of them.
    """
    parts = tuple(dict.fromkeys(part for name in names for part in elementary(name, encoder.depth)))

    def extract(params: dict, images_bhwc: jax.Array) -> dict[str, jax.Array]:
        return forward(encoder, parts, params, normalise(images_bhwc.astype(jnp.float32), mean, std))

    return jax.jit(extract, out_shardings=replicated(mesh))


def forward(encoder: ViT, parts: tuple[str, ...], params: dict, images_bhwc: jax.Array) -> dict[str, jax.Array]:
    """Elementary features, float32 [batch, width] each, of normalised pictures [batch, size, size, c]. Pure."""
    patches_bnp = patchify(images_bhwc, encoder.patch)
    tokens_bnd, collected = encoder.apply({"params": params}, patches_bnp, mutable=["intermediates"])

    def value(part: str) -> jax.Array:
        pooling, _, where = part.partition("@")
        if not where:
            x_bd = pool(tokens_bnd, pooling)
            after_mean = pooling == "mean" and "fc_norm" in params
            return layer_norm(jnp.float32, None).apply({"params": params["fc_norm"]}, x_bd) if after_mean else x_bd
        block = int(where.removesuffix("norm")) - 1
        x_bd = collected["intermediates"]["blocks"][f"{pooling}_bd"][0][block]
        if where.endswith("norm"):
            if not encoder.final_norm:
                raise ConfigError(f"feature: '{part}' needs a final LayerNorm, which this encoder does not have")
            x_bd = layer_norm(encoder.dtype, None).apply({"params": params["norm"]}, x_bd)
        return x_bd.astype(jnp.float32)

    return {part: value(part) for part in parts}


def extract(
    extractor: Extractor,
    params: dict,
    batches: Iterable[dict],
    depth: int,
    check: Callable[[], None] = lambda: None,
    dtype: np.dtype = np.float32,
) -> Features:
    """Features of every picture of `batches`, each exactly once.

    Args:
      extractor: from `make_extractor`.
      params: encoder parameters.
      batches: dicts with 'image', 'id', 'label', 'content', 'valid'; see `data.batches.evaluation`.
      depth: number of blocks of the encoder.
      check: called before every batch; may raise to stop.
      dtype: that the vectors are kept in, float32 or bfloat16.
    """
    found: list[dict] = []

    def to_host(row: dict) -> dict:
        row = {key: np.asarray(value) for key, value in row.items()}
        return {key: x.astype(dtype) if x.dtype == np.float32 else x for key, x in row.items()}

    for batch in batches:
        check()
        columns = {key: _whole(batch[key]) for key in ("label", "id", "content", "valid")}
        found.append(extractor(params, batch["image"]) | columns)
        if len(found) > 1:  # fetch one batch late: the device works on while the host waits
            found[-2] = to_host(found[-2])
    found[-1] = to_host(found[-1])
    valid = np.concatenate([row["valid"] for row in found])
    columns = {key: np.concatenate([row[key] for row in found])[valid] for key in found[0]}
    labels, ids, content, _ = (columns.pop(key) for key in ("label", "id", "content", "valid"))
    return Features(columns, labels, ids, content, depth)


def _whole(x_b: jax.Array) -> jax.Array:
    """A small array that is split over the devices, on every one of them."""
    return jax.device_put(x_b, replicated(x_b.sharding.mesh))
