"""Pictures and charts of a run, as arrays, PNG bytes and SVG text. Pure functions: nothing here touches a file.

Axes in names and shapes: n pictures, q queries, k neighbours, then height, width, channels. Pictures are uint8 with any
number of channels: one or two are shown as grey (the first channel), more than three as their first three.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

STAGES = {"pretrain": "MAE", "control": "control", "head": "head", "tune": "MAE-CT"}  # in the order they are shown
# metric -> (title, unit, factor); the loss has a chart for each stage, every other metric comes after these
CHARTS = {
    "knn": ("k-NN accuracy during training", "%", 100.0),
    "neighbor_accuracy": ("Neighbours of the same class", "%", 100.0),
    "embedding_std": ("Embedding standard deviation", "", 1.0),
    "effective_rank": ("Effective rank", "", 1.0),
    "learning_rate": ("Learning rate", "", 1.0),
    "gradient_norm": ("Gradient norm", "", 1.0),
    "images_per_second": ("Images per second", "", 1.0),
}

SAME_CLASS = (22, 158, 108)  # green and red that also differ in brightness and in blue, for colour-blind readers
OTHER_CLASS = (229, 72, 77)
BACKGROUND = (255, 255, 255)
FRAME, GAP = 3, 3  # pixels
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


def as_rgb(images: np.ndarray) -> np.ndarray:
    """What is shown of pictures with any number of channels.

    Args:
      images: uint8 [..., h, w, c], c >= 1.

    Returns:
      uint8 [..., h, w, 3].

    Raises:
      ValueError: not uint8, or fewer than three axes, or an empty height, width or channel axis.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim < 3 or 0 in images.shape[-3:]:
        raise ValueError(f"pictures must be uint8 [..., h, w, c]; got {images.dtype} {list(images.shape)}")
    return images[..., :3] if images.shape[-1] >= 3 else np.repeat(images[..., :1], 3, axis=-1)


def resize(picture: np.ndarray, min_side: int = 0, max_side: int | None = None) -> np.ndarray:
    """Make a picture large enough to look at, or small enough to embed.

    Args:
      picture: uint8 [h, w, c].
      min_side: a smaller picture is enlarged by a whole factor, each pixel staying a sharp square.
      max_side: a larger picture is reduced (Lanczos), keeping its proportions.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: as `as_rgb`.
    """
    picture = as_rgb(picture)
    height, width = picture.shape[:2]
    if min(height, width) < min_side:
        factor = -(-min_side // min(height, width))
        picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    elif max_side and max(height, width) > max_side:
        share = max_side / max(height, width)
        size = max(1, round(width * share)), max(1, round(height * share))
        picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    return picture


def to_png(array: np.ndarray) -> bytes:
    """The RGB PNG file of one picture, uint8 [h, w, c]; the same bytes for the same array.

    Raises:
      ValueError: as `as_rgb`, or more than three axes.
    """
    if np.ndim(array) != 3:
        raise ValueError(f"to_png takes one picture [h, w, c]; got {list(np.shape(array))}")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(as_rgb(array))).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def reconstruction_grid(
    original: np.ndarray, masked: np.ndarray, reconstructed: np.ndarray, min_side: int = 96
) -> np.ndarray:
    """What MAE saw, what it made of it, and the truth: a row a picture.

    Args:
      original, masked, reconstructed: uint8 [n, h, w, c], n >= 1.
      min_side: smaller pictures are enlarged to at least this, in pixels.

    Returns:
      uint8 [H, W, 3]; columns are masked, reconstructed, original, with `GAP` white pixels between and around.

    Raises:
      ValueError: the three shapes differ, or they hold no picture.
    """
    columns = [np.asarray(part) for part in (masked, reconstructed, original)]
    shapes = [list(part.shape) for part in columns]
    if columns[0].ndim != 4 or shapes[0][0] == 0 or shapes.count(shapes[0]) != 3:
        raise ValueError(f"masked, reconstructed, original must have one shape [n, h, w, c]; got {shapes}")
    return _tiles([[resize(part[i], min_side) for part in columns] for i in range(shapes[0][0])])


def neighbor_grid(
    query: np.ndarray,
    neighbor: np.ndarray,
    query_label: np.ndarray,
    neighbor_label: np.ndarray,
    min_side: int = 48,
) -> np.ndarray:
    """Queries and their nearest neighbours: a row a query, the query first, then the most similar and onwards.

    Args:
      query: uint8 [q, h, w, c], q >= 1.
      neighbor: uint8 [q, k, h, w, c].
      query_label: integers [q].
      neighbor_label: integers [q, k].
      min_side: smaller pictures are enlarged to at least this, in pixels.

    Returns:
      uint8 [H, W, 3]: each picture whole, in a frame of `FRAME` pixels, `SAME_CLASS` around a neighbour whose label is
      the query's, `OTHER_CLASS` around any other, `BACKGROUND` around the query and around all neighbours of a query
      without a label (-1); `GAP` pixels between and around.

    Raises:
      ValueError: the shapes do not belong together; the message names them.
    """
    check_neighbors(query, neighbor, query_label, neighbor_label)
    rows = [[_framed(resize(picture, min_side), BACKGROUND)] for picture in query]
    for (i, j), label in np.ndenumerate(neighbor_label):
        color = BACKGROUND if query_label[i] < 0 else SAME_CLASS if label == query_label[i] else OTHER_CLASS
        rows[i].append(_framed(resize(neighbor[i, j], min_side), color))
    return _tiles(rows)


