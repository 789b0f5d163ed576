"""The stages of a run, one after the other: pre-train -> (control) -> head -> tune -> evaluate.

A stage has a folder in the work folder with its checkpoints and, when it is complete, `DONE.json`. Running again skips
what is done and continues what is not. What a stage starts from, in this order: its own newest checkpoint, the stage
before it in this work folder, the run given as `init_from`, fresh weights (pre-training only).
"""

import json
import time

import jax
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maect_jax import assemble, evaluate
from maect_jax.config import TRAINED, updates_of
from maect_jax.context import Run
from maect_jax.data.pipeline import training_batches
from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.evaluation.health import health
from maect_jax.evaluation.records import weights_hash
from maect_jax.models.vit import join_blocks
from maect_jax.parallel.mesh import batch_sharding, replicated
from maect_jax.training.checkpoint import (
    Checkpoints,
    absolute,
    compare_trees,
    newest_step_folder,
    read_arrays,
    write_json,
)
from maect_jax.training.loop import Stage, train
from maect_jax.training.progress import StageProgress

BEFORE = {"control": "pretrain", "head": "pretrain", "tune": "head"}


def run_stages(run: Run) -> None:
    """Runs the stages of `run.config.stages` in order."""
    for stage in run.config.stages:
        run.stop.raise_if_requested(f"before stage '{stage}'")
        if stage == "evaluate":
            run_evaluation(run)
        elif (run.workdir / stage / "DONE.json").exists():
            run.say(f"{stage}: done already")
        else:
            run_training_stage(run, stage)


def run_evaluation(run: Run) -> None:
    """Evaluates every complete stage, unless the same weights were evaluated with the same settings."""
    marker = run.workdir / "evaluate" / "DONE.json"
    folders = evaluated_folders(run)
    settings = {key: run.config.evaluate[key] for key in ("probe_epochs", "probe_batch")}
    what = {"weights": {stage: _done(folder)["weights"] for stage, folder in folders.items()}, "settings": settings}
    if marker.exists() and {key: _done(marker.parent).get(key) for key in what} == what:
        run.say("evaluate: done already")
        return
    began = time.perf_counter()
    evaluate.evaluate_run(run, {stage: _evaluated(folder, run.mesh) for stage, folder in folders.items()})
    if run.leader:
        seconds = round(time.perf_counter() - began, 1)
        write_json(marker, {"stage": "evaluate", "seconds": seconds} | what)


def run_training_stage(run: Run, stage: str) -> None:
    """Trains one stage from where it stands to its end."""
    config, folder = run.config, run.workdir / stage
    assembled = assemble.assemble(config, stage, len(run.train), run.mesh)
    wanted = assemble.source_shapes(config, stage, run.mesh)
    step, shapes, shardings = assemble.compile_for(assembled, run.mesh, wanted)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_every)
    if found := checkpoints.restore(shapes, shardings):
        state, seconds = found[0], found[1]["seconds"]
        run.say(f"{stage}: continues after update {int(state.step)} of {assembled.clock.updates}")
    else:
        sources = stage_sources(run, stage, wanted)
        state, seconds = jax.jit(assembled.first_state, out_shardings=shardings)(sources), 0.0
        if run.leader:
            table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
            (folder / "parameters.txt").write_text(table + "\n")
    run.logbook.start_stage(stage, int(state.step))
    batches = training_batches(
        run.train,
        batch=assembled.batch,
        seed=assembled.clock.seed,
        start_step=int(state.step),
        views=assembled.views,
        image_size=config.model.image_size,
        crop_scale=assembled.crop_scale,
        sharding=batch_sharding(run.mesh),
        workers=config.data.workers,
        resident_limit=int(config.data.resident_gib * 2**30),
    )
    monitor = evaluate.make_monitor(run, stage)
    plan = Stage(
        name=stage,
        folder=folder,
        step=step,
        batches=batches,
        updates=assembled.clock.updates,
        updates_per_epoch=assembled.clock.updates_per_epoch,
        batch=assembled.batch,
        log_every=config.log_every,
        save_every=config.checkpoint.every_updates,
        monitor_every=config.evaluate.every_epochs * assembled.clock.updates_per_epoch if monitor else 0,
        monitor=monitor,
        health=health,
        hidden=() if run.train.classes else ("neighbor_accuracy",),
        seconds=seconds,
        meta={"stage": stage, "name": config.name, "seed": config.seed},
    )
    progress = StageProgress(stage, plan.updates, plan.updates_per_epoch, _later_work(run, stage), run.leader)
    try:
        state, seconds = train(plan, state, checkpoints, run.logbook, progress, run.stop)
    finally:
        batches.close()
        checkpoints.close()
    if stage == "pretrain" and run.leader:
        evaluate.save_reconstructions(run, state.params, int(state.step))
    if run.leader:
        done = {"stage": stage, "step": int(state.step), "seconds": round(seconds, 1)}
        write_json(folder / "DONE.json", done | {"weights": weights_hash(_evaluated_encoder(_parts(state)))})


def _later_work(run: Run, stage: str) -> float:
    """Work of the training stages that follow and are not done, in updates of this one."""
    stages = run.config.stages
    work = 0.0
    for later in stages[stages.index(stage) + 1 :]:
        if later in TRAINED and not (run.workdir / later / "DONE.json").exists():
            updates = updates_of(run.config, later, len(run.train))
            work += updates * assemble.flops_per_update(run.config, later)
    return work / assemble.flops_per_update(run.config, stage)


