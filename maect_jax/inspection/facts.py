"""What is at a path: facts by name, from which `inspection.text` makes text and `inspect --json` an object.

Every path has 'path' and 'kind'. Others come where they apply:

  container, bytes, sha256, md5 of a file; weights_sha256 of the encoder of a complete stage
  layout, same_as: that the tensors fit; layout None with 'differences', all that keeps them from the nearest
  encoder, decoder, head, nnclr: sizes; heads_source is 'said' (in or beside the file), 'published' (for the width),
    'settings' (of the run) or 'unknown'
  pooling, pictures, parameters; problems: sentences on what our models do not compute with
  license, license_source, derived_from, trained_on, recipe, stage, step, average, code_version: see
    `exchange.provenance.Provenance`; None = nothing says
  beside: what else is in the file or the checkpoint
  stages: of a run; of a stage or a fine-tuning 'complete' and 'checkpoints', of the latter 'chosen', a step
  tensors: name -> `Shape`
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from maect_jax.errors import ConfigError
from maect_jax.inspection.files import file_facts
from maect_jax.inspection.runs import SETTINGS, checkpoint_facts, run_facts, stage_facts
from maect_jax.training.checkpoint import absolute

_MAX_DEPTH = 16  # of containers in somebody's notes


def facts_of(path: str) -> dict[str, Any]:
    """Facts on a weights file or a folder with one, a run, a stage, or a checkpoint; see above.

    Raises:
      ConfigError: nothing there. CheckpointError: it can not be read.
    """
    root = absolute(path)
    if not root.exists():
        raise ConfigError(f"FILE: nothing at '{path}'; give a weights file, a run, a stage or a checkpoint in one")
    if (root / SETTINGS).exists():
        facts = run_facts(root)
    elif (root / "state").is_dir():
        facts = checkpoint_facts(root)
    elif (root / "checkpoints").is_dir():
        facts = stage_facts(root)
    else:
        facts = file_facts(path)
    return {name: value if name == "tensors" else _plain(value) for name, value in facts.items()}


def as_json(facts: Mapping[str, Any]) -> str:
    """The facts as one JSON object, the tensors as a list of objects with 'name', 'shape', 'dtype' and 'bytes'."""
    tensors = [{"name": name, **asdict(shape)} for name, shape in facts.get("tensors", {}).items()]
    return json.dumps(dict(facts) | ({"tensors": tensors} if "tensors" in facts else {}), indent=1, allow_nan=False)


def _plain(value: Any, depth: int = 0) -> Any:
    """What JSON knows: numbers that it does not know become text, and what is nested too deep is cut."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping | list | tuple) and depth == _MAX_DEPTH:
        return "..."
    if isinstance(value, Mapping):
        return {str(name): _plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    return value
