"""python -m fitness_dpo.train: from preference pairs to a tuned model in a run folder."""

import json
import os
import resource
import statistics
import uuid
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fitness_dpo import distributed, plugins, runs
from fitness_dpo.cli import verb
from fitness_dpo.config import InputError, TrainConfig
from fitness_dpo.data import Preferences, load_preferences
from fitness_dpo.health import judge
from fitness_dpo.interruption import Interruption
from fitness_dpo.report import write_report
from fitness_dpo.weights import locate

Metrics = dict[str, Any]


def train(config: TrainConfig, run: Path, console: Console, interruption: Interruption) -> Metrics:
    """Train and save into `run`: config.yaml, versions.json, samples.jsonl, checkpoints/, adapter/, metrics.json, report.html.

    Several processes train together, and the first alone writes, into its `run`. Raises Stopped, a checkpoint being written, where
    `interruption` asks for it.
    """
    if config.dpo.micro_batch_tokens is not None and distributed.world_size() > 1:
        raise InputError(
            f"dpo.micro_batch_tokens={config.dpo.micro_batch_tokens}: {distributed.world_size()} processes would wait for one another at unlike "
            "numbers of parts; set it to null and lower dpo.batch_size instead"
        )
    with distributed.first_of_machine_alone():
        preferences = load_preferences(config.data)
        console.print(opening(config, preferences), highlight=False)
        locate(config.model.name, config.model.revision)  # ends a run without weights before anything heavy is imported

        from fitness_dpo.model import load_policy, save_adapter

        policy = load_policy(config.model, config.lora, config.dpo.seed)
    run = distributed.shared_folder(run)

    from fitness_dpo.callbacks import Health, ProgressBar, Samples
    from fitness_dpo.checkpoints import Checkpoints
    from fitness_dpo.failures import explained
    from fitness_dpo.memory import warn_of_memory
    from fitness_dpo.progress import ProgressFile
    from fitness_dpo.tracking import Tracking
    from fitness_dpo.trainer import build_trainer

    recorded = runs.read_record(run) or runs.provenance(preferences.fingerprints()) | {"wandb_id": uuid.uuid4().hex[:8]}
    if recorded["dataset"] != preferences.fingerprints():
        raise InputError(
            f"resume={run}: the rows of data.path={config.data.path} have changed since; put them back, or start anew"
        )
    first = distributed.rank() == 0
    with explained(config, run):
        tracking, progress = Tracking(config, run, recorded["wandb_id"]), ProgressBar(console)
        samples = Samples(policy, config.logging, config.data, run, console, tracking)
        checkpoints = Checkpoints(interruption, run, config.dpo.save_total_limit)
        health = Health(config.health, config.dpo, run, console)
        callbacks = [tracking, health, checkpoints, samples, progress, ProgressFile(run)]
        trainer = build_trainer(config, policy, preferences.splits, run, callbacks)
        warn_of_memory(config, trainer)
        if first:
            runs.write_start(run, config, recorded)
        checkpoint = runs.last_checkpoint(run)
        if checkpoint is not None:
            console.print(resuming(run, checkpoint), highlight=False)
            trainer.args.eval_on_start = trainer.args.eval_strategy == "steps" and owes_evaluation(
                checkpoint, trainer.args.eval_steps
            )
        with tracking.opened(), checkpoints.saving(trainer):
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                progress.progress.stop()
            if trainer.eval_dataset is not None:
                trainer.evaluate()
        pairs = trainer.held_out if trainer.eval_dataset is not None else None
        verdicts = judge(
            trainer.state.log_history, config.health, config.dpo, trainer.state.max_steps, pairs, ended=True
        )
        if health.ended_by is not None:
            verdicts = [health.ended_by, *(each for each in verdicts if each.name != health.ended_by.name)]
        metrics = summary(trainer, progress, preferences) | {
            "verdicts": [verdict._asdict() for verdict in verdicts],
            "ended_by": health.ended_by and health.ended_by.line,
            "held_out_pairs": pairs and pairs._asdict(),
        }
        if first:
            save_adapter(policy, config.model.name, run / runs.ADAPTER)
            runs.write_whole(run / runs.METRICS, json.dumps(metrics, indent=1))
            write_report(run)
            console.print(closing(metrics, run))
    distributed.leave()
    return metrics


def resuming(run: Path, checkpoint: Path) -> str:
    newer = [folder.name for folder in runs.checkpoint_folders(run) if runs.step_of(folder) > runs.step_of(checkpoint)]
    passed = f" ({', '.join(newer)} is not whole: cut off while it was written, or changed since)" if newer else ""
    return f"resume {os.path.relpath(checkpoint)}{passed}"


