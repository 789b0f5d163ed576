"""How others name and order the tensors that we hold as trees: one table of rows a layout.

Our trees are {'encoder': …} and, beside it, 'decoder', 'fc_norm', 'head', 'pooler' (the last: HF's map after the CLS
token, which nothing here computes with); for MAE-CT's NNCLR head the fields of `TrainState`, {'params', 'batch_stats',
'queue'} and 'target' in stage 3; for its linear probes {'probe': …}.

Sources: released files of MAE, MAE-CT, timm 1.0.31, transformers 4.57.1 and 5.23.0.
"""

from maect_jax.exchange.rows import BlockNames, Row, affine, blocks, mlp, statistics

_TIMM_BLOCK = BlockNames("norm1", ("attn.qkv",), "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_HF4_BLOCK = BlockNames(
    "layernorm_before",
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attention.output.dense",
    "layernorm_after",
    "intermediate.dense",
    "output.dense",
)
_HF5_BLOCK = BlockNames(
    "layernorm_before",
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attention.o_proj",
    "layernorm_after",
    "mlp.fc1",
    "mlp.fc2",
)

# --------------------------------------------------------------------------------------------------------------- parts


def _stem(cls: str, positions: str, patch: str) -> list[Row]:
    return [
        Row((cls,), "encoder.cls_token", "same", "1 1 d"),
        Row((positions,), "encoder.pos_embed", "positions", "1 n d"),
        *affine(patch, "encoder.patch_embed", "patch", "d", "c p p"),
    ]


def _decoder(prefix: str, stack: str, names: BlockNames) -> list[Row]:
    return [
        Row((f"{prefix}mask_token",), "decoder.mask_token", "same", "1 1 e"),
        Row((f"{prefix}decoder_pos_embed",), "decoder.pos_embed", "positions", "1 n e"),
        *affine(f"{prefix}decoder_embed", "decoder.embed", "linear", "e", "d"),
        *blocks(f"{prefix}{stack}", "decoder", names, "e", "g"),
        *affine(f"{prefix}decoder_norm", "decoder.norm", "same", "e"),
        *affine(f"{prefix}decoder_pred", "decoder.predict", "linear", "v", "e"),
    ]


def _hf_encoder(prefix: str, stack: str, names: BlockNames) -> list[Row]:
    inside = f"{prefix}embeddings."
    return [
        *_stem(f"{inside}cls_token", f"{inside}position_embeddings", f"{inside}patch_embeddings.projection"),
        *blocks(f"{prefix}{stack}", "encoder", names, "d", "f"),
        *affine(f"{prefix}layernorm", "encoder.norm", "same", "d"),
    ]


def _hf(version: str, stack: str, names: BlockNames) -> dict[str, list[Row]]:
    """The layouts of one major version of transformers: ViTMAE with its decoder, bare models, the ViT classifier."""
    bare, inside = _hf_encoder("", stack, names), _hf_encoder("vit.", stack, names)
    return {
        f"{version}_pretraining": [*inside, *_decoder("decoder.", "decoder_layers", names)],
        f"{version}_encoder": bare,
        f"{version}_model": [*bare, *affine("pooler.dense", "pooler", "linear", "o", "d")],
        f"{version}_classifier": [*inside, *affine("classifier", "head", "linear", "k", "d")],
    }


_PROJECTOR = "h d bn, h h bn, e h bn"
_UNNORMED = [
    *_stem("cls_token", "pos_embed", "patch_embed.proj"),
    *blocks("blocks", "encoder", _TIMM_BLOCK, "d", "f"),
]
_TIMM = [*_UNNORMED, *affine("norm", "encoder.norm", "same", "d")]
_TIMM_HEAD = affine("head", "head", "linear", "k", "d")
_NNCLR_HEAD = [
    Row(("queue",), "queue.rows_qe", "same", "q e"),
    Row(("queue_y",), "queue.label_q", "integer", "q"),
    Row(("queue_id",), "queue.id_q", "integer", "q"),
    Row(("queue_ptr",), "queue.pointer", "pointer", "1"),
    *mlp("projector", "params.projector", "batch_stats.projector", _PROJECTOR),
    *mlp("predictor", "params.predictor", "batch_stats.predictor", "k e bn, e k"),
]

# -------------------------------------------------------------------------------------------------------------- layouts

LAYOUTS: dict[str, list[Row]] = {
    "mae_official_full": [*_TIMM, *_decoder("", "decoder_blocks", _TIMM_BLOCK)],
    "mae_official_encoder": _TIMM,
    "mae_finetuned": [*_UNNORMED, *affine("fc_norm", "fc_norm", "same", "d"), *_TIMM_HEAD],
    "timm_mae": _TIMM,
    "timm_fc_norm": [*_UNNORMED, *affine("fc_norm", "fc_norm", "same", "d")],
    "timm_classifier": [*_TIMM, *_TIMM_HEAD],
    "maect_encoder": _TIMM,
    "maect_probe": [
        *statistics("layer.1", "probe", "d"),
        *affine("layer.2", "probe", "linear", "k", "d"),
        Row(("norm.running_mean",), "probe.mean", "again", "d"),
        Row(("norm.running_var",), "probe.var", "again", "d"),
        Row(("norm.num_batches_tracked",), "", "again", ""),
    ],
    "maect_head_stage2": _NNCLR_HEAD,
    "maect_head_stage3": [*_NNCLR_HEAD, *mlp("target_projector", "target.params", "target.batch_stats", _PROJECTOR)],
    **_hf("hf4", "encoder.layer", _HF4_BLOCK),
    **_hf("hf5", "layers", _HF5_BLOCK),
    # what `save_pretrained` of version 5 makes of the decoder's names, and loads again
    "hf5_saved_pretraining": [
        *_hf_encoder("vit.", "encoder.layer", _HF4_BLOCK),
        *_decoder("decoder.", "decoder_encoder.layer", _HF4_BLOCK),
    ],
}
WITHOUT_CLASS_ROW = ("maect_encoder",)  # position tables of patches only
ENCODERS = tuple(name for name, rows in LAYOUTS.items() if any(row.path.startswith("encoder.") for row in rows))
