"""Settings of a run: the full tree with its defaults, overrides, and what follows from the data's size.

A recipe is a file with `get_config(variant)` that starts from `default()` and sets plain values. Precedence, lowest
first: default, recipe, `--config.key=value`. Problems are collected and reported at once (`config_checks`). A value of
None means "derived" (see `derive`), mostly from the size of the training set; paper recipes leave none of these.
"""

import difflib
import importlib.util
import traceback
from pathlib import Path

import yaml
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from maect_jax.data.device.augment import IMAGENET_MEAN, IMAGENET_STD
from maect_jax.data.host.decode import cores
from maect_jax.errors import ConfigError
from maect_jax.evaluation.task import QUICK
from maect_jax.models.vit import SIZES
from maect_jax.objectives.masking import parallel_mask_ratio

STAGES = ("pretrain", "control", "head", "tune", "evaluate")
TRAINED = ("pretrain", "control", "head", "tune")


def default() -> ConfigDict:
    """Every setting there is, with the constants of MAE-CT ViT-L/16, minimal augmentation."""
    return ConfigDict(
        {
            "name": "mae_ct",
            "seed": 0,
            "stages": ("pretrain", "head", "tune", "evaluate"),
            "init_from": "",  # earlier run (work or stage folder), or anybody's weights file, that this run starts from
            "allow_missing": "",  # parts that such a file may lack, as 'decoder/*', with commas between
            "model": {
                "width": 1024,
                "depth": 24,
                "heads": 16,
                "patch": 16,
                "image_size": 224,  # pixels
                "channels": 3,
                "positions": "fixed",  # sine-cosine table, or 'learned', as in many ViTs of others
                "pooling": "cls",  # feature of a picture: 'cls' token or 'mean' of the patch tokens
                "dtype": "bfloat16",  # of the computation; parameters, statistics, softmax and losses are float32
                "remat": False,  # recompute activations in the backward pass: less memory, a third more work
                "decoder": {"width": 512, "depth": 8, "heads": 16},
                "projector": {"hidden": 2048, "out": 256},
                "predictor": {"hidden": 4096},
            },
            "data": {
                "train": "",  # 'digits', a folder or file of pictures, or a TFDS name; see docs/data.md
                "test": "",  # the same as `train` when empty
                "mean": IMAGENET_MEAN,  # a channel, for values in 0..1
                "std": IMAGENET_STD,
                "resize_ratio": 256 / 224,  # evaluation: shorter side over image size, before the central crop
                "workers": placeholder(int),  # loader processes of a host; 0 = threads; None = by set and machine
                "bad": "skip",  # pictures that can not be used: 'skip' (a neighbour takes the place) or 'error'
                "bad_limit": 0.001,  # share of a set's pictures that may be bad before the run ends
                "resident_gib": 2.0,  # up to this size a set of equally sized pictures is kept on the devices
            },
            "pretrain": {
                # 'mae'; 'emae': parallel masks, self-consistent; 'disjoint': two masks of DMJD. See docs/pretraining.md
                "method": "mae",
                "epochs": placeholder(int),
                "batch": 1024,  # pictures an update
                "views": 2,
                "base_lr": 1.5e-4,  # peak rate = base_lr * views * batch / 256 * what `batch_counting` says
                "batch_counting": "images",  # a picture counts once; 'parts'; or 'predicted', by what its parts hide
                "warmup_epochs": placeholder(int),
                "weight_decay": 0.05,
                "mask_ratio": placeholder(float),  # None = 0.75; with 'emae' what follows from its parts
                "decoded_share": 1.0,  # of the removed patches that are predicted, a random choice
                "normalise_pixels": True,
                "crop_scale": (0.2, 1.0),
                "accumulate": 1,  # groups a batch is split into, one after the other
                "emae": {  # see objectives/emae.py
                    "parts": 4,  # K; a part sees 1 / K of the patches
                    "consistency_weight": 1.0,
                    "consistency_norm": "all",  # patches of a picture, or 'overlap': those hidden from both parts
                    "consistency_form": "symmetric",  # or 'one_sided', with a stop-gradient
                    "consistency_space": "targets",  # what is predicted, or 'pixels'
                },
                "disjoint": {"covered": 1.0},  # share of the patches that at least one of the two parts predicts
            },
            # The same MAE trained on, for comparison with head and tuning; everything else as in `pretrain`.
            "control": {"epochs": placeholder(int)},
            "head": {
                "epochs": placeholder(int),
                "batch": 1024,
                "base_lr": 1e-4,
                "warmup": 0.2,  # share of the updates
                "weight_decay": 1e-5,
                "temperature": 0.15,
                "queue": placeholder(int),  # rows; the batch must divide it
                "crop_scale": (0.08, 1.0),
                "augmentation": "minimal",
            },
            "tune": {
                "epochs": placeholder(int),
                "batch": 1024,
                "encoder_base_lr": 1e-4,
                "head_base_lr": 1e-4,
                "warmup": 0.2,
                "encoder_weight_decay": 0.05,
                "head_weight_decay": 1e-5,
                "layer_decay": 0.65,
                "frozen_blocks": 12,
                "temperature": 0.2,
                "top_k": 20,
                "target_factor": 0.99,  # EMA of the target projector
                "ema_factor": placeholder(float),  # EMA of the encoder, the weights that are evaluated
                "crop_scale": (0.08, 1.0),
                "augmentation": "minimal",
            },
            "evaluate": {
                "batch": 256,
                "every_epochs": 0,  # k-NN during training; 0 = never
                "online_limit": 10_000,  # pictures of each set in that k-NN, and in costly analyses at the end
                "only": QUICK,  # evaluations, in order; see `evaluation.protocols.EVALUATIONS`
                "preset": "maect",  # whose protocols: 'maect', 'mae', 'dinov2', 'mimrefiner', 'lightly'
                "feature_dtype": "float32",  # that cached features are kept in, or 'bfloat16'
                "probe_epochs": placeholder(int),  # of the linear probe; None = as its preset
                "probe_batch": placeholder(int),
                "probe_from": "features",  # cached ones, or 'images': crops and flips in each epoch, as published
                "finetune_epochs": placeholder(int),  # None = as the recipe
                "finetune_batch": placeholder(int),
                "finetune_base_lr": placeholder(float),  # peak rate = base_lr * batch / 256
                "finetune_ema": placeholder(float),  # evaluate a moving average of the weights with this factor
                "lists": "",  # folder of official split lists, see docs/evaluation.md
                "robustness": "",  # further test sets for the unchanged classifiers, with commas between
            },
            "mesh": {"fsdp": 1},  # devices that share one copy of the parameters
            "checkpoint": {"every_updates": 1000, "keep": 2, "keep_every": 0},  # keep_every in updates; 0 = none
            "log_every": 50,  # updates between two lines of metrics
        }
    )


