"""Evaluations that must see pictures: fine-tuning, augmented views, colours, other test sets, figures of the report."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.data.device.augment import normalise
from maect_jax.evaluation import figures, health, labelled, views
from maect_jax.evaluation import robustness as other_sets
from maect_jax.evaluation.kept_heads import keep_finetuning
from maect_jax.evaluation.presets import presets
from maect_jax.evaluation.retrieval import confusion_matrix
from maect_jax.evaluation.task import SEED, Measurement, Task, data_hash
from maect_jax.finetuning.recipes import recipe_for
from maect_jax.finetuning.run import FineTuned, fine_tune
from maect_jax.models.patches import patchify
from maect_jax.parallel.mesh import replicated

FEWEST = 8  # labelled pictures to fine-tune with, some of which are held out
VIEWED = 4096  # pictures whose views are compared: uniformity holds a matrix of that side


def health_figures(task: Task) -> Iterator[Measurement]:
    """Is the space used, and do views of one picture meet? Of test pictures, without labels."""
    feature, limit = task.weights.pooling, min(task.settings.limit, VIEWED)
    query = task.features_of(task.test, [feature])
    x = jnp.asarray(query.vectors(feature)[np.sort(np.random.default_rng(0).permutation(len(query.ids))[:limit])])
    protocol = {"name": "health", "feature": feature, "rows": len(x)}
    for metric in ("effective_rank", "embedding_std", "uniformity"):
        yield Measurement(metric, float(jax.jit(getattr(health, metric))(x)), protocol, unit="")
    for augmentation in ("minimal", "strong") if task.test.channels == 3 else ("minimal",):
        pairs = views.two_views(task, task.test, feature, augmentation, limit)
        protocol = {
            "name": f"two views, {augmentation}",
            "feature": feature,
            "rows": len(pairs[0]),
            "augmentation": augmentation,
            "crop_scale": list(views.CROP_SCALE),
        }
        for metric, value in views.invariance(*pairs).items():
            yield Measurement(metric, float(value), protocol, unit="")


def colour_probe(task: Task) -> Iterator[Measurement]:
    """What invariance removed: how well a linear map reads a picture's colours from its feature."""
    feature, limit = task.weights.pooling, task.settings.limit
    histograms = [views.histograms(task, source, limit) for source in (task.train, task.test)]
    vectors = [task.features_of(source, [feature], limit).vectors(feature) for source in (task.train, task.test)]
    found = views.probe_colours(vectors[0], histograms[0], vectors[1], histograms[1], task.check)
    protocol = {"name": "colour-histogram", "feature": feature, "limit": limit} | found.protocol
    extra = {"baseline": found.baseline, "explained": 1 - float(found.error.mean()) / found.baseline}
    yield Measurement("histogram_error", found.error.mean(), protocol, "", found.error, found=extra)


def finetune(task: Task) -> Iterator[Measurement]:
    """Trains the whole encoder with a part of the labels; kept in `finetune/`, so that an interrupted one goes on."""
    weights, settings = task.weights, task.settings
    for name in presets(task, "finetune"):
        encoder = weights.encoder
        recipe = recipe_for(name, encoder.width, encoder.depth, encoder.patch)
        instead = {"base_lr": settings.finetune_base_lr, "ema_factor": settings.finetune_ema}
        recipe = replace(recipe, **{key: value for key, value in instead.items() if value is not None})
        split = labelled.share(task, f"{100 * recipe.share:g}pct")
        if split is None or len(split.rows) < FEWEST:
            why = f"{len(split.rows)} labels" if split else f"'{task.train.name}' is another share"
            task.say(f"evaluate {weights.stage:9} {name} is left out: {why}")
            continue
        asked = [recipe, settings.finetune_epochs, settings.finetune_batch, split.record, task.sha256, task.shape()]
        asked += [source.fingerprint() for source in (task.train, task.test)]
        found = fine_tune(
            task.params,
            encoder,
            task.train,
            task.test,
            split.rows,
            recipe,
            mesh=task.mesh,
            folder=task.folder / "finetune" / f"{name}_{hashlib.sha256(repr(asked).encode()).hexdigest()[:12]}",
            seed=SEED,
            stop=task.stop,
            mean=weights.mean,
            std=weights.std,
            resize_ratio=weights.resize_ratio,
            provenance=weights.provenance,
            epochs=settings.finetune_epochs,
            batch=settings.finetune_batch,
            say=task.say,
            workers=settings.workers,
            evaluation_batch=settings.batch,
        )
        keep_finetuning(task, name, found)
        yield from _of_finetuning(task, name, split, found)


def _of_finetuning(task: Task, name: str, split: labelled.Split, found: FineTuned) -> Iterator[Measurement]:
    mean, std, patch = task.weights.mean, task.weights.std, task.weights.encoder.patch

    @partial(jax.jit, out_shardings=replicated(task.mesh))
    def classify(params, images_bhwc):
        images_bhwc = normalise(images_bhwc.astype(jnp.float32), mean, std)
        return found.model.apply({"params": params}, patchify(images_bhwc, patch))[0]

    def logits(source) -> np.ndarray:
        rows = [(classify(found.params, batch["image"]), batch["valid"]) for batch in task.batches(source)]
        return np.concatenate([np.asarray(logits)[np.asarray(valid)] for logits, valid in rows])

    task.results.setdefault("classifiers", {})[name] = logits
    protocol = found.protocol | {"name": name, "labels": split.record}
    chosen = {"epoch": found.epoch, "held_out_accuracy": found.held_out_accuracy, "epochs": found.table}
    chosen |= {"last_epoch_accuracy": found.last_epoch_accuracy, "weights": str(found.weights)}
    yield Measurement("accuracy", found.accuracy, protocol, per_picture=found.correct, found=chosen)
    on_test = found.selected_on_test
    protocol = protocol | {"name": f"{name}, selected on test", "selection": "test"}
    chosen = {"epoch": on_test["epoch"]}
    yield Measurement("accuracy", on_test["accuracy"], protocol, per_picture=on_test["correct"], found=chosen)


def robustness(task: Task) -> Iterator[Measurement]:
    """The classifiers of earlier evaluations, unchanged, on other test sets of the same classes."""
    for source in task.others:
        found = task.features_of(source, [task.weights.pooling])
        target = other_sets.match(task.classes, source, found.labels)
        data = {"name": source.name, "rows": int(target.rows_n.sum()), "hash": data_hash(found)}
        for classifier, logits in task.results.get("classifiers", {}).items():
            task.check()
            right = other_sets.correct(logits(source), target)
            protocol = {
                "name": f"{classifier} on {source.name}",
                "classifier": classifier,
                "predicted_classes": int(target.present_c.sum()),
                "several_labels": source.label_sets() is not None,
            }
            yield Measurement("accuracy", right.mean(), protocol, per_picture=right, test=data)


def pictures(task: Task) -> Iterator[Measurement]:
    """Figures for the report; no number."""
    if task.leader:
        bank, query = task.features([task.weights.pooling])
        figures.save_neighbors(task, bank, query)
        figures.save_scatter(task, query)
        figures.save_attention(task, query)
        if "clusters" in task.results:
            rows, assignment_n, cluster_class = task.results["clusters"]
            figures.save_clusters(task, query.take(rows), assignment_n, cluster_class)
        if "predictions" in task.results:
            name, predicted = task.results["predictions"]
            matrix_cc = confusion_matrix(query.labels, predicted, len(task.classes))
            figures.save_confusion(task, matrix_cc, f"k-NN, {name}")
    yield from ()
