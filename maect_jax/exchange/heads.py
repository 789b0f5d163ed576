"""Classifiers for encoders: a linear probe or a fine-tuning, read beside a `Model` and given back as one with a head.

Three kinds are read, told by content: a probe that an evaluation here has kept, a fine-tuning of one, and MAE-CT's
published probes. Who kept a head says in a note of JSON on which weights and which feature it stands; see
`evaluation.kept_heads`. A probe's batch normalisation has no affine part and is folded into its linear map.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.evaluation.kept_heads import (
    CLASSIFIER,
    FINETUNINGS,
    PROBE_TENSORS,
    PROBES,
    SHAPE,
    Note,
    note_of_finetuning,
    note_of_probe,
)
from maect_jax.exchange.beside import Said
from maect_jax.exchange.layouts import ENCODERS
from maect_jax.exchange.mapping import from_layout, misfits
from maect_jax.exchange.model import Model
from maect_jax.exchange.provenance import NONE_STATED, OWN, Provenance, strictest
from maect_jax.exchange.pth import refusal
from maect_jax.exchange.tensors import read_tensors
from maect_jax.finetuning.model import classifier_of
from maect_jax.finetuning.run import finetuned_from
from maect_jax.results.record import weights_hash
from maect_jax.training.checkpoint import compare_trees, read_arrays

MAECT_EPSILON = 1e-5  # of the batch normalisation in MAE-CT's probes

FINETUNED = "maect_jax_finetuned"  # layout of a fine-tuning, in the provenance of a model that it became

_EVALUATIONS = {"probe": "linear", "finetuned": "finetune"}  # kind of a head -> what makes it


def open_head(path: str | PathLike, model: Model) -> Model:
    """The model with the classifier at `path`.

    Args:
      path: a kept probe (`heads/<stage>/<preset>.safetensors` in a work folder), a fine-tuning
        (`finetune/<recipe>_<hash>`, or the chosen checkpoint in it), or a probe file of MAE-CT.
      model: what the head was trained on. A fine-tuning takes the place of the whole encoder; its decoder is gone then.

    Returns:
      the model with `params['head']`, `pooling`, `classes`, the pictures' form that the head was trained with, and the
      stricter of the two licences.

    Raises:
      CheckpointError: there is no head, it can not be read, is of another width or of other weights, or is on a
        feature that no exported form has. ConfigError: the checkpoint is not the one that was chosen.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        return _finetuned(path, model)
    tensors, _ = read_tensors(path)
    if tensors.keys() == set(PROBE_TENSORS):
        return _kept_probe(path, tensors, model)
    if not any(misfits(tensors, "maect_probe").values()):
        return _published_probe(path, tensors, model)
    if not all(any(misfits(tensors, layout).values()) for layout in ENCODERS):
        raise refusal(path, "holds an encoder; give it as --weights, and with it the head that it may have")
    raise refusal(
        path,
        "holds no head; give a probe that `evaluate --only linear` kept below 'heads', the folder of a fine-tuning "
        "below 'finetune', or a probe file of MAE-CT",
    )


def find_head(run: str | PathLike, kind: str, model: Model) -> Path:
    """The newest head on these weights in a work folder.

    Args:
      run: work folder of an evaluation.
      kind: 'probe' (on a feature that can be exported) or 'finetuned'.
      model: what the head is to be on.

    Raises:
      ConfigError: there is none; names the command that makes one. CheckpointError: a note is damaged.
    """
    run, sha256 = Path(run), _sha256(model)
    if kind == "probe":
        noted = [(path, note_of_probe(path)) for path in run.glob(f"{PROBES}/*/*.safetensors")]
        noted = [(path, note) for path, note in noted if note.feature in ("cls", "mean")]
    else:
        noted = [(path, note_of_finetuning(path.parent)) for path in run.glob(f"{FINETUNINGS}/*/{CLASSIFIER}")]
    found = [path for path, note in noted if note.encoder_sha256 == sha256]
    if not found:
        raise ConfigError(
            f"--head {kind}: '{run}' has none on the weights of '{model.name}'; make one with "
            f"`python -m maect_jax evaluate --weights {run} --only {_EVALUATIONS[kind]}`"
        )
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    return newest if kind == "probe" else newest.parent


