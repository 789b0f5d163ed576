r"""MAE-CT ViT-H/14 on ImageNet-1k: 20 epochs of the head, 30 of tuning (aug: 40).

    python launch.py --config=configs/mae_ct_vith14.py --workdir=… \
        --config.init_from=mae_pretrain_vit_huge.pth
    (the same with configs/mae_ct_vith14.py:aug)

There is no MAE pre-training: the paper starts from the published MAE H/14 encoder.

ImageNet is prepared once with `python -m maect_jax data prepare imagenet2012`, see docs/data.md; `doctor` tells whether
the machine can feed the model.

Published (MAE-CT, Lehner et al. 2023; ImageNet-1k top-1): MAE k-NN 58.9, linear 77.2; MAE-CT 79.1, 81.3;
MAE-CT_aug 78.9, 82.0. This code's own run: not measured yet.
"""

from ml_collections import ConfigDict

from maect_jax.config import check_variant, default, set_size


def get_config(variant: str = "") -> ConfigDict:
    check_variant("mae_ct_vith14", variant, ("aug",))
    config = default()
    config.name = "mae_ct_vith14" + ("_aug" if variant else "")
    set_size(config, "H/14")
    config.data.train = "imagenet2012"
    config.stages = ("head", "tune", "evaluate")
    # only if asked for
    config.pretrain.update(epochs=800, batch=512, base_lr=1.5e-4, warmup_epochs=20, mask_ratio=0.75)
    config.control.epochs = 50
    config.head.update(epochs=20, batch=512, base_lr=1e-4, temperature=0.15, queue=65_536)
    config.tune.update(
        epochs=30,
        batch=512,
        encoder_base_lr=1e-4,
        head_base_lr=1e-4,
        frozen_blocks=16,
        temperature=0.3,
        top_k=20,
        target_factor=0.995,
        ema_factor=0.9999,
    )
    if variant == "aug":
        config.head.augmentation = config.tune.augmentation = "strong"
        config.tune.update(epochs=40, head_base_lr=5e-4, temperature=0.35)
        config.control.epochs = 60
    return config
