r"""MAE-CT ViT-H/16 on ImageNet-1k: 800 epochs of two-view MAE, 20 of the head, 30 of tuning (aug: 40).

    python launch.py --config=configs/mae_ct_vith16.py --workdir=…
    python launch.py --config=configs/mae_ct_vith16.py:aug --workdir=… \
        --config.init_from=… --config.stages=head,tune,evaluate

The second form starts from an MAE that is there already and costs about a seventh of the first (in FLOPs).

ImageNet is prepared once with `python -m maect_jax data prepare imagenet2012`, see docs/data.md; `doctor` tells whether
the machine can feed the model.

Published (MAE-CT, Lehner et al. 2023; ImageNet-1k top-1): MAE k-NN 61.1, linear 78.0; MAE-CT 79.4, 81.5;
MAE-CT_aug 79.8, 82.2. This code's own run: not measured yet.
"""

from ml_collections import ConfigDict

from maect_jax.config import check_variant, default, set_size


def get_config(variant: str = "") -> ConfigDict:
    check_variant("mae_ct_vith16", variant, ("aug",))
    config = default()
    config.name = "mae_ct_vith16" + ("_aug" if variant else "")
    set_size(config, "H/16")
    config.data.train = "imagenet2012"
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
