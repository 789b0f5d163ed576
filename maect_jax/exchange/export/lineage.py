"""What the weights of a model are, as far as their provenance tells: masked autoencoder, MAE-CT, or just a ViT.

Told by the stages that this package trained, by the recipe of the run that did, and by the layouts of the files that
weights were made from. An encoder's layout is that of any ViT with these names; MAE and MAE-CT have fixed positions,
others learned ones.
"""

from dataclasses import dataclass

from maect_jax.exchange.model import Model
from maect_jax.exchange.provenance import pretraining_method
from maect_jax.finetuning.recipes import RECIPES
from maect_jax.report.names import known_method, stage_names

_MASKED_STAGES = ("pretrain", "control")
_MASKED_LAYOUTS = ("mae_official_full", "mae_finetuned")  # and '…_pretraining'
_ENCODER_LAYOUTS = {"mae_official_encoder": "mae", "timm_mae": "mae", "maect_encoder": "mae-ct"}  # fixed positions
_STAGES = {
    "pretrain": "pre-trained as {masked}, the first stage of {tuned}",
    "control": "trained on as {masked}, for comparison with {tuned}",
    "tune": "trained by {tuned}",
}
_MASKED = {  # config.pretrain.method -> what is pre-trained
    "mae": "a masked autoencoder",
    "emae": "a self-consistent masked autoencoder (EMAE)",
    "disjoint": "a masked autoencoder with disjoint masks",
}
_BEFORE = {"mae-ct": "of MAE-CT", "mae": "of a masked autoencoder", "": "of others"}
_TAGS = {"mae-ct": "mae-ct", "mae": "masked-autoencoder"}
_METHODS = {
    "mae-ct": "MAE-CT ([Lehner et al. 2023](https://arxiv.org/abs/2304.10520)) trains a masked autoencoder and then\n"
    "tunes it by contrast with nearest neighbours, so that its features cluster by object without a label.",
    "mae": "A masked autoencoder ([He et al. 2022](https://arxiv.org/abs/2111.06377)) learns without labels: it\n"
    "predicts the patches that were removed from a picture.",
}
_VARIANTS = {  # the same -> a sentence after that on the method
    "mae": "",
    "emae": "\nHere the masked autoencoder is EMAE ([Li et al. 2023](https://arxiv.org/abs/2302.14431)): the patches\n"
    "of a picture are cut into parts, it is predicted from each part alone, and the predictions learn to agree.\n"
    "MAE-CT that starts from it is EMAE-CT.",
    "disjoint": "\nHere the masked autoencoder learned from two masks of a picture at a time, which hide different\n"
    "patches, as in DMJD ([Ma et al. 2022](https://arxiv.org/abs/2301.00230)).",
}


@dataclass(frozen=True)
class Lineage:
    """What a card says of weights.

    Attributes:
      tags: for the Hub.
      made: how they were made, the end of a sentence.
      method: sentences on how the method works; '' where it is not known which one it is.
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
    variant = known_method(pretraining_method(origin))
    named = {"masked": _MASKED[variant], "tuned": stage_names(variant)["tune"]}
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
        made = _STAGES["pretrain"].format(**named)
    else:
        made = _STAGES.get(own, f"converted from weights {_BEFORE[method]}").format(**named)
    tags = [tag for name, tag in _TAGS.items() if name in kinds]
    tags += ["emae"] if variant == "emae" and kinds else []
    tags += [*(["self-supervised-learning"] if kinds else []), "vision-transformer"]
    explained = "mae-ct" if own in _STAGES else method  # which these stages belong to
    sentences = _METHODS[explained] + _VARIANTS[variant] if explained else ""
    return Lineage(tuple(tags), made, sentences, finetuned)


def _plain(stage: object) -> str:
    """A stage without what was added to its name: 'tune' of 'tune, raw'."""
    return str(stage).split(",")[0]
