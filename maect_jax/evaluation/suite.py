"""Every asked-for evaluation on every set of weights; the numbers go to `results.jsonl` as soon as they are known.

What a protocol measures is in `protocols`; here each measurement becomes a record: with the transform, the types and
the hashes of the data it was made from, its bootstrap interval, and what it cost.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from etils import epath
from jax.sharding import Mesh

from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.open import open_source
from maect_jax.errors import ConfigError
from maect_jax.evaluation import data_checks, figures, presets, protocols
from maect_jax.evaluation.cache import FeatureCache
from maect_jax.evaluation.task import Measurement, Settings, Task, Weights, data_hash
from maect_jax.results.bootstrap import interval
from maect_jax.results.record import Record, add_records, weights_hash
from maect_jax.training.checkpoint import absolute, write_json
from maect_jax.training.stop import StopRequest

VERSION = 1  # of all presets together; another one where a protocol's numbers change


@dataclass(frozen=True)
class Place:
    """Where an evaluation runs and what it writes to.

    Attributes:
      mesh: devices.
      workdir: gets `results.jsonl`, `features/`, `figures/` and what an evaluation has to keep.
      stop: asked now and then.
      say: prints a line, on one process.
      leader: this process writes.
      bad: what is done about pictures that can not be used: 'skip' leaves them out of every number.
    """

    mesh: Mesh
    workdir: epath.Path
    stop: StopRequest
    say: Callable[[str], None]
    leader: bool = True
    bad: BadPictures = field(default_factory=BadPictures)


def evaluate(weights: Sequence[Weights], train: Source, test: Source, settings: Settings, place: Place) -> list[Record]:
    """Runs `settings.only` on each of the weights, whose parameters are read one after the other.

    Args:
      train, test: labelled pictures of the same classes.

    Returns:
      the records, in the order in which they were made.

    Raises:
      ConfigError: a setting that can not work. DataError: the data do not fit each other.
    """
    check_settings(settings)
    check_weights(weights)
    data_checks.check_classes(train, test)
    others = tuple(
        open_source(name, "test", channels=test.channels, classes=train.classes, key="--robustness")
        for name in settings.robustness
    )
    records: list[Record] = []
    for subject in weights:
        began = time.perf_counter()
        task = make_task(subject, train, test, settings, place, others)
        wanted = {name for evaluation in settings.only for name in protocols.needs(evaluation, task)}
        task.features([*sorted(wanted), subject.pooling])
        left_out = task.leave_out_bad()
        data = _describe(task, left_out, warn=not records)
        read, encoding = task.cached, round(time.perf_counter() - began, 3)
        for evaluation in settings.only:
            task.check()
            began, task.cached = time.perf_counter(), read
            found = list(protocols.EVALUATIONS[evaluation](task))
            cost = {
                "seconds": round(time.perf_counter() - began, 3),
                "features_seconds": encoding,
                "cache": task.cached,
            }
            for measured in found:
                if not np.isfinite(measured.value):
                    name = f"{measured.protocol['name']}: {measured.metric}"
                    place.say(
                        f"warning: {subject.stage}, {name} is not defined ({measured.value}): collapsed features?"
                    )
            defined = [measured for measured in found if np.isfinite(measured.value)]
            new = [_record(task, evaluation, measured, data, cost) for measured in defined]
            if place.leader and new:
                add_records(place.workdir / "results.jsonl", new)
            records += new
            for record in new:
                place.say(_line(record))
    return records


def picture_neighbors(weights: Iterable[Weights], train: Source, settings: Settings, place: Place) -> None:
    """Pictures of training pictures and their neighbours, where there is nothing labelled to test on."""
    for subject in weights:
        task = make_task(subject, train, train, settings, place)
        features = task.features([subject.pooling])
        if place.leader:
            figures.save_neighbors(task, *features)


def make_task(
    subject: Weights, train: Source, test: Source, settings: Settings, place: Place, others: tuple[Source, ...] = ()
) -> Task:
    """One set of weights with its parameters, ready for evaluations; `others` are further test sets."""
    params = subject.load()
    return Task(
        weights=subject,
        params=params,
        sha256=weights_hash(params),
        train=train,
        test=test,
        others=others,
        mesh=place.mesh,
        settings=settings,
        folder=place.workdir,
        cache=FeatureCache(place.workdir / "features", place.leader),
        stop=place.stop,
        say=place.say,
        leader=place.leader,
        bad=place.bad,
    )


def check_settings(settings: Settings) -> None:
    """Everything that can be known before pictures are opened.

    Raises:
      ConfigError: an evaluation or preset that does not exist, with the nearest that does; 'robustness' without test
        sets, or before what it applies; a folder of lists that is none.
    """
    problems = protocols.unknown("--only", settings.only, protocols.EVALUATIONS)
    problems += protocols.unknown("--preset", [settings.preset], presets.PRESETS)
    problems += protocols.unusable_robustness(settings.only, settings.robustness)
    if settings.lists and not absolute(settings.lists).is_dir():
        problems.append(f"--lists: '{settings.lists}' is no folder; give the one that holds the split lists")
    if problems:
        raise ConfigError(problems)


def check_weights(weights: Sequence[Weights]) -> None:
    """Raises ConfigError when two of them have one name, as their results would, or take unlike pictures."""
    names = [subject.stage for subject in weights]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(
            f"--weights: two of them are called '{doubled[0]}', and so would be their results; evaluate them alone,"
            " each with a --workdir of its own"
        )
    if len({subject.channels for subject in weights}) > 1:
        raise ConfigError("--weights: some take grey pictures and some coloured ones; evaluate them one by one")


def _describe(task: Task, left_out: dict[str, int], warn: bool) -> dict:
    """What a record says of the data; checks it, and writes `shared.json` for the report.

    Args:
      left_out: pictures of 'train' and 'test' that can not be used; see `Task.leave_out_bad`.
      warn: say which test pictures are also training pictures.

    Raises:
      DataError: see `data_checks.check_labels`.
    """
    sources, features = {"train": task.train, "test": task.test}, task.features([task.weights.pooling])
    for (what, source), found in zip(sources.items(), features):
        data_checks.check_labels(what, source, found.labels)
    shared = data_checks.shared_pictures(*features)
    if len(shared) and warn:
        ids = features[0].ids, features[1].ids
        task.say("warning: " + data_checks.describe_shared(task.train, task.test, shared, ids))
    if task.leader:
        write_json(task.folder / "shared.json", {"shared": len(shared), "test_pictures": len(features[1].ids)})
    data = {
        what: {"name": source.name, "rows": len(found.ids), "hash": data_hash(found)}
        for (what, source), found in zip(sources.items(), features)
    }
    data["test"]["shared_with_train"] = len(shared)
    for what, count in left_out.items():
        if count:
            data[what]["bad_pictures"] = count
    return data


def _record(task: Task, evaluation: str, measured: Measurement, data: dict, cost: dict) -> Record:
    weights = task.weights
    protocol = {"version": VERSION} | measured.protocol
    protocol |= {"classes": len(task.classes), "transform": task.transform(), "dtype": task.dtypes()}
    protocol |= data | ({"test": measured.test} if measured.test else {})
    per_picture = measured.per_picture
    return Record(
        stage=weights.stage,
        seed=weights.seed,
        evaluation=evaluation,
        metric=measured.metric,
        value=float(measured.value),
        unit=measured.unit,
        interval=None if per_picture is None else interval(np.asarray(per_picture, np.float64)),
        std=None if measured.std is None else float(measured.std),
        values=None if measured.values is None else [float(value) for value in measured.values],
        protocol=protocol,
        found=measured.found,
        weights={"sha256": task.sha256} | weights.origin,
        model=task.shape(),
        cost=cost,
    )


def _line(record: Record) -> str:
    percent = record.unit == "fraction"

    def show(value: float) -> str:
        return f"{100 * value:.1f}" if percent else f"{value:.4g}"

    text = f"evaluate {record.stage:9} {record.protocol['name']:28} {record.metric} {show(record.value)}"
    text += " %" if percent else ""
    if record.interval:
        text += f"  [{show(record.interval[0])}, {show(record.interval[1])}]"
    return text + (f"  ± {show(record.std)}" if record.std is not None else "")
