"""python -m fitness_dpo.report: what a run did, on one page that needs nothing else. Imports no torch."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup
from omegaconf import OmegaConf

from fitness_dpo import runs
from fitness_dpo.cli import verb
from fitness_dpo.config import InputError, ReportConfig
from fitness_dpo.pages import render
from fitness_dpo.plots import Interval, Series, curves, histogram, intervals, scatter

EVALUATION = Path("evaluation") / "metrics.json"
Data = dict[str, Any]
Plot = tuple[str, Markup, str]
"""Caption, SVG, note."""
Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
"""Caption, head, rows."""


def write_report(run: Path) -> Path:
    """Write RUN/report.html from what a finished run and, if there was one, its evaluation left behind; its path."""
    if not (run / runs.METRICS).is_file():
        raise InputError(f"run={run}: no {runs.METRICS} there; the run did not finish, go on with resume={run}")
    metrics, record = read_json(run / runs.METRICS), read_json(run / runs.RECORD)
    evaluation = read_json(run / EVALUATION) if (run / EVALUATION).is_file() else None
    settings = (run / runs.CONFIG).read_text(encoding="utf-8")
    config: Any = OmegaConf.create(settings)
    page = render(
        "report",
        title=f"{config.model.name} on {config.data.path}",
        subtitle=f"{'/'.join(run.resolve().parts[-2:])}, commit {(record['commit'] or 'unknown')[:12]}",
        held_out=held_out_figures(metrics),
        curves=list(training_curves(metrics["history"], config.dpo.beta)),
        effort=effort(metrics),
        pair_plots=list(pair_plots(metrics["held_out_pairs"], evaluation, config.dpo.beta)),
        evaluation=evaluation,
        tables=list(evaluation_tables(evaluation)) if evaluation else [],
        group_plots=list(group_plots(evaluation["preference"])) if evaluation else [],
        side_by_side=evaluation["side_by_side"] if evaluation else sampled(run),
        versions=[("python", record["python"]), *record["packages"].items()],
        settings=settings,
        **verdict(metrics["verdicts"], evaluation),
    )
    runs.write_whole(run / runs.REPORT, page)
    return run / runs.REPORT


def verdict(verdicts: list[Data], evaluation: Data | None) -> Data:
    """The box on top: what is wrong, or that nothing is."""
    sick = [each for each in verdicts if each["sick"]]
    health = f"unhealthy: {', '.join(each['name'] for each in sick)}" if sick else "nothing wrong seen while training"
    gate: Data = evaluation["gate"] if evaluation else {"passed": True, "breaches": []}
    passed = "gate passed" if gate["passed"] else f"gate failed on {len(gate['breaches'])}"
    return {
        "good": not sick and gate["passed"],
        "headline": f"{passed}; {health}" if evaluation else f"{health}; not evaluated yet",
        "sick": [each["line"] for each in sick],
        "healthy": [each["line"] for each in verdicts if not each["sick"]],
    }


def held_out_figures(metrics: Data) -> list[tuple[Any, ...]]:
    after = metrics["after"]
    names = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
    return [(f"held-out {name}", after[f"eval_{key}"]) for key, name in names.items() if after]


def effort(metrics: Data) -> list[tuple[Any, ...]]:
    names = {
        "steps": "steps",
        "seconds": "seconds",
        "tokens_per_second": "tokens a second",
        "peak_memory_gib": "GiB at most",
    }
    rows = {"train": "training pairs", "validation": "validation pairs", "test": "test pairs"}
    return [
        *((name, metrics[key]) for key, name in names.items()),
        *((name, metrics["rows"][key]) for key, name in rows.items()),
    ]


def training_curves(history: list[Data], beta: float) -> Iterator[Plot]:
    """Loss, margin, accuracy, log-probabilities, gradient norm and learning rate over the steps."""
    train = [entry for entry in history if "loss" in entry]
    held_out = [entry for entry in history if "eval_loss" in entry]

    def series(key: str, name: str, held: str, *, scale: float = 1, colours: tuple[int, int] = (0, 1)) -> list[Series]:
        measured = [entry for entry in held_out if key != "rewards/accuracies" or entry["step"] > 0]
        lines = [(train, key, name, colours[0], False), (measured, f"eval_{key}", held, colours[1], True)]
        return [
            Series(label, [entry["step"] for entry in entries], [entry[key] * scale for entry in entries], colour, marked)
            for entries, key, label, colour, marked in lines if entries and key in entries[0]
        ]  # fmt: skip

    for key, caption in (
        ("loss", "Loss"),
        ("rewards/margins", "Reward margin"),
        ("rewards/accuracies", "Reward accuracy"),
    ):
        yield caption, curves(f"{caption} over steps", series(key, "train", "held out")), ""
    sides = [
        line
        for colour, side in enumerate(("chosen", "rejected"))
        for line in series(f"rewards/{side}", side, f"{side}, held out", scale=1 / beta, colours=(colour, colour))
    ]
    yield "Change in log-probability", curves("Change in log-probability over steps", sides), "nats an answer"
    yield "Gradient norm", curves("Gradient norm over steps", series("grad_norm", "train", ""), log=True), ""
    yield "Learning rate", curves("Learning rate over steps", series("learning_rate", "train", "")), ""


def pair_plots(pairs: Data | None, evaluation: Data | None, beta: float) -> Iterator[Plot]:
    """The margins of the evaluated pairs, or else of the validation split, and how lengths go with them."""
    margins, rows = (evaluation["preference"]["margins"], evaluation["split"]) if evaluation else (pairs, "validation")
    if margins and margins["after"]:
        series = {name: margins[name] for name in ("before", "after")}
        label = "log p(chosen) − log p(rejected), nats"
        yield "Margins", histogram("Margins before and after training", series, label), f"{rows} split"
    if pairs:
        rewards = [beta * (after - before) for before, after in zip(pairs["before"], pairs["after"], strict=True)]
        plot = scatter(
            "Reward margin by difference in length", pairs["length_differences"], rewards, "tokens, chosen − rejected",
            "reward margin",
        )  # fmt: skip
        yield "Margin and length", plot, "validation split"


def evaluation_tables(evaluation: Data) -> Iterator[Table]:
    """Every measure: those of the tuned model against its base, then base beside tuned."""
    preference, quiz = evaluation["preference"], evaluation["quiz"]
    head = ("", "base" if evaluation["against"] is None else "against", "tuned", "difference")
    names = {
        "accuracy": "reward accuracy", "margin": "reward margin",
        "chosen_change": "change of the chosen log-probability, nats",
        "rejected_change": "change of the rejected log-probability, nats",
    }  # fmt: skip
    yield "Preference", ("", "tuned against base"), [(name, preference[key]) for key, name in names.items()]
    yield "Preference by log-probability", head, beside(preference)
    parts = {"": quiz, ", facts seen in training": quiz["in_training"], ", unseen facts": quiz["unseen"]}
    exams = [(f"{name}{part}", *values) for part, scores in parts.items() for name, *values in beside(scores)]
    yield "Quiz", head, exams
    yield "Quiz, McNemar's test", ("", "p"), [(words(key), p) for key, p in (quiz["p_value"] or {}).items()]
    yield "Safety", head, beside(evaluation["safety"])
    yield "Degeneration", head, beside(evaluation["degeneration"])
    if evaluation["judge"]:
        yield "Judge", ("", ""), [(words(key), value) for key, value in evaluation["judge"].items()]


def beside(scores: Data) -> list[tuple[Any, ...]]:
    """A row for each measure: base, tuned and, where it was computed, their difference."""
    base, difference = scores["base"] or {}, scores.get("difference") or {}
    return [(words(key), base.get(key), tuned, difference.get(key)) for key, tuned in (scores["tuned"] or {}).items()]


def group_plots(preference: Data) -> Iterator[Plot]:
    """Reward accuracy with its interval, by topic and by flaw."""
    for key, name in (("by_topic", "topic"), ("by_flaw", "flaw")):
        rows = [
            Interval(f"{group} ({each['rows']})", *(each["accuracy"][end] for end in ("value", "low", "high")))
            for group, each in preference[key].items() if each["accuracy"]
        ]  # fmt: skip
        if rows:
            plot = intervals(f"Reward accuracy by {name}", rows, "reward accuracy, 95% interval", 0.5)
            yield f"By {name}", plot, "in brackets: pairs; dashed: chance"


def sampled(run: Path) -> list[Data]:
    """The sample questions with their first and last answers."""
    answers: dict[str, Data] = {}
    for row in runs.read_samples(run):
        known = answers.setdefault(row["prompt"], {"prompt": row["prompt"], "base": row["answer"]})
        known["tuned"] = row["answer"]
    return list(answers.values())


def words(key: str) -> str:
    return key.replace("_", " ")


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def main(config: ReportConfig, _: Path) -> None:
    print(os.path.relpath(write_report(runs.finished_run(config.run))))  # noqa: T201


if __name__ == "__main__":
    verb("report", ReportConfig, main)
