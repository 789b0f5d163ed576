"""Lists every picture of a data set that can not be used, as JSON: each is read and decoded.

Of a packed folder the checksums of its files are compared as well. Exit status: 0 all are good, 3 some are bad.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from maect_jax.commands.data.pack import add_workers, check_workers
from maect_jax.data.packing.manifest import SPLITS, is_packed, write_atomically
from maect_jax.data.packing.splits import open_splits
from maect_jax.data.packing.verify import bad_files, bad_pictures
from maect_jax.errors import ConfigError, DataError, Preempted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="data set: whatever --config.data.train takes")
    add_reading(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", choices=SPLITS, help="only this one")
    channels = "of the decoded pictures: 1, 3 (the default), or as many as .npy files have"
    parser.add_argument("--channels", type=int, metavar="N", help=channels)
    add_workers(parser)
    parser.add_argument("--json", default="-", metavar="FILE", help="where to write it; - is standard output (default)")


def check_reading(arguments: argparse.Namespace) -> None:
    problems = check_workers(arguments)
    if arguments.channels is not None and arguments.channels < 1:
        problems.append(f"--channels {arguments.channels}: give 1 or more")
    if problems:
        raise ConfigError(problems)


def main(arguments: argparse.Namespace) -> None:
    check_reading(arguments)
    began = time.perf_counter()
    folder = Path(arguments.source).expanduser()
    try:
        bad = bad_files(folder, arguments.split) if is_packed(folder) else []
        counts, broken = {}, None
        try:
            sources = open_splits(arguments.source, split=arguments.split, channels=arguments.channels)
        except DataError as error:  # without a shard the ids of the pictures are not known
            if not bad:
                raise
            broken = error
        else:
            bad += bad_pictures(sources, arguments.workers)
            counts = {split: len(source) for split, source in sources.items()}
    except KeyboardInterrupt:
        raise Preempted("SIGINT; nothing was written") from None
    splits = {s: {"pictures": n, "bad": sum(b["split"] == s for b in bad)} for s, n in counts.items()}
    found = {"source": arguments.source, "splits": splits, "bad": bad, "seconds": round(time.perf_counter() - began, 3)}
    write_json(found, arguments.json)
    if broken:
        raise broken
    if bad:
        where = "" if arguments.json == "-" else f", listed in {arguments.json}"
        raise DataError(f"{len(bad)} of {sum(counts.values())} pictures of {arguments.source!r} are bad{where}")
    print(f"{sum(counts.values())} pictures, none bad", file=sys.stderr, flush=True)


def write_json(content: dict, to: str) -> None:
    """Writes to the file `to`, or prints where it is '-'."""
    text = json.dumps(content, indent=1)
    if to == "-":
        print(text, flush=True)
    else:
        write_atomically(Path(to).expanduser(), f"{text}\n".encode())
