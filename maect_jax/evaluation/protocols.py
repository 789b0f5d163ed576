"""Which evaluations there are, whose presets they follow, which features they need, and what they measure.

An evaluation is a generator (task) -> measurements. It takes features by name from the task and leaves what later ones
use in `task.results`. Settings live in the preset tables of the modules that do the work.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

import jax
import jax.numpy as jnp

from maect_jax.evaluation import figures, health, knn, views
from maect_jax.evaluation.task import Measurement, Task

Evaluation = Callable[[Task], Iterator[Measurement]]

# Whose protocols an evaluation follows; where a preset has none of its own, 'maect' stands in.
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
    "mimrefiner": {"knn": ("mimrefiner-knn", "mimrefiner-hub-knn"), "linear": ("mimrefiner-linear",)},
    "lightly": {"knn": ("lightly-knn",)},
}


def presets(task: Task, evaluation: str) -> tuple[str, ...]:
    """Names of the presets of an evaluation that the settings ask for."""
    return PRESETS[task.settings.preset].get(evaluation, PRESETS["maect"].get(evaluation, ()))


def unknown(option: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """A sentence for each name that is not known."""
    problems = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(f"{option}: no '{name}'; there is {', '.join(known)}{hint}")
    return problems


def needs(evaluation: str, task: Task) -> tuple[str, ...]:
    """Features of the whole sets that an evaluation will ask for, so that one pass extracts those of all."""
    if evaluation in ("knn", "linear", "logreg"):
        table = {"knn": knn.PRESETS}[evaluation]
        return tuple(task.feature(table[name].feature) for name in presets(task, evaluation))
    return (task.weights.pooling,) if evaluation not in ("knn_layers", "colour", "finetune") else ()


def _knn(task: Task) -> Iterator[Measurement]:
    """Weighted nearest neighbours on the whole training set, all presets side by side."""
    chosen = [knn.PRESETS[name] for name in presets(task, "knn")]
    for preset in chosen:
        feature = task.feature(preset.feature)
        bank, query = task.features([feature])
        vectors = bank.vectors(feature), bank.labels, query.vectors(feature)
        predicted = knn.classify(task.mesh, *vectors, preset, len(task.classes))
        right = predicted == query.labels
        task.results.setdefault("predictions", (preset.name, predicted))
        yield Measurement("accuracy", right.mean(), asdict(preset) | {"feature": feature}, per_picture=right)


def _knn_layers(task: Task) -> Iterator[Measurement]:
    """k-NN at the output of every block, before any norm: where in the encoder do classes separate?"""
    preset, names = knn.PRESETS["maect-knn"], [f"{task.weights.pooling}@{i + 1}" for i in range(task.depth)]
    bank, query = task.features(names, task.settings.limit)
    rows = {"limit": task.settings.limit, "train_rows": len(bank.labels), "test_rows": len(query.labels)}
    for block, name in enumerate(names, 1):
        task.check()
        vectors = bank.vectors(name), bank.labels, query.vectors(name)
        right = knn.classify(task.mesh, *vectors, preset, len(task.classes)) == query.labels
        protocol = asdict(preset) | {"name": f"{preset.name}, block {block}", "feature": name, "block": block} | rows
        yield Measurement("accuracy", right.mean(), protocol, per_picture=right)


def _health(task: Task) -> Iterator[Measurement]:
    """Is the space used, and do views of one picture meet? Of test pictures, without labels."""
    feature, limit = task.weights.pooling, min(task.settings.limit, 4096)
    _, query = task.features([feature])
    x = jnp.asarray(query.vectors(feature)[:limit])
    protocol = {"name": "health", "feature": feature, "rows": len(x)}
    for metric in ("effective_rank", "embedding_std", "uniformity"):
        yield Measurement(metric, float(jax.jit(getattr(health, metric))(x)), protocol, unit="")
    for augmentation in ("minimal", "strong") if task.test.channels == 3 else ("minimal",):
        seen = views.look(task, task.test, feature, augmentation, limit)
        protocol = {
            "name": f"two views, {augmentation}",
            "feature": feature,
            "rows": len(seen.first),
            "augmentation": augmentation,
            "crop_scale": list(views.CROP_SCALE),
        }
        for metric, value in views.invariance(seen.first, seen.second).items():
            yield Measurement(metric, float(value), protocol, unit="")


def _colour(task: Task) -> Iterator[Measurement]:
    """What invariance removed: how well a linear map reads a picture's colours from its feature."""
    feature, limit = task.weights.pooling, task.settings.limit
    train, test = (views.look(task, source, feature, "minimal", limit) for source in (task.train, task.test))
    clean = [task.features_of(source, [feature], limit).vectors(feature) for source in (task.train, task.test)]
    found = views.probe_colours(clean[0], train.histogram, clean[1], test.histogram, task.check)
    protocol = {"name": "colour-histogram", "feature": feature, "limit": limit} | found.protocol
    extra = {"baseline": found.baseline, "explained": 1 - float(found.error.mean()) / found.baseline}
    yield Measurement("histogram_error", found.error.mean(), protocol, "", found.error, found=extra)


def _pictures(task: Task) -> Iterator[Measurement]:
    """Figures for the report; no number."""
    if task.leader:
        bank, query = task.features([task.weights.pooling])
        figures.save_neighbors(task, bank, query)
        figures.save_scatter(task, query)
        figures.save_attention(task, query)
    yield from ()


EVALUATIONS: dict[str, Evaluation] = {
    "knn": _knn,
    "knn_layers": _knn_layers,
    "health": _health,
    "colour": _colour,
    "pictures": _pictures,
}
