"""Writes weights in the form of another library: timm, transformers, official MAE or MAE-CT names, ONNX.

The new folder holds the weights, config.json, preprocessor_config.json and a model card README.md. Where the library is
installed it runs both models on fixed pictures and writes the difference into the card.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from maect_jax.commands.evaluate import add_reading, check_counts, instead_of
from maect_jax.errors import ConfigError
from maect_jax.exchange import provenance
from maect_jax.exchange.export.package import DTYPES, write_package
from maect_jax.exchange.export.proof import Proof
from maect_jax.exchange.export.targets import TARGETS
from maect_jax.exchange.heads import find_head, open_head
from maect_jax.exchange.model import Model
from maect_jax.parallel.mesh import make_mesh
from maect_jax.portable import Portable, encoder_only, open_portable
from maect_jax.terminal import use_compilation_cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, metavar="FORM", help=", ".join(TARGETS))
    weights = "run (its last stage), a stage or checkpoint in it, or anybody's weights file or folder"
    parser.add_argument("--weights", required=True, metavar="PATH", help=weights)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder to write")
    head = "classifier: 'probe' or 'finetuned' (newest of the run), or a probe's file, or a fine-tuning's folder"
    parser.add_argument("--head", metavar="WHICH", help=head)
    parser.add_argument("--encoder-only", action="store_true", help="leave out decoder and head")
    parser.add_argument("--raw", action="store_true", help="of a tuned run: not the moving average of the weights")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the written tensors")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="instead of the model's own")
    parser.add_argument("--pooling", choices=("cls", "mean"), help="instead of the model's own feature")
    parser.add_argument("--pixels", choices=("normalised", "plain"), help="what a decoder in a file predicts")
    add_reading(parser)
    parser.add_argument("--decoder-heads", type=int, metavar="N", help="of a decoder in a file, as --heads")
    parser.add_argument("--license", metavar="ID", default="", help="that you state for these weights (SPDX)")
    parser.add_argument(
        "--license-reason", metavar="TEXT", default="", help="why you may; needed to state a looser one"
    )
    parser.add_argument("--no-proof", action="store_true", help="do not run the written model")


def main(arguments: argparse.Namespace) -> None:
    check_counts(arguments)
    if arguments.to not in TARGETS:
        raise ConfigError(f"--to '{arguments.to}': choose from {', '.join(TARGETS)}")
    use_compilation_cache()
    instead = replace(instead_of(arguments), dtype=None)  # --dtype is that of the written tensors here
    options = {"raw": arguments.raw, "decoder_heads": arguments.decoder_heads}
    mesh = make_mesh(devices=jax.devices()[:1])
    found = open_portable(arguments.weights, mesh, instead, **options)
    for note in found.notes:
        print(f"note: {note}", flush=True)
    target = TARGETS[arguments.to]
    model = chosen(found, arguments)
    target.check(model)
    proof = write_package(
        model,
        target,
        Path(arguments.out),
        records=list(found.records),
        notes=found.notes,
        dtype=arguments.dtype,
        prove=not arguments.no_proof,
    )
    print(describe(proof, target.loader), flush=True)
    print(arguments.out, flush=True)


def chosen(found: Portable, arguments: argparse.Namespace) -> Model:
    """The model with the parts and the licence that the command line asks for."""
    model = found.model
    if arguments.pixels:
        if model.decoder is None or found.run is not None:
            why = "is a run, which knows" if found.run is not None else "has no decoder"
            raise ConfigError(f"--pixels: '{arguments.weights}' {why}; leave it out")
        model = replace(model, normalised_pixels=arguments.pixels == "normalised")
    if arguments.encoder_only or arguments.head:
        model = encoder_only(model)
    if arguments.pooling and (arguments.head or model.has_head):
        raise ConfigError(
            f"--pooling: the classifier is on the feature that it was trained with; leave it out"
            f"{'' if arguments.head else ', or take the encoder alone with --encoder-only'}"
        )
    if arguments.head:
        path = arguments.head
        if path in ("probe", "finetuned"):
            if found.run is None:
                raise ConfigError(f"--head {path}: '{arguments.weights}' is no run; give the head's file")
            path = find_head(found.run, path, model)
        model = open_head(path, model)
    stated = provenance.stated(model.provenance, arguments.license, arguments.license_reason)
    return replace(model, provenance=stated, params=jax.tree.map(np.asarray, model.params))


def describe(proof: Proof, library: str) -> str:
    """One line on how far the written model is from ours."""
    if proof.differences is None:
        return f"not checked against {library}: {proof.reason}"
    largest = max(proof.differences, key=lambda name: proof.differences[name])
    return (
        f"checked against {library}: largest relative difference {proof.differences[largest]:.1e} "
        f"({', '.join(proof.differences)})"
    )
