"""Fine-tuning of an encoder with some of the labels, from its start or from where it was interrupted to its numbers.

It trains with the loop of pre-training: checkpoints, stop requests and bad batches are handled as there. Every epoch
ends with the accuracy on held-out training pictures, which chooses the epoch, and on the test pictures.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from maect_jax.data.batches.evaluation import EvaluationBatches
from maect_jax.data.batches.training import training_batches
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.subset import SubsetSource
from maect_jax.errors import CheckpointError
from maect_jax.evaluation.rows import round_up
from maect_jax.exchange.provenance import Provenance, pretraining_method, trained, without_place
from maect_jax.finetuning.epochs import Epochs, Monitor, make_scorer
from maect_jax.finetuning.model import Classifier, start_params
from maect_jax.finetuning.plan import make_plan
from maect_jax.finetuning.recipes import Recipe
from maect_jax.finetuning.step import first_state, make_finetune_step
from maect_jax.models.vit import ViT
from maect_jax.parallel.mesh import batch_sharding, replicated, state_sharding
from maect_jax.randomness import purpose_key
from maect_jax.results.record import weights_hash
from maect_jax.training.checkpoint import Checkpoints, absolute, read_arrays
from maect_jax.training.logbook import Logbook
from maect_jax.training.loop import Stage, train
from maect_jax.training.progress import StageProgress
from maect_jax.training.state import TrainState
from maect_jax.training.steps import Clock
from maect_jax.training.stop import StopRequest


@dataclass(frozen=True)
class FineTuned:
    """What a fine-tuning gave; accuracies are shares in [0, 1], epochs count from 1.

    Attributes:
      accuracy: on the test pictures, of the epoch chosen on the held-out ones. The number to report.
      correct: which test pictures it gets right, bool [test], in the order of the test source.
      epoch, held_out_accuracy: of the choice; the latter is above the truth, as it was chosen for being high.
      last_epoch_accuracy: on the test pictures.
      selected_on_test: {'accuracy', 'correct', 'epoch'} of the epoch chosen on the test pictures, as published; too
        high.
      table: a dict an epoch; see `epochs.Epochs`.
      protocol: every setting.
      model, params: the classifier and its weights of the chosen epoch, float32, a copy on each device.
      weights: folder of the checkpoint that holds these.
      seconds: of training and measuring, interruptions left out.
    """

    accuracy: float
    correct: np.ndarray = field(repr=False)
    epoch: int
    held_out_accuracy: float
    last_epoch_accuracy: float
    selected_on_test: dict = field(repr=False)
    table: list[dict] = field(repr=False)
    protocol: dict = field(repr=False)
    model: Classifier = field(repr=False)
    params: dict = field(repr=False)
    weights: epath.Path
    seconds: float


def fine_tune(
    encoder_params: dict,
    encoder: ViT,
    train_source: Source,
    test_source: Source,
    rows: np.ndarray,
    recipe: Recipe,
    *,
    mesh: Mesh,
    folder: str | epath.Path,
    seed: int,
    stop: StopRequest,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    resize_ratio: float,
    provenance: Provenance,
    epochs: int | None = None,
    batch: int | None = None,
    name: str = "",
    logbook: Logbook | None = None,
    say: Callable[[str], None] = print,
    workers: int = 0,
    resident_limit: int = 2 << 30,
    evaluation_batch: int = 256,
    save_every: int = 1000,
    log_every: int = 50,
) -> FineTuned:
    """Fine-tunes, continues, or reads what `folder` holds; an interruption changes no number.

    Args:
      encoder_params: pre-trained encoder with fixed positions.
      encoder: its shape, the type of the computation, and the side of the pictures, which may be another than that of
        pre-training.
      train_source, test_source: pictures with labels, of the same classes.
      rows: training pictures whose labels may be used, int [labelled]; some are held out, see `plan.split_rows`.
      recipe: from `recipe_for`; what is changed in it is named in the protocol.
      mesh: devices; parameters are split over its axis 'fsdp'.
      folder: of this fine-tuning alone.
      seed: of order, augmentation, head and held-out rows.
      stop: asked after every update and before every measured batch.
      mean, std, resize_ratio: of the pictures; see `data.device.augment.normalise` and `data.batches.evaluation`.
      provenance: of the encoder; that of the fine-tuning is kept in its checkpoints.
      epochs: instead of the recipe's, the warm-up in proportion.
      batch: instead of the recipe's, which is cut for few rows; see `recipes.fitting_batch`.
      name: in the log; the recipe's by default.
      logbook: where metrics go; None = nowhere.
      say: prints a line.
      workers, resident_limit: of the loader; see `data.batches.training`.
      evaluation_batch: measured pictures at a time.
      save_every, log_every: in updates.

    Raises:
      ConfigError: no epoch, or a batch that does not fit the rows or the devices.
      DataError: too few rows, pictures without label, or one that can not be decoded.
      CheckpointError: `folder` holds another fine-tuning, or the encoder is of another architecture.
      Preempted, NumericsError: see `training.loop.train`.
    """
    name, folder = name or recipe.name, absolute(folder)
    sources = train_source, test_source
    plan = make_plan(encoder, *sources, rows, recipe, devices=mesh.size, seed=seed, epochs=epochs, batch=batch)
    protocol = plan.protocol | {"resize_ratio": resize_ratio, "mean": list(mean), "std": list(std)}
    identity = {"weights": weights_hash(encoder_params), "data": [source.digest() for source in sources]}
    settings = json.loads(json.dumps(protocol | identity))
    clock = plan.clock

    def start(encoder_params: dict) -> TrainState:
        values, key = encoder.patch**2 * train_source.channels, purpose_key(clock.seed, "initialisation")
        return first_state(start_params(plan.model, encoder_params, values, key), plan.recipe)

    def batches_of(source: Source):
        return EvaluationBatches(
            source,
            batch=round_up(min(evaluation_batch, max(len(test_source), len(plan.held_out))), mesh.size),
            image_size=encoder.image_size,
            sharding=batch_sharding(mesh),
            resize_ratio=resize_ratio,
            workers=workers,
        )

    shapes = jax.eval_shape(start, encoder_params)
    shardings = state_sharding(mesh, shapes)
    checkpoints, chosen = Checkpoints(folder / "checkpoints"), Checkpoints(folder / "chosen")
    try:
        if found := checkpoints.restore(shapes, shardings):
            state, meta = found
            _check_same(meta["settings"], settings, folder)
        else:
            state = jax.jit(start, out_shardings=shardings)(jax.device_put(encoder_params, replicated(mesh)))
            meta = {"stage": name, "settings": settings, "epochs": None, "seconds": 0.0}
        kept = {"stage": name, "recipe": protocol | {"name": name}, "trained_on": without_place(train_source.name)}
        meta["provenance"] = finetuned_from(provenance, identity["weights"], **kept).as_dict()
        meta["classes"] = list(train_source.classes)
        step = int(state.step)
        monitor = Monitor(
            scorer=make_scorer(plan.model, mean, std, mesh),
            held_out=batches_of(SubsetSource(train_source, plan.held_out)),
            test=batches_of(test_source),
            chosen=chosen,
            meta=meta,
            check=lambda: stop.raise_if_requested(f"while measuring '{name}'"),
        )
        if len(monitor.epochs.table) < step // clock.updates_per_epoch:
            monitor(state, step)  # it was stopped between an epoch's last update and its measurement
        if step < clock.updates:
            if step:
                say(f"{name}: continues after update {step} of {clock.updates}")
            update = make_finetune_step(plan.model, plan.recipe, batch=plan.batch, clock=clock, mean=mean, std=std)
            outputs = (shardings, replicated(mesh), batch_sharding(mesh))
            stage = Stage(
                name=name,
                folder=folder,
                step=jax.jit(update, donate_argnums=0, out_shardings=outputs),
                batches=training_batches(
                    SubsetSource(train_source, plan.kept),
                    batch=plan.batch,
                    seed=clock.seed,
                    start_step=step,
                    views=1,
                    image_size=encoder.image_size,
                    crop_scale=plan.recipe.crop_scale,
                    sharding=batch_sharding(mesh),
                    workers=workers,
                    resident_limit=resident_limit,
                ),
                updates=clock.updates,
                updates_per_epoch=clock.updates_per_epoch,
                batch=plan.batch,
                log_every=log_every,
                save_every=save_every,
                monitor_every=clock.updates_per_epoch,
                monitor=monitor,
                health=lambda vector_bd: {},
                hidden=(),
                seconds=meta["seconds"],
                meta=meta,
            )
            meta["seconds"] = _train(stage, state, checkpoints, logbook or Logbook(folder, write=False), stop)
    finally:
        checkpoints.close()
        chosen.close()
    return _result(plan.model, protocol, monitor.epochs, len(test_source), folder, clock, mesh, meta["seconds"])


def finetuned_from(
    before: Provenance, sha256: str, *, stage: str, recipe: dict[str, Any], trained_on: str
) -> Provenance:
    """Provenance of a fine-tuning.

    Args:
      before: of the encoder. One that this package has trained becomes a step of its own; for others their file is one.
      sha256: `results.record.weights_hash` of the encoder's parameters.
      stage, recipe: name and protocol of the fine-tuning.
      trained_on: name of the training pictures.
    """
    encoder = {"name": before.recipe.get("name", before.stage), "stage": before.stage, "step": before.step}
    encoder |= {"sha256": sha256, "license": before.license}
    encoder |= {"method": method} if (method := pretraining_method(before)) else {}
    factor = recipe.get("ema_factor")
    average = f"exponential, {factor}" if isinstance(factor, float) else "none"
    about = {"stage": stage, "recipe": recipe, "trained_on": trained_on, "average": average}
    return trained(before, encoder if before.code_version else None, **about)


def _train(stage: Stage, state: TrainState, checkpoints: Checkpoints, logbook: Logbook, stop: StopRequest) -> float:
    """Runs the stage from the state's step to its end; returns its seconds, interruptions left out."""
    logbook.start_stage(stage.name, int(state.step))
    progress = StageProgress(stage.name, stage.updates, stage.updates_per_epoch, 0.0, jax.process_index() == 0)
    try:
        return train(stage, state, checkpoints, logbook, progress, stop)[1]
    finally:
        stage.batches.close()


