"""The numbers of a run: a group an evaluation, a row a protocol, a column a stage.

Numbers stand in one row only if all settings of their protocols are equal. Where one name was run with several
settings, each has a row of its own that says in what it differs.
"""

import json
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from maect_jax.report import charts
from maect_jax.report.files import number, order_stages
from maect_jax.report.names import RAW, column_names

EVALUATIONS = {  # in the order in which they are shown; others follow under their own names
    "knn": "Nearest neighbours vote (k-NN)",
    "linear": "Linear probe",
    "logreg": "Few labels: logistic regression",
    "ridge": "Few labels: ridge regression",
    "finetune": "Fine-tuning",
    "robustness": "Robustness: classifiers, unchanged, on other test sets",
    "cluster": "Clusters found without labels (k-means)",
    "retrieval": "Retrieval: pictures of the same class among the nearest",
    "health": "Health of the features: neither direction is better by itself",
    "colour": "Colours still readable from the features",
}
METRICS = {
    "acc": "accuracy, clusters matched with classes",
    "nmi": "NMI",
    "ami": "AMI",
    "ari": "ARI",
    "davies_bouldin": "Davies–Bouldin index",
    "map": "mAP",
    "embedding_std": "standard deviation",
}
LOWER_IS_BETTER = frozenset({"loss", "error", "mce", "ece", "davies_bouldin", "colour"})
# Not better in either direction. All of 'health' also describes collapsed features well when read alone; inertia is
# measured in each encoder's own space.
NO_BEST = frozenset({"health", "inertia"})
LAYERS = "knn_layers"
CHOSEN = ("base_rate", "epoch")  # of what schema 1 wrote under 'protocol', no setting but what was found
MAX_FIELDS = 6  # named in a note
MAX_TEXT = 160  # characters of a setting; a table of all heads of a probe stays in results.jsonl


@dataclass(frozen=True)
class Entry:
    """One line of `results.jsonl`, in the shape of schema 2; `protocol` is flat, its values JSON."""

    stage: str
    seed: str
    evaluation: str
    metric: str
    value: float
    unit: str | None
    interval: tuple[float, float] | None
    std: float | None
    repeats: int
    name: str
    protocol: dict[str, str]
    found: dict[str, Any]
    weights: dict[str, str]


def read_entries(records: Iterable[dict[str, Any]]) -> list[Entry]:
    """The newest number of each stage, seed, evaluation, metric, protocol name and test set, as they first appear."""
    newest: dict[tuple[str, ...], Entry] = {}
    for record in records:
        if entry := _entry(record):
            test = entry.protocol.get("test")
            test = test.get("name") if isinstance(test, dict) else test
            newest[entry.stage, entry.seed, entry.evaluation, entry.metric, entry.name, str(test)] = entry
    return list(newest.values())


