"""python -m fitness_dpo.leaderboard: the runs of a sweep ranked, in the terminal, as CSV and as a page. Imports no torch."""

import csv
import io
import json
import math
import re
import shlex
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from fitness_dpo import runs, sweep
from fitness_dpo.cli import verb
from fitness_dpo.config import LeaderboardConfig

VETO = "displacement"
Z95 = 1.959964


class Figures(NamedTuple):
    """What a run is judged by. None where it was not measured."""

    accuracy: float | None
    """Share of held-out pairs whose chosen answer has the higher reward. The one figure that means the same at every beta."""
    rows: int
    """Held-out pairs behind it."""
    margin: float | None
    """Held-out reward margin divided by beta: how much further apart the two log-probabilities moved, in nats."""
    chosen_change: float | None
    """Change of the chosen answers' log-probability, in nats; far below 0 is displacement (Razin et al. 2024)."""
    quiz: float | None
    answer_words: float | None
    seconds: float | None
    memory_gib: float | None


@dataclass(slots=True, kw_only=True)
class Entry:
    """One setting of the sweep: the mean over its seeds."""

    jobs: list[int]
    settings: dict[str, str]
    """What the sweep varied."""
    overrides: list[str]
    figures: Figures
    seeds: list[float] = field(default_factory=list)
    """Held-out accuracy of each seed."""
    sick: list[str] | None = None
    """Health verdicts against any of its runs; None where none was given."""

    stopped: bool = False
    """Whether a health verdict ended any of its runs early."""

    @property
    def vetoed(self) -> bool:
        return self.stopped or VETO in (self.sick or ())

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.figures.accuracy is None else wilson(self.figures.accuracy, self.figures.rows)


