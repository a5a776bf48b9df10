"""Plots as inline SVG that follow the page's colours, light or dark. Imports no torch."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

INK, FAINT, COLOURS = (
    "#010203",
    "#040506",
    ("#070809", "#0a0b0c"),
)  # stand for the style sheet's variables until the SVG is written
VARIABLES = {INK: "currentColor", FAINT: "var(--faint)", COLOURS[0]: "var(--first)", COLOURS[1]: "var(--second)"}
MARKS, DASHES = ("o", "s"), ("-", "--")  # told apart without colour, too
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "fitness_dpo", "text.parse_math": False, "font.size": 11.5,
    "text.color": INK, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "xtick.labelsize": 10.5, "ytick.labelsize": 10.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": FAINT, "legend.frameon": False,
    "axes.axisbelow": True,
}  # fmt: skip


class Series(NamedTuple):
    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    """0 or 1."""
    marked: bool = False
    """Few points, each marked and joined by dashes: what was measured on held-out rows."""


class Interval(NamedTuple):
    name: str
    value: float
    low: float
    high: float


@contextmanager
def drawing(label: str, height: float = 2.5) -> Iterator[tuple[Axes, list[Markup]]]:
    """Axes to draw on, about as wide as a phone; the list then holds one SVG that a screen reader calls `label`."""
    drawn: list[Markup] = []
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's browser has its own fonts
        figure = Figure(figsize=(4.6, height), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        yield axes, drawn
        for artist in axes.findobj():
            artist.set_clip_on(False)  # nothing lies outside, and clip paths would need ids that are unique on the page
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(
        r"<metadata>.*?</metadata>| id=\"[a-z0-9]+_\d+\"| xmlns(:xlink)?=\"[^\"]*\"| width=\"[\d.]+pt\"| height=\"[\d.]+pt\"",
        "",
        svg,
        flags=re.S,
    )
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    drawn.append(Markup('<svg role=img aria-label="{}"').format(label) + Markup(svg.removeprefix("<svg")))  # noqa: S704


def curves(label: str, series: Sequence[Series], x_label: str = "step", log: bool = False) -> Markup:
    """Lines over steps, several with a legend above; `log` allows a logarithmic axis where the values span two decades."""
    with drawing(label) as (axes, drawn):
        for each in series:
            mark = MARKS[each.colour] if each.marked or len(each.x) == 1 else ""
            axes.plot(
                each.x, each.y, label=each.name, color=COLOURS[each.colour],
                linestyle=DASHES[each.marked], linewidth=1.8, marker=mark, markersize=5,
            )  # fmt: skip
        positive = [value for each in series for value in each.y if value > 0]
        if log and positive and max(positive) > 100 * min(positive):
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(x_label)
        if len(series) > 1:
            axes.figure.legend(loc="outside upper left", ncols=2, handlelength=2.6)
    return drawn[0]


def histogram(
    label: str, series: dict[str, Sequence[float]], x_label: str, bins: int = 30, mark: tuple[float, str] | None = None
) -> Markup:
    """How many of each series fall where; `mark` is a place on the axis with its name, left out where it is out of sight."""
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(each, dtype=float) for each in series.values()]), bins)
    with drawing(label) as (axes, drawn):
        for place, (name, values) in enumerate(series.items()):
            counts = np.histogram(values, edges)[0]
            axes.stairs(counts, edges, fill=True, alpha=0.3, color=COLOURS[place])
            axes.stairs(counts, edges, label=name, color=COLOURS[place], linestyle=DASHES[place], linewidth=1.8)
        if mark is not None and edges[0] <= mark[0] <= edges[-1]:
            axes.axvline(mark[0], color=INK, linestyle=":")
            side = "left" if mark[0] < edges.mean() else "right"
            axes.text(mark[0], axes.get_ylim()[1], f" {mark[1]} ", ha=side, va="top")
        axes.set_xlabel(x_label)
        axes.set_ylabel("pairs")
        axes.figure.legend(loc="outside upper left", ncols=2, handlelength=2.6)
    return drawn[0]


def intervals(label: str, rows: Sequence[Interval], x_label: str, reference: float) -> Markup:
    """A point with its interval for each row, the name above it; `reference` is where nothing would be gained."""
    with drawing(label, height=0.9 + 0.42 * len(rows)) as (axes, drawn):
        for place, row in enumerate(rows):
            axes.plot([row.low, row.high], [place, place], color=COLOURS[0], linewidth=2.2)
            axes.plot([row.value], [place], "o", color=COLOURS[0], markersize=6)
        axes.axvline(reference, color=FAINT, linestyle="--", zorder=0)
        left = axes.get_xlim()[0]
        for place, row in enumerate(rows):
            axes.text(left, place - 0.28, row.name, va="center", fontsize=10.5)
        axes.set_ylim(len(rows) - 0.5, -0.7)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(x_label)
    return drawn[0]


def scatter(label: str, x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> Markup:
    """A point for each pair."""
    with drawing(label) as (axes, drawn):
        axes.plot(x, y, "o", color=COLOURS[0], markersize=5, alpha=0.6)
        axes.axhline(0, color=INK, linestyle=":")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    return drawn[0]
