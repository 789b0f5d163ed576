"""One self-contained page about a run, made from the files of its work folder and nothing else.

Everything in those files (class names, settings, metric names) is treated as text of unknown origin: the templates
escape it, and the page's own policy forbids scripts and every request.
"""

import math
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from etils import epath

from maect_jax.errors import DataError
from maect_jax.report import charts, maps, pictures, results
from maect_jax.report.files import STAGES, count_text, number, parse_mapping, read_lines, read_text
from maect_jax.report.names import column_names, method_of, stage_names


def write_report(workdir: str | os.PathLike) -> epath.Path:
    """Write `report.html` into a run's work folder.

    Args:
      workdir: the folder of the run. Read are `config.resolved.yaml`, `environment.json`, `data.json`,
        `shared.json`, `metrics.jsonl`, `results.jsonl`, `figures/*.npz` and `{stage}/DONE.json`; where one is missing,
        unfinished or damaged, the page says so in place of the chapter.

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
        temporary.write_bytes(page.encode("utf-8", errors="replace"))  # JSON can hold half characters
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _render(context: dict[str, Any]) -> str:
    loader, strict = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": count_text, "duration": _duration}
    return environment.get_template("report.html").render(context)


def _context(root: epath.Path) -> dict[str, Any]:
    """Everything the templates show; a chapter without data is None or empty, the reasons are in `absent`."""
    config_text = read_text(root / "config.resolved.yaml")
    config = parse_mapping(config_text, yaml.safe_load)
    metrics, torn_metrics = read_lines(root / "metrics.jsonl")
    records, torn_results = read_lines(root / "results.jsonl")
    entries = results.read_entries(records)
    finished = {path.parent.name: parse_mapping(read_text(path)) for path in root.glob("*/DONE.json")}
    method = method_of(config, finished.values())
    series, names = charts.metric_series(metrics), stage_names(method)
    main_charts, more_charts = ([charts.inline(svg) for svg in part] for part in charts.training_charts(series, names))
    folder, reasons = root / "figures", {}
    begun_here = "pretrain" in str(config.get("stages")) or not config.get("init_from")
    in_parts = (method == "emae" and begun_here) or any(folder.glob("parts_*.npz"))
    chapters = {
        "neighbors": pictures.neighbors(folder, names, reasons),
        "clusters": pictures.clusters(folder, names, reasons),
        "scatter": maps.scatters(folder, names, reasons),
        "confusion": maps.confusions(folder, names, reasons),
        "attention": pictures.attention(folder, names, reasons),
        "reconstruction": pictures.reconstructions(folder, reasons),
        "parts": pictures.parts(folder, reasons) if in_parts else None,
    }
    absent: dict[str, str] = {}
    for file, reason in reasons.items():
        kind = file.partition("_")[0]
        absent[kind] = f"{absent.get(kind, '')} {reason}".strip()
    return chapters | {
        "name": str(config.get("name") or root.name or "run"),
        "facts": _facts(config),
        "shared": _shared(root),
        "table": results.make_table(entries, names),
        "layers": results.layer_charts(entries, names),
        "colors": maps.COLORS,
        "charts": main_charts,
        "more_charts": more_charts,
        "not_finite": sum(not math.isfinite(y) for stages in series.values() for xy in stages.values() for y in xy[1]),
        "names": names,
        "stages": _stages(finished, config, metrics, column_names(names)),
        "config": config_text,
        "environment": parse_mapping(read_text(root / "environment.json")),
        "absent": absent,
        "torn": {"metrics.jsonl": torn_metrics, "results.jsonl": torn_results},
        "max_points": charts.MAX_POINTS,
    }


def _shared(root: epath.Path) -> dict[str, Any] | None:
    """How many test pictures are also training pictures, of how many; None where none is known to be."""
    found = [parse_mapping(read_text(root / name)) for name in ("data.json", "shared.json")]
    found = [of for of in found if (number(of.get("shared")) or 0) > 0]
    return {"count": found[-1]["shared"], "of": number(found[-1].get("test_pictures"))} if found else None


def _stages(
    done: dict[str, dict[str, Any]], config: dict[str, Any], metrics: list[dict[str, Any]], columns: dict[str, str]
) -> list[dict[str, Any]]:
    """A row a stage that the config names or that left a trace; `done` are the `DONE.json` of the finished ones."""
    log: dict[str, list[dict]] = {}
    for line in metrics:
        log.setdefault(str(line.get("stage")), []).append(line)
    planned = re.findall(r"\w+", str(config.get("stages", "")))
    shown = [name for name in STAGES if name in planned or name in done or name in log]
    rows = []
    for name in shown + sorted((done.keys() | log.keys()) - set(STAGES)):
        settings = config.get(name) if isinstance(config.get(name), dict) else {}
        marker = done.get(name, {})
        clocks = [[number(line.get(key)) for line in log.get(name, [])] for key in ("time", "step")]
        times, steps = ([at for at in clock if at is not None and 0 <= at < 1e11] for clock in clocks)
        seconds = number(marker.get("seconds"))
        rows.append(
            {
                "name": columns.get(name, name),
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


def _duration(seconds: float | None) -> str:
    """3725.2 -> '1 h 2 min'."""
    if seconds is None:
        return "–"
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if seconds < 3600:
        return f"{minutes:.0f} min {seconds % 60:.0f} s" if minutes else f"{seconds:.1f} s"
    return f"{days:.0f} d {hours:.0f} h" if days else f"{hours:.0f} h {minutes:.0f} min"
