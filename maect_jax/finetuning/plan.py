"""What a fine-tuning will do, settled before a device is touched: which pictures, how long, and the protocol of it."""

import hashlib
from dataclasses import asdict, dataclass, field

import numpy as np

from maect_jax.data.sources.base import Source
from maect_jax.errors import ConfigError, DataError
from maect_jax.evaluation.rows import HELD_OUT, hold_out
from maect_jax.finetuning.epochs import SELECTION_RULE
from maect_jax.finetuning.model import HEAD_STD, Classifier, classifier_of
from maect_jax.finetuning.recipes import Recipe, fitting_batch, recipe_for
from maect_jax.finetuning.step import MIXING_SWITCH, UNDECAYED, clock_of
from maect_jax.models.vit import ViT
from maect_jax.randomness import stage_seed
from maect_jax.training.schedule import peak_learning_rate
from maect_jax.training.steps import Clock

LEAST_ONE_IN = 4  # at most this share of few rows is held out


@dataclass(frozen=True)
class Plan:
    """A fine-tuning before it has weights.

    Attributes:
      recipe, batch, clock: its settings and lengths.
      model: encoder and head.
      kept, held_out: rows of the training set to train on and to choose the epoch on, int [n], ascending.
      protocol: every setting, as plain values.
    """

    recipe: Recipe
    batch: int
    clock: Clock
    model: Classifier
    kept: np.ndarray = field(repr=False)
    held_out: np.ndarray = field(repr=False)
    protocol: dict = field(repr=False)


def make_plan(
    encoder: ViT,
    train: Source,
    test: Source,
    rows: np.ndarray,
    recipe: Recipe,
    *,
    devices: int,
    seed: int,
    epochs: int | None = None,
    batch: int | None = None,
) -> Plan:
    """Settles everything that follows from the settings and the data; arguments and errors as in `run.fine_tune`."""
    kept, held_out = split_rows(train, np.asarray(rows), seed)
    if test.labels.min() < 0:
        raise DataError(
            f"data.test: '{test.name}' has pictures without label; fine-tuning is measured on labelled ones"
        )
    if epochs is not None:
        recipe = recipe.lasting(epochs)
    if batch is None:
        batch = fitting_batch(recipe.batch, len(kept), devices)
    problems = []
    if recipe.epochs < 1:
        problems.append(f"fine-tuning: {recipe.epochs} epochs; give at least 1")
    if not 1 <= batch <= len(kept):
        problems.append(f"fine-tuning: batch {batch}; give 1 to {len(kept)}, the number of pictures it trains on")
    if problems:
        raise ConfigError(problems)
    model = classifier_of(encoder, len(train.classes), recipe.pooling)
    clock = clock_of(recipe, batch, len(kept), stage_seed(seed, recipe.name))
    count = {"train_rows": len(kept), "held_out_rows": len(held_out), "test_rows": len(test), "classes": model.classes}
    protocol = _protocol(recipe, model.encoder, clock, batch) | count
    digest = hashlib.sha256(np.sort(rows).astype("<i8").tobytes()).hexdigest()
    return Plan(recipe, batch, clock, model, kept, held_out, protocol | {"seed": seed, "labelled_rows": digest})


def split_rows(source: Source, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The labelled rows as (kept, held out), each ascending: a tenth, of each class its share, is held out.

    Where a class has fewer than ten pictures on average, one of each class is held out instead, but no more than a
    quarter of all.

    Raises:
      DataError: fewer than four rows, or a row without label.
    """
    rows = np.sort(rows)
    labels = source.labels[rows]
    if rows.size and labels.min() < 0:
        raise DataError(
            f"data.train: {(labels < 0).sum()} of the pictures to fine-tune on have no label; leave them out"
        )
    one_in = int(np.clip(rows.size // len(source.classes), LEAST_ONE_IN, HELD_OUT))
    kept, held_out = hold_out(labels, seed, one_in)
    return rows[kept], rows[held_out]


def _protocol(recipe: Recipe, encoder: ViT, clock: Clock, batch: int) -> dict:
    settings = asdict(recipe)
    published = asdict(recipe_for(recipe.name, encoder.width, encoder.depth, encoder.patch))
    changed = {key: published[key] for key in settings if settings[key] != published[key]}
    if batch != published["batch"]:
        changed["batch"] = published["batch"]
    size = settings.pop("size")
    return settings | {
        "recipe_size": size,
        "instead_of_published": changed,
        "batch": batch,
        "updates": clock.updates,
        "warmup_updates": clock.warmup,
        "peak_lr": peak_learning_rate(recipe.base_lr, batch, 1),
        "optimiser": "AdamW; rate = base_lr * batch / 256",
        "undecayed": ["biases", "norms", "pos_embed", *UNDECAYED],
        "positions": "learned, from the fixed table of the picture size",
        "head_start": f"normal, deviation {HEAD_STD}; bias 0",
        "loss": "cross-entropy with soft targets",
        "mixing": f"each batch by mixup or CutMix, share of CutMix {MIXING_SWITCH}" if recipe.mixup else "none",
        "image_size": encoder.image_size,
        "compute": np.dtype(encoder.dtype).name,
        "selection": "heldout",
        "selection_rule": SELECTION_RULE,
        "reported_weights": "the chosen epoch's, trained on the kept rows only",
        "candidates": recipe.epochs,
    }
