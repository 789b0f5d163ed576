"""One self-contained page about a run, made from the files of its work folder and nothing else.

Everything in those files (class names, settings, metric names) is treated as text of unknown origin: the template
escapes it, and the page's own policy forbids scripts and every request.
"""

import base64
import io
import json
import math
import os
import re
import statistics
import zipfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from etils import epath
from markupsafe import Markup

from maect_jax.errors import DataError
from maect_jax.report import figures

SHORT = figures.STAGES
STAGES = SHORT | {"control": "MAE, trained on instead (control)"}
EVALUATIONS = {"knn": "k-NN", "linear": "linear probe"}  # other names stand as they are
LOWER_IS_BETTER = frozenset({"loss", "error", "mce", "ece"})
MAX_QUERIES, MAX_RECONSTRUCTIONS = 12, 12  # a page that fits into a mail; the caption says how many there are


def write_report(workdir: str | os.PathLike) -> epath.Path:
    """Write `report.html` into a run's work folder.

    Args:
      workdir: the folder of the run. Read are `config.resolved.yaml`, `environment.json`, `metrics.jsonl`,
        `results.jsonl`, `figures/*.npz` and `{stage}/DONE.json`; where one is missing, unfinished or damaged, the page
        says so in place of the chapter.

    Returns:
      The path of the page. It replaces an older one in one step, so a reader never sees half a page.

    Raises:
      DataError: `workdir` is not a folder.
    """
    root = epath.Path(workdir)
    if not root.is_dir():
        raise DataError(f"report: '{workdir}' is not a folder; give the work folder of a run")
    page = _render(_context(root))
    path = root / "report.html"
    temporary = root / f".report.html.{os.getpid()}"
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _render(context: dict[str, Any]) -> str:
    loader, strict = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": _count, "duration": _duration}
    return environment.get_template("report.html").render(context)


def _context(root: epath.Path) -> dict[str, Any]:
    """Everything the template shows; a chapter without data is None or empty, its reason is in `absent`."""
    absent: dict[str, str] = {}
    config_text = _text(root / "config.resolved.yaml")
    config = _mapping(config_text, yaml.safe_load)
    metrics, torn_metrics = _json_lines(root / "metrics.jsonl")
    results, torn_results = _json_lines(root / "results.jsonl")
    pictures, triplet = root / "figures", ("masked", "reconstructed", "original")
    table = _results(results)
    series = figures.metric_series(metrics)
    # Markup: `figures.curve` has escaped its texts. In a page the namespace of an SVG is implied.
    svg = [
        [Markup(re.sub(r' xmlns="[^"]*"', "", of, count=1)) for of in part] for part in figures.training_charts(series)
    ]
    return {
        "name": str(config.get("name") or root.name or "run"),
        "facts": _facts(config),
        "headline": _headline(table),
        "table": table,
        "neighbors": _neighbors(pictures, absent),
        "reconstructions": _arrays(pictures / "reconstruction.npz", triplet, _triplets, absent),
        "charts": svg[0],
        "more_charts": svg[1],
        "not_finite": sum(not math.isfinite(y) for stages in series.values() for xy in stages.values() for y in xy[1]),
        "stages": _stages(root, config, metrics),
        "config": config_text,
        "environment": _mapping(_text(root / "environment.json")),
        "absent": absent,
        "torn": {"metrics.jsonl": torn_metrics, "results.jsonl": torn_results},
        "max_points": figures.MAX_POINTS,
    }


# --- files ----------------------------------------------------------------------------------------------------------


def _text(path: epath.Path) -> str:
    """The file's text, or '' where there is none."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _mapping(text: str, load: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """The mapping that a text holds, empty where it holds none."""
    try:
        value = load(text)
    except (ValueError, yaml.YAMLError):
        value = None
    return value if isinstance(value, dict) else {}


def _json_lines(path: epath.Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of lines and how many lines are none: an interrupted run leaves a torn one."""
    lines = [line for line in _text(path).split("\n") if line.strip()]
    records = [record for line in lines if (record := _mapping(line))]
    return records, len(lines) - len(records)


def _arrays(path: epath.Path, names: Iterable[str], build: Callable[..., Any], absent: dict[str, str]) -> Any:
    """What `build` makes of the named arrays of an npz file, or None with the reason in `absent`."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return build(*(file[name] for name in names))
    except FileNotFoundError:
        absent[path.stem] = f"figures/{path.name} is not in this folder."
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile) as error:
        absent[path.stem] = f"figures/{path.name} could not be read ({type(error).__name__}: {error})."
    return None


def _number(value: Any) -> float | None:
    """The finite number that a JSON value is, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


# --- results --------------------------------------------------------------------------------------------------------


