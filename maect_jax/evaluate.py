"""What a run evaluates and when: cheap k-NN while it trains, every protocol and the pictures at its end."""

from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from maect_jax import assemble
from maect_jax.context import Run
from maect_jax.data.decode import central_crop
from maect_jax.data.pipeline import EvaluationBatches, evaluation_batches
from maect_jax.data.sources import Source
from maect_jax.evaluation import knn, linear
from maect_jax.evaluation.features import Features, extract, make_extractor
from maect_jax.evaluation.pictures import choose_queries, reconstruct
from maect_jax.evaluation.records import Result, weights_hash, write_results
from maect_jax.models.vit import join_blocks
from maect_jax.parallel.mesh import batch_sharding
from maect_jax.report.figures import neighbor_grid, reconstruction_grid
from maect_jax.training.state import TrainState

EVALUATED = ("pretrain", "control", "tune")
RECONSTRUCTIONS, QUERIES, SHOWN = 12, 12, 6


def _batches(run: Run, source: Source, limit: int | None = None) -> EvaluationBatches:
    config = run.config
    return evaluation_batches(
        source,
        batch=config.evaluate.batch,
        image_size=config.model.image_size,
        sharding=batch_sharding(run.mesh),
        resize_ratio=config.data.resize_ratio,
        limit=limit,
        workers=config.data.workers,
    )


def _extractor(run: Run):
    config = run.config
    encoder = assemble.build_encoder(config)
    return make_extractor(encoder, config.model.pooling, config.data.mean, config.data.std, run.mesh)


def can_evaluate(run: Run) -> bool:
    """Whether there are labelled pictures to train on and to test on."""
    return run.test is not None and bool(run.train.classes) and bool(run.test.classes)


def make_monitor(run: Run, stage: str) -> Callable[[TrainState, int], dict] | None:
    """k-NN accuracy of the current encoder on a fixed part of the data; None where there is nothing to follow."""
    if not run.config.evaluate.every_epochs or stage == "head" or not can_evaluate(run):
        return None
    extractor, limit = _extractor(run), run.config.evaluate.online_limit
    bank_batches, query_batches = _batches(run, run.train, limit), _batches(run, run.test, limit)
    preset = knn.PRESETS["maect-knn"]

    def check() -> None:
        run.stop.raise_if_requested(f"while evaluating stage '{stage}'")

    def monitor(state: TrainState, step: int) -> dict:
        encoder = state.params["encoder"]
        if stage == "tune":
            encoder = join_blocks(state.ema["encoder"], state.frozen["encoder"])
        elif run.leader:
            pictures = _reconstructions(run, state.params)
            run.logbook.picture("reconstruction", reconstruction_grid(**pictures), step)
        bank, query = (extract(extractor, encoder, batches) for batches in (bank_batches, query_batches))
        return {"knn": _knn(run, bank, query, preset)}

    return monitor


def _knn(run: Run, bank: Features, query: Features, preset: knn.KnnPreset) -> float:
    args = (bank.vectors, bank.labels, query.vectors, query.labels)
    return knn.accuracy(run.mesh, *args, preset, len(run.train.classes))


def _reconstructions(run: Run, params: dict) -> dict[str, np.ndarray]:
    config = run.config
    source = run.test or run.train
    batch = next(iter(_batches(run, source, RECONSTRUCTIONS)))
    images = np.asarray(jax.device_get(batch["image"]))[np.asarray(batch["valid"])]
    return reconstruct(
        assemble.build_autoencoder(config),
        params,
        images[:RECONSTRUCTIONS],
        mask_ratio=config.pretrain.mask_ratio,
        normalised_pixels=config.pretrain.normalise_pixels,
        mean=config.data.mean,
        std=config.data.std,
        seed=config.seed,
    )


def save_reconstructions(run: Run, params: dict, step: int) -> None:
    """Writes `figures/reconstruction.npz` for the report, and the same picture to TensorBoard."""
    pictures = _reconstructions(run, params)
    _save(run.workdir / "figures" / "reconstruction.npz", pictures)
    run.logbook.picture("reconstruction", reconstruction_grid(**pictures), step)


