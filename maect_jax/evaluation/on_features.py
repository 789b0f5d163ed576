"""Evaluations that only need cached features: neighbours, probes, low-shot, clusters."""

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from maect_jax.evaluation import knn, labelled, retrieval
from maect_jax.evaluation.clustering import cluster
from maect_jax.evaluation.kept_heads import keep_probe
from maect_jax.evaluation.presets import presets
from maect_jax.evaluation.probes import linear, linear_heads, linear_images, logistic, ridge
from maect_jax.evaluation.splits import SplitScores
from maect_jax.evaluation.task import SEED, Measurement, Task, data_hash

RETRIEVED = 10  # neighbours


def knn_accuracy(task: Task) -> Iterator[Measurement]:
    """Weighted nearest neighbours on the whole training set, all presets side by side."""
    chosen = [knn.PRESETS[name] for name in presets(task, "knn")]
    for feature in dict.fromkeys(task.feature(preset.feature) for preset in chosen):
        alike = [preset for preset in chosen if task.feature(preset.feature) == feature]
        bank, query = task.features([feature])
        vectors = bank.vectors(feature), bank.labels, query.vectors(feature)
        for preset, predicted in zip(alike, knn.classify_many(task.mesh, *vectors, alike, len(task.classes))):
            right = predicted == query.labels
            task.results.setdefault("predictions", (preset.name, predicted))
            yield Measurement("accuracy", right.mean(), asdict(preset) | {"feature": feature}, per_picture=right)


def layer_names(task: Task) -> tuple[str, ...]:
    """The model's own pooling at the output of every block."""
    return tuple(f"{task.weights.pooling}@{i + 1}" for i in range(task.depth))


def knn_of_layers(task: Task) -> Iterator[Measurement]:
    """k-NN at the output of every block, before any norm: where in the encoder do classes separate?"""
    preset, names = knn.PRESETS["maect-knn"], layer_names(task)
    bank, query = task.features(names, task.settings.limit)
    rows = {"feature": f"{task.weights.pooling}@block", "limit": task.settings.limit}
    rows |= {"train_rows": len(bank.labels), "test_rows": len(query.labels)}
    for block, name in enumerate(names, 1):
        task.check()
        vectors = bank.vectors(name), bank.labels, query.vectors(name)
        right = knn.classify(task.mesh, *vectors, preset, len(task.classes)) == query.labels
        protocol = asdict(preset) | {"name": f"{preset.name}, block {block}", "block": block} | rows
        yield Measurement("accuracy", right.mean(), protocol, per_picture=right)


def retrieve(task: Task) -> Iterator[Measurement]:
    """What the test pictures retrieve from the training set: precision, mean average precision, purity."""
    feature = task.weights.pooling
    bank, query = task.features([feature])
    k = min(RETRIEVED, len(bank.labels))
    rows = bank.vectors(feature), bank.labels, query.vectors(feature), query.labels
    protocol = {"name": "cosine retrieval", "feature": feature, "k": k}
    found = retrieval.retrieval(task.mesh, *rows, classes=len(task.classes), k=k)
    for metric, value_n in found.items():
        yield Measurement(metric, value_n.mean(), protocol, per_picture=value_n)


def linear_probe(task: Task) -> Iterator[Measurement]:
    """A grid of linear heads: the head and epoch chosen on held-out rows; and, under its own name, on the test rows."""
    settings = task.settings
    for name in presets(task, "linear"):
        preset = linear_heads.PRESETS[name].on(task.weights.pooling)
        train, test = task.features(preset.features)
        vectors = [{feature: rows.vectors(feature) for feature in preset.features} for rows in (train, test)]
        length = {"epochs": settings.probe_epochs, "batch": settings.probe_batch}
        common = length | {"preset": preset, "seed": SEED, "mesh": task.mesh, "check": task.check}
        if settings.probe_from == "images":
            found = linear_images.evaluate_linear_images(
                task.weights.encoder,
                task.params,
                task.train,
                *vectors,
                test.labels,
                len(task.classes),
                mean=task.weights.mean,
                std=task.weights.std,
                workers=settings.workers,
                **common,
            )
        else:
            found = linear.evaluate_linear(
                vectors[0], train.labels, vectors[1], test.labels, len(task.classes), **common
            )
        keep_probe(task, name, found)
        yield from _of_probe(task, name, found)


