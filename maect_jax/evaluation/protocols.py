"""Which evaluations there are, whose presets they follow, and which features they will ask for.

An evaluation is a generator (task) -> measurements. It takes features by name from the task and leaves what later ones
use in `task.results`. Settings live in the preset tables of the modules that do the work.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator

from maect_jax.evaluation import knn, on_features, on_pictures
from maect_jax.evaluation.presets import presets
from maect_jax.evaluation.probes import linear_heads
from maect_jax.evaluation.task import Measurement, Task

Evaluation = Callable[[Task], Iterator[Measurement]]

EVALUATIONS: dict[str, Evaluation] = {
    "knn": on_features.knn_accuracy,
    "knn_layers": on_features.knn_of_layers,
    "retrieval": on_features.retrieve,
    "linear": on_features.linear_probe,
    "logreg": on_features.logistic_regression,
    "ridge": on_features.ridge_few_shot,
    "cluster": on_features.clusters,
    "finetune": on_pictures.finetune,
    "health": on_pictures.health_figures,
    "colour": on_pictures.colour_probe,
    "robustness": on_pictures.robustness,
    "pictures": on_pictures.pictures,
}


def unknown(option: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """A sentence for each name that is not known."""
    problems = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(f"{option}: no '{name}'; there is {', '.join(known)}{hint}")
    return problems


def unusable_robustness(only: tuple[str, ...], sets: tuple[str, ...]) -> list[str]:
    """A sentence when 'robustness' has no test sets, or nothing before it whose classifier it could apply."""
    if "robustness" not in only:
        return []
    before = only[: only.index("robustness")]
    problems = [] if sets else ["--only robustness: needs --robustness=DATA,…, the sets to test on"]
    if not {"linear", "finetune"} & set(before):
        problems.append("--only robustness: needs 'linear' or 'finetune' before it, whose classifiers it applies")
    return problems


def needs(evaluation: str, task: Task) -> tuple[str, ...]:
    """Features of the whole sets that an evaluation will ask for, so that one pass extracts those of all."""
    names = presets(task, evaluation)
    if evaluation == "knn":
        return tuple(task.feature(knn.PRESETS[name].feature) for name in names)
    if evaluation == "linear":
        return tuple(task.feature(feature) for name in names for feature in linear_heads.PRESETS[name].features)
    if evaluation == "logreg":
        return tuple(on_features.logreg_feature(task, name) for name in names)
    if evaluation == "knn_layers":
        whole = max(len(task.train), len(task.test)) <= task.settings.limit
        return on_features.layer_names(task) if whole else ()
    return () if evaluation == "finetune" else (task.weights.pooling,)
