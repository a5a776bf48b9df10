"""leaderboard.html: the ranking as a table that sorts, and what each varied setting did to the score. Imports no torch."""

import itertools
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from fitness_dpo.leaderboard import Entry, Leaderboard, cells, setting
from fitness_dpo.pages import render
from fitness_dpo.plots import COLOURS, drawing

MANY = 8  # past so many values of a setting a heat map is drawn as points
Plot = tuple[str, Markup, str]
"""Caption, SVG, note."""


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
    return render(
        "leaderboard", title=str(board.folder), best=board.best, columns=["rank", *board.parameters, *used], lines=lines,
        plots=plots(board), unfinished=board.unfinished, rows=board.entries[0].figures.rows if board.entries else 0,
    )  # fmt: skip


def plots(board: Leaderboard) -> list[Plot]:
    """A plot of each varied setting against the held-out accuracy, and one of each pair of them."""
    scored = [entry for entry in board.entries if entry.figures.accuracy is not None]
    if len(scored) < 2:
        return []
    alone = [against_score(scored, name) for name in board.parameters]
    return [*alone, *(interaction(scored, *pair) for pair in itertools.combinations(board.parameters, 2))]


def against_score(entries: list[Entry], name: str) -> Plot:
    """Every setting's accuracy and interval over one of its values; the line joins the means."""
    axis = Axis(entries, name)
    places = [axis.place(entry) for entry in entries]
    scores = [entry.figures.accuracy or 0.0 for entry in entries]
    with drawing(f"held-out accuracy over {name}", height=3) as (axes, drawn):
        for place, score, entry in zip(places, scores, entries, strict=True):
            axes.plot([place, place], entry.interval or (), color=COLOURS[0], alpha=0.25, linewidth=1.5)
            axes.plot([place], [score], "x" if entry.vetoed else "o", color=COLOURS[entry.vetoed], markersize=5)
        if len(axis.values) <= MANY:
            means = [
                average([score for at, score in zip(places, scores, strict=True) if at == place])
                for place in axis.places
            ]
            axes.plot(axis.places, means, color=COLOURS[0], linewidth=1.5)
        axis.label(axes, "x")
    return f"Accuracy over {name}", drawn[0], "line: means; × vetoed"


def interaction(entries: list[Entry], across: str, up: str) -> Plot:
    """The mean accuracy of each pair of values, as a heat map; as points where there are many values."""
    x, y = Axis(entries, across), Axis(entries, up)
    shared: dict[tuple[float, float], list[float]] = {}
    for entry in entries:
        shared.setdefault((x.place(entry), y.place(entry)), []).append(entry.figures.accuracy or 0.0)
    values = {place: average(scores) for place, scores in shared.items()}
    with drawing(f"held-out accuracy over {across} and {up}", height=3) as (axes, drawn):
        axes.grid(visible=False)
        if max(len(x.values), len(y.values)) > MANY:
            columns, lines = zip(*values, strict=True)
            scale: Any = axes.scatter(columns, lines, c=list(values.values()), cmap="viridis", s=40)
            x.label(axes, "x")
            y.label(axes, "y")
        else:
            scale = heat_map(axes, x, y, values)
        if axes.figure is not None:
            axes.figure.colorbar(scale, ax=axes)
    return f"Accuracy over {across} and {up}", drawn[0], ""


def heat_map(axes: Axes, x: "Axis", y: "Axis", values: dict[tuple[float, float], float]) -> Any:
    grid = [[float("nan")] * len(x.values) for _ in y.values]
    for (across, up), value in values.items():
        column, line = x.places.index(across), y.places.index(up)
        grid[line][column] = value
        label = {"facecolor": "black", "alpha": 0.4, "linewidth": 0, "boxstyle": "round,pad=0.15"}
        axes.text(column, line, f"{value:.3f}", ha="center", va="center", color="white", bbox=label)
    axes.set_xticks(range(len(x.values)), x.values)
    axes.set_yticks(range(len(y.values)), y.values)
    axes.set_xlabel(x.name)
    axes.set_ylabel(y.name)
    return axes.imshow(grid, cmap="viridis", aspect="auto", origin="lower")


class Axis:
    """Where a setting's values stand: numbers at their place, on a logarithmic axis where they span a decade; others in order."""

    def __init__(self, entries: list[Entry], name: str) -> None:
        self.name = name
        found = {entry.settings.get(name, "") for entry in entries}
        numeric = all(is_number(value) for value in found)
        self.values = sorted(found, key=float) if numeric else sorted(found)
        self.places = [float(value) if numeric else float(place) for place, value in enumerate(self.values)]
        self.logarithmic = numeric and self.places[0] > 0 and self.places[-1] / self.places[0] >= 8

    def place(self, entry: Entry) -> float:
        return self.places[self.values.index(entry.settings.get(self.name, ""))]

    def label(self, axes: Axes, side: str) -> None:
        if self.logarithmic:
            axes.set(**{f"{side}scale": "log"})
            axis = axes.xaxis if side == "x" else axes.yaxis
            axis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        if len(self.values) <= MANY:
            axes.set(**{f"{side}ticks": self.places, f"{side}ticklabels": self.values})
        axes.set(**{f"{side}label": self.name})


def is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def average(values: list[float]) -> float:
    return sum(values) / len(values)