def set_size(config: ConfigDict, size: str) -> None:
    """Takes width, depth, heads and patch of one of the published sizes ('S/16', 'B/16', 'L/16', 'H/16', 'H/14')."""
    shape = SIZES[size]
    config.model.update(width=shape.width, depth=shape.depth, heads=shape.heads, patch=shape.patch)


def check_variant(recipe: str, variant: str, known: tuple[str, ...]) -> None:
    """Raises ConfigError when a recipe does not have the variant that was asked for; '' is always known."""
    if variant and variant not in known:
        raise ConfigError(f"{recipe}: no variant '{variant}'; there is {', '.join(known) or 'none'}")


def load(path_and_variant: str, overrides: dict[str, str]) -> ConfigDict:
    """Reads a recipe and applies overrides.

    Args:
      path_and_variant: 'configs/mae_ct_vitl.py' or 'configs/mae_ct_vitl.py:aug'. The file is Python and is run.
      overrides: dotted key -> text of the value, read as YAML.

    Raises:
      ConfigError: with every problem found.
    """
    path, _, variant = path_and_variant.partition(":")
    if not Path(path).is_file():
        recipes = sorted(str(file) for file in Path(path).parent.glob("*.py")) if Path(path).parent.is_dir() else []
        near = difflib.get_close_matches(path, recipes, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"--config: no file '{path}'{hint}")
    spec = importlib.util.spec_from_file_location("recipe", path)
    recipe = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(recipe)
        config = recipe.get_config(variant)
    except ConfigError:
        raise
    except Exception as error:  # a recipe is a program of the user's: say where it went wrong
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{line.filename}:{line.lineno}"
        raise ConfigError(f"--config: '{path}' fails with {type(error).__name__} at {where}: {error}") from error
    if problems := unknown_keys(config) + apply_overrides(config, overrides):
        raise ConfigError(problems)
    return config


def flatten(config: ConfigDict) -> dict:
    """Dotted key -> value, in order."""
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict)
        flat |= {f"{key}.{inner}": v for inner, v in flatten(value).items()} if nested else {key: value}
    return flat


def plain(config: ConfigDict) -> dict:
    """The settings as dicts, lists and scalars, for YAML and JSON."""
    return {
        key: plain(value) if isinstance(value, ConfigDict) else list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
    }


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    same_name = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = near or same_name
    return f"config.{key}: no such setting" + (f"; did you mean config.{near[0]}?" if near else "")


def unknown_keys(config: ConfigDict) -> list[str]:
    """Settings of a recipe that `default()` does not have: a misspelt name must not go unnoticed."""
    known = list(flatten(default()))
    return [_unknown(key, known) for key in flatten(config) if key not in known]


