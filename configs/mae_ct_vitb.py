r"""MAE-CT ViT-B/16 on ImageNet-1k: 800 epochs of two-view MAE, 20 of the head, 20 of tuning (aug: 80).

    python launch.py --config=configs/mae_ct_vitb.py --workdir=…
    python launch.py --config=configs/mae_ct_vitb.py:aug --workdir=… \
        --config.init_from=mae_pretrain_vit_base.pth --config.stages=head,tune,evaluate

The second form starts from an MAE that is there already and costs about a seventh of the first (in FLOPs).

ImageNet is prepared once with `python -m maect_jax data prepare imagenet2012`, see docs/data.md; `doctor` tells whether
the machine can feed the model.

Published (MAE-CT, Lehner et al. 2023; ImageNet-1k top-1): MAE k-NN 51.1, linear 66.7; MAE-CT 64.1, 73.5;
MAE-CT_aug 73.4, 76.9. This code's own run: not measured yet.
"""

from ml_collections import ConfigDict

from maect_jax.config import check_variant, default, set_size


def get_config(variant: str = "") -> ConfigDict:
    check_variant("mae_ct_vitb", variant, ("aug",))
    config = default()
    config.name = "mae_ct_vitb" + ("_aug" if variant else "")
    set_size(config, "B/16")
    config.model.pooling = "mean"
    config.data.train = "imagenet2012"
    config.pretrain.update(epochs=800, batch=1024, base_lr=1.5e-4, warmup_epochs=20, mask_ratio=0.75)
    config.control.epochs = 40
    config.head.update(epochs=20, batch=1024, base_lr=1e-4, temperature=0.15, queue=65_536)
    config.tune.update(
        epochs=20,
        batch=1024,
        encoder_base_lr=1e-4,
        head_base_lr=1e-4,
        frozen_blocks=6,
        temperature=0.15,
        top_k=20,
        target_factor=0.99,
        ema_factor=0.9999,
    )
    if variant == "aug":
        config.head.augmentation = config.tune.augmentation = "strong"
        config.tune.update(epochs=80, head_base_lr=5e-4, top_k=10)
        config.control.epochs = 100
    return config