def folded(probe: Mapping[str, np.ndarray], epsilon: float) -> dict[str, np.ndarray]:
    """The linear map that equals batch normalisation by running statistics and the map after it.

    Args:
      probe: 'mean', 'var' [width], 'kernel' [width, classes], 'bias' [classes].
      epsilon: added to the variance.

    Returns:
      'kernel' and 'bias', float32, computed in float64.
    """
    mean_d, var_d, kernel_dc, bias_c = (np.asarray(probe[name], np.float64) for name in PROBE_TENSORS)
    kernel_dc = kernel_dc / np.sqrt(var_d + epsilon)[:, None]
    return {"kernel": kernel_dc.astype(np.float32), "bias": (bias_c - mean_d @ kernel_dc).astype(np.float32)}


# --------------------------------------------------------------------------------------------------------------- probes


def _kept_probe(path: Path, tensors: dict[str, np.ndarray], model: Model) -> Model:
    note = note_of_probe(path)
    if note.feature not in ("cls", "mean"):
        raise refusal(
            path,
            f"is on the feature {note.feature!r}, which no exported form has, only 'cls' and 'mean'; give a probe of "
            "`evaluate --only linear` with its default --preset",
        )
    _check_encoder(path, note, model)
    head = _folded_head(path, tensors, note.epsilon, model)
    origin = {"layout": "maect_jax_probe", "license": note.said.license or OWN}
    return _with_head(path, model, head, note.feature, note.said, origin)


def _published_probe(path: Path, tensors: dict[str, np.ndarray], model: Model) -> Model:
    """One of MAE-CT's; which encoder it belongs to, its file does not tell."""
    try:
        probe = from_layout(tensors, "maect_probe")["probe"]
    except CheckpointError as error:
        raise refusal(path, error) from None
    head = _folded_head(path, probe, MAECT_EPSILON, model)
    if not model.encoder.final_norm:
        raise refusal(
            path, f"is on an encoder with a norm after its last block, which '{model.name}' lacks; give another"
        )
    origin = {"layout": "maect_probe", "license": NONE_STATED}
    return _with_head(path, model, head, _published_feature(path, model), Said(), origin)


def _published_feature(path: Path, model: Model) -> str:
    """The class token; for B/16 of MAE-CT, though not of its reimplementation of MAE, the mean of the patches.

    Source: MAE-CT (Lehner et al. 2023), released recipes of the probes.
    """
    reimplemented = any("mae_reimpl" in name.lower() for name in (path.name, model.name))
    return "mean" if model.encoder.width == 768 and not reimplemented else "cls"


def _folded_head(path: Path, probe: Mapping[str, np.ndarray], epsilon: float, model: Model) -> dict[str, np.ndarray]:
    """The folded head, after a look at its tensors."""
    mean, var, kernel, bias = (probe[name] for name in PROBE_TENSORS)
    if kernel.ndim == 2 and len(kernel) != model.encoder.width:
        raise refusal(
            path,
            f"is a head on {len(kernel)} channels; '{model.name}' has width {model.encoder.width}: give the probe of "
            "this encoder",
        )
    if kernel.ndim != 2 or (mean.shape, var.shape, bias.shape) != (kernel.shape[:1],) * 2 + (kernel.shape[1:],):
        raise refusal(path, "its tensors do not fit each other; make the probe again")
    numbers = all(jnp.issubdtype(x.dtype, jnp.floating) and np.isfinite(x).all() for x in (mean, var, kernel, bias))
    if not numbers or np.min(var) + epsilon <= 0:
        raise refusal(path, "holds values that are no finite numbers, or no variances; make the probe again")
    return folded(probe, epsilon)


