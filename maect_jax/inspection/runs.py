"""What a run is, a stage of one, or a checkpoint. Shapes come from metadata; no array is read."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from maect_jax import assemble, handover
from maect_jax.config import TRAINED, default
from maect_jax.errors import CheckpointError
from maect_jax.exchange.beside import NOTE, parsed, read_text, said
from maect_jax.exchange.heads import CLASSIFIER
from maect_jax.exchange.provenance import from_dict
from maect_jax.inspection.architecture import decoder_facts, encoder_facts, parameter_counts
from maect_jax.inspection.files import classifier_facts, provenance_facts
from maect_jax.inspection.shapes import Shape, shape_of
from maect_jax.models.vit import join_blocks
from maect_jax.parallel.mesh import make_mesh
from maect_jax.trained import run_settings
from maect_jax.training.checkpoint import newest_step_folder, read_meta, saved_tree

SETTINGS = "config.resolved.yaml"
_ABOVE = 6  # folders at most from a checkpoint up to its run: transfer/<data>/finetune/<recipe>/chosen/<step>
_OTHERWISE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)  # of what is not as ours


def run_facts(folder: epath.Path) -> dict[str, Any]:
    """Facts on a run and its stages; see `inspection.facts`.

    Raises:
      CheckpointError: its settings, or what it says of a stage, can not be read.
    """
    config = run_settings(folder)
    stages = [stage for stage in TRAINED if stage in config.stages or (folder / stage).is_dir()]
    found = {"path": str(folder), "kind": "run", "name": config.name, "seed": config.seed}
    found |= {"starts_from": config.init_from} if config.init_from else {}
    try:
        found |= _model_facts({"params": assemble.source_shapes(config, "pretrain", make_mesh())}, config)
    except _OTHERWISE as error:
        raise CheckpointError(f"{folder / SETTINGS}: describes no model ({error})") from None
    return found | {"trained_on": config.data.train, "stages": [_stage_row(folder / stage) for stage in stages]}


def stage_facts(folder: epath.Path) -> dict[str, Any]:
    """Facts on a stage or a fine-tuning and its last checkpoint.

    Raises:
      CheckpointError: there is none, or it can not be read.
    """
    row = _stage_row(folder)
    if row["step"] is None:
        raise CheckpointError(f"{folder}: has no complete checkpoint yet; continue its training first")
    checkpoint = folder / "checkpoints" / str(row["step"])
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: the last checkpoint of a complete stage is gone; give another checkpoint")
    steps = sorted(int(path.name) for path in checkpoint.parent.iterdir() if path.name.isdigit())
    found = {"kind": "stage", "complete": row["complete"]}
    if (folder / "chosen").is_dir():
        step = parsed(_classifier(folder)).get("step")
        found = {"kind": "fine-tuning", "complete": step is not None} | ({} if step is None else {"chosen": step})
    return checkpoint_facts(checkpoint) | found | {"checkpoints": steps}


def checkpoint_facts(folder: epath.Path) -> dict[str, Any]:
    """Facts on the checkpoint in a step's folder.

    Raises:
      CheckpointError: its metadata can not be read.
    """
    meta, done = _meta(folder), _done(folder.parent.parent)
    tree, provenance = _shapes(folder), _provenance(meta, done)
    found: dict[str, Any] = {"path": str(folder), "kind": "checkpoint", "container": "orbax"}
    if done and str(done["step"]) == folder.name:
        found["weights_sha256"] = done.get("weights")
    with suppress(*_OTHERWISE):  # a state that is not as ours: its tensors tell what it is
        found |= _model_facts(tree, _settings(folder, provenance["recipe"]))
        if "head" in tree["params"]:
            note = json.dumps({"classes": meta["classes"]}) if "classes" in meta else _classifier(folder.parent.parent)
            found["head"] = classifier_facts(tree["params"]["head"], said(Path(folder), {NOTE: note}))
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    if provenance["average"] is None:
        provenance["average"] = "exponential" if "ema" in tree else "none"
    found["bytes"] = sum(leaf.bytes for leaf in leaves.values())
    found["beside"] = {name: _described(part) for name, part in tree.items() if name != "params"}
    return found | provenance | {"tensors": leaves}


def _stage_row(folder: epath.Path) -> dict[str, Any]:
    """A stage in the list of a run; one that has not begun has no step."""
    done, newest = _done(folder), newest_step_folder(folder)
    step = done["step"] if done else int(newest.name) if newest else None
    row = {"stage": folder.name, "complete": bool(done), "step": step, "weights_sha256": done.get("weights")}
    provenance = _provenance(_meta(folder / "checkpoints" / str(step)), done)
    return row | {name: provenance[name] for name in ("license", "license_source")}


def _model_facts(tree: dict, config: ConfigDict | None) -> dict[str, Any]:
    """Encoder, and decoder where there is one, in the state of a stage or a fine-tuning."""
    params = tree["params"]
    parts = [part["encoder"] for part in (params, tree.get("frozen", {})) if "encoder" in part]
    encoder = jax.eval_shape(join_blocks, *parts) if len(parts) == 2 else parts[0]
    found: dict[str, Any] = {"encoder": encoder_facts(encoder, config.model.patch if config else None)}
    found["encoder"]["positions"] = "learned" if "pos_embed" in encoder else "fixed"
    found["encoder"] |= {"heads": None, "heads_source": "unknown", "channels": None, "image_size": None}
    if "decoder" in params:
        found["decoder"] = decoder_facts(params["decoder"]) | {"heads": None, "heads_source": "unknown"}
    found["parameters"] = parameter_counts({"encoder": encoder} | {k: v for k, v in params.items() if k != "encoder"})
    if config:
        _add_settings(found, config)
    if config and "pos_embed" in encoder:
        found["encoder"]["image_size"] = config.model.patch * math.isqrt(encoder["pos_embed"].shape[1] - 1)
    return found


def _add_settings(found: dict[str, Any], config: ConfigDict) -> None:
    """What the settings of the run tell, and shapes do not."""
    model, data = config.model, config.data
    settings = {"heads_source": "settings"}
    found["encoder"] |= settings | {key: model[key] for key in ("heads", "channels", "image_size")}
    found["pictures"] = {"mean": data.mean, "std": data.std, "resize_ratio": data.resize_ratio}
    if "head" not in found["parameters"]:  # a fine-tuning has a feature of its own
        found["pooling"] = model.pooling
    if "decoder" in found:
        pixels = {"normalised_pixels": config.pretrain.normalise_pixels}
        found["decoder"] |= settings | {"heads": model.decoder.heads} | pixels
        found["pictures"]["mask_ratio"] = config.pretrain.mask_ratio


# ------------------------------------------------------------------------------------------------------------- reading


def _shapes(folder: epath.Path) -> dict[str, Any]:
    """The state's tree, a `Shape` in the place of each array."""
    try:
        return jax.tree.map(shape_of, dict(saved_tree(folder)))
    except Exception as error:  # whatever Orbax makes of damaged metadata
        raise CheckpointError(f"{folder}: can not be read ({error}); give another checkpoint") from None


