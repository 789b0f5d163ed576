"""From pictures to feature vectors, once for every set of weights; every protocol runs on these.

Source: MAE-CT (Lehner et al. 2023), section 5: the whole, unmasked picture; CLS token or mean of the patch tokens after
the final LayerNorm.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.data.augment import normalise
from maect_jax.models.patches import patchify
from maect_jax.models.vit import ViT, pool
from maect_jax.parallel.mesh import replicated

Extractor = Callable[[dict, jax.Array], jax.Array]


@dataclass(frozen=True)
class Features:
    """Features float32 [n, width], labels int32 [n] (-1 = none), sample ids int32 [n]."""

    vectors: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


def make_extractor(
    encoder: ViT, pooling: str, mean: tuple[float, ...], std: tuple[float, ...], mesh: jax.sharding.Mesh
) -> Extractor:
    """Jitted (encoder parameters, pictures uint8 [batch, size, size, c]) -> features float32 [batch, width].

    The pictures are split over the devices; the features come back on every one of them.
    """

    def extract(params: dict, images_bhwc: jax.Array) -> jax.Array:
        images_bhwc = normalise(images_bhwc.astype(jnp.float32), mean, std)
        return pool(encoder.apply({"params": params}, patchify(images_bhwc, encoder.patch)), pooling)

    return jax.jit(extract, out_shardings=replicated(mesh))


def extract(
    extractor: Extractor, params: dict, batches: Iterable[dict], check: Callable[[], None] = lambda: None
) -> Features:
    """Features of every picture of `batches`, each exactly once.

    Args:
      extractor: from `make_extractor`.
      params: encoder parameters.
      batches: dicts with 'image', 'id', 'label', 'valid'; see `data.pipeline.evaluation_batches`.
      check: called before every batch; may raise to stop.
    """
    found: list[tuple] = []
    for batch in batches:
        check()
        found.append((extractor(params, batch["image"]), *(_whole(batch[key]) for key in ("label", "id", "valid"))))
        if len(found) > 1:  # fetch one batch late: the device works on while the host waits
            found[-2] = tuple(np.asarray(x) for x in found[-2])
    vectors, labels, ids, valid = (np.concatenate([np.asarray(row[i]) for row in found]) for i in range(4))
    return Features(vectors[valid], labels[valid], ids[valid])


def _whole(x_b: jax.Array) -> jax.Array:
    """A small array that is split over the devices, on every one of them."""
    return jax.device_put(x_b, replicated(x_b.sharding.mesh))
