"""Prints what a checkpoint is: layout, architecture, stage, step, licence, tensors, hashes.

FILE is a weights file (.safetensors, .pth, .th, .npz), a folder with one in the form of timm or transformers, a run, a
stage of a run, or a checkpoint in it. A file that fits no layout is shown with all that keeps it from the nearest; the
exit status is 0 whenever the names and shapes of the tensors could be read. Nothing in a file is executed, no
accelerator is started, and of large files only the hash is taken.
"""

import argparse
import os
import sys

import jax

from maect_jax.errors import CheckpointError
from maect_jax.inspection.facts import as_json, facts_of
from maect_jax.inspection.text import as_text, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="weights file, or folder of a run, a stage or a checkpoint")
    parser.add_argument("--all", action="store_true", help="a line for each tensor, also of equal blocks")
    parser.add_argument("--json", action="store_true", help="the same facts, and every tensor, as one JSON object")


def main(arguments: argparse.Namespace) -> None:
    jax.config.update("jax_platforms", "cpu")  # Orbax asks JAX for its process, which starts all devices there are
    try:
        facts = facts_of(arguments.file)
    except CheckpointError as error:
        raise CheckpointError(printable(" ".join(str(error).split()))) from None
    text = as_json(facts) if arguments.json else as_text(facts, arguments.all)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough; what is left must not be written when Python ends either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
