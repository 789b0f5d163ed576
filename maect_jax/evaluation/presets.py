"""Whose protocols an evaluation follows; where somebody has none of their own, MAE-CT's stand in."""

from maect_jax.evaluation.task import Task

PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "maect": {
        "knn": ("maect-knn", "maect-knn-std"),
        "linear": ("maect-linear",),
        "logreg": ("maect-logreg",),
        "finetune": ("finetune-1pct", "finetune-10pct", "mae-finetune"),
    },
    "mae": {"linear": ("mae-linear",), "finetune": ("mae-finetune",)},
    "dinov2": {
        "knn": ("dinov2-knn-10", "dinov2-knn-20", "dinov2-knn-100", "dinov2-knn-200"),
        "linear": ("dinov2-linear",),
        "logreg": ("dinov2-logreg",),
    },
    "mimrefiner": {
        "knn": ("mimrefiner-knn", "mimrefiner-knn-mean", "mimrefiner-hub-knn"),
        "linear": ("mimrefiner-linear",),
    },
    "lightly": {"knn": ("lightly-knn",)},
}


def presets(task: Task, evaluation: str) -> tuple[str, ...]:
    """Names of the presets of an evaluation that the settings ask for."""
    return PRESETS[task.settings.preset].get(evaluation, PRESETS["maect"].get(evaluation, ()))
