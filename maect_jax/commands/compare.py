"""Prints the numbers of two or more evaluations side by side; refuses unlike protocols."""

import argparse

from maect_jax.results.compare import compare, read_column


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = "work folder or results.jsonl, and after a colon the stage: runs/digits:tune"
    parser.add_argument("first", metavar="A", help=where)
    parser.add_argument("others", metavar="B", nargs="+", help="the same, of what to compare with")
    parser.add_argument("--anyway", action="store_true", help="show unlike protocols too, with the fields that differ")


def main(arguments: argparse.Namespace) -> None:
    columns = [read_column(where) for where in (arguments.first, *arguments.others)]
    print(compare(columns, arguments.anyway))
