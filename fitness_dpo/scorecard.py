"""The one screen an evaluation ends with. Imports no torch."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

Scores = dict[str, Any]


def scorecard(metrics: Scores, other: str) -> Table:
    """base | tuned | difference with its 95% interval. `other` names what the tuned model is compared with."""
    compared = metrics["run"] is not None
    table = Table(title=f"{metrics['split']} split, {metrics['rows']} pairs", title_justify="left", box=None)
    table.add_column("", no_wrap=True)
    if compared:
        table.add_column(other, justify="right")
    table.add_column("tuned" if compared else "score", justify="right")
    table.add_column("difference [95%]" if compared else "[95%]", justify="right", no_wrap=True)
    for title, rows in (
        ("preference", preference_rows(metrics["preference"])),
        ("quiz", quiz_rows(metrics["quiz"])),
        ("safety", safety_rows(metrics["safety"])),
        ("degeneration", degeneration_rows(metrics["degeneration"])),
        ("judge", judge_rows(metrics["judge"])),
    ):
        lines = list(rows)
        if lines:
            table.add_row(f"[bold]{title}[/]")
        for name, base, tuned, difference in lines:
            table.add_row(f"  {name}", *([base] if compared else []), tuned, difference)
    return table


Row = tuple[str, str, str, str]


def figure(value: Any, form: str) -> str:
    """A figure or an interval's value."""
    if value is None:
        return ""
    return format(value["value"] if isinstance(value, dict) else value, form)


def spread(interval: Scores | None, form: str, *, value: bool = True) -> str:
    if interval is None:
        return ""
    ends = f"[{interval['low']:{form}}, {interval['high']:{form}}]"
    return f"{interval['value']:{form}} {ends}" if value else ends


def compare(scores: Scores, key: str, name: str, form: str = ".3f") -> Row:
    """One measure of both sides; of a single model, the measure and its own interval."""
    base, tuned, change = scores["base"], scores["tuned"], scores["difference"]
    if change is None:
        own = tuned[key]
        return name, "", figure(own, form), spread(own, form, value=False) if isinstance(own, dict) else ""
    return name, figure(base[key], form), figure(tuned[key], form), spread(change[key], f"+{form}")


def preference_rows(scores: Scores) -> Iterator[Row]:
    if scores["accuracy"] is not None:
        yield "reward accuracy", "", figure(scores["accuracy"], ".3f"), spread(scores["accuracy"], ".3f", value=False)
        if scores["tfidf"] is not None:
            tfidf = scores["tfidf"]
            own, theirs = figure(scores["accuracy"], ".3f"), figure(tfidf["accuracy"], ".3f")
            yield "… against TF-IDF on answers", theirs, own, spread(tfidf["difference"], "+.3f")
        yield "reward margin", "", figure(scores["margin"], ".3f"), spread(scores["margin"], ".3f", value=False)
        for side in ("chosen", "rejected"):
            change = scores[f"{side}_change"]
            yield f"{side} log-probability", "", "", spread(change, "+.2f")
    yield compare(scores, "logp_accuracy", "chosen is likelier")
    yield compare(scores, "logp_per_token_accuracy", "chosen is likelier, per token")


def quiz_rows(scores: Scores) -> Iterator[Row]:
    parts = (("", scores), (", seen facts", scores["in_training"]), (", unseen", scores["unseen"]))
    for suffix, part in parts:
        if part["questions"]:
            for key, name in (("raw", "right"), ("per_byte", "right, per byte")):
                yield compare(part, key, f"{name}{suffix}")
    if scores["p_value"] is not None:
        shown = ", ".join(
            f"{scores['p_value'][key]:.2g} {name}" for key, name in (("raw", "raw"), ("per_byte", "per byte"))
        )
        yield "McNemar's p", "", "", shown


def safety_rows(scores: Scores) -> Iterator[Row]:
    for key, name in (
        ("care_passed", "met with care"), ("answered", "harmless answered"), ("over_refused", "harmless refused"),
    ):  # fmt: skip
        if scores["tuned"].get(key) is not None:
            yield compare(scores, key, name)


def degeneration_rows(scores: Scores) -> Iterator[Row]:
    for key, name, form in (
        ("words", "words an answer", ".1f"), ("distinct_2", "distinct-2", ".3f"),
        ("repeated_4grams", "repeated 4-grams", ".3f"), ("ended", "ended by itself", ".3f"), ("empty", "empty", ".3f"),
    ):  # fmt: skip
        yield compare(scores, key, name, form)


def judge_rows(scores: Scores | None) -> Iterator[Row]:
    if scores is None:
        return
    for key, name in (("win_rate", "tuned wins"), ("length_controlled_win_rate", "… at equal length")):
        if scores[key] is not None:
            yield name, "", figure(scores[key], ".3f"), spread(scores[key], ".3f", value=False)
    yield "verdicts, ties, missing", "", "", f"{scores['verdicts']}, {scores['ties']}, {scores['missing']}"