def _entry(record: dict[str, Any]) -> Entry | None:
    """A record as an entry, None where it holds no number; an unexpected part of it counts as not there."""

    def mapping(key: str) -> dict[str, Any]:
        return dict(record[key]) if isinstance(record.get(key), dict) else {}

    if (value := number(record.get("value"))) is None:
        return None
    protocol, found = mapping("protocol") or {"name": record.get("protocol")}, mapping("found")
    if number(record.get("schema")) is None:
        found |= {key: protocol.pop(key) for key in CHOSEN if key in protocol}
    older = {"sha256": record.get("weights"), "step": record.get("step")}
    weights = mapping("weights") or {key: value for key, value in older.items() if value is not None}
    bounds = record.get("interval")
    bounds = [number(bound) for bound in bounds] if isinstance(bounds, list) else []
    return Entry(
        stage=str(record.get("stage") or "unknown stage"),
        seed=str(record.get("seed", "–")),
        evaluation=str(record.get("evaluation") or ""),
        metric=str(record.get("metric") or ""),
        value=value,
        unit=record["unit"] if isinstance(record.get("unit"), str) else None,
        interval=tuple(bounds) if len(bounds) == 2 and None not in bounds else None,
        std=number(record.get("std")),
        repeats=len(record["values"]) if isinstance(record.get("values"), list) else 0,
        name=str(protocol.get("name") or ""),
        protocol=_flat(protocol),
        found=found,
        weights=_flat(weights),
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> text of the value."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def _variants(entries: Iterable[Entry], ignored: tuple[str, ...] = ()) -> tuple[list[list[Entry]], list[str]]:
    """Entries with the same settings together, and the settings in which these groups differ."""
    groups: dict[str, tuple[dict[str, str], list[Entry]]] = {}
    for entry in entries:
        settings = {key: value for key, value in entry.protocol.items() if key not in ignored}
        groups.setdefault(json.dumps(settings, sort_keys=True), (settings, []))[1].append(entry)
    settings = [of for of, _ in groups.values()]
    keys = dict.fromkeys(key for of in settings for key in of)
    differing = [key for key in keys if len({of.get(key) for of in settings}) > 1]
    return [group for _, group in groups.values()], differing


def _note(entry: Entry, differing: list[str]) -> str:
    """What a row's settings are where those of its namesakes are others; '' without any."""
    fields = [f"{key} = {_short(entry.protocol.get(key, 'not given'))}" for key in differing[:MAX_FIELDS]]
    more = f" and {len(differing) - MAX_FIELDS} more" if len(differing) > MAX_FIELDS else ""
    return f"{', '.join(fields)}{more}"


def make_table(entries: Iterable[Entry], names: Mapping[str, str]) -> dict[str, Any] | None:
    """Groups of rows, columns, and every setting behind them; None without a number.

    Args:
      entries: from `read_entries`.
      names: stage -> its name; see `names.stage_names`.
    """
    columns = column_names(names)
    named: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        if entry.evaluation != LAYERS:
            named.setdefault((entry.evaluation, entry.metric, entry.name), []).append(entry)
    if not named:
        return None
    present = {entry.stage for group in named.values() for entry in group}
    stages = sorted(order_stages(present), key=lambda stage: [*columns, stage].index(stage))
    against = [stage for stage in ("pretrain", "control") if stage in present and "tune" in present]
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in EVALUATIONS}
    for key, group in named.items():
        parts, differing = _variants(group)
        groups.setdefault(key[0], []).extend(_row(part, stages, against, _note(part[0], differing)) for part in parts)
    return {
        "stages": [(stage, columns.get(stage, stage)) for stage in stages],
        "against": [(stage, names[stage]) for stage in against],
        "groups": [(EVALUATIONS.get(name, name), _one_name(rows), rows) for name, rows in groups.items() if rows],
        "headline": _headline(groups["knn"], names),
        "protocols": _protocols(named.values(), columns),
    }


def _one_name(rows: list[dict[str, Any]]) -> str:
    """The protocol name that all rows share, '' if they do not."""
    names = {row["protocol"] for row in rows}
    return names.pop() if len(names) == 1 else ""


def _row(entries: list[Entry], stages: list[str], against: list[str], note: str) -> dict[str, Any]:
    first = entries[0]
    at = {stage: [entry for entry in entries if entry.stage == stage] for stage in stages}
    mean = {stage: statistics.fmean(entry.value for entry in of) for stage, of in at.items() if of}
    units = {entry.unit for entry in entries}
    percent = "fraction" in units or (units == {None} and all(abs(entry.value) <= 1 for entry in entries))
    names = {first.evaluation, first.metric.lower(), first.metric.lower().split("@")[0]}
    lower, ranked = bool(names & LOWER_IS_BETTER), not names & NO_BEST
    ranked_of = {stage: value for stage, value in mean.items() if stage != RAW}  # its average is what is reported
    best = (min if lower else max)(ranked_of.values(), default=None)
    cells = [
        {
            "value": mean.get(stage),
            "text": _show(mean[stage], percent) if stage in mean else "–",
            "best": ranked and len(ranked_of) > 1 and stage in ranked_of and ranked_of[stage] == best,
            "spread": _spread(at[stage], percent),
        }
        for stage in stages
    ]
    change = {stage: mean["tune"] - mean[stage] for stage in against if "tune" in mean and stage in mean}
    return {
        "metric": _metric(first.metric),
        "key": first.metric,
        "protocol": first.name,
        "unit": "%" if percent else "",
        "lower": lower and ranked,
        "cells": cells,
        "show": {stage: _show(value, percent) for stage, value in mean.items()},
        "change": [
            (change.get(stage), _show(change[stage], percent, "+") if stage in change else "–") for stage in against
        ],
        "note": note,
    }


