"""Counts a data set: pictures a class, sizes, forms, mean and std of the channels, duplicates in and between splits.

The numbers come as JSON, and the most important ones as a table with the settings to paste for a run on this set.
"""

import argparse
import time

from rich.console import Console
from rich.table import Table

from maect_jax.commands.data.verify import add_reading, check_reading, write_json
from maect_jax.data.packing.splits import open_splits
from maect_jax.data.packing.stats import statistics
from maect_jax.errors import Preempted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="data set: whatever --config.data.train takes")
    add_reading(parser)


def main(arguments: argparse.Namespace) -> None:
    check_reading(arguments)
    began = time.perf_counter()
    try:
        sources = open_splits(arguments.source, split=arguments.split, channels=arguments.channels)
        found = statistics(sources, arguments.workers)
    except KeyboardInterrupt:
        raise Preempted("SIGINT; nothing was written") from None
    found = {"source": arguments.source} | found | {"seconds": round(time.perf_counter() - began, 3)}
    write_json(found, arguments.json)
    show(found, Console(stderr=arguments.json == "-", soft_wrap=True, highlight=False))


def show(found: dict, console: Console) -> None:
    """The table, and what to paste."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    splits = found["splits"]
    for split in splits:
        table.add_column(split, justify="right")
    for name, value in _LINES.items():
        table.add_row(name, *(value(split) for split in splits.values()))
    duplicates = found["duplicate_counts"]
    table.add_row("duplicates", *(str(duplicates[split]) for split in splits))
    console.print(table)
    if duplicates.get("between"):
        console.print(f"{duplicates['between']} pictures of the test split are in the training split too", markup=False)
    first = next(iter(splits.values()))
    if first["mean"]:
        console.print(" ".join(f"--config.data.{key}={_tuple(first[key])}" for key in ("mean", "std")), markup=False)


def _tuple(values: list[float]) -> str:
    """As the command line of a run takes it."""
    return ",".join(f"{value:.4f}" for value in values)


def _spread(values: dict) -> str:
    return "-" if values["min"] is None else f"{values['min']} / {values['median']:g} / {values['max']}"


_LINES = {
    "pictures": lambda s: str(s["pictures"]),
    "classes": lambda s: str(len(s["classes"])),
    "pictures a class": lambda s: (
        f"{min(s['classes'].values())}..{max(s['classes'].values())}" if s["classes"] else "-"
    ),
    "without a label": lambda s: str(s["unlabelled"]),
    "bad": lambda s: str(len(s["bad"])),
    "height (min / median / max)": lambda s: _spread(s["height"]),
    "width": lambda s: _spread(s["width"]),
    "bytes": lambda s: _spread(s["bytes"]),
    "forms": lambda s: ", ".join(
        f"{form} {100 * n / sum(s['forms'].values()):.3g}%" for form, n in list(s["forms"].items())[:4]
    ),
    "16 bit": lambda s: str(s["sixteen_bit"]),
}
