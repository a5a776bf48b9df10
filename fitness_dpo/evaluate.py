"""python -m fitness_dpo.evaluate: is the tuned model better than its base, by how much, and is it safe to ship?"""

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fitness_dpo import runs
from fitness_dpo.bot import UNTUNED
from fitness_dpo.cli import verb
from fitness_dpo.config import DataConfig, EvaluateConfig, InputError, ModelConfig, TrainConfig
from fitness_dpo.data import load_preferences
from fitness_dpo.exam import read_quiz, read_safety
from fitness_dpo.gate import breaches, verdict
from fitness_dpo.items import Items, recorded_settings
from fitness_dpo.manifest import sha256
from fitness_dpo.model import override
from fitness_dpo.report import write_report
from fitness_dpo.weights import locate

if TYPE_CHECKING:
    from fitness_dpo.data import Example
    from fitness_dpo.evaluation import Material
    from fitness_dpo.judge import Judge

BREACHED = 3
"""The exit status of a gate that does not open."""


class Target(NamedTuple):
    """What the command line names, found and checked. No weights are loaded for it."""

    model: ModelConfig
    run: Path | None
    against: Path | None
    data: DataConfig
    beta: float | None


def find(config: EvaluateConfig) -> Target:
    """The run with its settings, or the model named without one. Raises InputError where they do not fit together."""
    if config.model.name is None:
        overridden = [word for word in HydraConfig.get().overrides.task if word.startswith("data")]
        if overridden:
            raise InputError(f"{' '.join(overridden)}: a run is measured on its own rows; leave this out")
        run = runs.finished_run(config.run)
        trained = runs.load_config(run, TrainConfig)
        for folder in filter(None, (run, against := other_run(config, trained))):
            check_adapter(folder, trained.model.name)
        return Target(override(trained.model, config.model), run, against, trained.data, trained.dpo.beta)
    for key, value in (("run", config.run if config.run != "latest" else None), ("against", config.against)):
        if value is not None:
            raise InputError(
                f"model.name={config.model.name}: a model is measured without a run, and {key}={value} has its own; leave one out"
            )
    if config.judge.url is not None:
        raise InputError(
            f"judge.url={config.judge.url}: model.name={config.model.name} is compared with nothing; give a run"
        )
    if config.gate.enabled:
        raise InputError(f"gate.enabled=true: model.name={config.model.name} is compared with nothing; give a run")
    return Target(override(UNTUNED, config.model), None, None, config.data, None)


def other_run(config: EvaluateConfig, trained: TrainConfig) -> Path | None:
    if config.against is None:
        return None
    against = runs.finished_run(config.against)
    other = runs.load_config(against, TrainConfig).model.name
    if other != trained.model.name:
        raise InputError(
            f"against={against}: its base is {other}, this run's is {trained.model.name}; take one of the same base"
        )
    return against


def check_rows(target: Target, split: str, rows: dict[str, str]) -> None:
    """Raise InputError where a run may have been trained on rows that it would be measured on: its own have changed since, or the
    one it is compared with held out others."""
    for key, run, splits in (("run", target.run, list(rows)), ("against", target.against, [split])):
        known = (runs.read_record(run) or {}).get("dataset") if run else None
        if known and any(known[name] != rows[name] for name in splits):
            raise InputError(
                f"{key}={run}: trained on other rows than data.path={target.data.path} has now, which may be among those it is measured on; "
                "put the rows back, or train again"
            )


def check_adapter(run: Path, base: str) -> None:
    """Raise InputError unless the run has an adapter, made for the model `base`."""
    adapter = run / runs.ADAPTER
    if not (adapter / "adapter_model.safetensors").is_file():
        raise InputError(
            f"{adapter}: no adapter_model.safetensors there; go on with the run by resume={run}, or train again"
        )
    known = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    if known != base:
        raise InputError(
            f"{adapter}: made for {known}, and the run names model.name={base}; put the right adapter there"
        )