class Leaderboard(NamedTuple):
    folder: Path
    parameters: list[str]
    entries: list[Entry]
    """Best first."""
    unfinished: list[dict[str, Any]]
    """Jobs without a result, as sweep.json has them."""

    @property
    def best(self) -> str | None:
        """The command that repeats the best run."""
        if not self.entries or self.entries[0].vetoed:
            return None
        return shlex.join(["python", "-m", "fitness_dpo.train", *self.entries[0].overrides])


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` trials (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    middle = share + Z95**2 / (2 * count)
    reach = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def run_figures(run: Path) -> Figures:
    """The figures of a finished run, from its metrics.json and, where it was evaluated, evaluation/metrics.json."""
    metrics, config = read_json(run / runs.METRICS), OmegaConf.load(run / runs.CONFIG)
    beta, after, rows = float(config.dpo.beta), metrics["after"] or {}, metrics["rows"]
    evaluation = run / "evaluation" / runs.METRICS
    evaluated = read_json(evaluation) if evaluation.is_file() else {}
    quiz, answers = evaluated.get("quiz"), evaluated.get("degeneration")
    return Figures(
        accuracy=number(after.get("eval_rewards/accuracies")),
        rows=rows["validation"] - rows["too_long"]["validation"],
        margin=number(after.get("eval_rewards/margins"), 1 / beta),
        chosen_change=number(after.get("eval_rewards/chosen"), 1 / beta),
        quiz=number(quiz["tuned"]["raw"]["value"]) if quiz else None,
        answer_words=number(answers["tuned"]["words"]) if answers else None,
        seconds=number(metrics["seconds"]),
        memory_gib=number(metrics["peak_memory_gib"]),
    )


NOT_MEASURED = Figures(**{name: 0 if name == "rows" else None for name in Figures._fields})  # type: ignore[arg-type]


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def number(value: float | None, scale: float = 1.0) -> float | None:
    """The scaled value, or None where there is none or it is not finite."""
    return value * scale if value is not None and math.isfinite(value) else None


def mean(figures: list[Figures]) -> Figures:
    """Figure by figure; one that a run lacks is lacking."""
    means: dict[str, Any] = {
        name: None if None in values else statistics.fmean(values)
        for name, values in zip(Figures._fields, zip(*figures, strict=True), strict=True)
    }
    return Figures(**means | {"rows": max(each.rows for each in figures)})


def rank(folder: Path) -> Leaderboard:
    """Rank the settings of a sweep by held-out accuracy; one with a run whose chosen answers were displaced, or that a
    health verdict stopped, stands behind all others, whatever its accuracy. Margins and losses do not rank: they are not comparable across betas."""
    record = sweep.read_record(folder) or {"jobs": []}
    parsed = {job["number"]: values_of(job["overrides"]) for job in record["jobs"]}
    names = dict.fromkeys(name for values in parsed.values() for name in values)
    varied = [name for name in names if len({values.get(name) for values in parsed.values()}) > 1]
    parameters = [name for name in varied if name != "dpo.seed"] or varied
    groups: dict[tuple[str | None, ...], list[dict[str, Any]]] = {}
    unfinished = []
    for job in record["jobs"]:
        if job["state"] == "stopped" or (folder / job["folder"] / runs.METRICS).is_file():
            groups.setdefault(tuple(parsed[job["number"]].get(name) for name in parameters), []).append(job)
        else:
            unfinished.append(job)
    entries = []
    for values, jobs in groups.items():
        measured = [folder / job["folder"] for job in jobs if (folder / job["folder"] / runs.METRICS).is_file()]
        each = [run_figures(run) for run in measured] + [NOT_MEASURED] * (len(jobs) - len(measured))
        verdicts = [read_json(run / runs.METRICS).get("verdicts") for run in measured]
        sick = [verdict["name"] for given in verdicts for verdict in given or () if verdict["sick"]]
        stopped = [job["reason"].partition(":")[0] for job in jobs if job["state"] == "stopped"]
        several = len(jobs) > 1
        entries.append(
            Entry(
                jobs=[job["number"] for job in jobs],
                settings={name: value for name, value in zip(parameters, values, strict=True) if value is not None},
                overrides=jobs[0]["overrides"],
                figures=mean(each),
                seeds=[figures.accuracy for figures in each if figures.accuracy is not None] if several else [],
                sick=None if None in verdicts and not stopped else list(dict.fromkeys([*stopped, *sick])),
                stopped=bool(stopped),
            )
        )
    return Leaderboard(folder, parameters, sorted(entries, key=order), unfinished)


def order(entry: Entry) -> tuple[bool, float, float]:
    accuracy, change = entry.figures.accuracy, entry.figures.chosen_change
    return entry.vetoed, math.inf if accuracy is None else -accuracy, -(change or 0.0)


def values_of(overrides: list[str]) -> dict[str, str]:
    parsed = OverridesParser.create().parse_overrides(overrides=overrides)
    return {override.key_or_group: override.get_value_element_as_str() for override in parsed}


def displaced(run: Path) -> bool:
    """Whether the run's own verdict is that its chosen answers lost probability."""
    verdicts = read_json(run / runs.METRICS).get("verdicts") or ()
    return any(verdict["sick"] and verdict["name"] == VETO for verdict in verdicts)


def cells(entry: Entry) -> dict[str, str]:
    """An entry's figures as they are shown, under their column's heading."""
    figures, interval = entry.figures, entry.interval
    return {
        "accuracy": shown(figures.accuracy, ".3f"),
        "95%": f"{interval[0]:.2f}-{interval[1]:.2f}" if interval else "",
        **({"seeds": f"{min(entry.seeds):.3f}-{max(entry.seeds):.3f}"} if entry.seeds else {}),
        "margin / beta": shown(figures.margin, ".2f"),
        "chosen change": shown(figures.chosen_change, "+.2f"),
        "quiz": shown(figures.quiz, ".3f"),
        "answer words": shown(figures.answer_words, ".0f"),
        "health": "" if entry.sick is None else ", ".join(entry.sick) or "well",
        "seconds": shown(figures.seconds, ".0f"),
        "GiB": shown(figures.memory_gib, ".2f"),
        "jobs": " ".join(map(str, entry.jobs)),
    }


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def setting(value: str) -> str:
    """A setting's value as it is shown: numbers as Optuna draws them are too long for a table."""
    return f"{float(value):.4g}" if re.fullmatch(r"-?\d*\.\d{5,}(e-?\d+)?", value) else value


def terminal_table(board: Leaderboard) -> Table:
    table = Table(title=f"{board.folder}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    rows = [cells(entry) for entry in board.entries]
    used = [name for name in (rows[0] if rows else {}) if any(row.get(name) for row in rows)]
    for name in ("", *board.parameters, *used):
        table.add_column(name, justify="right")
    for place, (entry, row) in enumerate(zip(board.entries, rows, strict=True), 1):
        table.add_row(
            "veto" if entry.vetoed else str(place),
            *(setting(entry.settings.get(name, "")) for name in board.parameters),
            *(row.get(name, "") for name in used),
            style="dim" if entry.vetoed else "",
        )
    return table


def as_csv(board: Leaderboard) -> str:
    """One line for each setting, figures in full."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(
        ["rank", "jobs", *board.parameters, *Figures._fields, "low", "high", "accuracy_of_seeds", "sick", "vetoed"]
    )
    for place, entry in enumerate(board.entries, 1):
        low, high = entry.interval or (None, None)
        writer.writerow(
            [
                place, " ".join(map(str, entry.jobs)), *(entry.settings.get(name) for name in board.parameters),
                *entry.figures, low, high, " ".join(map(str, entry.seeds)), " ".join(entry.sick or ()), entry.vetoed,
            ]
        )  # fmt: skip
    return file.getvalue()


def publish(folder: Path, console: Console) -> Leaderboard:
    """Write leaderboard.csv and leaderboard.html into the sweep's folder and print the ranking."""
    from fitness_dpo.leaderboard_page import page

    board = rank(folder)
    runs.write_whole(folder / "leaderboard.csv", as_csv(board))
    runs.write_whole(folder / "leaderboard.html", page(board))
    if board.entries:
        console.print(terminal_table(board))
    for job in board.unfinished:
        console.print(
            f"job {job['number']} {job['state']}: {job['reason'] or ' '.join(job['overrides'])}",
            markup=False,
            highlight=False,
        )
    if board.best is not None:
        console.print(f"best  {board.best}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"page  {folder / 'leaderboard.html'}", markup=False, highlight=False, soft_wrap=True)
    return board


def main(config: LeaderboardConfig, run: Path) -> None:
    publish(sweep.sweep_folder("sweep", config.sweep), Console())


if __name__ == "__main__":
    verb("leaderboard", LeaderboardConfig, main)
