"""What a run evaluates and when: cheap k-NN while it trains, the suite and the pictures at its end."""

from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from maect_jax import assemble, foreign, weights
from maect_jax.context import Run
from maect_jax.data.batches.evaluation import EvaluationBatches
from maect_jax.data.sources.base import Source
from maect_jax.evaluation import figures, knn, suite
from maect_jax.evaluation.features import Features, extract, make_extractor
from maect_jax.evaluation.pictures import reconstruct, reconstruct_parts
from maect_jax.evaluation.task import Settings
from maect_jax.models.vit import join_blocks
from maect_jax.parallel.mesh import batch_sharding
from maect_jax.report.figures import neighbor_grid, reconstruction_grid
from maect_jax.trained import stages_of
from maect_jax.training.state import TrainState

RECONSTRUCTIONS, PICTURES_IN_PARTS, PARTS = 12, 6, 4  # that are kept for the report


def _batches(run: Run, source: Source, limit: int | None = None) -> EvaluationBatches:
    config = run.config
    return EvaluationBatches(
        source,
        batch=config.evaluate.batch,
        image_size=config.model.image_size,
        sharding=batch_sharding(run.mesh),
        resize_ratio=config.data.resize_ratio,
        limit=limit,
        workers=config.data.workers,
        bad=run.bad,
    )


def can_evaluate(run: Run) -> bool:
    """Whether there are labelled pictures to train on and to test on."""
    return run.test is not None and bool(run.train.classes) and bool(run.test.classes)


def make_monitor(run: Run, stage: str) -> Callable[[TrainState, int], dict] | None:
    """k-NN accuracy of the current encoder on a fixed part of the data; None where there is nothing to follow."""
    if not run.config.evaluate.every_epochs or stage == "head" or not can_evaluate(run):
        return None
    config, feature = run.config, run.config.model.pooling
    encoder = assemble.build_encoder(config)
    extractor = make_extractor(encoder, [feature], config.data.mean, config.data.std, run.mesh)
    limit = config.evaluate.online_limit
    bank_batches, query_batches = _batches(run, run.train, limit), _batches(run, run.test, limit)
    preset = knn.PRESETS["maect-knn"]

    def check() -> None:
        run.stop.raise_if_requested(f"while evaluating stage '{stage}'")

    def features(params: dict, batches: EvaluationBatches) -> Features:
        return extract(extractor, params, batches, encoder.depth, check)

    def monitor(state: TrainState, step: int) -> dict:
        params = state.params["encoder"]
        if stage == "tune":
            params = join_blocks(state.ema["encoder"], state.frozen["encoder"])
        elif run.leader:
            pictures = _reconstructions(run, state.params)
            run.logbook.picture("reconstruction", reconstruction_grid(**pictures), step)
        bank, query = features(params, bank_batches), features(params, query_batches)
        rows = bank.vectors(feature), bank.labels, query.vectors(feature), query.labels
        return {"knn": knn.accuracy(run.mesh, *rows, preset, len(run.train.classes))}

    return monitor


def _shown_pictures(run: Run, count: int) -> np.ndarray:
    """The same few pictures each time, uint8 [count, size, size, c]: of the test set, where there is one."""
    batch = next(iter(_batches(run, run.test or run.train, count)))
    return np.asarray(jax.device_get(batch["image"]))[np.asarray(batch["valid"])][:count]


def _reconstructions(run: Run, params: dict) -> dict[str, np.ndarray]:
    config = run.config
    return reconstruct(
        assemble.build_autoencoder(config),
        params,
        _shown_pictures(run, RECONSTRUCTIONS),
        mask_ratio=config.pretrain.mask_ratio,
        normalised_pixels=config.pretrain.normalise_pixels,
        mean=config.data.mean,
        std=config.data.std,
        seed=config.seed,
    )


def save_reconstructions(run: Run, params: dict, step: int) -> None:
    """Writes `figures/reconstruction.npz` for the report, and the same picture to TensorBoard."""
    pictures = _reconstructions(run, params)
    figures.save(run.workdir / "figures" / "reconstruction.npz", pictures)
    run.logbook.picture("reconstruction", reconstruction_grid(**pictures), step)


def save_parts(run: Run, params: dict, when: str) -> None:
    """Writes `figures/parts_<when>.npz` for the report: what EMAE's parts make of the same pictures, with the weights
    'before' training and 'after' it. Nothing with other methods.
    """
    config = run.config
    if config.pretrain.method != "emae":
        return
    found = reconstruct_parts(
        assemble.build_autoencoder(config),
        params,
        _shown_pictures(run, PICTURES_IN_PARTS),
        parts=config.pretrain.emae.parts,
        normalised_pixels=config.pretrain.normalise_pixels,
        mean=config.data.mean,
        std=config.data.std,
        seed=config.seed,
    )
    found |= {name: found[name][:, :PARTS] for name in ("seen", "completed")}
    found["parts"] = np.asarray(config.pretrain.emae.parts)
    figures.save(run.workdir / "figures" / f"parts_{when}.npz", found)


def settings_of(run: Run) -> Settings:
    """How the run's settings ask to evaluate."""
    config = run.config
    asked = config.evaluate
    return Settings(
        only=tuple(asked.only),
        preset=asked.preset,
        batch=asked.batch,
        workers=config.data.workers,
        limit=asked.online_limit,
        feature_dtype=asked.feature_dtype,
        probe_epochs=asked.probe_epochs,
        probe_batch=asked.probe_batch,
        probe_from=asked.probe_from,
        finetune_epochs=asked.finetune_epochs,
        finetune_batch=asked.finetune_batch,
        finetune_base_lr=asked.finetune_base_lr,
        finetune_ema=asked.finetune_ema,
        lists=asked.lists,
        robustness=tuple(name.strip() for name in asked.robustness.split(",") if name.strip()),
    )


def starts_from_file(config: ConfigDict, workdir: epath.Path) -> bool:
    """Whether a weights file stands for the pre-training that the tuned encoder is compared with."""
    return foreign.is_weights_file(config.init_from) and not (workdir / "pretrain" / "DONE.json").exists()


def evaluate_run(run: Run) -> None:
    """Runs the suite on every complete stage; without labelled test pictures, only pictures of neighbours are made."""
    run.logbook.start_stage("evaluate", 0)
    source = str(run.workdir)
    found = [
        weights.of_trained(run.config, trained, run.mesh, source) for trained in stages_of(run.config, run.workdir)
    ]
    subjects = [subject for stage in found for subject in stage]
    if starts_from_file(run.config, run.workdir):
        subjects.insert(0, weights.of_initial(run.config))
    train, test, settings = run.train, run.test, settings_of(run)
    place = suite.Place(run.mesh, run.workdir, run.stop, run.say, run.leader, run.bad)
    if not can_evaluate(run):
        run.say("evaluate: pictures of neighbours only; numbers need labelled training and test pictures")
        suite.picture_neighbors(subjects, train, settings, place)
    else:
        suite.evaluate(subjects, train, test, settings, place)
    if run.leader:
        for path in (run.workdir / "figures").glob("neighbors_*.npz"):
            with np.load(path, allow_pickle=False) as arrays:
                names = ("query", "neighbor", "query_label", "neighbor_label")
                run.logbook.picture(path.stem.replace("_", "/", 1), neighbor_grid(*(arrays[n] for n in names)), 0)