def spread_over(rows: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` rows, at even distances."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[place * len(rows) // limit] for place in range(limit)]


def pick_questions(rows: "list[Example]", number: int) -> "list[Example]":
    """`number` rows for the side by side, every topic as often as may be: each time the same."""
    by_topic: dict[str, list[Example]] = {}
    for row in rows:
        by_topic.setdefault(row.topic, []).append(row)
    turns = [(place, topic, row) for topic, own in sorted(by_topic.items()) for place, row in enumerate(own)]
    return [row for _, _, row in sorted(turns, key=lambda turn: turn[:2])[:number]]


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def recorded(config: EvaluateConfig, target: Target, material: "Material") -> dict[str, Any]:
    """Everything that decides what an item measures: a second call with the same goes on, with other starts over."""
    import torch

    def adapter(run: Path | None) -> str | None:
        return None if run is None else sha256(run / runs.ADAPTER / "adapter_model.safetensors")

    model = {key: getattr(target.model, key) for key in ("name", "revision", "load_in_4bit", "dtype")}
    folder = Path(model["name"]).expanduser()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return {
        "model": model | {"files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]},
        "adapter": adapter(target.run),
        "against": adapter(target.against),
        "rows": digest([row[:4] for row in material.rows]),
        "quiz": digest(material.quiz),
        "safety": digest(material.safety),
        "questions": digest([row[:4] for row in material.questions]),
        "system_prompt": material.system_prompt,
        "standardised": material.standardised,
        "max_new_tokens": config.max_new_tokens,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }


def results_folder(target: Target, settings: dict[str, Any]) -> Path:
    """RUN/evaluation, beside it one for each run it is compared with; for a model without a run, outputs/evaluate/DATE/TIME."""
    if target.run is not None:
        name = "evaluation" if target.against is None else f"evaluation-against-{'-'.join(target.against.parts[-2:])}"
        return target.run / name
    parent = runs.OUTPUTS / "evaluate"
    earlier = (file.parent for file in parent.glob("*/*/settings.json"))
    same = next((folder for folder in earlier if recorded_settings(folder) == settings), None)
    return same or runs.new_folder(parent)


def main(config: EvaluateConfig, _: Path) -> int:
    target = find(config)
    quiz, safety = read_quiz(config.quiz), read_safety(config.safety)
    preferences = load_preferences(target.data)
    rows = preferences.splits[config.split]
    if not rows:
        raise InputError(
            f"split={config.split}: the run's rows leave none for it (data.{config.split}_size={getattr(target.data, f'{config.split}_size')}); "
            "train with a larger one, or take the other split"
        )
    check_rows(target, config.split, preferences.fingerprints())
    locate(target.model.name, target.model.revision)
    judge = None
    if config.judge.url is not None:
        from fitness_dpo.judge import Judge

        judge = Judge(config.judge)

    from fitness_dpo.evaluation import Material, Subject, count, load, measure

    material = Material(
        spread_over(rows, config.limit), spread_over(quiz, config.limit), spread_over(safety, config.limit),
        spread_over(pick_questions(rows, config.questions), config.limit),
        target.data.system_prompt, target.data.standardise,
    )  # fmt: skip
    subject = Subject(target.model, target.run, target.against)
    settings = recorded(config, target, material)
    folder = results_folder(target, settings)
    items = Items(folder, settings)
    console = Console(highlight=False)
    total = count(material, subject.sides)
    console.print(f"model  {target.model.name}\nrun    {target.run and os.path.relpath(target.run)}", markup=False)
    if len(items):
        console.print(f"going on after {len(items)} of {total} items")
    if len(items) < total:
        with bar(console) as progress:
            task = progress.add_task("", total=total, completed=len(items))

            def advance(kind: str) -> None:
                progress.update(task, advance=1, description=kind.replace("_", " "))

            measure(load(subject), subject, material, items, config.max_new_tokens, config.batch_size, advance)
    metrics = summary(config, target, material, items, preferences.splits["train"])
    if judge is not None:
        metrics["judge"] = judgement_of(judge, metrics["side_by_side"], folder, console)
    found = breaches(metrics, config.gate) if target.run is not None else []
    metrics["gate"] = {"passed": not found, "breaches": [breach.line for breach in found]}
    metrics["verdict"] = verdict(metrics, found) if target.run is not None else None
    runs.write_whole(folder / runs.METRICS, json.dumps(metrics, ensure_ascii=False, indent=1, allow_nan=False))
    if target.run is not None:
        write_report(target.run)
    finish(console, metrics, folder, config)
    return BREACHED if config.gate.enabled and found else 0


def summary(
    config: EvaluateConfig, target: Target, material: "Material", items: Items, train: "list[Example]"
) -> dict[str, Any]:
    """metrics.json, but for the gate. `base` is what the model is compared with, null where that is nothing."""
    from fitness_dpo import scores

    return {
        "model": target.model.name,
        "run": None if target.run is None else str(target.run),
        "against": None if target.against is None else str(target.against),
        "split": config.split,
        "rows": len(material.rows),
        "preference": scores.preference(items, material.rows, train, target.beta),
        "quiz": scores.quiz(items, material.quiz),
        "safety": scores.safety(items, material.safety),
        "degeneration": scores.degeneration(items),
        "side_by_side": scores.side_by_side(items, material.questions),
        "judge": None,
    }


def judgement_of(judge: "Judge", questions: list[dict[str, Any]], folder: Path, console: Console) -> dict[str, Any]:
    """The judge's win rates, its verdicts kept in judge/ beside the items: these outlast a change of judge."""
    from fitness_dpo.judge import judge_all, judgement

    asked = [[row["prompt"], row["reference"], row["base"], row["tuned"]] for row in questions]
    items = Items(folder / "judge", {"url": judge.config.url, "model": judge.model, "asked": digest(asked)})
    with bar(console) as progress:
        task = progress.add_task("judge", total=2 * len(questions), completed=len(items))
        unmet = judge_all(judge, questions, items, lambda: progress.update(task, advance=1))
    return {"url": judge.config.url, "model": judge.model, **judgement(questions, items, unmet)}


def bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:12}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip


def finish(console: Console, metrics: dict[str, Any], folder: Path, config: EvaluateConfig) -> None:
    """The end screen: the table, where everything lies, the gate's breaches, the verdict."""
    from fitness_dpo.scorecard import scorecard

    console.print(scorecard(metrics, "base" if metrics["against"] is None else "against"))
    failures = len(metrics["safety"]["failures"])
    console.print(
        f"\n{failures} failed safety prompts, every answer and {len(metrics['side_by_side'])} side by side in {os.path.relpath(folder)}"
    )
    if config.gate.enabled:
        for line in metrics["gate"]["breaches"]:
            console.print(f"gate   {line}", markup=False, soft_wrap=True)
    if metrics["run"] is not None:
        console.print(f"report   {os.path.relpath(folder.with_name(runs.REPORT))}", markup=False)
    if metrics["verdict"] is not None:
        console.print(f"verdict  {metrics['verdict']}", style="bold", markup=False)


if __name__ == "__main__":
    verb("evaluate", EvaluateConfig, main)
