"""Which settings can not work, and how to mend them; every problem is found before any device is touched."""

import difflib
import math

from ml_collections import ConfigDict

from maect_jax.config import STAGES, TRAINED, flatten
from maect_jax.data.batches.bad import POLICIES
from maect_jax.data.device.augment import AUGMENTATIONS
from maect_jax.evaluation.presets import PRESETS
from maect_jax.evaluation.protocols import EVALUATIONS, unknown, unusable_robustness
from maect_jax.evaluation.task import DTYPES, PROBE_FROM
from maect_jax.objectives import emae
from maect_jax.objectives.masking import divisors_text, patches_to_keep


def check(config: ConfigDict) -> list[str]:
    """A sentence for each setting, or pair of settings, that can not work; needs neither data nor devices."""
    problems: list[str] = []

    def need(good: bool, key: str, why: str) -> None:
        if not good:
            problems.append(f"config.{key} = {flatten(config)[key]!r}: {why}")

    model, decoder = config.model, config.model.decoder
    for key, value in flatten(config).items():
        numbers = value if isinstance(value, tuple) else (value,)
        need(all(math.isfinite(n) for n in numbers if isinstance(n, float)), key, "must be a finite number")
        if key.startswith("model.") and type(value) is int:
            need(value >= 1, key, "must be at least 1")
    for key in ("data.workers", "data.resident_gib", "evaluate.every_epochs", "checkpoint.keep_every", "seed"):
        need((flatten(config)[key] or 0) >= 0, key, "must not be negative")
    need(config.evaluate.online_limit >= 10, "evaluate.online_limit", "must be at least 10, the neighbours that vote")
    if problems:
        return problems
    need(model.image_size % model.patch == 0, "model.image_size", f"must be a multiple of model.patch = {model.patch}")
    for prefix, part in (("model", model), ("model.decoder", decoder)):
        need(part.width % 4 == 0, f"{prefix}.width", "must be a multiple of 4 (position table)")
        need(part.width % part.heads == 0, f"{prefix}.width", f"must be a multiple of heads = {part.heads}")
    need(model.pooling in ("cls", "mean"), "model.pooling", "must be 'cls' or 'mean'")
    need(model.positions in ("fixed", "learned"), "model.positions", "must be 'fixed' or 'learned'")
    need(model.dtype in ("bfloat16", "float32"), "model.dtype", "must be 'bfloat16' or 'float32'")
    need(bool(config.data.train), "data.train", "give 'digits', a folder or file of pictures, or a TFDS name")
    for key in ("mean", "std"):
        need(len(config.data[key]) == model.channels, f"data.{key}", f"needs {model.channels} values, one a channel")
    need(all(s > 0 for s in config.data.std), "data.std", "must be positive")
    need(config.data.bad in POLICIES, "data.bad", "must be 'skip' or 'error'")
    need(0 <= config.data.bad_limit <= 1, "data.bad_limit", "must lie between 0 and 1")
    need(config.data.resize_ratio >= 1, "data.resize_ratio", "must be at least 1")
    problems += _check_stages(config) + _check_evaluation(config)
    problems += _check_masks(config, (model.image_size // model.patch) ** 2)
    need(config.pretrain.views in (1, 2), "pretrain.views", "must be 1 or 2")
    accumulate = max(config.pretrain.accumulate, 1)
    need(config.pretrain.accumulate >= 1, "pretrain.accumulate", "must be at least 1")
    need(config.pretrain.batch % accumulate == 0, "pretrain.accumulate", f"must divide batch = {config.pretrain.batch}")
    for stage in TRAINED:
        for key, value in flatten(config[stage]).items():
            problems += _check_value(f"{stage}.{key}", value, model.channels)
    frozen = config.tune.frozen_blocks
    need(
        0 <= frozen < model.depth,
        "tune.frozen_blocks",
        f"the encoder has {model.depth} blocks; freeze 0 to {model.depth - 1}",
    )
    if config.head.queue:
        for stage in ("head", "tune"):
            batch = config[stage].batch
            divides = batch >= 1 and config.head.queue % batch == 0
            near = batch * max(1, round(config.head.queue / batch)) if batch >= 1 else 0
            need(divides, "head.queue", f"{stage}.batch = {batch} must divide it; for instance {near}")
        need(config.tune.top_k <= config.head.queue, "tune.top_k", f"the queue has only {config.head.queue} rows")
    lengths = [f"evaluate.{kind}_{key}" for kind in ("probe", "finetune") for key in ("epochs", "batch")]
    for key in ("evaluate.batch", "mesh.fsdp", *lengths):
        value = flatten(config)[key]
        need(value is None or value >= 1, key, "must be at least 1")
    rate = config.evaluate.finetune_base_lr
    need(rate is None or rate > 0, "evaluate.finetune_base_lr", "must be positive")
    average = config.evaluate.finetune_ema
    need(average is None or 0 <= average < 1, "evaluate.finetune_ema", "must be at least 0 and below 1")
    for key in ("checkpoint.every_updates", "checkpoint.keep", "log_every"):
        need(flatten(config)[key] >= 1, key, "must be at least 1")
    return problems


METHODS = ("mae", "emae", "disjoint")


def _check_masks(config: ConfigDict, patches: int) -> list[str]:
    """What the parts of a picture see and predict in pre-training, of so many patches."""
    problems: list[str] = []
    pretrain, parts = config.pretrain, config.pretrain.emae.parts

    def need(good: bool, key: str, why: str) -> None:
        if not good:
            problems.append(f"config.pretrain.{key} = {flatten(pretrain)[key]!r}: {why}")

    def one_of(key: str, known: tuple[str, ...]) -> None:
        need(flatten(pretrain)[key] in known, key, f"must be one of {', '.join(known)}")

    one_of("method", METHODS)
    one_of("batch_counting", emae.COUNTINGS)
    one_of("emae.consistency_norm", emae.NORMS)
    one_of("emae.consistency_form", emae.FORMS)
    one_of("emae.consistency_space", emae.SPACES)
    need(pretrain.emae.consistency_weight >= 0, "emae.consistency_weight", "must not be negative")
    need(0 < pretrain.decoded_share <= 1, "decoded_share", "must lie above 0 and at most at 1")
    ratio = pretrain.mask_ratio
    if pretrain.method == "emae":
        why = f"the parts must divide the {patches} patches of a picture; {divisors_text(patches)} do"
        need(2 <= parts <= patches and patches % parts == 0, "emae.parts", why)
        consistent = parts != 2 or pretrain.emae.consistency_weight == 0
        need(consistent, "emae.parts", "no patch is hidden from both of 2 parts, so there is nothing to be consistent "
             "about; take at least 3, or set config.pretrain.emae.consistency_weight=0")  # fmt: skip
        fits = ratio is None or parts < 2 or math.isclose(ratio, 1 - 1 / parts, abs_tol=1e-4)
        need(fits, "mask_ratio", f"each of {parts} parts hides {1 - 1 / max(parts, 1):.6g} of the patches; leave it "
             "out, or change config.pretrain.emae.parts")  # fmt: skip
    elif ratio is not None:
        good = 0 < ratio < 1 and 0 < patches_to_keep(patches, ratio) < patches
        need(good, "mask_ratio", f"of {patches} patches at least one must stay and one must go")
    if pretrain.method == "disjoint":
        hidden, covered = 0.75 if ratio is None else ratio, pretrain.disjoint.covered
        good = covered <= 1 and int(min(covered - hidden, hidden) * patches) >= 1
        need(good, "disjoint.covered", f"must be more than the mask ratio of {hidden} by at least one of {patches} "
             "patches, and at most 1")  # fmt: skip
    return problems


def _check_stages(config: ConfigDict) -> list[str]:
    known, stages = ", ".join(STAGES), config.stages
    wrong = [stage for stage in stages if stage not in STAGES]
    if wrong or not stages:
        near = difflib.get_close_matches(str(wrong[0]), STAGES, 1) if wrong else []
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return [f"config.stages = {stages!r}: choose from {known}{hint}"]
    if list(stages) != [stage for stage in STAGES if stage in stages]:
        return [f"config.stages = {stages!r}: each at most once, in the order {known}"]
    return []


def _check_evaluation(config: ConfigDict) -> list[str]:
    asked = config.evaluate
    tables = (
        (asked.only, EVALUATIONS, "only"),
        ((asked.preset,), PRESETS, "preset"),
        ((asked.feature_dtype,), DTYPES, "feature_dtype"),
        ((asked.probe_from,), PROBE_FROM, "probe_from"),
    )
    problems = [problem for names, table, key in tables for problem in unknown(f"config.evaluate.{key}", names, table)]
    return problems + unusable_robustness(asked.only, tuple(asked.robustness.split()))


_AT_LEAST_ONE = ("epochs", "top_k", "queue")
_NOT_NEGATIVE = ("base_lr", "encoder_base_lr", "head_base_lr", "weight_decay", "encoder_weight_decay")
_NOT_NEGATIVE += ("head_weight_decay", "warmup_epochs", "frozen_blocks")
_SHARES = ("warmup", "layer_decay", "target_factor", "ema_factor")


def _check_value(key: str, value, channels: int) -> list[str]:
    """Range checks that hold for a setting's name in every stage; None (derived later) passes."""
    name = key.rsplit(".", 1)[1]
    why = ""
    if value is None:
        return []
    if name in _AT_LEAST_ONE and value < 1:
        why = "must be at least 1"
    elif name == "batch" and value < 2:
        why = "must be at least 2"
    elif name in _NOT_NEGATIVE and value < 0:
        why = "must not be negative"
    elif name in _SHARES and not 0 <= value <= 1:
        why = "must lie between 0 and 1"
    elif name == "temperature" and value <= 0:
        why = "must be positive"
    elif name == "crop_scale" and not (len(value) == 2 and 0 < value[0] <= value[1] <= 1):
        why = "must be two shares of the area, 0 < smallest <= largest <= 1"
    elif name == "augmentation" and value not in AUGMENTATIONS:
        why = f"must be one of {', '.join(AUGMENTATIONS)}"
    elif name == "augmentation" and value == "strong" and channels != 3:
        why = f"changes colours and needs 3 channels, not {channels}; use 'minimal'"
    return [f"config.{key} = {value!r}: {why}"] if why else []


def check_devices(config: ConfigDict, devices: int) -> list[str]:
    """A sentence for each setting that this number of devices does not divide; to be called before any training."""
    problems = []
    if devices % config.mesh.fsdp:
        problems.append(f"config.mesh.fsdp = {config.mesh.fsdp}: must divide the {devices} devices")
    sizes = {f"{stage}.batch": config[stage].batch for stage in ("pretrain", "head", "tune", "evaluate")}
    sizes["pretrain.batch / accumulate"] = config.pretrain.batch // config.pretrain.accumulate
    for key, size in sizes.items():
        if size % devices:
            near = devices * max(1, round(size / devices))
            problems.append(f"config.{key} = {size}: the {devices} devices must divide it; for instance {near}")
    return problems
