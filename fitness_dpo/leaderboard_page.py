"""leaderboard.html: the ranking as a table that sorts, and what each varied setting did to the score."""

import io
import itertools
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from fitness_dpo.data_page import STYLE
from fitness_dpo.leaderboard import Entry, Leaderboard, cells, setting

CELLS = 8  # past so many values of a setting a heat map is drawn as points
GREY, COLOUR = "#808080", "#1f9e78"
LOOK: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "fitness_dpo", "font.family": "sans-serif", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
}  # fmt: skip


def page(board: Leaderboard) -> str:
    """The whole page. Every text out of a run is escaped."""
    rows = [cells(entry) for entry in board.entries]
    used = [name for name in (rows[0] if rows else {}) if any(row.get(name) for row in rows)]
    lines = [
        {
            "vetoed": entry.vetoed,
            "cells": [
                "veto" if entry.vetoed else place,
                *(setting(entry.settings.get(name, "")) for name in board.parameters), *(row.get(name, "") for name in used),
            ],
        }
        for place, (entry, row) in enumerate(zip(board.entries, rows, strict=True), 1)
    ]  # fmt: skip
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("fitness_dpo", "."),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return templates.get_template("leaderboard.html.jinja").render(
        board=board, style=STYLE, columns=["rank", *board.parameters, *used], lines=lines, plots=plots(board),
        rows=board.entries[0].figures.rows if board.entries else 0,
    )  # fmt: skip


def plots(board: Leaderboard) -> list[str]:
    """An SVG for each varied setting against the held-out accuracy, and one for each pair of them."""
    scored = [entry for entry in board.entries if entry.figures.accuracy is not None]
    if len(scored) < 2:
        return []
    with matplotlib.rc_context(LOOK):
        alone = [against_score(scored, name) for name in board.parameters]
        pairs = [interaction(scored, *pair) for pair in itertools.combinations(board.parameters, 2)]
    return [*alone, *pairs]


def against_score(entries: list[Entry], name: str) -> str:
    """Every setting's accuracy and interval over one of its values; the line joins the means."""
    axis = Axis(entries, name)
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.subplots()
    places = [axis.place(entry) for entry in entries]
    scores = [entry.figures.accuracy or 0.0 for entry in entries]
    for place, entry in zip(places, entries, strict=True):
        axes.plot([place, place], entry.interval or (), color=GREY, alpha=0.35, linewidth=1)
    axes.scatter(places, scores, color=[GREY if entry.vetoed else COLOUR for entry in entries], s=22, zorder=3)
    if len(set(places)) <= CELLS:
        means = [
            (place, average([s for p, s in zip(places, scores, strict=True) if p == place]))
            for place in sorted(set(places))
        ]
        axes.plot(*zip(*means, strict=True), color=COLOUR, linewidth=1.5)
    axis.label(axes.xaxis, axes.set_xscale)
    axes.set_xlabel(name)
    axes.set_ylabel("held-out accuracy")
    return svg(figure, f"held-out accuracy over {name}")


def interaction(entries: list[Entry], across: str, up: str) -> str:
    """The mean accuracy of each pair of values, as a heat map; as points where there are many values."""
    x, y = Axis(entries, across), Axis(entries, up)
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.subplots()
    shared: dict[tuple[float, float], list[float]] = {}
    for entry in entries:
        shared.setdefault((x.place(entry), y.place(entry)), []).append(entry.figures.accuracy or 0.0)
    values = {place: average(scores) for place, scores in shared.items()}
    if max(len(x.values), len(y.values)) > CELLS:
        columns, lines = zip(*values, strict=True)
        drawn: Any = axes.scatter(columns, lines, c=list(values.values()), cmap="viridis", s=40)
        x.label(axes.xaxis, axes.set_xscale)
        y.label(axes.yaxis, axes.set_yscale)
    else:
        grid = [[float("nan")] * len(x.values) for _ in y.values]
        for (across_place, up_place), value in values.items():
            column, line = x.places.index(across_place), y.places.index(up_place)
            grid[line][column] = value
            axes.text(
                column, line, f"{value:.3f}", ha="center", va="center", color="white",
                bbox={"facecolor": "black", "alpha": 0.35, "linewidth": 0, "boxstyle": "round,pad=0.15"},
            )  # fmt: skip
        drawn = axes.imshow(grid, cmap="viridis", aspect="auto", origin="lower")
        axes.set_xticks(range(len(x.values)), x.values)
        axes.set_yticks(range(len(y.values)), y.values)
    figure.colorbar(drawn, ax=axes)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    return svg(figure, f"held-out accuracy over {across} and {up}")


class Axis:
    """Where a setting's values stand: numbers at their place, on a logarithmic axis where they span a decade; others in order."""

    def __init__(self, entries: list[Entry], name: str) -> None:
        self.name = name
        found = {entry.settings.get(name, "") for entry in entries}
        self.numeric = all(is_number(value) for value in found)
        self.values = sorted(found, key=float) if self.numeric else sorted(found)
        self.places = (
            [float(value) for value in self.values] if self.numeric else [float(n) for n in range(len(self.values))]
        )
        self.logarithmic = self.numeric and self.places[0] > 0 and self.places[-1] / self.places[0] >= 8

    def place(self, entry: Entry) -> float:
        return self.places[self.values.index(entry.settings.get(self.name, ""))]

    def label(self, axis: Any, set_scale: Any) -> None:
        if self.logarithmic:
            set_scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        if len(self.values) <= CELLS:
            axis.set_ticks(self.places, self.values)
            axis.set_ticks([], minor=True)


def is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def average(values: list[float]) -> float:
    return sum(values) / len(values)


def svg(figure: Figure, label: str) -> str:
    """The figure as an element of a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Title": label})
    return file.getvalue()[file.getvalue().index("<svg") :]
