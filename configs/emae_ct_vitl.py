r"""EMAE followed by contrastive tuning, ViT-L/16 on ImageNet-1k: 300 epochs of EMAE, 20 of the head, 20 of tuning.

    python launch.py --config=configs/emae_ct_vitl.py --workdir=…
    python launch.py --config=configs/emae_ct_vitl.py:aug --workdir=… \
        --config.init_from=… --config.stages=head,tune,evaluate

The first stage is `configs/emae_vitl.py`, the others are `configs/mae_ct_vitl.py` (aug: 40 epochs of tuning, strong
views). The second form starts from an EMAE run that is there already.

Nobody has published this combination, so there is nothing to compare with but the same recipe after MAE: k-NN 78.0,
linear 80.2 (aug 79.1, 81.5; MAE-CT, Lehner et al. 2023). This code's own run: not measured yet.
"""

from ml_collections import ConfigDict

from maect_jax.config import check_variant, default, set_size


def get_config(variant: str = "") -> ConfigDict:
    check_variant("emae_ct_vitl", variant, ("aug",))
    config = default()
    config.name = "emae_ct_vitl" + ("_aug" if variant else "")
    set_size(config, "L/16")
    config.data.train = "imagenet2012"
    config.pretrain.update(method="emae", epochs=300, batch=4096, views=1, base_lr=1.5e-4, warmup_epochs=40)
    config.control.epochs = 40
    config.head.update(epochs=20, batch=1024, base_lr=1e-4, temperature=0.15, queue=65_536)
    config.tune.update(
        epochs=20,
        batch=1024,
        encoder_base_lr=1e-4,
        head_base_lr=1e-4,
        frozen_blocks=12,
        temperature=0.2,
        top_k=20,
        target_factor=0.99,
        ema_factor=0.9999,
    )
    if variant == "aug":
        config.head.augmentation = config.tune.augmentation = "strong"
        config.tune.update(epochs=40, head_base_lr=5e-4, temperature=0.15, top_k=10)
        config.control.epochs = 60
    return config
