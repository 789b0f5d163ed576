"""Charts of a run as SVG text: lines over updates or blocks. Pure functions: nothing here touches a file."""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from maect_jax.report.files import number, order_stages

# metric -> (title, unit, factor); the loss has a chart for each stage, every other metric comes after these
CHARTS = {
    "knn": ("k-NN accuracy during training", "%", 100.0),
    "reconstruction_loss": ("Reconstruction loss, mean over the parts", "", 1.0),
    "disagreement": ("Disagreement of the parts", "", 1.0),
    "disagreement_ratio": ("Disagreement over root of reconstruction loss", "", 1.0),
    "neighbor_accuracy": ("Neighbours of the same class", "%", 100.0),
    "embedding_std": ("Embedding standard deviation", "", 1.0),
    "effective_rank": ("Effective rank", "", 1.0),
    "learning_rate": ("Learning rate", "", 1.0),
    "gradient_norm": ("Gradient norm", "", 1.0),
    "images_per_second": ("Images per second", "", 1.0),
}

MAX_POINTS = 300  # a longer series is drawn as the mean of so many parts, with its range shaded

# matplotlib only draws fixed colours. These stand-ins become CSS colours in the SVG text, so that a page can follow the
# reader's light or dark setting; the second value is what a viewer without the page's style sheet shows.
_INK, _GRID = "#000001", "#000002"
_SERIES = ("#0000a0", "#0000a1", "#0000a2", "#0000a3", "#0000a4", "#0000a5")
_CSS = {
    _INK: "currentColor",
    _GRID: "var(--grid, #dcdfe5)",
    _SERIES[0]: "var(--series-0, #2f6fde)",
    _SERIES[1]: "var(--series-1, #7b8494)",
    _SERIES[2]: "var(--series-2, #9a5fd0)",
    _SERIES[3]: "var(--series-3, #dd6b20)",
    _SERIES[4]: "var(--series-4, #0f9488)",
    _SERIES[5]: "var(--series-5, #c43d74)",
}


def curve(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    xlabel: str,
    ylabel: str,
    colors: Sequence[str] = (),
) -> str:
    """A small line chart.

    Args:
      series: name -> (x, y), two sequences of one length. Points that are not finite are not drawn. A series longer
        than `MAX_POINTS` is drawn as the mean of that many parts, the range of each part shaded.
      title, xlabel, ylabel: plain text, never read as mathematics or markup.
      colors: names with a fixed place in the palette, so that a name has one colour in all charts of a page.

    Returns:
      One `<svg>` element without date, scripts or references outside itself, the same for the same input. Its colours
      are CSS: text takes `currentColor`, lines `--series-0` to `--series-5`, the grid `--grid`, each with a default.

    Raises:
      ValueError: x and y differ in length, or no series has a finite point.
    """
    series, title = {_encodable(name): xy for name, xy in series.items()}, _encodable(title)
    order = list(colors) + [name for name in series if name not in colors]
    drawn = {name: points for name, xy in series.items() if len((points := _points(name, *xy))[0])}
    if not drawn:
        raise ValueError(f"curve '{title}': no series has a finite point")
    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.1, 2.6), facecolor="none", layout="constrained")
        axes = figure.add_subplot(facecolor="none")
        handles = []
        for name, (x, mean, low, high) in drawn.items():
            color = _SERIES[order.index(name) % len(_SERIES)]
            style = {"marker": "o", "markersize": 3} if len(x) <= 40 else {}
            handles += axes.plot(x, mean, color=color, linewidth=1.5, **style)
            if np.any(high > low):
                axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        figure.suptitle(title, x=0.02, ha="left", color=_INK, fontsize=10.5, fontweight="bold")
        if len(drawn) > 1:
            axes.legend(
                handles, list(drawn), loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=4, frameon=False,
                labelcolor=_INK, handlelength=1.2, columnspacing=1.2, handletextpad=0.5,
            )  # fmt: skip
        axes.set_xlabel(xlabel, color=_INK)
        axes.set_ylabel(ylabel, color=_INK)
        axes.tick_params(colors=_INK, length=0)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    return _clean(buffer.getvalue(), title)