def evaluate_run(run: Run, weights: dict[str, tuple[dict, int]]) -> None:
    """Runs every protocol on every set of weights; adds to `results.jsonl` and writes the neighbours' pictures.

    Without labelled pictures to test on there are no numbers, and the queries are training pictures.

    Args:
      weights: stage -> (encoder parameters, updates of the stage).
    """
    labelled = can_evaluate(run)
    if not labelled:
        run.say("evaluate: pictures of neighbours only; numbers need labelled training and test pictures")
    run.logbook.start_stage("evaluate", 0)
    extractor = _extractor(run)
    train = _batches(run, run.train)
    test = _batches(run, run.test) if labelled else None
    for stage, (encoder, step) in weights.items():

        def check(stage=stage) -> None:
            run.stop.raise_if_requested(f"while evaluating '{stage}'; what is evaluated already is in results.jsonl")

        bank = extract(extractor, encoder, train, check)
        query = extract(extractor, encoder, test, check) if labelled else bank
        identity = {"stage": stage, "weights": weights_hash(encoder), "step": step, "seed": run.config.seed}
        results = []
        if labelled:
            results = _knn_results(run, bank, query, identity) + _linear_results(run, bank, query, identity, check)
            check()
        if run.leader:
            write_results(run.workdir / "results.jsonl", results)
            _save_neighbors(run, stage, bank, query, run.test if labelled else run.train)
        for result in results:
            run.say(f"evaluate {stage:9} {result.protocol['name']:24} {result.metric} {100 * result.value:.1f} %")


def _protocol(run: Run, bank: Features, query: Features) -> dict:
    """What every protocol's record says of features and data."""
    config = run.config
    return {
        "pooling": config.model.pooling,
        "layer": "last, after the final norm",
        "dtype": config.model.dtype,
        "image_size": config.model.image_size,
        "resize_ratio": config.data.resize_ratio,
        "train": f"{run.train.name}/train",
        "test": f"{run.test.name}/test",
        "train_pictures": len(bank.labels),
        "test_pictures": len(query.labels),
        "classes": len(run.train.classes),
    }


def _knn_results(run: Run, bank: Features, query: Features, identity: dict) -> list[Result]:
    common = _protocol(run, bank, query)
    return [
        Result(
            evaluation="knn",
            metric="accuracy",
            value=_knn(run, bank, query, preset),
            protocol={"name": preset.name, "k": preset.k, "temperature": preset.temperature}
            | {"standardise": preset.standardise, "epsilon": preset.epsilon}
            | common,
            **identity,
        )
        for preset in knn.PRESETS.values()
    ]


def _linear_results(
    run: Run, bank: Features, query: Features, identity: dict, check: Callable[[], None]
) -> list[Result]:
    """The probe's number, and the one chosen on the test pictures, as published, under a name of its own."""
    found = linear.evaluate_linear(
        bank.vectors,
        bank.labels,
        query.vectors,
        query.labels,
        len(run.train.classes),
        epochs=run.config.evaluate.probe_epochs,
        batch=run.config.evaluate.probe_batch,
        seed=run.config.seed,
        mesh=run.mesh,
        check=check,
    )
    common = found.protocol | _protocol(run, bank, query)
    chosen = {"name": linear.PRESET, "base_rate": found.base_rate, "epoch": found.epoch}
    on_test = found.selected_on_test
    chosen_on_test = {"name": f"{linear.PRESET}, selected on test", "selection": "test"}
    chosen_on_test |= {"base_rate": on_test["base_rate"], "epoch": on_test["epoch"]}
    return [
        Result(evaluation="linear", metric="accuracy", value=value, protocol=common | choice, **identity)
        for value, choice in ((found.accuracy, chosen), (on_test["accuracy"], chosen_on_test))
    ]


def _save_neighbors(run: Run, stage: str, bank: Features, query: Features, asked: Source) -> None:
    """Writes `figures/neighbors_<stage>.npz`: the same queries for every stage, their nearest training pictures.

    `asked` holds the queries; when it is the training set itself, a query's own picture is not its neighbour.
    """
    chosen = choose_queries(query.labels, QUERIES)
    own = asked is run.train
    k = min(SHOWN + own, len(bank.labels))
    similarity, index = knn.neighbors(run.mesh, bank.vectors, query.vectors[chosen], k)
    if own:
        kept = np.argsort(bank.ids[index] == query.ids[chosen][:, None], axis=1, kind="stable")[:, : k - 1]
        similarity, index = np.take_along_axis(similarity, kept, 1), np.take_along_axis(index, kept, 1)
    size, ratio = run.config.model.image_size, run.config.data.resize_ratio

    def pictures(source: Source, ids: np.ndarray) -> np.ndarray:
        shown = np.stack([central_crop(source.image(int(i)), size, ratio) for i in ids.ravel()])
        return shown.reshape(*ids.shape, *shown.shape[1:])

    arrays = {
        "query": pictures(asked, query.ids[chosen]),
        "neighbor": pictures(run.train, bank.ids[index]),
        "query_label": query.labels[chosen],
        "neighbor_label": bank.labels[index],
        "similarity": similarity,
        "classes": np.asarray(run.train.classes, dtype=str),
    }
    _save(run.workdir / "figures" / f"neighbors_{stage}.npz", arrays)
    grid = neighbor_grid(*(arrays[name] for name in ("query", "neighbor", "query_label", "neighbor_label")))
    run.logbook.picture(f"neighbors/{stage}", grid, 0)


def _save(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    temporary.replace(path)
