"""Packs a data set into a few large files of records, read in any order without a look-up for each picture.

The new folder is a data set like any other: --config.data.train=DST. It holds ArrayRecord shards, in which each record
has a checksum, and manifest.json. Started again after an interruption it goes on with the shards that are missing.
"""

import argparse
from pathlib import Path

from maect_jax.data.host.decode import cores
from maect_jax.data.packing.pack import pack
from maect_jax.data.packing.plan import Settings
from maect_jax.data.packing.splits import open_splits
from maect_jax.errors import ConfigError, DataError, Preempted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="data set: whatever --config.data.train takes")
    parser.add_argument("folder", metavar="DST", help="new folder; or the one of a packing that was interrupted")
    side = "make pictures smaller whose shorter side is longer; others stay as they are, to the byte"
    parser.add_argument("--short-side", type=int, metavar="PIXELS", help=side)
    quality = "of the JPEGs that --short-side makes, 1..100 (92)"
    parser.add_argument("--quality", type=int, default=92, metavar="Q", help=quality)
    parser.add_argument("--shard-mb", type=int, default=256, metavar="MB", help="size of a shard, about (256)")
    add_workers(parser)
    bad = "pictures that can not be decoded: left out and listed in the manifest (skip), or the end (error)"
    parser.add_argument("--bad", choices=("skip", "error"), default="skip", help=bad)


def add_workers(parser: argparse.ArgumentParser) -> None:
    text = "processes (one a CPU core); 0 = none but this one"
    parser.add_argument("--workers", type=int, default=cores(), metavar="N", help=text)


def check_workers(arguments: argparse.Namespace) -> list[str]:
    return [f"--workers {arguments.workers}: give 0 or more"] if arguments.workers < 0 else []


def main(arguments: argparse.Namespace) -> None:
    problems = check_workers(arguments)
    if not 1 <= arguments.quality <= 100:
        problems.append(f"--quality {arguments.quality}: give 1..100")
    if arguments.short_side is not None and arguments.short_side < 1:
        problems.append(f"--short-side {arguments.short_side}: give 1 or more")
    if arguments.shard_mb < 1:
        problems.append(f"--shard-mb {arguments.shard_mb}: give 1 or more")
    if problems:
        raise ConfigError(problems)
    source, folder = Path(arguments.source).expanduser(), Path(arguments.folder).expanduser()
    if source.exists() and folder.resolve().is_relative_to(source.resolve()):
        raise DataError(f"DST {str(folder)!r} is or lies in SRC {str(source)!r}; choose a folder of its own")
    settings = Settings(arguments.short_side, arguments.quality, arguments.shard_mb)
    skip = arguments.bad == "skip"
    try:
        sources = open_splits(arguments.source)
        print(pack(arguments.source, sources, folder, settings, skip=skip, workers=arguments.workers), flush=True)
    except KeyboardInterrupt:
        raise Preempted("SIGINT; the same command goes on with the shards that are missing") from None
