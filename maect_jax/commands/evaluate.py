"""Measures weights on labelled pictures: k-NN, probes, low-shot, clustering, fine-tuning and more.

Numbers are added to results.jsonl in the work folder, with a report beside it; features are cached there, so that a
second call reads them.
"""

import argparse
import math
from dataclasses import dataclass, fields

import jax
from etils import epath

from maect_jax.config import default
from maect_jax.data.batches.bad import LIMIT, POLICIES, BadPictures
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.open import open_source
from maect_jax.errors import ConfigError
from maect_jax.evaluation import presets, protocols, suite
from maect_jax.evaluation.task import DTYPES, PROBE_FROM, QUICK, Settings
from maect_jax.parallel.mesh import make_mesh
from maect_jax.report.html import write_report
from maect_jax.terminal import use_compilation_cache
from maect_jax.trained import run_folder, run_settings
from maect_jax.training.checkpoint import absolute
from maect_jax.training.stop import StopRequest
from maect_jax.weights import Instead, open_weights

SHARES = ("finetune_base_lr", "finetune_ema", "bad_limit")  # numbers between 0 and 1; all others count something


def add_arguments(parser: argparse.ArgumentParser) -> None:
    weights = "work folder of a run, a stage or checkpoint in it, or a weights file (.safetensors, .pth, .th)"
    parser.add_argument("--weights", nargs="+", required=True, metavar="PATH", help=weights)
    data = "'digits', a folder of class folders, or a TFDS name; without it the run's own"
    parser.add_argument("--train", metavar="DATA", help=f"training pictures: {data}")
    parser.add_argument("--test", metavar="DATA", help="test pictures; without it those of --train")
    names = ", ".join(protocols.EVALUATIONS)
    parser.add_argument("--only", metavar="NAME,…", help=f"of {names}; without it {', '.join(QUICK)}")
    parser.add_argument("--preset", default="maect", help=f"whose protocols: {', '.join(presets.PRESETS)}")
    parser.add_argument("--workdir", metavar="FOLDER", help="results go there; without it the run's own, or runs/…")
    parser.add_argument("--robustness", metavar="DATA,…", help="further test sets for the unchanged linear probe")
    parser.add_argument("--lists", metavar="FOLDER", default="", help="official split lists (docs/evaluation.md)")
    add_instead(parser)
    parser.add_argument("--feature-dtype", choices=tuple(DTYPES), default="float32", help="of cached features")
    parser.add_argument("--batch", type=int, default=256, help="pictures at a time, over all devices")
    parser.add_argument("--workers", type=int, default=0, help="loader processes; 0 = threads")
    add_bad(parser)
    parser.add_argument("--limit", type=int, default=10_000, help="pictures that costly analyses look at")
    parser.add_argument("--probe-from", choices=PROBE_FROM, default="features", help="images: augmented")
    parser.add_argument("--probe-epochs", type=int, metavar="N", help="instead of the preset's")
    parser.add_argument("--probe-batch", type=int, metavar="N", help="instead of the preset's")
    parser.add_argument("--finetune-epochs", type=int, metavar="N", help="instead of the recipe's")
    parser.add_argument("--finetune-batch", type=int, metavar="N", help="instead of the recipe's")
    parser.add_argument("--finetune-base-lr", type=float, metavar="X", help="instead of the recipe's, for small data")
    parser.add_argument(
        "--finetune-ema", type=float, metavar="X", help="evaluate an average of the weights, 0.9999 say"
    )
    parser.add_argument("--fsdp", type=int, default=1, help="devices that share one copy in fine-tuning")


