"""Under which licence weights of others stand, told by what they are where they do not say it themselves.

Sources: the releases of MAE (weights under CC-BY-NC-4.0), MAE-CT (no licence stated) and timm (`.mae` under
CC-BY-NC-4.0). When in doubt the stricter one is taken; `convert --license` states another.
"""

from typing import Any

from maect_jax.exchange.provenance import MAE_LICENSE, NONE_STATED, UNKNOWN
from maect_jax.models.vit import ViT

_MAE_FILES = {  # start of the published MD5 -> file
    "8cad7c": "mae_pretrain_vit_base.pth",
    "b8b06e": "mae_pretrain_vit_large.pth",
    "9bdbb0": "mae_pretrain_vit_huge.pth",
    "1b25e9": "mae_finetuned_vit_base.pth",
    "51f550": "mae_finetuned_vit_large.pth",
    "2541f2": "mae_finetuned_vit_huge.pth",
}
_MAE_SIZES = ((768, 12, 16), (1024, 24, 16), (1280, 32, 14))  # width, depth, patch


def license_of(layout: str, encoder: ViT, said: str | None, notes: dict[str, Any], md5: str) -> tuple[str, str]:
    """Licence and who says so.

    Args:
      layout: that the file fits.
      encoder: its shape.
      said: by the file or what lies beside it.
      notes: `tensors.read_notes`.
      md5: of the file, in hexadecimal.
    """
    published_size = (encoder.width, encoder.depth, encoder.patch) in _MAE_SIZES
    if md5[:6] in _MAE_FILES and published_size:
        return MAE_LICENSE, f"published with {_MAE_FILES[md5[:6]]} of MAE"
    if said:
        return said, "stated beside the weights"
    if layout == "maect_encoder" and not encoder.learned_positions:
        return NONE_STATED, "MAE-CT's release states none"
    if "optimizer" in notes:
        return UNKNOWN, "somebody's training checkpoint that states none"
    of_mae = layout in ("mae_finetuned", "mae_official_full") or layout.endswith("_pretraining")
    if published_size and (of_mae or not encoder.learned_positions):
        return MAE_LICENSE, "not stated; assumed, as layout, size and positions are those of MAE's published weights"
    return UNKNOWN, "nothing says"
