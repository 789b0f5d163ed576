"""The stages of a run, one after the other: pre-train -> (control) -> head -> tune -> evaluate.

A stage has a folder in the work folder with its checkpoints and, when it is complete, `DONE.json`. Running again skips
what is done and continues what is not. What a stage starts from, in this order: its own newest checkpoint, the stage
before it in this work folder, the run given as `init_from`, fresh weights (pre-training only).
"""

import time

import jax
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh

from maect_jax import assemble, evaluate
from maect_jax.config import TRAINED, updates_of
from maect_jax.context import Run
from maect_jax.data.pipeline import training_batches
from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.evaluation.health import health
from maect_jax.evaluation.records import weights_hash
from maect_jax.models.vit import join_blocks
from maect_jax.parallel.mesh import batch_sharding, replicated
from maect_jax.training.checkpoint import Checkpoints, compare_trees, newest_step_folder, read_arrays, write_json
from maect_jax.training.loop import Stage, train
from maect_jax.training.progress import StageProgress

BEFORE = {"control": "pretrain", "head": "pretrain", "tune": "head"}


def run_stages(run: Run) -> None:
    """Runs the stages of `run.config.stages` in order."""
    for stage in run.config.stages:
        run.stop.raise_if_requested(f"before stage '{stage}'")
        done = run.workdir / stage / "DONE.json"
        if done.exists():
            run.say(f"{stage}: done already")
            continue
        if stage in TRAINED:
            run_training_stage(run, stage)
        else:
            began = time.perf_counter()
            evaluate.evaluate_run(run, evaluated_weights(run))
            if run.leader:
                done.parent.mkdir(parents=True, exist_ok=True)
                write_json(done, {"stage": stage, "seconds": round(time.perf_counter() - began, 1)})


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
        evaluate.save_reconstructions(run, state.params)
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


def _read_stage(folder: epath.Path, mesh: Mesh) -> tuple[dict, epath.Path]:
    """The parts of a stage's newest checkpoint, replicated, and its folder."""
    found = newest_step_folder(folder)
    if found is None:
        raise CheckpointError(f"{folder}: holds no complete checkpoint; remove it, or give another run")
    return read_arrays(found, _PARTS, replicated(mesh)), found


def evaluated_weights(run: Run) -> dict[str, tuple[dict, int]]:
    """Stage -> (encoder parameters, updates) of every complete stage there is to evaluate.

    A run that started from an earlier one is compared with that one's pre-training.
    """
    folders = {stage: run.workdir / stage for stage in evaluate.EVALUATED}
    earlier = epath.Path(run.config.init_from or ".")
    if run.config.init_from and not (folders["pretrain"] / "DONE.json").exists():
        folders["pretrain"] = earlier if earlier.name == "pretrain" else earlier / "pretrain"
    weights = {}
    for stage, folder in folders.items():
        if (folder / "DONE.json").exists():
            parts, found = _read_stage(folder, run.mesh)
            weights[stage] = _evaluated_encoder(parts), int(found.name)
    return weights


def stage_sources(run: Run, stage: str, wanted: dict) -> dict:
    """What `stage` starts from, of the shapes `wanted`; {} for a pre-training from scratch.

    Raises:
      ConfigError: the stage before it has not been run, and `init_from` does not have it.
      CheckpointError: it is of another architecture.
    """
    before = BEFORE.get(stage)
    folder = run.workdir / before if before else None
    if folder is None or not (folder / "DONE.json").exists():
        folder = _init_folder(run.config.init_from, before or "pretrain")
    if folder is None and stage == "pretrain":
        return {}
    if folder is None:
        raise ConfigError(
            f"config.stages: '{stage}' starts from the stage '{before}', which is not complete in {run.workdir}; add "
            "it to config.stages, or give the folder of a run that has it as --config.init_from"
        )
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
    root = epath.Path(init_from)
    if not root.exists():
        raise ConfigError(f"config.init_from: no folder '{init_from}'; give the work folder of an earlier run")
    if (root / "checkpoints").is_dir():
        return root
    if (root / stage / "checkpoints").is_dir():
        return root / stage
    have = [name for name in TRAINED if (root / name / "checkpoints").is_dir()]
    raise ConfigError(
        f"config.init_from: '{init_from}' has no stage '{stage}' (it has {', '.join(have) or 'none'}); give another run"
    )