# ----------------------------------------------------------------------------------- what a stage takes from another

_PARTS = ("params", "frozen", "ema", "batch_stats", "queue")


def _parts(state) -> dict:
    return {name: getattr(state, name) for name in _PARTS}


def _evaluated_encoder(parts: dict) -> dict:
    """The encoder a stage stands for: its moving average (tuning), what it kept frozen (head), or what it trained."""
    if parts["ema"]:
        return join_blocks(parts["ema"]["encoder"], parts["frozen"]["encoder"])
    return (parts["frozen"] or parts["params"])["encoder"]


def _done(folder: epath.Path) -> dict:
    return json.loads((folder / "DONE.json").read_text())


def _read_stage(folder: epath.Path, mesh: Mesh) -> tuple[dict, epath.Path]:
    """The parts of a complete stage's last checkpoint, replicated, and its folder.

    Raises:
      CheckpointError: it is not there, can not be read, or does not hold the weights that the stage ended with.
    """
    done = _done(folder)
    found = folder / "checkpoints" / str(done["step"])
    mend = f"remove {folder / 'DONE.json'} to train the end of this stage again, or give another run"
    if not found.exists():
        raise CheckpointError(f"{found}: the last checkpoint of a complete stage is gone; {mend}")
    parts = read_arrays(found, _PARTS, replicated(mesh), mend)
    if weights_hash(_evaluated_encoder(parts)) != done["weights"]:
        raise CheckpointError(f"{found}: does not hold the weights that this stage ended with; {mend}")
    return parts, found


def _evaluated(folder: epath.Path, mesh: Mesh) -> tuple[dict, int]:
    """Encoder parameters of a complete stage and its updates."""
    parts, found = _read_stage(folder, mesh)
    return _evaluated_encoder(parts), int(found.name)


def evaluated_folders(run: Run) -> dict[str, epath.Path]:
    """Stage -> folder of every complete stage there is to evaluate.

    A run that started from an earlier one is compared with that one's pre-training.
    """
    folders = {stage: run.workdir / stage for stage in evaluate.EVALUATED}
    earlier = absolute(run.config.init_from or ".")
    if run.config.init_from and not (folders["pretrain"] / "DONE.json").exists():
        folders["pretrain"] = earlier if earlier.name == "pretrain" else earlier / "pretrain"
    return {stage: folder for stage, folder in folders.items() if (folder / "DONE.json").exists()}


def check_order(config: ConfigDict, workdir: epath.Path) -> list[str]:
    """A sentence for each stage of `config.stages` that will have nothing to start from; looks at files only."""
    problems = []
    for i, stage in enumerate(config.stages):
        before = BEFORE.get(stage)
        begun = newest_step_folder(workdir / stage) is not None
        if before in config.stages[:i] or begun or stage == "evaluate":
            continue
        try:
            if before and _source_folder(config, workdir, before) is None:
                problems.append(
                    f"config.stages: '{stage}' starts from the stage '{before}', which is not complete in {workdir}; "
                    "add it to config.stages, or give the folder of a run that has it as --config.init_from"
                )
            elif not before:
                _init_folder(config.init_from, stage)
        except ConfigError as error:
            problems += error.problems
    return problems


def _source_folder(config: ConfigDict, workdir: epath.Path, before: str) -> epath.Path | None:
    """Folder of the complete stage `before`: in the work folder, else what `init_from` means, else None."""
    folder = workdir / before
    return folder if (folder / "DONE.json").exists() else _init_folder(config.init_from, before)


def stage_sources(run: Run, stage: str, wanted: dict) -> dict:
    """What `stage` starts from, of the shapes `wanted`; {} for a pre-training from scratch.

    Raises:
      ConfigError: `init_from` does not have what this stage starts from.
      CheckpointError: it can not be read, or is of another architecture.
    """
    before = BEFORE.get(stage)
    config, workdir = run.config, run.workdir
    folder = _source_folder(config, workdir, before) if before else _init_folder(config.init_from, stage)
    if folder is None:
        return {}  # `check_order` has seen to it that only pre-training comes here
    parts, found = _read_stage(folder, run.mesh)
    sources = {"encoder": _evaluated_encoder(parts)}
    if stage in ("pretrain", "control") and "decoder" in parts["params"]:
        sources["decoder"] = parts["params"]["decoder"]
    if stage == "tune":
        if not parts["queue"]:
            raise ConfigError(f"config.init_from: {folder} has no head to tune with; add 'head' to config.stages")
        sources |= {name: parts[name] for name in ("params", "batch_stats", "queue")}
        sources["params"] = {name: parts["params"][name] for name in ("projector", "predictor")}
    compare_trees(sources, {name: wanted[name] for name in sources}, str(found))
    return sources


def _init_folder(init_from: str, stage: str) -> epath.Path | None:
    """The stage folder that `init_from` means: itself, or the stage of that name in it."""
    if not init_from:
        return None
    root = absolute(init_from)
    if not root.exists():
        raise ConfigError(f"config.init_from: no folder '{init_from}'; give the work folder of an earlier run")
    for folder in (root, root / stage):
        if (folder / "checkpoints").is_dir() and (folder / "DONE.json").exists():
            return folder
    have = [name for name in TRAINED if (root / name / "DONE.json").exists()]
    raise ConfigError(
        f"config.init_from: '{init_from}' has no complete stage '{stage}' (complete are: {', '.join(have) or 'none'}); "
        "give another run"
    )
