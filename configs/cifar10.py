"""CIFAR-10 (or another set of 32x32 pictures): a width-192 ViT with 4x4 patches, trained from scratch.

    python launch.py --config=configs/cifar10.py --workdir=runs/cifar10 --config.data.train=path/to/cifar10
    python launch.py --config=configs/cifar10.py:small …        a width-128 ViT, for a CPU
    python launch.py --config=configs/cifar10.py:emae …         the first stage is EMAE: 200 epochs of one crop in four
                                                                parts, the arithmetic of 400 epochs of two crops

`path/to/cifar10` holds train/<class>/*.png and test/<class>/*.png. Without it, the TFDS data set `cifar10` is taken,
which `python -m maect_jax data prepare cifar10` prepares, once.
"""

from ml_collections import ConfigDict

from maect_jax.config import check_variant, default


def get_config(variant: str = "") -> ConfigDict:
    check_variant("cifar10", variant, ("aug", "emae", "small"))
    config = default()
    config.name = "cifar10" + (f"_{variant}" if variant else "")
    config.model.update(width=192, depth=12, heads=3, patch=4, image_size=32, pooling="mean")
    config.model.decoder.update(width=96, depth=4, heads=3)
    config.model.projector.update(hidden=1024, out=128)
    config.model.predictor.hidden = 2048
    config.data.update(train="cifar10", mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), resize_ratio=1.0)
    config.pretrain.update(epochs=400, batch=512, views=2, base_lr=2e-4, warmup_epochs=20)
    config.head.update(epochs=20, batch=512, base_lr=2e-4, queue=8192, crop_scale=(0.2, 1.0))
    config.tune.update(
        epochs=40,
        batch=512,
        encoder_base_lr=2e-4,
        head_base_lr=2e-4,
        frozen_blocks=6,
        top_k=10,
        temperature=0.15,
        crop_scale=(0.2, 1.0),
    )
    config.evaluate.update(every_epochs=20, online_limit=5000)
    if variant == "aug":
        config.head.augmentation = config.tune.augmentation = "strong"
    if variant == "emae":
        config.pretrain.update(method="emae", epochs=200, views=1, base_lr=4e-4, warmup_epochs=10)
    if variant == "small":
        config.model.update(width=128, depth=6, heads=4, dtype="float32")
        config.model.decoder.update(width=64, depth=2, heads=2)
        config.model.projector.update(hidden=512, out=128)
        config.model.predictor.hidden = 1024
        config.pretrain.update(epochs=20, batch=128, views=1, base_lr=2e-3, warmup_epochs=1)
        config.head.update(epochs=2, batch=128, base_lr=1e-3, queue=4096)
        config.tune.update(epochs=4, batch=128, encoder_base_lr=1e-3, head_base_lr=1e-3, frozen_blocks=3)
        config.evaluate.update(every_epochs=2, online_limit=2000)
    return config
