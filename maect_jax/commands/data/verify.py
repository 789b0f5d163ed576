"""Lists every picture of a data set that can not be used, as JSON: each is read and decoded.

Of a packed folder the checksums of its files are compared as well. Where a split does not open, its damaged archives
or shards are listed, and its pictures are looked at as far as a packed folder still has them. An entry without id is
a file. Exit status: 0 all are good, 3 some are bad.
"""

import argparse
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from maect_jax.commands.data.pack import add_workers, check_workers
from maect_jax.data.packing.damage import damaged_files
from maect_jax.data.packing.manifest import SPLITS, is_packed, write_atomically
from maect_jax.data.packing.splits import open_each
from maect_jax.data.packing.verify import bad_pictures
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.records import open_intact
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
    if arguments.json != "-":
        path = Path(arguments.json).expanduser()
        if not path.parent.is_dir():
            problems.append(f"--json {arguments.json}: there is no folder {str(path.parent)!r}; make it first")
        elif path.is_dir():
            problems.append(f"--json {arguments.json}: is a folder; give the name of a file")
    if problems:
        raise ConfigError(problems)


def main(arguments: argparse.Namespace) -> None:
    check_reading(arguments)
    began = time.perf_counter()
    try:
        sources, failed = open_each(arguments.source, split=arguments.split, channels=arguments.channels)
        files = damaged_files(arguments.source, arguments.split, failed)
        ids = _add_intact(sources, failed, files, arguments)
        pictures = bad_pictures(sources, arguments.workers)
    except KeyboardInterrupt:
        raise Preempted("SIGINT; nothing was written") from None
    for bad in pictures:
        if bad["split"] in ids:
            bad["id"] = int(ids[bad["split"]][bad["id"]])
    splits = {
        split: {
            "pictures": len(sources.get(split, ())),
            "bad": _of(pictures, split),
            "bad_files": _of(files, split),
        }
        for split in SPLITS
        if split in sources or split in failed
    }
    found = {"source": arguments.source, "splits": splits, "bad": files + pictures}
    write_json(found | {"seconds": round(time.perf_counter() - began, 3)}, arguments.json)
    total = sum(map(len, sources.values()))
    if files or pictures:
        if not sources and len(files) == 1:
            raise next(iter(failed.values()))
        counts = [f"{len(pictures)} of {total} pictures"] if sources else []
        counts += [f"{len(files)} file{'s' if len(files) > 1 else ''}"] if files else []
        where = "" if arguments.json == "-" else f", listed in {arguments.json}"
        first = (files + pictures)[0]
        raise DataError(f"{arguments.source!r}: {' and '.join(counts)} bad{where}; {first['path']}: {first['reason']}")
    print(f"{total} pictures, none bad", file=sys.stderr, flush=True)


def _add_intact(sources: dict[str, Source], failed: dict[str, DataError], files: list[dict], arguments) -> dict:
    """Adds what is left of splits of a packed folder that lack a shard; ids of these pictures, int64 [n], by split."""
    folder, ids = Path(arguments.source).expanduser(), {}
    lacking = {bad["split"] for bad in files if bad["path"].endswith(".array_record")} if is_packed(folder) else set()
    for split in lacking & failed.keys():
        with suppress(DataError):  # nothing is left
            sources[split], ids[split] = open_intact(folder, split, arguments.channels)
    return ids


def _of(found: list[dict], split: str) -> int:
    return sum(bad["split"] == split for bad in found)


def write_json(content: dict, to: str) -> None:
    """Writes to the file `to`, or prints where it is '-'."""
    text = json.dumps(content, indent=1)
    if to == "-":
        print(text, flush=True)
    else:
        write_atomically(Path(to).expanduser(), f"{text}\n".encode())
