"""How much arithmetic an update is, for ETAs across stages: matrix products only, two operations a multiply-add."""

from maect_jax.objectives.masking import patches_to_keep


def block_flops(tokens: int, width: int) -> float:
    """Forward operations of one block with an MLP ratio of 4 on one sequence."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def forward_flops(width: int, depth: int, patches: int, values: int) -> float:
    """Forward operations of the encoder on one whole picture; `values` numbers a patch."""
    return 2 * patches * values * width + depth * block_flops(patches + 1, width)


def mae_flops(
    width: int, depth: int, decoder_width: int, decoder_depth: int, patches: int, values: int, mask_ratio: float
) -> float:
    """Forward operations of the masked autoencoder on one picture; only visible patches are embedded."""
    keep = patches_to_keep(patches, mask_ratio)
    encoder = 2 * keep * values * width + depth * block_flops(keep + 1, width)
    decoder = 2 * (keep + 1) * width * decoder_width + decoder_depth * block_flops(patches + 1, decoder_width)
    return encoder + decoder + 2 * (patches - keep) * decoder_width * values


def training_flops(stage: str, mae: float, full: float, tuned_share: float, views: int) -> float:
    """Operations of one picture in a stage.

    Args:
      stage: 'pretrain', 'control', 'head' or 'tune'.
      mae, full: forward operations of the autoencoder and of the encoder on a whole picture.
      tuned_share: share of the blocks that stage 3 trains; a backward pass costs two forward passes.
      views: of a picture in pre-training; head and tuning have two.
    """
    if stage in ("pretrain", "control"):
        return 3 * views * mae
    return 2 * full * (1 + (2 * tuned_share if stage == "tune" else 0))
