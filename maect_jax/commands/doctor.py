"""Measures what this machine can feed, compares it with what the model eats, and says what to change.

Takes the same --config and --config.KEY=VALUE as launch.py, runs the loader of training for some seconds, and writes
nothing. The model is not run: what it eats follows from its operations a picture at half of the accelerator's peak.
"""

import argparse
import json
from dataclasses import asdict

from maect_jax import config as settings
from maect_jax import config_checks
from maect_jax.config import TRAINED
from maect_jax.data.host.decode import cores
from maect_jax.data.sources.open import open_source
from maect_jax.doctor import appetite, feed
from maect_jax.doctor.advice import advice
from maect_jax.doctor.packed import packed_gain
from maect_jax.errors import ConfigError
from maect_jax.parallel.mesh import batch_sharding, make_mesh


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="recipe, as for launch.py")
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure for")
    parser.add_argument("--accelerator", choices=tuple(appetite.PEAKS), help="instead of the devices of this machine")
    parser.add_argument("--devices", type=int, metavar="N", help="accelerators that one such host feeds")
    parser.add_argument("--json", action="store_true", help="the measurements and the advice as JSON")


def main(arguments: argparse.Namespace) -> None:
    overrides, problems = settings.read_overrides(arguments.settings)
    problems += [] if arguments.seconds > 0 else [f"--seconds {arguments.seconds}: must be positive"]
    problems += [] if (arguments.devices or 1) > 0 else [f"--devices {arguments.devices}: must be at least 1"]
    if problems:
        raise ConfigError(problems)
    config = settings.load(arguments.config, overrides)
    if problems := config_checks.check(config):
        raise ConfigError(problems)
    if not any(stage in TRAINED for stage in config.stages):
        raise ConfigError(f"config.stages = {tuple(config.stages)!r}: none of them is trained, so nothing is fed")
    source = open_source(config.data.train, "train", channels=config.model.channels)
    settings.derive(config, len(source))
    eater = appetite.accelerator(arguments.accelerator, arguments.devices)
    eats = appetite.images_per_second(config, eater)
    mesh = make_mesh()
    found = feed.measure(source, config, batch_sharding(mesh), arguments.seconds)
    gain = None if found.resident else packed_gain(source, config, found.short_side, arguments.seconds * 0.1)
    hungriest = max(eats.items(), key=lambda item: item[1])
    lines = advice(found, hungriest, config.data.train, len(source), source.channels, gain)
    if arguments.json:
        facts = {"feeds": asdict(found), "packed_gain": gain, "eats": eats, "accelerator": asdict(eater)}
        print(json.dumps(facts | {"advice": lines}, indent=2))
        return
    print(table(found, eats, eater, gain))
    print("\n".join(lines), flush=True)


def table(found: feed.Feed, eats: dict[str, float], eater: appetite.Accelerator, gain: float | None) -> str:
    """The measurements, a line each."""
    kind = "the devices hold the set" if found.resident else _loader(found.workers)
    rows = [(f"batches on the device, {kind}", found.pipeline, "")]
    if not found.resident:
        rows += [
            (f"the same, {_loader(found.other_workers)}", found.other_pipeline, ""),
            ("reading alone", found.read, f"{found.read * found.bytes_each / 1e6:,.0f} MB/s"),
            ("reading and decoding alone, threads, full size", found.decode, ""),
        ]
    if gain is not None:
        rows.append(("packed at short side 256 (projected)", found.pipeline * gain, f"{gain:.1f} x a picture"))
    lines = [f"this machine feeds ({cores()} cores)"]
    lines += [f"  {what:48} {rate:10,.0f} images/s  {more}".rstrip() for what, rate, more in rows]
    peak = f"{eater.peak / 1e12:,.1f} TFLOP/s" + (" in a matrix product here" if eater.measured else "")
    lines.append(f"the model eats, at {appetite.SHARE:.0%} of {eater.count} x {eater.name} ({peak})")
    lines += [f"  {stage:48} {rate:10,.0f} images/s" for stage, rate in eats.items()]
    return "\n".join(lines)


def _loader(workers: int) -> str:
    return f"{workers} loader processes" if workers else "threads"
