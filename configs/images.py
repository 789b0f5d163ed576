"""Your own pictures: a folder in, features that cluster by object out.

    python launch.py --config=configs/images.py --workdir=runs/mine --config.data.train=path/to/pictures

`path/to/pictures` holds train/<class>/… and test/<class>/…, or pictures alone (then nothing is evaluated). Epochs,
queue and averages follow from the number of pictures (see `maect_jax.config.derive`) and are written to
config.resolved.yaml. Useful overrides: model.image_size, pretrain.batch, data.mean, data.std.

Variants: '' a ViT-S/16 at 224 pixels; 'base' a ViT-B/16; 'aug' colours change and do not matter; 'tiny' a width-96
ViT at 32 pixels with small batches, to see on a CPU that a folder is right before an accelerator is paid for.
"""

from ml_collections import ConfigDict

from maect_jax.config import check_variant, default, set_size


def get_config(variant: str = "") -> ConfigDict:
    check_variant("images", variant, ("base", "aug", "tiny"))
    config = default()
    config.name = "images" + (f"_{variant}" if variant else "")
    set_size(config, "B/16" if variant == "base" else "S/16")
    config.model.pooling = "mean"
    config.pretrain.update(batch=256, base_lr=1.5e-4)
    config.head.update(batch=256, base_lr=1e-4)
    config.tune.update(batch=256, frozen_blocks=6, temperature=0.15, top_k=10)
    config.evaluate.update(every_epochs=20, online_limit=5000)
    if variant == "aug":
        config.head.augmentation = config.tune.augmentation = "strong"
    if variant == "tiny":
        config.model.update(width=96, depth=4, heads=3, patch=4, image_size=32, dtype="float32")
        config.model.decoder.update(width=64, depth=2, heads=2)
        config.model.projector.update(hidden=256, out=64)
        config.model.predictor.hidden = 512
        config.pretrain.update(epochs=4, batch=16, views=1, base_lr=4e-3)
        config.head.update(epochs=1, batch=16, base_lr=2e-3)
        config.tune.update(epochs=2, batch=16, encoder_base_lr=2e-3, head_base_lr=2e-3, frozen_blocks=2, top_k=5)
        config.evaluate.update(every_epochs=2, probe_epochs=10, probe_batch=64)
        config.log_every = 10
    return config
