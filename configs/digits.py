"""Handwritten digits on dark grounds, 32x32: the whole of MAE-CT on a laptop CPU. Nothing is downloaded.

    python launch.py --config=configs/digits.py --workdir=runs/digits
    python launch.py --config=configs/digits.py:emae --workdir=runs/digits-emae

About ten minutes on two CPU cores. Beside head and tuning, the control trains the same MAE on for as long. k-NN
accuracy on held-out digits, three seeds: see the README. With `:emae` the first stage is EMAE, a quarter of the epochs
for the same arithmetic.

Rates are far above the paper's because the run is a few hundred updates. Blur hardly acts at 32 pixels, as its radius
scales with the picture. Each digit occurs in two pictures with ids of their own, so a neighbour in the queue may be the
same handwriting on another ground.
"""

from ml_collections import ConfigDict

from maect_jax.config import check_variant, default


def get_config(variant: str = "") -> ConfigDict:
    check_variant("digits", variant, ("emae",))
    config = default()
    config.name = "digits" + (f"_{variant}" if variant else "")
    config.stages = ("pretrain", "control", "head", "tune", "evaluate")
    config.model.update(width=96, depth=4, heads=3, patch=4, image_size=32, pooling="mean", dtype="float32")
    config.model.decoder.update(width=64, depth=2, heads=2)
    config.model.projector.update(hidden=256, out=64)
    config.model.predictor.hidden = 512
    config.data.update(train="digits", mean=(0.34, 0.34, 0.34), std=(0.26, 0.26, 0.26), resize_ratio=1.0)
    config.pretrain.update(epochs=26, batch=64, views=1, base_lr=4e-3, warmup_epochs=3)
    config.control.epochs = 31
    config.head.update(epochs=6, batch=128, base_lr=2e-3, queue=512, crop_scale=(0.5, 1.0), augmentation="strong")
    config.tune.update(epochs=10, batch=128, encoder_base_lr=3e-3, head_base_lr=3e-3, frozen_blocks=2, top_k=10)
    config.tune.update(temperature=0.15, crop_scale=(0.5, 1.0), augmentation="strong")
    config.evaluate.update(every_epochs=5, online_limit=1000, probe_batch=256)
    config.checkpoint.every_updates = 500
    config.log_every = 20
    if variant == "emae":  # four parts a picture, so the arithmetic of 28 epochs of MAE
        config.pretrain.update(method="emae", epochs=7, warmup_epochs=1)
        config.control.epochs = 8
    return config