def add_instead(parser: argparse.ArgumentParser) -> None:
    """Options that stand for what the weights themselves say; see `weights.Instead`."""
    parser.add_argument("--pooling", choices=("cls", "mean"), help="instead of the model's own feature")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="instead of the model's own")
    parser.add_argument(
        "--resize-ratio", type=float, metavar="X", help="shorter side over picture size before the crop"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the encoder's computation")
    add_reading(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Options on what a weights file does not tell, or lacks."""
    parser.add_argument("--heads", type=int, metavar="N", help="of an encoder in a file whose width does not tell them")
    values = "of the pictures, a value a channel, for values in 0..1; where the file and what lies beside it do not say"
    parser.add_argument("--mean", metavar="X,…", help=values)
    parser.add_argument("--std", metavar="X,…", help=values)
    parser.add_argument("--allow-missing", metavar="PART,…", help="that a file may lack: 'decoder/*', 'encoder/norm/*'")


def instead_of(arguments: argparse.Namespace) -> Instead:
    """The options of `add_instead`."""
    given = {field.name: getattr(arguments, field.name, None) for field in fields(Instead)}
    given |= {name: _numbers_of(name, given[name]) for name in ("mean", "std")}
    return Instead(**given | {"allow_missing": names_of(given["allow_missing"])})


def _numbers_of(option: str, text: str | None) -> tuple[float, ...] | None:
    try:
        values = tuple(float(value) for value in names_of(text))
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(value) and (value > 0 or option == "mean") for value in values):
        raise ConfigError(f"--{option} '{text}': must be numbers with commas between, a channel each")
    return values or None


@dataclass(frozen=True)
class Data:
    """Names of the training and test pictures, and where results go."""

    train: str
    test: str
    workdir: epath.Path


def main(arguments: argparse.Namespace) -> None:
    check_counts(arguments)
    settings = settings_of(arguments)
    suite.check_settings(settings)
    data = data_of(arguments.weights, arguments.train, arguments.test, arguments.workdir)
    use_compilation_cache()
    check_devices(arguments.fsdp, arguments.batch)
    mesh = make_mesh(arguments.fsdp)
    instead = instead_of(arguments)
    subjects = [subject for path in arguments.weights for subject in open_weights(path, mesh, instead)]
    train, test = open_pair(data, subjects[0].channels)
    leader = jax.process_index() == 0
    data.workdir.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        if leader:
            print(text, flush=True)

    for note in dict.fromkeys(note for subject in subjects for note in subject.origin.get("notes", ())):
        say(f"note: {note}")
    with StopRequest() as stop:
        bad = bad_pictures(arguments, data.workdir)
        suite.evaluate(subjects, train, test, settings, suite.Place(mesh, data.workdir, stop, say, leader, bad))
    if leader:
        print(write_report(data.workdir), flush=True)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The command line as settings of the suite; other test sets bring the evaluation that uses them."""
    only, robustness = names_of(arguments.only) or QUICK, names_of(arguments.robustness)
    if robustness and "robustness" not in only:
        only = (*only, "robustness")
    return Settings(
        only=only,
        preset=arguments.preset,
        batch=arguments.batch,
        workers=arguments.workers,
        limit=arguments.limit,
        feature_dtype=arguments.feature_dtype,
        probe_epochs=arguments.probe_epochs,
        probe_batch=arguments.probe_batch,
        probe_from=arguments.probe_from,
        finetune_epochs=arguments.finetune_epochs,
        finetune_batch=arguments.finetune_batch,
        finetune_base_lr=arguments.finetune_base_lr,
        finetune_ema=arguments.finetune_ema,
        lists=arguments.lists,
        robustness=robustness,
    )


def add_bad(parser: argparse.ArgumentParser) -> None:
    """What is done about pictures that can not be used."""
    parser.add_argument("--bad", choices=POLICIES, default="skip", help="leave unusable pictures out, or end")
    parser.add_argument("--bad-limit", type=float, default=LIMIT, metavar="SHARE", help="that may be left out")


def bad_pictures(arguments: argparse.Namespace, folder: epath.Path) -> BadPictures:
    """As the command line asks; they are noted in the folder."""
    return BadPictures(arguments.bad, arguments.bad_limit, folder / "bad_images.jsonl")


def check_counts(arguments: argparse.Namespace) -> None:
    """Raises ConfigError with every number on the command line that can not be."""
    values = {name: value for name, value in vars(arguments).items() if isinstance(value, int | float)}
    values = {name: value for name, value in values.items() if not isinstance(value, bool)}
    least = {"workers": 0, "resize_ratio": 1}
    problems = [
        f"--{name.replace('_', '-')} {value}: must be at least {least.get(name, 1)}"
        for name, value in values.items()
        if name not in SHARES and not value >= least.get(name, 1)
    ]
    problems += [
        f"--{name.replace('_', '-')} {values[name]}: must lie between 0 and 1"
        for name in SHARES
        if name in values and not 0 < values[name] < 1
    ]
    if problems:
        raise ConfigError(problems)


def names_of(text: str | None) -> tuple[str, ...]:
    """'knn, linear' -> ('knn', 'linear')."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def data_of(weights: list[str], train: str | None, test: str | None, workdir: str | None) -> Data:
    """Which pictures, and where results go, when the command line leaves some of it open.

    A run knows its pictures, and its results stand in its own folder; results on other pictures stand below it, those
    of a weights file in `runs/<file>/<data>`.

    Raises:
      ConfigError: a weights file without --train.
    """
    root = run_folder(weights[0])
    own = run_settings(root) if root is not None else default()
    if not train and root is None:
        raise ConfigError(f"--train is missing: '{weights[0]}' is not a run that knows its pictures; give --train=DATA")
    is_own = root is not None and train in (None, own.data.train) and test in (None, own.data.test, own.data.train)
    name = epath.Path(train or own.data.train).name
    if workdir:
        folder = absolute(workdir)
    elif root is not None:
        folder = root if is_own else root / "transfer" / name
    else:
        folder = absolute("runs") / epath.Path(weights[0]).stem / name
    train_name = train or own.data.train
    return Data(train_name, test or (own.data.test if is_own else "") or train_name, folder)


def open_pair(data: Data, channels: int) -> tuple[Source, Source]:
    """Training and test pictures.

    Raises:
      DataError: see `data.sources.open.open_source`.
    """
    train = open_source(data.train, "train", channels=channels, key="--train")
    return train, open_source(data.test, "test", channels=channels, classes=train.classes or None, key="--test")


def check_devices(fsdp: int, batch: int) -> None:
    """Raises ConfigError when the devices do not divide."""
    devices = jax.device_count()
    if devices % fsdp:
        raise ConfigError(f"--fsdp {fsdp}: must divide the {devices} devices")
    if batch % devices:
        near = devices * max(1, round(batch / devices))
        raise ConfigError(f"--batch {batch}: the {devices} devices must divide it; for instance {near}")
