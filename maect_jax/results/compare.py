"""Numbers side by side, where their protocols agree."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from etils import epath

from maect_jax.errors import ConfigError
from maect_jax.results.record import read_records

PREFERRED = ("tune", "control", "pretrain")  # of a run with several stages, when none is named


@dataclass(frozen=True)
class Column:
    """The records of one set of weights: title, and record by (evaluation, metric, protocol name)."""

    title: str
    records: dict[tuple[str, str, str], dict]


def read_column(where: str) -> Column:
    """The records that 'PATH' or 'PATH:STAGE' stands for.

    Args:
      where: a work folder or a `results.jsonl`, and after a colon the stage; without one the last stage of the method
        that was evaluated, or the only one there is. A protocol with several test sets there is named with each.

    Raises:
      ConfigError: no such file, no records, or no such stage.
    """
    path, stage = epath.Path(where), ""
    if not path.exists() and ":" in where:
        text, _, stage = where.rpartition(":")
        path = epath.Path(text)
    file = path / "results.jsonl" if path.is_dir() else path
    records = read_records(file)
    if not records:
        raise ConfigError(f"compare: no results in '{file}'; run `python -m maect_jax evaluate` first")
    stages = list(dict.fromkeys(record["stage"] for record in records))
    if not stage:
        stage = next((name for name in PREFERRED if name in stages), stages[0] if len(stages) == 1 else "")
    if stage not in stages:
        raise ConfigError(f"compare: '{where}' names no stage of '{file}'; there are {', '.join(stages)}: PATH:STAGE")
    chosen = [record for record in records if record["stage"] == stage]
    keys = [(record["evaluation"], record["metric"], record["protocol"]["name"]) for record in chosen]
    table = {
        (*key[:2], key[2] + (f" on {_test_set(record)}" if keys.count(key) > 1 else "")): record
        for key, record in zip(keys, chosen)
    }
    return Column(f"{path}:{stage}", table)


def _test_set(record: dict) -> str:
    test = record["protocol"].get("test")
    return str(test.get("name") if isinstance(test, dict) else test)


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """Dotted key -> value of nested dicts."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def differing(records: Sequence[dict]) -> dict[str, list]:
    """Protocol field -> its value in each record, for the fields that are not equal in all; None where absent."""
    flat = [flatten(record["protocol"]) for record in records]
    keys = dict.fromkeys(key for one in flat for key in one)
    found = {key: [one.get(key) for one in flat] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def compare(columns: Sequence[Column], anyway: bool = False) -> str:
    """A table: a row a number, a column a set of weights, with intervals; below it protocol fields that differ.

    Raises:
      ConfigError: nothing in common; or protocols differ and `anyway` is not set: with each field.
    """
    keys = [key for key in columns[0].records if all(key in column.records for column in columns[1:])]
    if not keys:
        have = "; ".join(f"{c.title}: {', '.join(sorted({k[2] for k in c.records}))}" for c in columns)
        raise ConfigError(f"compare: no protocol in common ({have}); evaluate both with the same --preset")
    unlike = {key: found for key in keys if (found := differing([column.records[key] for column in columns]))}
    sentences: dict[str, list[str]] = {}
    for key, found in unlike.items():
        for name, values in found.items():
            sentence = f"{name} = " + " / ".join(json.dumps(value, ensure_ascii=False) for value in values)
            sentences.setdefault(sentence, []).append(f"{key[0]} '{key[2]}'")
    notes = [f"{sentence}   in {', '.join(dict.fromkeys(rows))}" for sentence, rows in sentences.items()]
    if unlike and not anyway:
        titles = " / ".join(column.title for column in columns)
        mend = "evaluate both in the same way, or add --anyway to see them side by side"
        raise ConfigError([f"compare: the protocols of {titles} differ; {mend}:", *(f"  {note}" for note in notes)])
    return _table(columns, keys, unlike, notes)


def _table(columns: Sequence[Column], keys: list[tuple], unlike: dict, notes: list[str]) -> str:
    two = len(columns) == 2
    rows = [["", *(column.title for column in columns), *(["difference"] if two else [])]]
    for key in keys:
        found = [column.records[key] for column in columns]
        name = f"{key[0]} {key[1]}, {key[2]}" + (" *" if key in unlike else "")
        change = found[1]["value"] - found[0]["value"]
        rows.append([name, *map(_cell, found), *([_number(change, found[0], "+")] if two else [])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in rows]
    if notes:
        lines += ["", "* protocols differ:", *(f"  {note}" for note in notes)]
    return "\n".join(line.rstrip() for line in lines)


def _cell(record: dict) -> str:
    text = _number(record["value"], record)
    if record.get("interval"):
        low, high = (_number(value, record) for value in record["interval"])
        text += f" [{low}, {high}]"
    if record.get("std") is not None:
        text += f" ± {_number(record['std'], record)}"
    return text


def _number(value: float, record: dict, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}" if record.get("unit") == "fraction" else f"{value:{sign}.4g}"
