"""What the weights of a model are, as far as their provenance tells: masked autoencoder, MAE-CT, or just a ViT.

Told by the stages that this package trained and by the layouts of the files that weights were made from. An encoder's
layout is that of any ViT with these names; MAE and MAE-CT have fixed positions, others learned ones.
"""

from dataclasses import dataclass

from maect_jax.exchange.model import Model
from maect_jax.finetuning.recipes import RECIPES

_MASKED_STAGES = ("pretrain", "control")
_MASKED_LAYOUTS = ("mae_official_full", "mae_finetuned")  # and '…_pretraining'
_ENCODER_LAYOUTS = {"mae_official_encoder": "mae", "timm_mae": "mae", "maect_encoder": "mae-ct"}  # fixed positions
_STAGES = {
    "pretrain": "pre-trained as a masked autoencoder, the first stage of MAE-CT",
    "control": "trained on as a masked autoencoder, for comparison with MAE-CT",
    "tune": "trained by MAE-CT",
}
_BEFORE = {"mae-ct": "of MAE-CT", "mae": "of a masked autoencoder", "": "of others"}
_TAGS = {"mae-ct": "mae-ct", "mae": "masked-autoencoder"}
_METHODS = {
    "mae-ct": "MAE-CT ([Lehner et al. 2023](https://arxiv.org/abs/2304.10520)) trains a masked autoencoder and then\n"
    "tunes it by contrast with nearest neighbours, so that its features cluster by object without a label.",
    "mae": "A masked autoencoder ([He et al. 2022](https://arxiv.org/abs/2111.06377)) learns without labels: it\n"
    "predicts the patches that were removed from a picture.",
}


@dataclass(frozen=True)
class Lineage:
    """What a card says of weights.

    Attributes:
      tags: for the Hub.
      made: how they were made, the end of a sentence.
      method: a sentence on how the method works; '' where it is not known which one it is.
      finetuned: trained on with labels, by this package.
    """

    tags: tuple[str, ...]
    made: str
    method: str
    finetuned: bool


def lineage_of(model: Model) -> Lineage:
    """What the provenance of a model tells of it."""
    origin = model.provenance
    own, finetuned = _plain(origin.stage), origin.stage in RECIPES
    stages = {own, *(_plain(step.get("stage")) for step in origin.derived_from)}
    layouts = [str(step.get("layout", "")) for step in origin.derived_from]
    fixed = not model.encoder.learned_positions  # fine-tuned ones are learned, whatever they were before
    kinds = {_ENCODER_LAYOUTS[layout] for layout in layouts if fixed and layout in _ENCODER_LAYOUTS}
    masked = stages.intersection(_MASKED_STAGES) or any(
        layout in _MASKED_LAYOUTS or layout.endswith("_pretraining") for layout in layouts
    )
    kinds |= {"mae"} if masked or model.decoder or "mae-ct" in kinds else set()
    kinds |= {"mae-ct"} if "tune" in stages else set()
    method = next((name for name in _TAGS if name in kinds), "")
    if finetuned:
        made = f"fine-tuned with labels ('{origin.stage}') from weights {_BEFORE[method]}"
    elif own == "head" and "pretrain" in stages:  # which trains beside the encoder and leaves it as it was
        made = _STAGES["pretrain"]
    else:
        made = _STAGES.get(own, f"converted from weights {_BEFORE[method]}")
    tags = [tag for name, tag in _TAGS.items() if name in kinds]
    tags += [*(["self-supervised-learning"] if kinds else []), "vision-transformer"]
    explained = "mae-ct" if own in _STAGES else method  # which these stages belong to
    return Lineage(tuple(tags), made, _METHODS.get(explained, ""), finetuned)


def _plain(stage: object) -> str:
    """A stage without what was added to its name: 'tune' of 'tune, raw'."""
    return str(stage).split(",")[0]
