"""A model and its weights, apart from any file: what is read from one layout and written in another."""

from dataclasses import dataclass

from maect_jax.exchange.provenance import Provenance
from maect_jax.models.mae import Decoder
from maect_jax.models.vit import ViT


@dataclass(frozen=True)
class Model:
    """What a weights file, or a checkpoint of ours, stands for.

    Attributes:
      name: what to call it, such as 'tune' or the name of its file.
      encoder: computes in float32; `learned_positions` and `final_norm` say whether `params['encoder']` has 'pos_embed'
        and 'norm'.
      decoder: of a masked autoencoder, where there is one.
      params: float32 trees: 'encoder'; and, where there are, 'decoder' (of `models.mae.Decoder`), 'fc_norm' (scale and
        bias [width], over the mean of the patch tokens), 'head' (kernel [width, classes] and bias [classes]).
      pooling: 'cls' or 'mean': the vector that stands for a picture, and that a head is on.
      channels: of the pictures.
      mean, std: a channel, for values in 0..1.
      resize_ratio: shorter side over picture size, before the central crop.
      mask_ratio, normalised_pixels: of pre-training; whether the decoder predicts pixels normalised patch by patch
        (None = not known).
      classes: names of the head's classes, in order; () where they are not known.
      provenance: where it comes from.
    """

    name: str
    encoder: ViT
    params: dict
    provenance: Provenance
    decoder: Decoder | None = None
    pooling: str = "cls"
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize_ratio: float = 256 / 224
    mask_ratio: float = 0.75
    normalised_pixels: bool | None = None
    classes: tuple[str, ...] = ()

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.encoder.image_size

    @property
    def has_head(self) -> bool:
        return "head" in self.params