def _of_probe(task: Task, name: str, found) -> Iterator[Measurement]:
    def logits(source) -> np.ndarray:
        x_nd = task.features_of(source, [found.feature]).vectors(found.feature)
        return np.asarray(found.probe.logits(x_nd)[:, 0])

    task.results.setdefault("classifiers", {})[name] = logits
    protocol = found.protocol | {"name": name}
    chosen = {key: getattr(found, key) for key in ("feature", "base_rate", "epoch", "held_out_accuracy")}
    chosen |= {"last_epoch_accuracy": found.last_epoch_accuracy, "heads": found.table}
    yield Measurement("accuracy", found.accuracy, protocol, per_picture=found.correct, found=chosen)
    on_test = found.selected_on_test
    protocol = protocol | {"name": f"{name}, selected on test", "selection": "test"}
    chosen = {key: on_test[key] for key in ("feature", "base_rate", "epoch")}
    yield Measurement("accuracy", on_test["accuracy"], protocol, per_picture=on_test["correct"], found=chosen)


def logreg_feature(task: Task, name: str) -> str:
    """The preset's feature; of a model that stands for a picture by its patches their mean, not the CLS token."""
    feature = task.feature(logistic.PRESETS[name].feature)
    return feature.replace("cls", task.weights.pooling)


def logistic_regression(task: Task) -> Iterator[Measurement]:
    """L2 logistic regression on 1, 2 and 5 pictures a class; DINOv2's on all of them."""
    for name in presets(task, "logreg"):
        preset, feature = logistic.PRESETS[name], logreg_feature(task, name)
        train, test = task.features([feature])
        if name == "dinov2-logreg":
            chosen = {name: [labelled.Split("whole set", np.arange(len(train.labels)))]}
        else:
            chosen = {f"{name}, {n} per class": labelled.shots(task, n) for n in labelled.SHOTS}
        for title, found_splits in chosen.items():
            if not found_splits:
                continue
            found = logistic.low_shot(
                task.mesh,
                train.vectors(feature),
                train.labels,
                test.vectors(feature),
                test.labels,
                [split.rows for split in found_splits],
                preset,
                len(task.classes),
                seed=SEED,
                check=task.check,
            )
            labels = {"labels": [split.record for split in found_splits]}
            yield _of_splits(found, {"name": title, "preset": name, "feature": feature} | labels)


def ridge_few_shot(task: Task) -> Iterator[Measurement]:
    """Closed-form ridge regression on 5, 10 and 25 pictures a class: seconds, even on a CPU."""
    preset = ridge.PRESET
    feature = task.feature(preset.feature)
    if not labelled.enough(task, preset.name, min(preset.shots) + 1):
        return
    train, test = task.features([feature])
    rows = train.vectors(feature), train.labels, test.vectors(feature), test.labels
    scores = ridge.few_shot(task.mesh, *rows, len(task.classes), labelled.key(task), preset=preset, check=task.check)
    for shots, found in scores.items():
        yield _of_splits(found, {"name": f"{preset.name}, {shots} per class", "feature": feature})


def cluster_presets(task: Task) -> list[str]:
    """All classes of the test set, ImageNet's under its own name; and its fifteen dogs, where they are among them."""
    dogs = set(cluster.IMAGENET_DOGS_15) <= set(task.classes)
    every = "imagenet-val" if dogs and len(task.classes) == 1000 else "ours-cluster"
    return [every, "imagenet-dogs-15"] if dogs else [every]


def clusters(task: Task) -> Iterator[Measurement]:
    """k-means on the test pictures, as many clusters as classes: the run of lowest inertia, and how the runs vary."""
    for name in cluster_presets(task):
        preset = cluster.PRESETS[name]
        feature = task.feature(preset.feature)
        test = task.features_of(task.test, [feature])
        rows, part = np.arange(len(test.labels)), None
        if preset.class_names:
            rows = cluster.select_classes(test.labels, task.classes, preset.class_names)
            chosen = test.take(rows)
            part = {"name": f"{task.test.name}, {name}", "rows": len(rows), "hash": data_hash(chosen)}
        found = cluster.evaluate_cluster(
            task.mesh,
            test.vectors(feature)[rows],
            test.labels[rows],
            preset,
            len(task.classes),
            seed=SEED,
            check=task.check,
        )
        task.results.setdefault("clusters", (rows, found.assignment, found.cluster_class))
        protocol = found.protocol | {"name": name, "feature": feature}
        for metric, value in found.scores.items():
            runs = {"mean": found.mean[metric], "std": found.std[metric]} if metric in found.mean else {}
            yield Measurement(
                metric,
                value,
                protocol,
                unit="fraction" if metric in cluster.SCORES else "",
                per_picture=found.correct if metric == "acc" else None,
                found=runs | {"best_run": found.best},
                test=part,
            )


def _of_splits(found: SplitScores, protocol: dict) -> Measurement:
    several = len(found.accuracies) > 1
    return Measurement(
        "accuracy",
        found.accuracy,
        found.protocol | protocol,
        per_picture=found.correct,
        values=found.accuracies if several else None,
        std=found.std if several else None,
        found=found.found,
    )
