"""The stages of a run, one after the other: pre-train -> (control) -> head -> tune -> evaluate.

A stage has a folder in the work folder with its checkpoints and, when it is complete, `DONE.json`. Running again skips
what is done and continues what is not. What a stage starts from, in this order: its own newest checkpoint, the stage
before it in this work folder, the run or weights file given as `init_from`, fresh weights (pre-training only).
"""

import time

import jax
from clu import parameter_overview

from maect_jax import assemble, evaluate
from maect_jax.config import TRAINED, plain, updates_of
from maect_jax.context import Run
from maect_jax.data.batches.training import training_batches
from maect_jax.evaluation.health import health
from maect_jax.exchange.provenance import from_dict, pretraining_method
from maect_jax.foreign import file_hash
from maect_jax.handover import encoder_of, evaluated_folders, parts_of, read_done, stage_sources
from maect_jax.parallel.mesh import batch_sharding
from maect_jax.results.record import weights_hash
from maect_jax.training.checkpoint import Checkpoints, write_json
from maect_jax.training.loop import Stage, train
from maect_jax.training.progress import StageProgress


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
    folders = evaluated_folders(run.config, run.workdir)
    settings = plain(run.config.evaluate)
    weights = {stage: read_done(folder)["weights"] for stage, folder in folders.items()}
    earlier = read_done(marker.parent) if marker.exists() else {}
    if evaluate.starts_from_file(run.config, run.workdir):
        weights["pretrain"] = file_hash(run.config.init_from)
    elif run.config.init_from and "pretrain" not in weights and "pretrain" in earlier.get("weights", {}):
        weights["pretrain"] = earlier["weights"]["pretrain"]  # the file was evaluated, and is gone now
    what = {"weights": weights, "settings": settings}
    if marker.exists() and {key: earlier.get(key) for key in what} == what:
        run.say("evaluate: done already")
        return
    began = time.perf_counter()
    evaluate.evaluate_run(run)
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
        state, seconds, provenance = found[0], found[1]["seconds"], found[1].get("provenance")
        run.say(f"{stage}: continues after update {int(state.step)} of {assembled.clock.updates}")
    else:
        sources, origin = stage_sources(run, stage, wanted)
        state, seconds = jax.jit(assembled.first_state, out_shardings=shardings)(sources), 0.0
        provenance = origin.as_dict()
        if run.leader:
            table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
            (folder / "parameters.txt").write_text(table + "\n")
            if stage == "pretrain":
                evaluate.save_parts(run, state.params, "before")
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
        bad=run.bad,
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
        meta={"stage": stage, "name": config.name, "seed": config.seed, "provenance": provenance},
    )
    progress = StageProgress(stage, plan.updates, plan.updates_per_epoch, _later_work(run, stage), run.leader)
    try:
        state, seconds = train(plan, state, checkpoints, run.logbook, progress, run.stop)
    finally:
        batches.close()
        checkpoints.close()
    if stage == "pretrain" and run.leader:
        evaluate.save_reconstructions(run, state.params, int(state.step))
        evaluate.save_parts(run, state.params, "after")
    if run.leader:
        done = {"stage": stage, "step": int(state.step), "seconds": round(seconds, 1)}
        done["pretraining"] = pretraining_method(from_dict(provenance or {}))
        done["weights"] = weights_hash(encoder_of(parts_of(state)))
        write_json(folder / "DONE.json", done)


def _later_work(run: Run, stage: str) -> float:
    """Work of the training stages that follow and are not done, in updates of this one."""
    stages = run.config.stages
    work = 0.0
    for later in stages[stages.index(stage) + 1 :]:
        if later in TRAINED and not (run.workdir / later / "DONE.json").exists():
            updates = updates_of(run.config, later, len(run.train))
            work += updates * assemble.flops_per_update(run.config, later)
    return work / assemble.flops_per_update(run.config, stage)