def _check_same(saved: dict, settings: dict, folder: epath.Path) -> None:
    """Raises CheckpointError when a folder's fine-tuning is not the one that is asked for."""
    differ = sorted(key for key in saved.keys() | settings.keys() if saved.get(key) != settings.get(key))
    if differ:
        raise CheckpointError(
            f"{folder}: holds a fine-tuning with another {', '.join(differ)}; give another folder, or remove this one"
        )


def _result(
    model: Classifier,
    protocol: dict,
    epochs: Epochs,
    pictures: int,
    folder: epath.Path,
    clock: Clock,
    mesh: Mesh,
    seconds: float,
) -> FineTuned:
    chosen, on_test = epochs.best("held_out"), epochs.best("test")
    weights = folder / "chosen" / str(chosen["epoch"] * clock.updates_per_epoch)
    mend = f"remove {folder} to fine-tune again"
    return FineTuned(
        accuracy=chosen["test"],
        correct=epochs.correct("held_out", pictures),
        epoch=chosen["epoch"],
        held_out_accuracy=chosen["held_out"],
        last_epoch_accuracy=epochs.table[-1]["test"],
        selected_on_test={
            "accuracy": on_test["test"],
            "correct": epochs.correct("test", pictures),
            "epoch": on_test["epoch"],
        },
        table=epochs.table,
        protocol=protocol,
        model=model,
        params=read_arrays(weights, ("params",), replicated(mesh), mend)["params"],
        weights=weights,
        seconds=seconds,
    )
