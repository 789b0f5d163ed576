"""Classifiers that an evaluation has trained, kept for `convert --head`: what is written, and the note read again.

A probe is a file of its own; a fine-tuning keeps its weights itself and gets a note beside them. Both notes are JSON
and say on which weights and which feature the head stands, and how pictures became their input. `exchange.heads` makes
a classifier of either.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from maect_jax.evaluation.probes.linear_selection import LinearResult
from maect_jax.evaluation.task import Task
from maect_jax.exchange.beside import NOTE, Said, said
from maect_jax.exchange.provenance import without_place
from maect_jax.exchange.pth import refusal
from maect_jax.exchange.tensors import read_notes
from maect_jax.finetuning.run import FineTuned
from maect_jax.results.record import weights_hash
from maect_jax.training.checkpoint import write_json

PROBES = "heads"  # in a work folder: heads/<stage>/<preset>.safetensors
PROBE_TENSORS = ("mean", "var", "kernel", "bias")
FINETUNINGS = "finetune"  # in a work folder: finetune/<recipe>_<hash>/
CLASSIFIER = "classifier.json"  # in the folder of a complete fine-tuning: its note
SHAPE = ("width", "depth", "heads", "patch", "image_size", "mlp_ratio")  # of the encoder, in a note

_MAX_NOTE = 1 << 24  # characters

# -------------------------------------------------------------------------------------------------------------- writing


def keep_probe(task: Task, name: str, found: LinearResult) -> None:
    """Writes the chosen head of a linear probe as `heads/<stage>/<name>.safetensors`, in the place of an older one.

    Tensors, float32: 'mean' and 'var' [width] of the batch normalisation, 'kernel' [width, classes], 'bias' [classes].
    A probe without normalisation has mean 0, variance 1 and epsilon 0. Only the leading process writes.

    Args:
      name: of the preset.
    """
    if not task.leader:
        return
    probe = found.probe
    tensors = (probe.mean_d, probe.var_d, probe.kernel_hcd[0].T, probe.bias_hc[0])
    tensors = {key: np.ascontiguousarray(x, np.float32) for key, x in zip(PROBE_TENSORS, tensors)}
    note = _note(task, name, found, found.feature)
    note |= {"epsilon": probe.epsilon or 0.0, "base_rate": found.base_rate}
    path = task.folder / PROBES / task.stage_folder / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    temporary.write_bytes(safetensors.numpy.save(tensors, {NOTE: json.dumps(note)}))
    temporary.replace(path)


def keep_finetuning(task: Task, name: str, found: FineTuned) -> None:
    """Writes `classifier.json` into the folder of a complete fine-tuning: what its checkpoint does not tell.

    Only the leading process writes.

    Args:
      name: of the preset.
    """
    if not task.leader:
        return
    note = _note(task, name, found, found.protocol["pooling"])
    note |= {"step": int(found.weights.name), "sha256": weights_hash(found.params)}
    write_json(found.weights.parent.parent / CLASSIFIER, note)


def _note(task: Task, name: str, found: LinearResult | FineTuned, feature: str) -> dict:
    weights = task.weights
    return {
        "preset": name,
        "feature": feature,
        "classes": list(task.classes),
        "encoder": task.shape(),
        "encoder_sha256": task.sha256,
        "mean": list(weights.mean),
        "std": list(weights.std),
        "resize_ratio": weights.resize_ratio,
        "transform": task.transform(),
        "protocol": found.protocol | {"name": name},
        "epoch": found.epoch,
        "held_out_accuracy": found.held_out_accuracy,
        "test_accuracy": found.accuracy,
        "trained_on": without_place(task.train.name),
        "tested_on": without_place(task.test.name),
        "license": weights.provenance.license,
    }


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Note:
    """What is said of a head that was kept.

    Attributes:
      said: class names, pictures, licence, checked value by value.
      preset: of the evaluation that trained it.
      feature: name of what the head is on; of a fine-tuning its `Recipe.pooling`.
      encoder: `SHAPE` of the encoder it was trained on.
      encoder_sha256: of that encoder's parameters.
      protocol, trained_on: how and with which pictures.
      epsilon: of a probe's batch normalisation.
      step, sha256: of a fine-tuning: its chosen checkpoint, and the hash of the parameters there.
    """

    said: Said
    preset: str
    feature: str
    encoder: dict[str, int]
    encoder_sha256: str
    protocol: dict[str, Any]
    trained_on: str
    epsilon: float
    step: int
    sha256: str


def note_of_probe(path: Path) -> Note:
    """The note in the header of a kept probe. Raises CheckpointError when it can not be read."""
    return _parsed(path, read_notes(path).get(NOTE))


def note_of_finetuning(folder: Path) -> Note:
    """The note in the folder of a fine-tuning. Raises CheckpointError when there is none or it can not be read."""
    path = folder / CLASSIFIER
    if not path.is_file():
        raise refusal(
            folder,
            f"is no complete fine-tuning: it has no {CLASSIFIER}; `python -m maect_jax evaluate --only finetune`, "
            "given as before, completes one and writes it",
        )
    try:
        with open(path, "rb") as file:
            return _parsed(path, file.read(_MAX_NOTE + 1).decode(errors="replace"))
    except OSError as error:
        raise refusal(path, f"can not be read ({error.strerror})") from None


def _parsed(path: Path, text: Any) -> Note:
    """A note, which may be somebody's: bounded and checked."""
    try:
        values = json.loads(text) if isinstance(text, str) and len(text) <= _MAX_NOTE else None
    except (ValueError, RecursionError):
        values = None
    kinds = dict.fromkeys(("preset", "feature", "encoder_sha256", "trained_on"), str) | {"encoder": dict}
    kinds |= {"protocol": dict, "epsilon": int | float, "step": int, "sha256": str}
    values = {"epsilon": 0.0, "step": 0, "sha256": ""} | values if isinstance(values, dict) else {}
    good = all(isinstance(values.get(name), kind) for name, kind in kinds.items())
    good = good and all(type(values["encoder"].get(name)) is int for name in SHAPE) and 0 <= values["epsilon"] <= 1
    if not good:
        raise refusal(path, "the note on its head is missing or damaged; evaluate again, which writes a new one")
    return Note(said(path, {NOTE: text}), **{name: values[name] for name in kinds})
