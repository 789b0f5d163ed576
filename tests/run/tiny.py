"""The smallest run that has every part: 64 pictures of 16x16, two blocks, a few updates a stage. Used by tests only."""

from ml_collections import ConfigDict

from maect_jax.config import check_variant, default


def get_config(variant: str = "") -> ConfigDict:
    check_variant("tiny", variant, ("strong",))
    config = default()
    config.name = "tiny"
    config.model.update(width=16, depth=2, heads=2, patch=4, image_size=16, pooling="mean", dtype="float32")
    config.model.decoder.update(width=8, depth=1, heads=2)
    config.model.projector.update(hidden=16, out=8)
    config.model.predictor.hidden = 16
    config.data.resize_ratio = 1.0
    config.pretrain.update(epochs=3, batch=16, views=2, base_lr=1e-2, warmup_epochs=1)
    config.control.epochs = 1
    config.head.update(epochs=2, batch=16, base_lr=1e-2, queue=32)
    config.tune.update(epochs=3, batch=16, encoder_base_lr=1e-2, head_base_lr=1e-2, frozen_blocks=1, top_k=3)
    config.tune.update(ema_factor=0.9)
    config.evaluate.update(batch=16, probe_epochs=2, probe_batch=16, only=("knn", "linear", "pictures"))
    config.checkpoint.every_updates = 2
    config.log_every = 2
    if variant:
        config.head.augmentation = config.tune.augmentation = "strong"
    return config
