"""How much arithmetic an update is, for ETAs across stages: matrix products only, two operations a multiply-add."""

from maect_jax.objectives.masking import Masks


def block_flops(tokens: int, width: int) -> float:
    """Forward operations of one block with an MLP ratio of 4 on one sequence."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def forward_flops(width: int, depth: int, patches: int, values: int) -> float:
    """Forward operations of the encoder on one whole picture; `values` numbers a patch."""
    return 2 * patches * values * width + depth * block_flops(patches + 1, width)


def mae_flops(width: int, depth: int, decoder_width: int, decoder_depth: int, values: int, masks: Masks) -> float:
    """Forward operations of the masked autoencoder on one picture, all its parts; what a part sees is embedded."""
    tokens, predicted = masks.keep + 1, masks.predicted
    encoder = 2 * masks.keep * values * width + depth * block_flops(tokens, width)
    decoder = 2 * tokens * width * decoder_width + decoder_depth * block_flops(tokens + predicted, decoder_width)
    return masks.parts * (encoder + decoder + 2 * predicted * decoder_width * values)


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
