"""Imagenette at 96 pixels: a width-384 ViT with 8x8 patches, trained from scratch.

    python launch.py --config=configs/imagenette.py --workdir=runs/imagenette --config.data.train=path/to/imagenette96

Variants: 'aug' strong views; 'small' for a CPU; 'emae' the first stage is EMAE, one crop in four parts for half the
epochs, which is the arithmetic of two crops for all of them.

The folder holds train/<class>/… and val/<class>/…; without it, the TFDS data set `imagenette/160px-v2` is taken.
Nearly all of Imagenette's validation pictures are ImageNet-1k training pictures: not a test for ImageNet weights.
"""

from ml_collections import ConfigDict

from maect_jax.config import check_variant, default


def get_config(variant: str = "") -> ConfigDict:
    check_variant("imagenette", variant, ("aug", "emae", "small"))
    config = default()
    config.name = "imagenette" + (f"_{variant}" if variant else "")
    config.model.update(width=384, depth=12, heads=6, patch=8, image_size=96, pooling="mean")
    config.model.decoder.update(width=192, depth=4, heads=6)
    config.model.projector.update(hidden=1024, out=128)
    config.model.predictor.hidden = 2048
    config.data.update(train="imagenette/160px-v2", resize_ratio=1.0)
    config.pretrain.update(epochs=800, batch=256, views=2, base_lr=2e-4, warmup_epochs=40)
    config.head.update(epochs=40, batch=256, base_lr=2e-4, queue=2048, crop_scale=(0.2, 1.0))
    config.tune.update(
        epochs=80,
        batch=256,
        encoder_base_lr=2e-4,
        head_base_lr=2e-4,
        frozen_blocks=6,
        top_k=10,
        temperature=0.15,
        crop_scale=(0.2, 1.0),
    )
    config.evaluate.update(every_epochs=40, online_limit=5000)
    if variant == "aug":
        config.head.augmentation = config.tune.augmentation = "strong"
    if variant == "emae":
        config.pretrain.update(method="emae", epochs=400, views=1, base_lr=4e-4, warmup_epochs=20)
    if variant == "small":
        config.model.update(width=128, depth=6, heads=4, patch=12, dtype="float32")
        config.model.decoder.update(width=64, depth=2, heads=2)
        config.model.projector.update(hidden=512, out=128)
        config.model.predictor.hidden = 1024
        config.pretrain.update(epochs=20, batch=64, views=1, base_lr=2e-3, warmup_epochs=1)
        config.head.update(epochs=2, batch=64, base_lr=1e-3)
        config.tune.update(epochs=4, batch=64, encoder_base_lr=1e-3, head_base_lr=1e-3, frozen_blocks=3)
        config.evaluate.update(every_epochs=5, online_limit=2000)
    return config
