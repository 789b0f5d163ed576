"""Which patches are seen and which are predicted: one permutation a picture, never shared by a batch.

A picture is encoded and decoded in one or several parts, each with a mask of its own. All parts take their patches from
the one shuffled order of the picture, at places that are constants (`Masks`): a mask is never an array that the step
computes, and nothing is scattered.

Source: MAE (He et al. 2022), section 3; parallel masks of EMAE (Li et al. 2023); disjoint masks of DMJD (Ma et al.
2022), released code.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Masks:
    """Where the parts of a picture take their patches from, as places in its shuffled order.

    Attributes:
      places_km: int32 [parts, keep + predicted]: the patches that a part sees, then those it predicts.
      keep: patches that a part sees.
      patches: of the picture.
    """

    places_km: np.ndarray
    keep: int
    patches: int

    @property
    def parts(self) -> int:
        return len(self.places_km)

    @property
    def predicted(self) -> int:
        """Patches that a part predicts."""
        return self.places_km.shape[1] - self.keep

    @property
    def coverage(self) -> float:
        """Patches of the picture that are hidden from at least one part, over those that are hidden from one."""
        seen_by_all = set(range(self.patches)).intersection(*(row[: self.keep].tolist() for row in self.places_km))
        return (self.patches - len(seen_by_all)) / (self.patches - self.keep)


def random_mask(patches: int, mask_ratio: float, decoded_share: float = 1.0) -> Masks:
    """MAE's mask: one part, which sees a random share of the patches.

    Args:
      patches: of a picture.
      mask_ratio: share of removed patches.
      decoded_share: share of the removed patches that are predicted, a random choice (1 = all of them).
    """
    keep = patches_to_keep(patches, mask_ratio)
    return _windows(patches, keep, (0,), decoded_share)


def disjoint_masks(patches: int, mask_ratio: float, covered: float = 1.0, decoded_share: float = 1.0) -> Masks:
    """DMJD's masks: two parts with one mask ratio, whose removed patches have as little in common as they can.

    Of what the first part sees, min(covered - mask_ratio, mask_ratio) of the picture is removed in the second.

    Args:
      patches, mask_ratio, decoded_share: as `random_mask`, for each part.
      covered: share of the patches that at least one part is to predict, more than `mask_ratio`.
    """
    keep = patches_to_keep(patches, mask_ratio)
    return _windows(patches, keep, (0, int(min(covered - mask_ratio, mask_ratio) * patches)), decoded_share)


def parallel_masks(patches: int, parts: int, decoded_share: float = 1.0) -> Masks:
    """EMAE's masks: the shuffled patches are cut into `parts` blocks, and part k sees block k and nothing else.

    A part predicts the other blocks in cyclic order, k + 1 first. With a `decoded_share` below 1 it predicts the first
    patches of each block only; all parts predict the same ones, so that they can be compared.

    Args:
      patches: of a picture; a multiple of `parts`.
      parts: K; the mask ratio of a part is (K - 1) / K.
    """
    if parts < 2 or patches % parts:
        raise ValueError(f"{parts} parts do not divide {patches} patches; {divisors_text(patches)} do")
    keep = patches // parts
    shown = _share_of(keep, decoded_share)
    blocks = np.arange(patches, dtype=np.int32).reshape(parts, keep)
    others = [np.roll(blocks, -part, axis=0)[1:, :shown].ravel() for part in range(parts)]
    return Masks(np.concatenate([blocks, np.stack(others)], axis=1), keep, patches)


def parallel_mask_ratio(patches: int, parts: int) -> float:
    """(parts - 1) / parts, or the next smaller float with which `patches_to_keep` is what a part sees."""
    ratio = 1 - 1 / parts
    while patches_to_keep(patches, ratio) < patches // parts:
        ratio = math.nextafter(ratio, 0)
    return ratio


def divisors_text(patches: int) -> str:
    """'4, 7, 14, 28, 49, 98 or 196': the numbers of parts, more than two, that so many patches can be cut into."""
    found = [str(k) for k in range(3, patches + 1) if patches % k == 0]
    return " or ".join(filter(None, (", ".join(found[:-1]), found[-1]))) if found else "no number of parts"


def _windows(patches: int, keep: int, starts: tuple[int, ...], decoded_share: float) -> Masks:
    """Parts that see `keep` patches from their start on, and predict those that follow, in a circle."""
    predicted = _share_of(patches - keep, decoded_share)
    rows = [np.roll(np.arange(patches, dtype=np.int32), -start)[: keep + predicted] for start in starts]
    return Masks(np.stack(rows), keep, patches)


def _share_of(patches: int, share: float) -> int:
    return max(1, round(patches * share))


def patches_to_keep(patches: int, mask_ratio: float) -> int:
    """Number of visible patches, by float truncation as in MAE (100 patches at 0.9 keep 9)."""
    return int(patches * (1 - mask_ratio))


def mask_noise(keys_b: jax.Array, patches: int) -> jax.Array:
    """Uniform noise float32 [batch, patches] from one key a picture."""
    return jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(keys_b)


def shuffle(noise_bn: jax.Array) -> jax.Array:
    """Permutation int32 [batch, patches] by ascending noise: the first patches are the visible ones."""
    return jnp.argsort(noise_bn, axis=1).astype(jnp.int32)
