"""python -m fitness_dpo.inspect_data: what a preference file holds, what is dropped and how long its rows are."""

import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fitness_dpo.cli import verb
from fitness_dpo.config import InspectConfig
from fitness_dpo.data import Preferences, load_preferences
from fitness_dpo.data_page import page
from fitness_dpo.runs import write_whole
from fitness_dpo.weights import locate

if TYPE_CHECKING:
    from fitness_dpo.template import ChatTemplate, PairIds

Report = dict[str, Any]
PLACES, EXAMPLES = 5, 10
PERCENTILES = {"min": 0, "median": 50, "p90": 90, "p99": 99, "max": 100}


def inspect(preferences: Preferences, template: "ChatTemplate", config: InspectConfig) -> Report:
    """The report as plain data. Lengths are in tokens; `places` name the first rows concerned."""
    rows = [row for split in preferences.splits.values() for row in split]
    pairs = [template.pair_ids(row.prompt, row.chosen, row.rejected) for row in rows]
    limit = config.model.max_length_tokens
    long = [row.place for row, pair in zip(rows, pairs, strict=True) if pair.length > limit]
    lengths = {
        "question": [len(pair.prompt_ids) for pair in pairs],
        "chosen": [len(pair.chosen_ids) for pair in pairs],
        "rejected": [len(pair.rejected_ids) for pair in pairs],
        "question and longer answer": [pair.length for pair in pairs],
    }
    chosen, rejected = np.array(lengths["chosen"]), np.array(lengths["rejected"])
    shown = random.Random(config.data.seed).sample(range(len(rows)), min(EXAMPLES, len(rows)))  # noqa: S311
    return {
        "path": config.data.path,
        "model": config.model.name,
        "read": preferences.read,
        "kept": len(rows),
        "splits": {name: len(split) for name, split in preferences.splits.items()},
        "formats": preferences.formats,
        "dropped": {
            reason: {"rows": len(places), "places": list(dict.fromkeys(places))[:PLACES]}
            for reason, places in sorted(preferences.dropped_rows.items(), key=lambda item: -len(item[1]))
        },
        "duplicates": {"exact": preferences.dropped["duplicate"], "near": preferences.dropped["near-duplicate"]},
        "tokens": {
            name: {label: round(float(np.percentile(values, rank))) for label, rank in PERCENTILES.items()}
            for name, values in lengths.items()
        },
        "max_length_tokens": limit,
        "too_long": {"rows": len(long), "places": long[:PLACES]},
        "length_bias": {
            "chosen_longer": round(float((chosen > rejected).mean()), 3),
            "mean_ratio": round(float((chosen / rejected).mean()), 3),
        },
        "topics": dict(Counter(row.topic for row in rows if row.topic).most_common()),
        "flaws": dict(Counter(row.flaw for row in rows if row.flaw).most_common()),
        "examples": [{"place": rows[place].place, **as_seen(template, pairs[place])} for place in shown],
        "lengths": lengths,
    }


def as_seen(template: "ChatTemplate", pair: "PairIds") -> dict[str, str]:
    """The texts that the token ids of a pair stand for, template and all."""
    return {name.removesuffix("_ids"): str(template.tokenizer.decode(ids)) for name, ids in pair._asdict().items()}


def summary(report: Report) -> Table:
    """The report on one screen."""
    table = Table(title="data", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    splits = ", ".join(f"{rows:,} {name}" for name, rows in report["splits"].items())
    table.add_row("rows", f"{report['read']:,} read, {report['kept']:,} pairs kept: {splits}")
    files: dict[str, list[str]] = {}
    for file, formats in report["formats"].items():
        for name in formats:
            files.setdefault(name, []).append(file)
    for name, found in files.items():
        more = f" and {len(found) - 1} more files" if len(found) > 1 else ""
        table.add_row(
            "format", f"{name}: {sum(report['formats'][file][name] for file in found):,} rows of {found[0]}{more}"
        )
    for reason, dropped in report["dropped"].items():
        places = [place.removeprefix(f"{next(iter(report['formats']))} ") for place in dropped["places"]]
        more = " ..." if dropped["rows"] > len(places) else ""
        table.add_row("dropped", f"{dropped['rows']:,} {reason}: {', '.join(places)}{more}")
    for name, values in report["tokens"].items():
        table.add_row("tokens", f"{name}: {', '.join(f'{label} {value:,}' for label, value in values.items())}")
    table.add_row(
        "too long", f"{report['too_long']['rows']:,} rows of more than {report['max_length_tokens']:,} tokens"
    )
    bias = report["length_bias"]
    table.add_row(
        "length bias",
        f"chosen longer in {bias['chosen_longer']:.0%} of the pairs, {bias['mean_ratio']:.2f} times as long on average",
    )
    for name in ("topics", "flaws"):
        if report[name]:
            table.add_row(name, ", ".join(f"{topic} {rows:,}" for topic, rows in report[name].items()))
    return table


def main(config: InspectConfig, folder: Path) -> None:
    preferences = load_preferences(config.data)
    path = locate(config.model.name, config.model.revision)

    from transformers import AutoTokenizer

    from fitness_dpo.template import ChatTemplate

    tokenizer = AutoTokenizer.from_pretrained(
        path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
    )
    report = inspect(preferences, ChatTemplate(tokenizer), config)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.html", page(report))
    write_whole(folder / "report.json", json.dumps(report, ensure_ascii=False, indent=1))
    console = Console(markup=False, highlight=False)
    console.print(summary(report))
    console.print(f"report   {os.path.relpath(folder / 'report.html')}")


if __name__ == "__main__":
    verb("inspect_data", InspectConfig, main)
