"""Works on data sets: prepares them, packs them into records, looks for bad files, counts.

`python -m maect_jax data COMMAND --help` tells what each command takes.
"""

import argparse

from maect_jax.commands.data import pack, prepare, stats, verify
from maect_jax.terminal import Parser

COMMANDS = {"prepare": prepare, "pack": pack, "verify": verify, "stats": stats}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="data_command", required=True, parser_class=Parser, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary, _, more = module.__doc__.partition("\n")
        module.add_arguments(commands.add_parser(name, help=summary, description=summary + more))


def main(arguments: argparse.Namespace) -> None:
    COMMANDS[arguments.data_command].main(arguments)