def _settings(folder: epath.Path, recipe: dict[str, Any]) -> ConfigDict | None:
    """Settings of the run that a checkpoint lies in; of one that was moved those it carries, where it does."""
    for parent in list(folder.parents)[:_ABOVE]:
        if (parent / SETTINGS).exists():
            return run_settings(parent)
    if "model" not in recipe:  # a fine-tuning's has no such part
        return None
    config = default()
    config.update(recipe)
    return config


def _done(folder: epath.Path) -> dict[str, Any]:
    """`DONE.json` of a stage; {} where it is not complete."""
    if not (folder / "DONE.json").exists():
        return {}
    done = handover.read_done(folder)
    if not isinstance(done, dict) or type(done.get("step")) is not int:
        raise CheckpointError(f"{folder / 'DONE.json'}: is damaged (no step); remove it to train the end again")
    return done


def _classifier(folder: epath.Path) -> str:
    """The note of a complete fine-tuning; '' where there is none."""
    return read_text(Path(folder / CLASSIFIER))


def _meta(folder: epath.Path) -> dict[str, Any]:
    meta = read_meta(folder)
    if not isinstance(meta, dict):
        raise CheckpointError(f"{folder / 'meta'}: is damaged (no object); give another checkpoint")
    return meta


def _provenance(meta: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint or its stage says of itself; older ones say stage and step."""
    said = next((item["provenance"] for item in (meta, done) if isinstance(item.get("provenance"), dict)), None)
    found = provenance_facts(from_dict(said or {}))
    if said is None:
        found |= {"average": None, "trained_on": None}
    for name in ("stage", "step"):
        found[name] = meta.get(name, found[name])
    return found


def _name(path: tuple) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def _described(part: Any) -> str:
    leaves: list[Shape] = jax.tree.leaves(part)
    return f"{len(leaves)} arrays, {sum(leaf.bytes for leaf in leaves)} bytes"
