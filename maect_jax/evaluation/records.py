"""One line of `results.jsonl` for every number, with the protocol that made it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from etils import epath


@dataclass(frozen=True)
class Result:
    """A number and all that is needed to compare it with another.

    Attributes:
      stage: whose weights: 'pretrain', 'control' or 'tune'.
      evaluation: 'knn', 'linear', …
      metric: 'accuracy', …
      value: a fraction for accuracies.
      protocol: every setting of the evaluation; 'name' is the preset.
      weights: SHA-256 of the encoder parameters.
      step: updates of the stage.
      seed: of the run.
    """

    stage: str
    evaluation: str
    metric: str
    value: float
    protocol: dict[str, Any]
    weights: str
    step: int
    seed: int


def weights_hash(params: dict) -> str:
    """SHA-256 of names, shapes, types and bytes of a parameter tree, independent of devices and order."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for name, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def write_results(path: epath.Path, results: list[Result]) -> None:
    """Adds results to the file in one step; an older line of the same stage, evaluation and protocol name goes."""

    def identity(record: dict) -> tuple:
        keys = ("stage", "evaluation", "metric", "seed")
        return (*(record[key] for key in keys), record["protocol"]["name"])

    new = [asdict(result) for result in results]
    replaced = {identity(record) for record in new}
    old = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
    kept = [record for line in old if (record := _parsed(line)) and identity(record) not in replaced]
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept + new))
    temporary.replace(path)


def _parsed(line: str) -> dict | None:
    """A record, or None for a line that a crash or a full disk tore."""
    try:
        record = json.loads(line)
        return record if isinstance(record["protocol"]["name"], str) else None
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