def read_overrides(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """'--config.key=value' or '--config.key value' -> (overrides by dotted key, a sentence for each other argument)."""
    overrides, problems, rest = {}, [], list(arguments)
    while rest:
        text = rest.pop(0)
        key, equals, value = text.removeprefix("--config.").partition("=")
        if not text.startswith("--config."):
            problems.append(f"'{text}' is not understood; settings are given as --config.key=value")
        elif equals or (rest and not rest[0].startswith("--")):
            overrides[key] = value if equals else rest.pop(0)
        else:
            problems.append(f"'{text}' needs a value: {text}=…")
    return overrides, problems


def apply_overrides(config: ConfigDict, overrides: dict[str, str]) -> list[str]:
    """Sets `overrides` in `config`; returns a sentence for each that is unknown or of the wrong type."""
    problems = []
    known = list(flatten(config))
    for key, text in overrides.items():
        if key not in known:
            problems.append(_unknown(key, known))
            continue
        *folders, name = key.split(".")
        section = config
        for folder in folders:
            section = section[folder]
        wanted, old = section.get_type(name), section[name]
        if wanted is tuple:  # 'head,tune' is as good as '[head, tune]'
            parts = text.strip().removeprefix("[").removesuffix("]").split(",")
            value = tuple(_parsed(part.strip(), type(old[0])) for part in parts)
            good = all(type(part) is type(old[0]) for part in value)
        else:
            value = _parsed(text, wanted)
            good = type(value) is wanted
        if good:
            section[name] = value
        else:
            example = f"; for instance {old!r}" if old is not None else ""
            problems.append(f"config.{key}: '{text}' is not a {wanted.__name__}{example}")
    return problems


def _parsed(text: str, wanted: type):
    """The text as a value of the wanted type where it is one, else as whatever YAML makes of it."""
    if wanted is str:
        return text
    try:
        return float(text) if wanted is float else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text


def derive(config: ConfigDict, pictures: int) -> None:
    """Fills the settings left as None from the number of training pictures.

    Paper constants presuppose paper lengths: an average of factor 0.9999 over few updates is still its start, a queue
    longer than the data set holds a picture's own past, a warm-up of 20 epochs may be the whole run. So:

      epochs      smaller sets are seen more often: 400 * (1e6 / pictures)^(1/3), at most 1600, in pre-training;
                  20 * (1e6 / pictures)^(1/3), at most 100, for head and tuning; the control as long as both
      warm-up     a twentieth of the epochs of pre-training
      queue       the largest power of two times the batch within a quarter of the set, at most 65,536 rows
      workers     a process a core for sets of 100,000 pictures and more; few pictures are sooner read by threads than
                  processes start
      EMA         such that at most 1 % of the start remains at the end, at most 0.9999

    The mask ratio follows from the method instead: 0.75, or (K - 1) / K for the K parts of EMAE.
    """
    growth = (1e6 / pictures) ** (1 / 3)

    def fill(section: str, key: str, value) -> None:
        if config[section][key] is None:
            config[section][key] = value

    fill("data", "workers", cores() if pictures >= 100_000 and cores() > 4 else 0)
    fill("pretrain", "epochs", round(min(1600, 400 * growth)))
    fill("pretrain", "warmup_epochs", max(1, config.pretrain.epochs // 20))
    patches, parts = (config.model.image_size // config.model.patch) ** 2, config.pretrain.emae.parts
    emae = config.pretrain.method == "emae"
    if emae:  # exactly, also where it was given with fewer digits
        config.pretrain.mask_ratio = parallel_mask_ratio(patches, parts)
    fill("pretrain", "mask_ratio", 0.75)
    for stage in ("head", "tune"):
        fill(stage, "epochs", round(min(100, max(20, 20 * growth))))
    fill("control", "epochs", config.head.epochs + config.tune.epochs)
    step = max(config.head.batch, config.tune.batch)
    rows = step
    while 2 * rows <= min(65_536, pictures // 4):
        rows *= 2
    fill("head", "queue", rows)
    updates = max(1, updates_of(config, "tune", pictures))
    fill("tune", "ema_factor", min(0.9999, 0.01 ** (1 / updates)))


def updates_of(config: ConfigDict, stage: str, pictures: int) -> int:
    """Updates of a training stage: epochs times whole batches in the training set."""
    batch = config[_settings_of(stage)].batch
    return config[stage].epochs * (pictures // batch)


def warmup_updates(config: ConfigDict, stage: str, pictures: int) -> int:
    """Warm-up updates: whole epochs in pre-training, a share of all updates (rounded down) in head and tuning."""
    if stage in ("pretrain", "control"):
        epochs = min(config.pretrain.warmup_epochs, config[stage].epochs)
        return epochs * (pictures // config.pretrain.batch)
    return int(config[stage].warmup * updates_of(config, stage, pictures))


def _settings_of(stage: str) -> str:
    """The section that holds a stage's batch and rates: the control is pre-training continued."""
    return "pretrain" if stage == "control" else stage