def _results(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Records as a table: a row an evaluation, metric and protocol name; a column a stage.

    The newest record of a seed counts; several seeds give their mean and standard deviation.
    """
    rows: dict[tuple[str, str, str], dict[str, dict[Any, dict]]] = {}
    for record in records:
        if (value := _number(record.get("value"))) is None:
            continue
        protocol = record.get("protocol")
        record = record | {"value": value, "protocol": protocol if isinstance(protocol, dict) else {"name": protocol}}
        key = tuple(str(part or "") for part in (record.get("evaluation"), record.get("metric")))
        key += (str(record["protocol"].get("name") or ""),)
        stage = str(record.get("stage") or "unknown stage")
        rows.setdefault(key, {}).setdefault(stage, {})[str(record.get("seed", "–"))] = record
    if not rows:
        return None
    present = {stage for row in rows.values() for stage in row}
    stages = [stage for stage in STAGES if stage in present] + sorted(present - STAGES.keys())
    against = [stage for stage in ("pretrain", "control") if stage in present and "tune" in present]
    return {
        "stages": [(stage, STAGES.get(stage, stage)) for stage in stages],
        "against": [(stage, SHORT[stage]) for stage in against],
        "rows": [_row(key, row, stages, against) for key, row in rows.items()],
        "protocols": _protocols(rows, stages),
    }


def _row(key: tuple[str, str, str], row: dict[str, dict], stages: list[str], against: list[str]) -> dict[str, Any]:
    values = {stage: [record["value"] for record in seeds.values()] for stage, seeds in row.items()}
    mean = {stage: statistics.fmean(of) for stage, of in values.items()}
    percent = all(abs(value) <= 1 for of in values.values() for value in of)
    best = (min if key[1].lower() in LOWER_IS_BETTER else max)(mean.values())

    def show(value: float, sign: str = "") -> str:
        text = f"{100 * value:{sign}.1f}" if percent else f"{value:{sign}.4g}"
        return text.replace("-", "−")

    cells = []
    for stage in stages:
        of = values.get(stage, [])
        cells.append(
            {
                "value": mean.get(stage),
                "text": show(mean[stage]) if of else "–",
                "best": len(mean) > 1 and mean.get(stage) == best,
                "spread": f"± {show(statistics.stdev(of))}, {len(of)} seeds" if len(of) > 1 else "",
            }
        )
    change = {stage: mean["tune"] - mean[stage] for stage in against if "tune" in mean and stage in mean}
    return {
        "evaluation": EVALUATIONS.get(key[0], key[0]),
        "metric": key[1],
        "protocol": key[2],
        "unit": "%" if percent else "",
        "cells": cells,
        "show": {stage: show(value) for stage, value in mean.items()},
        "change": [(change.get(stage), show(change[stage], "+") if stage in change else "–") for stage in against],
    }


def _protocols(rows: dict, stages: list[str]) -> list[dict[str, Any]]:
    """Every setting behind the rows, a column a stage, so that unlike settings show."""
    tables: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for (evaluation, _, protocol), row in rows.items():
        table = tables.setdefault((evaluation, protocol), {})
        for stage, seeds in row.items():
            newest = list(seeds.values())[-1]
            settings = newest["protocol"] | {key: newest[key] for key in ("weights", "step") if key in newest}
            for key, value in (settings | {"seed": ", ".join(seeds)}).items():
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                table.setdefault(str(key), {})[stage] = text
    return [
        {
            "title": EVALUATIONS.get(evaluation, evaluation),
            "settings": [(name, [of.get(stage, "–") for stage in stages]) for name, of in table.items()],
        }
        for (evaluation, _), table in tables.items()
    ]


def _headline(table: dict[str, Any] | None) -> dict[str, Any] | None:
    """The first row of k-NN accuracy that has a value for MAE and for MAE-CT."""
    for row in table["rows"] if table else []:
        is_knn = row["evaluation"] == EVALUATIONS["knn"] and row["metric"] == "accuracy" and row["unit"] == "%"
        if is_knn and {"pretrain", "tune"} <= row["show"].keys():
            stages = [stage for stage in ("pretrain", "control", "tune") if stage in row["show"]]
            return row | {"tiles": [(SHORT[stage], row["show"][stage]) for stage in stages]}
    return None


# --- pictures -------------------------------------------------------------------------------------------------------


def _image(picture: np.ndarray, max_side: int) -> dict[str, Any]:
    """A picture as a data address; small ones stay as they are, for the style sheet to enlarge with sharp pixels."""
    png = figures.to_png(figures.resize(picture, max_side=max_side))
    address = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    return {"src": address, "sharp": max(picture.shape[:2]) <= 48}


def _neighbors(folder: epath.Path, absent: dict[str, str]) -> list[dict[str, Any]]:
    """Groups of the same queries, each with one strip of neighbours for every stage that has them."""
    groups: list[dict[str, Any]] = []
    names = ("query", "neighbor", "query_label", "neighbor_label", "similarity", "classes")
    for stage in ("pretrain", "control", "tune"):
        path = folder / f"neighbors_{stage}.npz"
        if (stage == "control" and not path.exists()) or not (strip := _arrays(path, names, _strip, absent)):
            continue
        queries, count = strip.pop("queries"), strip.pop("count")
        same = [group for group in groups if group["queries"] == queries and group["count"] == count]
        if not same:
            groups.append({"queries": queries, "count": count, "strips": []})
        (same or groups[-1:])[0]["strips"].append(strip | {"name": SHORT[stage], "stage": stage})
    return groups


def _strip(query, neighbor, query_label, neighbor_label, similarity, classes) -> dict[str, Any]:
    """What is shown of one file of neighbours: the first queries, and for each a row of neighbours."""
    figures.check_neighbors(query, neighbor, query_label, neighbor_label)
    same_qk = (neighbor_label == query_label[:, None])[:MAX_QUERIES]
    labelled = bool((query_label >= 0).all())
    rows: list[list[dict[str, Any]]] = [[] for _ in same_qk]
    for (i, j), same in np.ndenumerate(same_qk):
        text = {"label": _class(classes, neighbor_label[i, j]), "similarity": f"{similarity[i, j]:.2f}"}
        frame = ("same" if same else "other") if labelled else "plain"
        rows[i].append(_image(neighbor[i, j], 80) | text | {"frame": frame})
    queries = [_image(query[i], 96) | {"label": _class(classes, query_label[i])} for i in range(len(rows))]
    right_q = [int(right) for right in same_qk.sum(1)]
    found = {"queries": queries, "count": len(query), "rows": rows, "labelled": labelled}
    return found | {"right": right_q, "total": same_qk.size}


def _class(classes: np.ndarray, label: int) -> str:
    if label < 0:
        return "no label"
    return str(classes[label]) if classes.ndim == 1 and label < len(classes) else f"class {label}"


def _triplets(*parts: np.ndarray) -> dict[str, Any]:
    """What is shown of the masked, reconstructed and original pictures."""
    shown = range(min(len(parts[0]), MAX_RECONSTRUCTIONS))
    return {"triplets": [[_image(part[i], 192) for part in parts] for i in shown], "count": len(parts[0])}


# --- what was run ---------------------------------------------------------------------------------------------------


def _stages(root: epath.Path, config: dict[str, Any], metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a stage that the config names or that left a trace."""
    done = {path.parent.name: _mapping(_text(path)) for path in root.glob("*/DONE.json")}
    log: dict[str, list[dict]] = {}
    for line in metrics:
        log.setdefault(str(line.get("stage")), []).append(line)
    planned = re.findall(r"\w+", str(config.get("stages", "")))
    names = [name for name in STAGES if name in planned or name in done or name in log]
    rows = []
    for name in names + sorted((done.keys() | log.keys()) - STAGES.keys()):
        settings = config.get(name) if isinstance(config.get(name), dict) else {}
        marker = done.get(name, {})
        clocks = [[_number(line.get(key)) for line in log.get(name, [])] for key in ("time", "step")]
        times, steps = ([at for at in clock if at is not None and 0 <= at < 1e11] for clock in clocks)
        seconds = _number(marker.get("seconds"))
        rows.append(
            {
                "name": STAGES.get(name, name),
                "state": "finished" if name in done else "not finished" if name in log else "not run",
                "epochs": settings.get("epochs"),
                "batch": settings.get("batch"),
                "updates": marker.get("step", max(steps, default=None)),
                "started": datetime.fromtimestamp(min(times), UTC).strftime("%Y-%m-%d %H:%M") if times else "–",
                "seconds": max(times) - min(times) if times and seconds is None else seconds,
                "from_log": seconds is None and bool(times),
                "weights": str(marker.get("weights") or "–")[:12],
            }
        )
    return rows


def _facts(config: dict[str, Any]) -> list[str]:
    """The run in a few words, under its name."""
    model, data = (config[key] if isinstance(config.get(key), dict) else {} for key in ("model", "data"))
    size = [f"{key} {model[key]}" for key in ("depth", "width", "heads", "patch") if key in model]
    facts = ["ViT, " + ", ".join(size)] if size else []
    facts += [f"{model['image_size']} px"] if "image_size" in model else []
    facts += [f"{text} {data[key]}" for key, text in (("train", "trained on"), ("test", "tested on")) if data.get(key)]
    return facts + ([f"seed {config['seed']}"] if "seed" in config else [])


def _count(value: Any) -> str:
    number = _number(value)
    return "–" if value is None else f"{number:,.10g}" if number is not None else str(value)


def _duration(seconds: float | None) -> str:
    """3725.2 -> '1 h 2 min'."""
    if seconds is None:
        return "–"
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if seconds < 3600:
        return f"{minutes:.0f} min {seconds % 60:.0f} s" if minutes else f"{seconds:.1f} s"
    return f"{days:.0f} d {hours:.0f} h" if days else f"{hours:.0f} h {minutes:.0f} min"