def _metric(name: str) -> str:
    """A metric in words: 'davies_bouldin' -> 'Davies–Bouldin index', 'map@10' -> 'mAP@10'."""
    word, at, k = name.partition("@")
    return METRICS.get(word, word.replace("_", " ")) + at + k


def _show(value: float, percent: bool, sign: str = "") -> str:
    if percent:
        text = f"{100 * value:{sign}.1f}"
    else:
        text = f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.4g}"
    return text.replace("-", "−")


def _spread(entries: list[Entry], percent: bool) -> list[str]:
    """How far the number could be off, in small lines: over seeds, or over test pictures and repeats of one seed."""
    if len(entries) > 1:
        return [f"± {_show(statistics.stdev(entry.value for entry in entries), percent)}, {len(entries)} seeds"]
    lines = []
    for entry in entries:
        if entry.interval:
            lines.append(" to ".join(_show(bound, percent) for bound in entry.interval))
        if entry.std is not None:
            lines.append(f"± {_show(entry.std, percent)}" + (f", {entry.repeats} repeats" if entry.repeats else ""))
        runs = number(entry.found.get("mean")), number(entry.found.get("std"))
        if None not in runs:
            lines.append(f"all runs {_show(runs[0], percent)} ± {_show(runs[1], percent)}")
    return lines


def _protocols(groups: Iterable[list[Entry]], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every setting behind the rows, a column a stage."""
    alike: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in (entry for group in groups for entry in group):
        alike.setdefault((entry.evaluation, entry.name, json.dumps(entry.protocol, sort_keys=True)), []).append(entry)
    tables = []
    for (evaluation, name, _), entries in alike.items():
        stages = order_stages({entry.stage for entry in entries})
        told: dict[str, dict[str, str]] = {stage: {} for stage in stages}
        for entry in entries:
            found = {key: value for key, value in entry.found.items() if key not in ("mean", "std")}
            told[entry.stage] |= entry.protocol | _flat({"found": found, "weights": entry.weights})
        for stage in stages:
            told[stage]["seed"] = ", ".join(dict.fromkeys(entry.seed for entry in entries if entry.stage == stage))
        keys = dict.fromkeys(key for settings in told.values() for key in settings)
        tables.append(
            {
                "title": ": ".join(filter(None, (EVALUATIONS.get(evaluation, evaluation), name))),
                "stages": [columns.get(stage, stage) for stage in stages],
                "settings": [(key, [_short(told[stage].get(key, "–")) for stage in stages]) for key in keys],
            }
        )
    return tables


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"


def _headline(rows: list[dict[str, Any]], names: Mapping[str, str]) -> dict[str, Any] | None:
    """The first row of k-NN accuracy that has a value from before tuning and from after it."""
    for row in rows:
        if row["key"] == "accuracy" and row["unit"] == "%" and {"pretrain", "tune"} <= row["show"].keys():
            stages = [stage for stage in ("pretrain", "control", "tune") if stage in row["show"]]
            return row | {"tiles": [(names[stage], row["show"][stage]) for stage in stages]}
    return None


def layer_charts(entries: Iterable[Entry], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """k-NN accuracy after each block, a line a stage; a chart for each set of equal settings; see `make_table`."""
    known = {**column_names(names), **names}
    metrics: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.evaluation == LAYERS and re.fullmatch(r"\d{1,4}", entry.protocol.get("block", "")):
            metrics.setdefault(entry.metric, []).append(entry)
    found = []
    for metric, group in metrics.items():
        parts, differing = _variants(group, ignored=("name", "block"))
        for part in parts:
            values: dict[str, dict[int, list[float]]] = {}
            for entry in part:
                values.setdefault(entry.stage, {}).setdefault(int(entry.protocol["block"]), []).append(entry.value)
            mean = {
                known.get(stage, stage): {block: statistics.fmean(of) for block, of in sorted(values[stage].items())}
                for stage in order_stages(values)
            }
            lines = {name: (list(of), [100 * value for value in of.values()]) for name, of in mean.items()}
            title = f"k-NN {_metric(metric)} after each block"
            svg = charts.curve(lines, title, "block", "%", list(names.values()))
            blocks = sorted({block for of in mean.values() for block in of})
            rows = [
                (block, [_show(of[block], True) if block in of else "–" for of in mean.values()]) for block in blocks
            ]
            note = _note(part[0], differing)
            found.append({"svg": charts.inline(svg), "names": list(mean), "rows": rows, "note": note})
    return found
