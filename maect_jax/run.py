"""One run: command line -> settings -> data -> devices -> stages -> report. Errors end it with one clear message."""

import argparse
import json
import os
import platform

import jax
import yaml
from etils import epath
from ml_collections import ConfigDict

from maect_jax import config as settings
from maect_jax import config_checks
from maect_jax.context import Run
from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.open import open_source
from maect_jax.errors import ConfigError, DataError
from maect_jax.handover import check_order
from maect_jax.parallel.mesh import make_mesh
from maect_jax.report.html import write_report
from maect_jax.results.record import software
from maect_jax.stages import run_stages
from maect_jax.terminal import guard, use_compilation_cache
from maect_jax.training.checkpoint import absolute, newest_step_folder, write_json
from maect_jax.training.logbook import Logbook
from maect_jax.training.stop import StopRequest

# Settings that may differ when a work folder is continued: they do not change what is learned.
FREE_TO_CHANGE = ("stages", "init_from", "allow_missing", "log_every", "checkpoint.", "evaluate.", "data.workers")
FREE_TO_CHANGE += ("data.resident_gib", "data.bad", "mesh.", "model.remat")


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""

    def action() -> None:
        config_path, workdir, overrides = parse(arguments)
        config = settings.load(config_path, overrides)
        if problems := config_checks.check(config):
            raise ConfigError(problems)
        run(config, workdir)

    return guard(action)


def parse(arguments: list[str]) -> tuple[str, str, dict[str, str]]:
    """Command line -> (recipe, work folder, overrides by dotted key).

    Raises:
      ConfigError: for everything that is missing or not understood.
    """
    parser = argparse.ArgumentParser(
        prog="launch.py",
        usage="launch.py --config=FILE[:VARIANT] --workdir=FOLDER [--config.KEY=VALUE …]",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config")
    parser.add_argument("--workdir")
    try:
        known, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None
    overrides, problems = settings.read_overrides(rest)
    problems += [] if known.config else ["--config=FILE is missing; for instance --config=configs/digits.py"]
    problems += [] if known.workdir else ["--workdir=FOLDER is missing; for instance --workdir=runs/digits"]
    if problems:
        raise ConfigError(problems)
    return known.config, known.workdir, overrides


def run(config: ConfigDict, workdir: str) -> epath.Path:
    """Runs all stages of a checked config in `workdir` and writes the report; returns its path.

    Raises:
      MaectError: everything a user can mend or must know.
    """
    with StopRequest() as stop:
        return _run(config, absolute(workdir), stop)


def _run(config: ConfigDict, root: epath.Path, stop: StopRequest) -> epath.Path:
    if root.exists() and not root.is_dir():
        raise ConfigError(f"--workdir: '{root}' is a file; give a folder")
    train, test = open_data(config)
    settings.derive(config, len(train))
    if problems := config_checks.check(config) or check_order(config, root):
        raise ConfigError(problems)
    data = {"train": train.digest(), "test": test.digest() if test else "none"}
    if has_begun(root):
        compare_with_earlier(config, data, root)
    stop.raise_if_requested("before anything was trained")
    use_compilation_cache()
    if problems := config_checks.check_devices(config, jax.device_count()):
        raise ConfigError(problems)
    leader = jax.process_index() == 0
    root.mkdir(parents=True, exist_ok=True)
    for stage in config.stages:
        (root / stage).mkdir(exist_ok=True)
    if leader:
        _write(root / "config.resolved.yaml", yaml.safe_dump(settings.plain(config), sort_keys=False))
        write_json(root / "environment.json", environment())
        write_json(root / "data.json", data)
    mesh = make_mesh(config.mesh.fsdp)
    logbook = Logbook(root, write=leader)
    try:
        run_stages(Run(config, root, mesh, train, test, logbook, stop, leader, bad_pictures(config, root)))
    finally:
        logbook.close()
    if not leader:
        return root / "report.html"
    report = write_report(root)
    print(report, flush=True)
    return report


def open_data(config: ConfigDict) -> tuple[Source, Source | None]:
    """Training and test pictures; the test set is None for a flat folder of unlabelled pictures alone.

    Raises:
      DataError: see `data.sources.open.open_source`; or fewer pictures than one batch of a stage.
    """
    channels = config.model.channels
    train = open_source(config.data.train, "train", channels=channels)
    trained = [stage for stage in config.stages if stage in settings.TRAINED]
    sections = dict.fromkeys("pretrain" if stage == "control" else stage for stage in trained)
    too_large = [f"config.{name}.batch = {config[name].batch}" for name in sections if config[name].batch > len(train)]
    if too_large:
        raise DataError(
            f"data.train: '{config.data.train}' has {len(train)} pictures, fewer than one batch; set "
            f"{', '.join(too_large)} to at most {len(train)}, or add pictures"
        )
    if not train.classes and not config.data.test:
        return train, None
    if not config.data.test:  # a split of its own, or an error: the training pictures are no test set
        return train, open_source(config.data.train, "test", channels=channels)
    return train, open_source(config.data.test, "test", channels=channels, classes=train.classes or None)


def bad_pictures(config: ConfigDict, root: epath.Path) -> BadPictures:
    """What the run does about pictures that can not be used; each process has a file of its own."""
    process = jax.process_index()
    name = f"bad_images.{process}.jsonl" if process else "bad_images.jsonl"
    return BadPictures(config.data.bad, config.data.bad_limit, root / name)


def has_begun(root: epath.Path) -> bool:
    """Whether a stage in the work folder has anything to lose."""
    return any(newest_step_folder(root / stage) is not None for stage in settings.TRAINED)


def compare_with_earlier(config: ConfigDict, data: dict, root: epath.Path) -> None:
    """Refuses to continue a work folder with other settings or other pictures than it was begun with.

    Raises:
      ConfigError: with each setting that differs. DataError: the pictures do.
    """
    mend = "use another folder, or what it was begun with"
    path = root / "config.resolved.yaml"
    earlier = settings.flatten(ConfigDict(yaml.safe_load(path.read_text()) or {})) if path.exists() else {}
    now = settings.flatten(ConfigDict(settings.plain(config)))
    if earlier:  # a setting that did not exist then was as it is by default, unless that follows from the data
        by_default = settings.flatten(ConfigDict(settings.plain(settings.default())))
        earlier = {key: value for key, value in by_default.items() if value is not None} | earlier
    differing = [key for key in earlier.keys() & now.keys() if earlier[key] != now[key]]
    problems = [
        f"--workdir: '{root}' holds a run with config.{key} = {earlier[key]!r}, not {now[key]!r}; {mend}"
        for key in sorted(differing)
        if not key.startswith(FREE_TO_CHANGE)
    ]
    if problems:
        raise ConfigError(problems)
    path = root / "data.json"
    begun_with = json.loads(path.read_text()) if path.exists() else data
    for split in data:
        if begun_with.get(split, data[split]) != data[split]:
            raise DataError(
                f"data.{split}: the run in '{root}' was begun with {begun_with[split]}, now there are {data[split]}; "
                f"sample ids and order would change: {mend}"
            )


def environment() -> dict:
    """Versions and devices of this run, for `environment.json`; nothing of the process's environment variables."""
    return {"platform": platform.platform(), "cpus": os.cpu_count()} | software()


def _write(path: epath.Path, text: str) -> None:
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text(text)
    temporary.replace(path)
