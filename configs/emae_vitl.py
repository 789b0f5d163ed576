"""EMAE ViT-L/16 on ImageNet-1k: 300 epochs of four parallel masks with self-consistency, then evaluation.

    python launch.py --config=configs/emae_vitl.py --workdir=…

Claimed (EMAE, Li et al. 2023, abstract): MAE's quality on ViT-L in 13 % of its pre-training time. How many epochs that
is, the abstract does not say: 13 % of MAE's 1,600 epochs is the arithmetic of 52 EMAE epochs. 300 is the length that is
stated for ViT-B. This code's own run: not measured yet.

Everything but the method is the original MAE's recipe: batch 4096, one crop, 40 epochs of warm-up; what EMAE's text
leaves open has the defaults of `maect_jax/objectives/emae.py`. An epoch costs four of MAE's in arithmetic and one in
pictures decoded. ImageNet is prepared once with `python -m maect_jax data prepare imagenet2012`, see docs/data.md.
"""

from ml_collections import ConfigDict

from maect_jax.config import check_variant, default, set_size


def get_config(variant: str = "") -> ConfigDict:
    check_variant("emae_vitl", variant, ())
    config = default()
    config.name = "emae_vitl"
    set_size(config, "L/16")
    config.data.train = "imagenet2012"
    config.stages = ("pretrain", "evaluate")
    config.pretrain.update(method="emae", epochs=300, batch=4096, views=1, base_lr=1.5e-4, warmup_epochs=40)
    return config