def check_neighbors(query: np.ndarray, neighbor: np.ndarray, query_label: np.ndarray, neighbor_label: np.ndarray):
    """Raise ValueError, naming the shapes, unless they are those that `neighbor_grid` describes."""
    shapes = [np.shape(array) for array in (query, neighbor, query_label, neighbor_label)]
    q, k = (*shapes[3], 0, 0)[:2]
    picture = shapes[0][1:]
    if len(picture) != 3 or q == 0 or k == 0 or shapes != [(q, *picture), (q, k, *picture), (q,), (q, k)]:
        raise ValueError(
            "neighbours need query [q, h, w, c], neighbor [q, k, h, w, c], query_label [q], neighbor_label [q, k]; got "
            + ", ".join(str(list(shape)) for shape in shapes)
        )


def _framed(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """The picture [h, w, 3], whole, with a frame outside it: [h + 2 FRAME, w + 2 FRAME, 3]."""
    height, width = picture.shape[:2]
    framed = np.full((height + 2 * FRAME, width + 2 * FRAME, 3), color, np.uint8)
    framed[FRAME:-FRAME, FRAME:-FRAME] = picture
    return framed


def _tiles(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Rows of equally large pictures [h, w, 3] on one white sheet."""
    height, width = rows[0][0].shape[:2]
    size = (GAP + len(rows) * (height + GAP), GAP + len(rows[0]) * (width + GAP), 3)
    sheet = np.full(size, BACKGROUND, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = GAP + i * (height + GAP), GAP + j * (width + GAP)
            sheet[top : top + height, left : left + width] = picture
    return sheet


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


def metric_series(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """The numbers of a metrics log: metric -> stage -> (steps, values), ordered by step.

    Of a step that was logged twice, as after a resume, the last line counts. Lines without a step, and metrics without
    a finite value, are left out.
    """
    found: dict[str, dict[str, dict[float, float]]] = {}
    for line in lines:
        numbers = {key: float(of) for key, of in line.items() if isinstance(of, int | float) and of is not True}
        step = numbers.pop("step", math.nan)
        if math.isfinite(step):
            for key in numbers.keys() - {"epoch", "time", "stage"}:
                found.setdefault(key, {}).setdefault(str(line.get("stage")), {})[step] = numbers[key]
    series: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for key, stages in found.items():
        for stage in sorted(stages, key=lambda name: [*STAGES, name].index(name)):
            if any(map(math.isfinite, stages[stage].values())):
                steps = sorted(stages[stage])
                series.setdefault(key, {})[stage] = steps, [stages[stage][step] for step in steps]
    return series


def training_charts(series: Mapping[str, Mapping[str, tuple]]) -> tuple[list[str], list[str]]:
    """Every chart for which there is data, from `metric_series`.

    The losses of the stages are of different kinds, so each has its own chart and steps. All other charts show the
    stages one after another; the control starts where MAE ended, as the head does.

    Returns:
      SVG strings: the losses and the metrics of `CHARTS`, then all other metrics by name.
    """
    length: dict[str, float] = {}
    for stages in series.values():
        for stage, (steps, _) in stages.items():
            length[stage] = max(length.get(stage, 0), steps[-1])
    after_mae = length.get("pretrain", 0)
    start = {"control": after_mae, "head": after_mae, "tune": after_mae + length.get("head", 0)}

    def chart(key: str) -> str:
        title, unit, factor = CHARTS.get(key, (key.replace("_", " "), "", 1.0))
        shown = {
            STAGES.get(stage, stage): ([x + start.get(stage, 0) for x in steps], [factor * y for y in values])
            for stage, (steps, values) in series[key].items()
        }
        return curve(shown, title, "updates since the start", unit, list(STAGES.values()))

    names = {stage: STAGES.get(stage, stage) for stage in series.get("loss", {})}
    losses = [
        curve({names[stage]: points}, f"Loss, {names[stage]}", "updates", "", list(STAGES.values()))
        for stage, points in series.get("loss", {}).items()
    ]
    main = losses + [chart(key) for key in CHARTS if key in series]
    return main, [chart(key) for key in sorted(series.keys() - CHARTS.keys() - {"loss"})]
