"""The recipes of the paper carry the paper's numbers; those of small data derive theirs from the data."""

import pytest

import golden
from maect_jax import config as settings
from maect_jax import config_checks
from maect_jax.assemble import assemble, build_encoder
from maect_jax.objectives.masking import patches_to_keep
from maect_jax.parallel.mesh import make_mesh
from maect_jax.training.schedule import peak_learning_rate
from runs import ROOT

RECIPES = {"B16": "mae_ct_vitb", "L16": "mae_ct_vitl", "H16": "mae_ct_vith16", "H14": "mae_ct_vith14"}
POOLING = {"mean_patch": "mean", "class_token": "cls", "cls": "cls"}


@pytest.mark.parametrize("model", RECIPES)
@pytest.mark.parametrize("variant", ["min", "aug"])
def test_paper_recipes_equal_the_recorded_constants(model, variant):
    schedule = golden.constants("schedule")
    recorded = schedule["recipes"][model]
    config = settings.load(f"configs/{RECIPES[model]}.py" + (":aug" if variant == "aug" else ""), {})
    settings.derive(config, schedule["dataset_size"])
    for name, section, key in (
        ("pretrain", config.pretrain, "stage1"),
        ("head", config.head, f"stage2_{variant}"),
        ("tune", config.tune, f"stage3_{variant}"),
    ):
        stage = recorded.get(key)
        if stage is None:
            assert model == "H14" and name == "pretrain" and "pretrain" not in config.stages
            continue
        views = config.pretrain.views if name == "pretrain" else 2
        assert (section.epochs, section.batch, views) == (stage["epochs"], stage["batch"], stage["n_views"])
        assert settings.updates_of(config, name, schedule["dataset_size"]) == stage["total_updates"]
        part = stage.get("head") if name == "head" else stage["encoder"]
        assert settings.warmup_updates(config, name, schedule["dataset_size"]) == part["warmup_updates"]
        assert (config.model.width, config.model.depth, config.model.heads, config.model.patch) == (
            stage["dim"],
            stage["depth"],
            stage["heads"],
            stage["patch"],
        )
        base = {"pretrain": "base_lr", "head": "base_lr", "tune": "encoder_base_lr"}[name]
        decay = {"pretrain": "weight_decay", "head": "weight_decay", "tune": "encoder_weight_decay"}[name]
        assert peak_learning_rate(section[base], section.batch, views) == pytest.approx(part["peak_lr"], rel=1e-12)
        assert section[decay] == part["weight_decay"]
        if name == "pretrain":
            assert section.mask_ratio == stage["mask_ratio"]
            continue
        assert section.temperature == stage["temperature"]
        assert config.head.queue == stage["queue_size"]
        assert config.model.projector.hidden == stage["proj_hidden"]
        assert config.model.projector.out == stage["proj_out"]
        assert config.model.predictor.hidden == stage["pred_hidden"]
        assert config.model.pooling == POOLING[stage["pooling"]]
        assert section.augmentation == ("strong" if variant == "aug" else "minimal")
        if name == "tune":
            head = stage["head"]
            assert section.top_k == stage["topk"] and section.frozen_blocks == stage["frozen_blocks"]
            assert section.target_factor == stage["target_factor"] and section.ema_factor == stage["encoder_ema_factor"]
            assert section.layer_decay == part["llrd"]
            assert peak_learning_rate(section.head_base_lr, section.batch, 2) == pytest.approx(
                head["peak_lr"], rel=1e-12
            )
            assert section.head_weight_decay == head["weight_decay"]


VARIANTS = ("cifar10.py:aug", "cifar10.py:emae", "cifar10.py:small", "digits.py:emae", "emae_ct_vitl.py:aug")
VARIANTS += ("imagenette.py:aug", "imagenette.py:emae", "imagenette.py:small", "images.py:base", "images.py:tiny")


@pytest.mark.parametrize("recipe", [*sorted(path.name for path in (ROOT / "configs").glob("*.py")), *VARIANTS])
def test_every_recipe_is_sound_for_its_data(recipe):
    config = settings.load(f"configs/{recipe}", {"data.train": "somewhere"})
    for pictures in (9_469, 50_000, 1_281_167):
        derived = config.copy_and_resolve_references()
        settings.derive(derived, pictures)
        assert config_checks.check(derived) == []
        left_open = {key for key, value in settings.flatten(derived).items() if value is None}
        assert all(
            key.startswith(("evaluate.probe_", "evaluate.finetune_")) for key in left_open
        )  # None = as published


@pytest.mark.parametrize("size", ["b", "l"])
def test_emae_recipes_are_the_original_recipe_of_mae(size):
    """Batch, rate, warm-up and decay of He et al. 2022; 300 epochs and four parts as EMAE states."""
    config = settings.load(f"configs/emae_vit{size}.py", {})
    settings.derive(config, 1_281_167)
    pretrain = config.pretrain
    assert (pretrain.method, pretrain.emae.parts, pretrain.mask_ratio) == ("emae", 4, 0.75)
    assert settings.updates_of(config, "pretrain", 1_281_167) == 300 * 312 == 93_600
    assert settings.warmup_updates(config, "pretrain", 1_281_167) == 40 * 312
    assert peak_learning_rate(pretrain.base_lr, pretrain.batch, pretrain.views) == pytest.approx(2.4e-3)
    assert (pretrain.weight_decay, pretrain.views, pretrain.crop_scale) == (0.05, 1, (0.2, 1.0))


def test_small_sets_get_constants_that_fit_them():
    config = settings.load("configs/images.py", {"data.train": "somewhere"})
    settings.derive(config, 5_000)
    updates = settings.updates_of(config, "tune", 5_000)
    assert config.tune.ema_factor**updates <= 0.01 + 1e-9
    assert config.head.queue <= 5_000 // 4 and config.head.queue % config.head.batch == 0
    assert config.pretrain.warmup_epochs < config.pretrain.epochs / 10


def test_models_have_the_published_shapes():
    config = settings.load("configs/mae_ct_vith14.py", {})
    encoder = build_encoder(config)
    assert encoder.grid == 16 and patches_to_keep(encoder.grid**2, config.pretrain.mask_ratio) == 64
    mesh = make_mesh()
    assembled = assemble(settings.load("configs/mae_ct_vitb.py", {}), "tune", 1_281_167, mesh)
    assert assembled.clock.updates == 25_020 and assembled.clock.warmup == 5_004
