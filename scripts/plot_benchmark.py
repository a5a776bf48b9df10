"""Draw what scripts/benchmark.py measured: python scripts/plot_benchmark.py {lengths,losses} benchmark.json docs/FILE.svg.

`lengths` draws tokens a second over the length of a sequence, a line for a few batch sizes and one for the largest at each
length; `losses` the loss of every training, smoothed over ten steps. One system for the first, any for the second.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MEAN_LENGTH = 200
"""Tokens of a prompt and an answer at --scale 1, the longer and the shorter answer averaged."""
BATCHES = (1, 8, 32)
MARKS, DASHES = "osD^", ("-", "--", ":", "-.")  # told apart without colour, too
SMOOTH = 10


def lengths(axes: Axes, results: list[dict[str, Any]]) -> None:
    found = {(result["scale"], result["batch"]): result["tokens_per_second"] / 1000 for result in results}
    scales = sorted({scale for scale, _ in found})
    largest = {scale: max(batch for other, batch in found if other == scale) for scale in scales}
    lines = {f"{batch} {'pair' if batch == 1 else 'pairs'} a step": dict.fromkeys(scales, batch) for batch in BATCHES}
    for (label, batches), mark, dash in zip((lines | {"most": largest}).items(), MARKS, DASHES, strict=True):
        points = [
            (scale * MEAN_LENGTH, found[scale, batch]) for scale, batch in batches.items() if (scale, batch) in found
        ]
        axes.plot(*zip(*points, strict=True), marker=mark, linestyle=dash, label=label)
    for scale, batch in largest.items():
        axes.annotate(
            str(batch), (scale * MEAN_LENGTH, found[scale, batch]), (0, 6), textcoords="offset points", ha="center"
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([64, 256, 1024, 4096], labels=["64", "256", "1,024", "4,096"])
    axes.set_xlabel("tokens of a prompt and an answer, on average")
    axes.set_ylabel("thousand tokens/s")
    axes.set_ylim(bottom=0)


def losses(axes: Axes, results: list[dict[str, Any]]) -> None:
    for result, dash in zip(results, itertools.cycle(DASHES), strict=False):
        smooth = np.convolve(result["loss"], np.full(SMOOTH, 1 / SMOOTH), mode="valid")
        label = f"{result['system']}, {result['dtype']}, seed {result['seed']}"
        axes.plot(np.arange(SMOOTH, SMOOTH + len(smooth)), smooth, linestyle=dash, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, mean of {SMOOTH} steps")


def main() -> None:
    kind, source, target = sys.argv[1:]
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    results = [result for result in json.loads(Path(source).read_text(encoding="utf-8")) if "failed" not in result]
    {"lengths": lengths, "losses": losses}[kind](axes, results)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.4)
    axes.legend(frameon=False)
    figure.savefig(target, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