def owes_evaluation(checkpoint: Path, eval_steps: int) -> bool:
    """Whether a run was stopped at this checkpoint before it could score the validation split there."""
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    step = runs.step_of(checkpoint)
    return step % eval_steps == 0 and not any(entry["step"] == step and "eval_loss" in entry for entry in history)


def summary(trainer: Any, progress: Any, preferences: Preferences) -> Metrics:
    """Figures of a finished run; `history` is every logged step as TRL named it."""
    history = [dict(entry) for entry in trainer.state.log_history]
    held_out = [entry for entry in history if "eval_loss" in entry]
    logged = [entry for entry in history if "loss" in entry]
    seconds = progress.step_seconds  # of this process: a resumed run counts its own, none if only the end was missing
    pairs = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    typical = statistics.median(seconds) if seconds else None  # the first steps warm up
    return {
        "steps": trainer.state.global_step,
        "loss": logged[-1]["loss"] if logged else None,
        "loss_step": logged[-1]["step"] if logged else None,
        "after": held_out[-1] if held_out else None,
        "seconds": round(sum(seconds), 1),
        "pairs_per_second": round(pairs / typical, 2) if typical else None,
        "tokens_per_second": round(trainer._total_train_tokens / len(seconds) / typical, 1) if typical else None,
        "peak_memory_gib": round(peak_memory_bytes() / 2**30, 2),
        "rows": {
            "read": preferences.read,
            "dropped": dict(preferences.dropped),
            "too_long": trainer.too_long,
            **{name: len(rows) for name, rows in preferences.splits.items()},
        },
        "history": history,
    }


def peak_memory_bytes() -> int:
    """The most memory torch held on the GPU; without one, the most this process held."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def opening(config: TrainConfig, preferences: Preferences) -> str:
    sizes = ", ".join(f"{len(rows)} {name}" for name, rows in preferences.splits.items())
    dropped = "".join(f", {count} dropped ({reason})" for reason, count in preferences.dropped.most_common())
    return f"data   {config.data.path}: {sizes}{dropped}\nmodel  {config.model.name} ({config.model.backend})"


def closing(metrics: Metrics, run: Path) -> Table:
    """The one screen a run ends with."""
    table = Table(title="trained", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    after, loss = metrics["after"], metrics["loss"]
    table.add_row(
        "loss", "none logged" if loss is None else f"{loss:.3f} at step {metrics['loss_step']} of {metrics['steps']}"
    )
    if after:
        table.add_row("held-out accuracy", f"{after['eval_rewards/accuracies']:.3f}, where guessing gets 0.5")
        table.add_row("held-out margin", f"{after['eval_rewards/margins']:.3f}, 0 before")
    speed = f", {metrics['tokens_per_second']:.0f} tokens/s" if metrics["tokens_per_second"] else ""
    table.add_row("training", f"{metrics['seconds']:.0f} s{speed}, {metrics['peak_memory_gib']:.2f} GiB peak")
    for line in health_lines(metrics["verdicts"]):
        table.add_row("health", Text(line))
    table.add_row("run", os.path.relpath(run))
    table.add_row("report", os.path.relpath(run / runs.REPORT))
    table.add_row("next", 'python -m fitness_dpo.infer prompt="How often should I train legs?"')
    return table


def health_lines(verdicts: list[dict[str, Any]]) -> list[str]:
    """What is wrong, a line each; else what was looked at."""
    names = ", ".join(verdict["name"] for verdict in verdicts)
    return [verdict["line"] for verdict in verdicts if verdict["sick"]] or [f"nothing wrong seen ({names})"]


def main(config: TrainConfig, run: Path) -> None:
    given = list(HydraConfig.get().overrides.task)
    lone = next((word for word in given if word.startswith("sweep.")), None)
    if lone is not None:
        raise InputError(f"{lone}: this is one run; add -m to make it a sweep")
    with Interruption(config.max_minutes).watching() as interruption, runs.held(run):
        if config.resume is not None:
            settings = runs.resumed_settings(run, OmegaConf.structured(config), given, config.allow_changes)
            config = runs.to_settings(run, settings, TrainConfig)
        quiet = not config.logging.console or distributed.rank() > 0
        train(config, run, Console(quiet=quiet), interruption)


if __name__ == "__main__":
    plugins.register()
    verb("config", TrainConfig, main)
