"""What one stage takes from another: the parts of a complete stage, and which folder a stage starts from.

A complete stage has `DONE.json` with the hash of the encoder it stands for; what is read is checked against it.
"""

import json
from dataclasses import replace

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maect_jax import foreign
from maect_jax.config import TRAINED, plain
from maect_jax.context import Run
from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.exchange.files import Opened
from maect_jax.exchange.provenance import Provenance, from_dict, pretraining_method, trained, without_place
from maect_jax.models.vit import join_blocks
from maect_jax.parallel.mesh import replicated
from maect_jax.results.record import weights_hash
from maect_jax.training.checkpoint import absolute, compare_trees, newest_step_folder, read_arrays, read_meta

BEFORE = {"control": "pretrain", "head": "pretrain", "tune": "head"}
EVALUATED = ("pretrain", "control", "tune")

_PARTS = ("params", "frozen", "ema", "batch_stats", "queue")


def parts_of(state) -> dict:
    """What another stage may take of a train state, as `read_stage` returns it."""
    return {name: getattr(state, name) for name in _PARTS}


def encoder_of(parts: dict) -> dict:
    """The encoder a stage stands for: its moving average (tuning), what it kept frozen (head), or what it trained."""
    if parts["ema"]:
        return join_blocks(parts["ema"]["encoder"], parts["frozen"]["encoder"])
    return (parts["frozen"] or parts["params"])["encoder"]


def raw_encoder_of(parts: dict) -> dict | None:
    """The encoder as trained, where `encoder_of` gives its moving average; else None."""
    return join_blocks(parts["params"]["encoder"], parts["frozen"]["encoder"]) if parts["ema"] else None


def read_done(folder: epath.Path) -> dict:
    """What `DONE.json` of a complete stage says: stage, step, seconds, weights.

    Raises:
      CheckpointError: it is damaged.
    """
    path = folder / "DONE.json"
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged ({error}); remove it to train the end of this stage again") from None


def read_step(folder: epath.Path, mesh: Mesh, mend: str = "give another checkpoint") -> dict:
    """The parts of the checkpoint in a step's folder, replicated, as `parts_of`.

    Raises:
      CheckpointError: it can not be read.
    """
    return read_arrays(folder, _PARTS, replicated(mesh), mend)


def read_stage(folder: epath.Path, mesh: Mesh) -> tuple[dict, epath.Path]:
    """The parts of a complete stage's last checkpoint, replicated, and its folder.

    Raises:
      CheckpointError: it is not there, can not be read, or does not hold the weights that the stage ended with.
    """
    done = read_done(folder)
    found = folder / "checkpoints" / str(done["step"])
    mend = f"remove {folder / 'DONE.json'} to train the end of this stage again, or give another run"
    if not found.exists():
        raise CheckpointError(f"{found}: the last checkpoint of a complete stage is gone; {mend}")
    parts = read_step(found, mesh, mend)
    if weights_hash(encoder_of(parts)) != done["weights"]:
        raise CheckpointError(f"{found}: does not hold the weights that this stage ended with; {mend}")
    return parts, found


def provenance_of(checkpoint: epath.Path) -> Provenance:
    """Where the weights of a checkpoint (a step's folder) come from; of older ones nothing is known."""
    meta = read_meta(checkpoint)
    return replace(from_dict(meta.get("provenance") or {}), step=meta.get("step"))


def evaluated_folders(config: ConfigDict, workdir: epath.Path) -> dict[str, epath.Path]:
    """Stage -> folder of every complete stage there is to evaluate.

    A run that started from an earlier one is compared with that one's pre-training.
    """
    folders = {stage: workdir / stage for stage in EVALUATED}
    earlier = absolute(config.init_from or ".")
    from_run = config.init_from and not foreign.is_weights_file(config.init_from)
    if from_run and not (folders["pretrain"] / "DONE.json").exists():
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
            if _starts_from_file(config, workdir, stage):
                foreign.sources_of(config, stage, foreign.open_initial(config))
            elif before and _source_folder(config, workdir, before) is None:
                problems.append(
                    f"config.stages: '{stage}' starts from the stage '{before}', which is not complete in {workdir}; "
                    "add it to config.stages, or give the folder of a run that has it as --config.init_from"
                )
            elif not before:
                _init_folder(config.init_from, stage)
        except ConfigError as error:
            problems += error.problems
    return problems


def _starts_from_file(config: ConfigDict, workdir: epath.Path, stage: str) -> bool:
    """Whether `stage` starts from a weights file: one is given, it can, and there is no earlier stage to start from."""
    before = BEFORE.get(stage)
    complete = before is not None and (workdir / before / "DONE.json").exists()
    return before != "head" and not complete and foreign.is_weights_file(config.init_from)