def _with_head(
    path: Path, model: Model, head: dict[str, np.ndarray], pooling: str, facts: Said, origin: dict[str, str]
) -> Model:
    """The encoder as it is, and a linear head on it. Only the mean goes through `fc_norm`, where there is one."""
    kept = {name: part for name, part in model.params.items() if name != "fc_norm" or pooling == "mean"}
    with open(path, "rb") as file:
        origin = {"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()} | origin
    return replace(
        model,
        params=kept | {"head": head},
        pooling=pooling,
        classes=_classes(facts, len(head["bias"])),
        provenance=_with_origin(model.provenance, origin),
        **_pictures(facts, model),
    )


# --------------------------------------------------------------------------------------------------------- fine-tunings


def _finetuned(path: Path, model: Model) -> Model:
    folder = path.parent.parent if path.parent.name == "chosen" else path
    note = note_of_finetuning(folder)
    if path != folder and path.name != str(note.step):
        raise ConfigError(f"--head: '{path}' is not the epoch that was chosen; give '{folder}'")
    if note.feature not in ("cls", "mean", "fc_norm"):
        raise refusal(folder, f"is on the feature {note.feature!r}, which no fine-tuning has; fine-tune again")
    _check_encoder(folder, note, model)
    classifier = classifier_of(model.encoder, len(note.said.classes or ()), note.feature)
    step_folder = folder / "chosen" / str(note.step)
    params = _read_classifier(step_folder, classifier, model)
    if weights_hash(params) != note.sha256:
        raise refusal(step_folder, "does not hold the weights that were chosen; remove the folder and fine-tune again")
    return replace(
        model,
        encoder=classifier.encoder,
        decoder=None,
        params=params,
        pooling="cls" if note.feature == "cls" else "mean",
        classes=_classes(note.said, classifier.classes),
        normalised_pixels=None,
        provenance=_of_finetuning(folder, note, model),
        **_pictures(note.said, model),
    )


def _of_finetuning(folder: Path, note: Note, model: Model) -> Provenance:
    """Trained on from the encoder, which is named where it is none of a file that is named already."""
    kept = {"stage": note.preset, "recipe": note.protocol, "trained_on": note.trained_on}
    provenance = finetuned_from(model.provenance, note.encoder_sha256, **kept)
    origin = {"name": folder.name, "sha256": note.sha256, "layout": FINETUNED, "license": note.said.license or OWN}
    return _with_origin(replace(provenance, step=note.step), origin)


def _read_classifier(folder: Path, classifier, model: Model) -> dict:
    """Parameters of the chosen epoch, float32 on the host.

    Raises:
      CheckpointError: they can not be read, or are of another architecture.
    """
    values = classifier.encoder.patch**2 * model.channels
    patches_bnp = jnp.zeros((1, classifier.encoder.grid**2, values))
    wanted = jax.eval_shape(lambda: classifier.init(jax.random.key(0), patches_bnp)["params"])
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        params = read_arrays(folder, ("params",), device, "fine-tune again")["params"]
        compare_trees(params, wanted, "the classifier")
    except CheckpointError as error:
        raise refusal(folder, error) from None
    return jax.tree.map(np.asarray, params)


# ----------------------------------------------------------------------------------------------------------------- both


def _check_encoder(path: Path, note: Note, model: Model) -> None:
    """Raises CheckpointError when a head was not trained on this encoder."""
    mends = {name: f"give --{name.replace('_', '-')}={note.encoder[name]}" for name in ("heads", "image_size")}
    for name in SHAPE:
        own = getattr(model.encoder, name)
        if note.encoder[name] != own:
            mend = mends.get(name, "give the --weights that it was trained on")
            raise refusal(path, f"is for an encoder with {name} {note.encoder[name]}; '{model.name}' has {own}: {mend}")
    own = _sha256(model)
    if note.encoder_sha256 != own:
        raise refusal(
            path,
            f"was trained on other weights (SHA-256 {note.encoder_sha256[:12]}…) than '{model.name}' ({own[:12]}…); "
            "give those as --weights, or evaluate these",
        )


def _sha256(model: Model) -> str:
    """Hash of the parameters that features are made with, as in the records of evaluations."""
    fc_norm = {"fc_norm": model.params["fc_norm"]} if "fc_norm" in model.params else {}
    return weights_hash(model.params["encoder"] | fc_norm)


def _classes(facts: Said, count: int) -> tuple[str, ...]:
    names = facts.classes or ()
    return names if len(names) == count else ()


def _pictures(facts: Said, model: Model) -> dict[str, Any]:
    """How pictures became the input that the head was trained on, where that is said."""
    given = {name: getattr(facts, name) for name in ("mean", "std", "resize_ratio")}
    given = {name: value for name, value in given.items() if value is not None}
    return {name: value for name, value in given.items() if name == "resize_ratio" or len(value) == model.channels}


def _with_origin(provenance: Provenance, origin: dict[str, Any]) -> Provenance:
    """Made from one thing more, under the strictest licence."""
    head = Provenance(license=origin["license"], license_source=f"that of its head, {origin['name']}")
    license, source = strictest(provenance, head)
    return replace(provenance, license=license, license_source=source, derived_from=(origin, *provenance.derived_from))
