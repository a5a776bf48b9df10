"""The report of inspect_data as one HTML page. Imports no torch."""

from typing import Any

from fitness_dpo.pages import render
from fitness_dpo.plots import histogram


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    lengths = report["lengths"]
    answers = {name: lengths[name] for name in ("chosen", "rejected")}
    whole = {"question and longer answer": lengths["question and longer answer"]}
    limit = (report["max_length_tokens"], "max_length_tokens")
    return render(
        "data",
        title=str(report["path"]),
        report=report,
        formats=[(file, name, rows) for file, formats in report["formats"].items() for name, rows in formats.items()],
        dropped=[(reason, ", ".join(each["places"]), each["rows"]) for reason, each in report["dropped"].items()],
        token_head=("", *next(iter(report["tokens"].values()))),
        token_rows=[(name, *values.values()) for name, values in report["tokens"].items()],
        answers_plot=histogram("histogram of the answers' lengths in tokens", answers, "tokens"),
        rows_plot=histogram("histogram of the rows' lengths in tokens", whole, "tokens", mark=limit),
    )