def _source_folder(config: ConfigDict, workdir: epath.Path, before: str) -> epath.Path | None:
    """Folder of the complete stage `before`: in the work folder, else what `init_from` means, else None."""
    folder = workdir / before
    return folder if (folder / "DONE.json").exists() else _init_folder(config.init_from, before)


def stage_sources(run: Run, stage: str, wanted: dict) -> tuple[dict, Provenance]:
    """What `stage` starts from, of the shapes `wanted` ({} for a pre-training from scratch), and the provenance of
    what it will train.

    Raises:
      ConfigError: `init_from` does not have what this stage starts from.
      CheckpointError: it can not be read, or is of another architecture.
    """
    config = run.config
    if _starts_from_file(config, run.workdir, stage):
        opened = foreign.open_initial(config)
        for note in opened.notes:
            run.say(f"{stage}: {config.init_from}: {note}")
        sources = foreign.sources_of(config, stage, opened)
        before, origin = _of_file(opened, config.init_from)
        where = config.init_from
        for part in ("head", "fc_norm"):
            if part in opened.model.params:
                run.say(f"{stage}: {config.init_from}: its {part} is not used")
        run.say(f"{stage}: starts from {config.init_from} ({opened.layout}; licence: {before.license})")
    else:
        sources, before, origin, where = _from_run(run, stage)
    compare_trees(sources, {name: wanted[name] for name in sources}, where)
    average = f"exponential, {config.tune.ema_factor}" if stage == "tune" else "none"
    recipe = _without_places(plain(config))
    about = {"stage": stage, "recipe": recipe, "trained_on": recipe["data"]["train"], "average": average}
    return sources, trained(before, origin, **about)


def _of_file(opened: Opened, init_from: str) -> tuple[Provenance, dict]:
    """Provenance of the weights in a file, and the entry that names it with what was done to them."""
    before = opened.model.provenance
    entry = {"name": epath.Path(init_from).name, "sha256": opened.sha256, "layout": opened.layout}
    entry |= {"license": before.license} | ({"notes": list(opened.notes)} if opened.notes else {})
    entry |= {"stage": before.stage, "step": before.step} if before.code_version else {}
    entry |= {"method": method} if (method := pretraining_method(before)) else {}
    rest = tuple(step for step in before.derived_from if step.get("sha256") != opened.sha256)
    return replace(before, derived_from=rest), entry


def _without_places(recipe: dict) -> dict:
    """The settings, with paths shortened to names."""
    data, evaluate = recipe["data"], recipe["evaluate"]
    data = data | {key: without_place(data[key]) for key in ("train", "test")}
    others = ",".join(without_place(name) for name in evaluate["robustness"].split(","))
    evaluate = evaluate | {"lists": without_place(evaluate["lists"]), "robustness": others}
    return recipe | {"init_from": without_place(recipe["init_from"]), "data": data, "evaluate": evaluate}


def _from_run(run: Run, stage: str) -> tuple[dict, Provenance | None, dict | None, str]:
    """What an earlier stage left: sources, their provenance, the entry that names them, and the folder."""
    before = BEFORE.get(stage)
    config, workdir = run.config, run.workdir
    folder = _source_folder(config, workdir, before) if before else _init_folder(config.init_from, stage)
    if folder is None:
        return {}, None, None, ""  # `check_order` has seen to it that only pre-training comes here
    parts, found = read_stage(folder, run.mesh)
    sources = {"encoder": encoder_of(parts)}
    if stage in ("pretrain", "control") and "decoder" in parts["params"]:
        sources["decoder"] = parts["params"]["decoder"]
    if stage == "tune":
        if not parts["queue"]:
            raise ConfigError(f"config.init_from: {folder} has no head to tune with; add 'head' to config.stages")
        sources |= {name: parts[name] for name in ("params", "batch_stats", "queue")}
        sources["params"] = {name: parts["params"][name] for name in ("projector", "predictor")}
    done, provenance = read_done(folder), provenance_of(found)
    origin = {"name": provenance.recipe.get("name", folder.parent.name), "stage": folder.name, "step": done["step"]}
    origin |= {"method": method} if (method := pretraining_method(provenance)) else {}
    return sources, provenance, origin | {"sha256": done["weights"], "license": provenance.license}, str(found)


def _init_folder(init_from: str, stage: str) -> epath.Path | None:
    """The stage folder that `init_from` means: itself, or the stage of that name in it."""
    if not init_from:
        return None
    if foreign.is_weights_file(init_from):
        raise ConfigError(
            f"config.init_from: '{init_from}' is a weights file, which stands for a pre-training; it has no stage "
            f"'{stage}': add the stages between to config.stages"
        )
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