def _encodable(text: str) -> str:
    """The text without half characters, which JSON can hold and no font or file."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _points(name: str, x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, ...]:
    """Finite points as (x, mean, low, high), at most `MAX_POINTS` of each, float64."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"series '{name}': x and y need one length; got {list(x.shape)} and {list(y.shape)}")
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= MAX_POINTS:
        return x, y, y, y
    start = np.arange(MAX_POINTS) * len(x) // MAX_POINTS
    size = np.diff(start, append=len(x))
    mean_x, mean_y = np.add.reduceat(x, start) / size, np.add.reduceat(y, start) / size
    return mean_x, mean_y, np.minimum.reduceat(y, start), np.maximum.reduceat(y, start)


def _short(value: float) -> str:
    """A tick's text: 12000 -> '12k', 0.000015 -> '1.5e−5'."""
    text = f"{value:.6g}"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            text = f"{value / size:g}{unit}"
            break
    if 0 < abs(value) < 1e-4:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", "−")


def _clean(svg: str, title: str) -> str:
    """Only the `<svg>` element of matplotlib's file: fit to stand in a page, as wide as its place, in CSS colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same names in every chart: not unique in a page, and not used
    svg = svg.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:href=", "href=")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font, system-ui, sans-serif)", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = re.sub("|".join(_CSS), lambda color: _CSS[color[0]], svg)
    attributes, content = svg.removeprefix("<svg").split(">", 1)
    attributes = re.sub(r' (width|height)="[^"]*"', "", attributes)
    return f'<svg role="img" aria-label={quoteattr(title)} stroke-linejoin="round"{attributes}>{content.strip()}'


def inline(svg: str) -> Markup:
    """The chart as part of a page, where the namespace of an SVG is implied; `curve` has escaped its texts."""
    return Markup(re.sub(r' xmlns="[^"]*"', "", svg, count=1))


def metric_series(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """The numbers of a metrics log: metric -> stage -> (steps, values), ordered by step.

    Of a step that was logged twice, as after a resume, the last line counts. Lines without a step, and metrics without
    a finite value, are left out.
    """
    found: dict[str, dict[str, dict[float, float]]] = {}
    for line in lines:
        if (step := number(line.get("step"))) is not None:
            for key in line.keys() - {"step", "epoch", "time", "stage"}:
                if isinstance(line[key], float) or number(line[key]) is not None:
                    found.setdefault(key, {}).setdefault(str(line.get("stage")), {})[step] = float(line[key])
    series: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for key, stages in found.items():
        for stage in order_stages(stages):
            if any(map(math.isfinite, stages[stage].values())):
                steps = sorted(stages[stage])
                series.setdefault(key, {})[stage] = steps, [stages[stage][step] for step in steps]
    return series


def training_charts(series: Mapping[str, Mapping[str, tuple]], names: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Every chart for which there is data, from `metric_series`.

    The losses of the stages are of different kinds, so each has its own chart and steps. All other charts show the
    stages one after another; the control starts where pre-training ended, as the head does.

    Args:
      series: from `metric_series`.
      names: stage -> its name; see `names.stage_names`.

    Returns:
      SVG strings: the losses and the metrics of `CHARTS`, then all other metrics by name.
    """
    length: dict[str, float] = {}
    for stages in series.values():
        for stage, (steps, _) in stages.items():
            length[stage] = max(length.get(stage, 0), steps[-1])
    pretrained = length.get("pretrain", 0)
    start = {"control": pretrained, "head": pretrained, "tune": pretrained + length.get("head", 0)}
    colors = list(names.values())

    def chart(key: str) -> str:
        title, unit, factor = CHARTS.get(key, (key.replace("_", " "), "", 1.0))
        shown = {
            names.get(stage, stage): ([x + start.get(stage, 0) for x in steps], [factor * y for y in values])
            for stage, (steps, values) in series[key].items()
        }
        return curve(shown, title, "updates since the start", unit, colors)

    losses = [
        curve({(name := names.get(stage, stage)): points}, f"Loss, {name}", "updates", "", colors)
        for stage, points in series.get("loss", {}).items()
    ]
    main = losses + [chart(key) for key in CHARTS if key in series]
    return main, [chart(key) for key in sorted(series.keys() - CHARTS.keys() - {"loss"})]
