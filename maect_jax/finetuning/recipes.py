"""Published ways to fine-tune: all labels as MAE does it, 1 % and 10 % of them as MAE-CT's successor does it.

MAE-CT (Lehner et al. 2023) fine-tunes on 1 % and 10 % of ImageNet's labels, but its settings are in none of its
released material. The recipes here are those of MIM-Refiner (Alkin et al. 2024), by the same group; their protocol
calls them 'follow-up proxy'.

Sources: MAE (He et al. 2022), appendix A.1 and released fine-tuning code (where the two differ, the code); MIM-Refiner,
released configurations for ImageNet 1 % and 10 %.
"""

from dataclasses import dataclass, replace

import numpy as np

from maect_jax.data.device.randaugment import RandAugment
from maect_jax.errors import ConfigError
from maect_jax.models.vit import SIZES


@dataclass(frozen=True)
class Recipe:
    """Every setting of a fine-tuning.

    Attributes:
      name: key of `RECIPES`.
      source: where its values come from, for the protocol.
      size: published size whose values these are, a key of `models.vit.SIZES`.
      share: of the training labels it is meant for.
      base_lr: peak rate = base_lr * batch / 256.
      batch: pictures an update.
      epochs, warmup_epochs: length; another number of epochs keeps the warm-up's share, see `Recipe.lasting`.
      schedule: 'mae' (0 to the peak, half a cosine to `min_lr`) or 'mae-ct' (never 0; half a cosine towards 0).
      min_lr: last rate of the schedule 'mae'.
      weight_decay: of all but biases, norms, positions and the CLS token.
      betas: of AdamW.
      layer_decay: factor on the rate from one block to the one below; the stem is below the first block.
      drop_path: share of pictures that skip a branch of the last block; it rises linearly from 0 in the first.
      pooling: 'fc_norm' (mean of the last block's patch tokens, then a new LayerNorm), or 'cls' or 'mean' after the
        encoder's own final LayerNorm.
      crop_scale: range of the crop's share of the picture's area.
      rand_augment: settings of RandAugment; None = none.
      mixup, cutmix: parameters of their Beta distributions, 0 = never; each batch draws one of the two.
      erasing: probability of random erasing.
      smoothing: of the labels.
      ema_factor: evaluate a moving average of the weights with this factor an update; None = the weights themselves.
    """

    name: str
    source: str
    size: str
    share: float
    base_lr: float
    batch: int
    epochs: int
    layer_decay: float
    pooling: str
    schedule: str
    warmup_epochs: float = 5
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    drop_path: float = 0.0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    rand_augment: RandAugment | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0
    smoothing: float = 0.1
    ema_factor: float | None = None

    def lasting(self, epochs: int) -> "Recipe":
        """The recipe for another number of epochs, the warm-up shortened or lengthened with it."""
        return replace(self, epochs=epochs, warmup_epochs=self.warmup_epochs * epochs / self.epochs)


_FULL = {"rand_augment": RandAugment(), "mixup": 0.8, "cutmix": 1.0, "erasing": 0.25}
_MAE = {
    "name": "mae-finetune",
    "source": "MAE, released fine-tuning code",
    "share": 1.0,
    "batch": 1024,
    "pooling": "fc_norm",
    "schedule": "mae",
    "min_lr": 1e-6,
    **_FULL,
}
_PROXY = {"source": "follow-up proxy", "epochs": 50, "layer_decay": 0.75, "pooling": "cls", "schedule": "mae-ct"}
_ONE = {"name": "finetune-1pct", "share": 0.01, "base_lr": 3e-5, "batch": 512} | _PROXY
_TEN = {"name": "finetune-10pct", "share": 0.1} | _PROXY
_TEN_HUGE = _TEN | {"base_lr": 1e-3, "batch": 256, "drop_path": 0.2, **_FULL}

_PUBLISHED = (
    Recipe(size="B/16", epochs=100, base_lr=5e-4, layer_decay=0.65, drop_path=0.1, **_MAE),
    Recipe(size="L/16", epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2, **_MAE),
    Recipe(size="H/14", epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.3, **_MAE),
    Recipe(size="L/16", **_ONE),
    Recipe(size="H/16", weight_decay=0.4, **_ONE),
    Recipe(size="H/14", weight_decay=0.4, **_ONE),
    Recipe(size="L/16", base_lr=3e-5, batch=512, rand_augment=RandAugment(), **_TEN),
    Recipe(size="H/16", **_TEN_HUGE),
    Recipe(size="H/14", **_TEN_HUGE),
)
RECIPES: dict[str, dict[str, Recipe]] = {}
for _recipe in _PUBLISHED:
    RECIPES.setdefault(_recipe.name, {})[_recipe.size] = _recipe


def recipe_for(name: str, width: int, depth: int, patch: int) -> Recipe:
    """The recipe `name` for an encoder: of its own size where that is published, else of the nearest one.

    Nearest is the size whose blocks have the most similar number of parameters (their ratio), then the patch's side.

    Raises:
      ConfigError: no recipe of that name.
    """
    if name not in RECIPES:
        raise ConfigError(f"fine-tuning: no recipe '{name}'; there is {', '.join(RECIPES)}")

    def distance(recipe: Recipe) -> tuple[float, int]:
        size = SIZES[recipe.size]
        return abs(float(np.log(width**2 * depth / (size.width**2 * size.depth)))), abs(patch - size.patch)

    return min(RECIPES[name].values(), key=distance)


def fitting_batch(batch: int, rows: int, devices: int) -> int:
    """The batch, or for few rows the greatest power of two within a quarter of them; at least a row a device."""
    return min(batch, max(2 ** int(np.log2(max(rows // 4, 1))), devices))
