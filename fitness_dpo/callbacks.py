"""What is shown and recorded while a run trains: sample answers, progress and what is wrong with it."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fitness_dpo import runs
from fitness_dpo.config import DataConfig, DpoConfig, HealthConfig, Hopeless, LoggingConfig
from fitness_dpo.health import Verdict, judge
from fitness_dpo.inference import ask, generate, merged_for_now
from fitness_dpo.model import Policy
from fitness_dpo.tracking import Tracking


class Samples(TrainerCallback):
    """Answers the fixed questions before, during and after training, into samples.jsonl, a wandb table and the console."""

    def __init__(
        self, policy: Policy, config: LoggingConfig, data: DataConfig, run: Path, console: Console, tracking: Tracking
    ) -> None:
        self.policy, self.config, self.console, self.tracking = policy, config, console, tracking
        self.file = run / runs.SAMPLES
        self.prompts = [
            ask(question, data.system_prompt, standardised=data.standardise) for question in config.sample_prompts
        ]
        self.rows = runs.read_samples(run)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0 or self.due(state):  # a run stopped on request had no time to answer
            self.sample(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.due(state) and not (control.should_training_stop and state.global_step < state.max_steps):
            self.sample(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.sample(state)

    def due(self, state: TrainerState) -> bool:
        steps = self.config.sample_steps
        return steps is not None and state.global_step % steps == 0

    def sample(self, state: TrainerState) -> None:
        if (
            not state.is_world_process_zero
            or not self.prompts
            or any(row["step"] == state.global_step for row in self.rows)
        ):
            return
        with merged_for_now(self.policy.model):
            answers = generate(self.policy, self.prompts, self.config.sampling)
        self.rows += [
            {"step": state.global_step, "prompt": prompt, "answer": answer}
            for prompt, answer in zip(self.config.sample_prompts, answers, strict=True)
        ]
        runs.write_whole(self.file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        self.tracking.log_samples(self.rows)
        for question, answer in zip(self.config.sample_prompts, answers, strict=True):
            self.console.print(f"\n[bold]step {state.global_step}[/] {question}", highlight=False)
            self.console.print(answer, markup=False, highlight=False, style="dim")


class ProgressBar(TrainerCallback):
    """One bar with loss, accuracy and margin in a terminal; one line at each logging step anywhere else.

    `step_seconds` has the time of every optimizer step alone, without samples, evaluation and checkpoints.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.step_seconds: list[float] = []
        self.progress = Progress(
            TextColumn("training"), BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.task = self.progress.add_task(
                "training", total=state.max_steps, completed=state.global_step, figures=""
            )
            self.progress.start()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self.began)
        if state.is_world_process_zero:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        logs: dict[str, float] = given["logs"]
        if not state.is_world_process_zero or "loss" not in logs:
            return
        names = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
        figures = "  ".join(f"{short} {logs[name]:.3f}" for name, short in names.items() if name in logs)
        self.progress.update(self.task, figures=figures)
        if not self.console.is_terminal:
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  {figures}  rate {logs['learning_rate']:.1e}",
                highlight=False,
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.stop()


class Health(TrainerCallback):
    """Says once, in one line, what the logged figures show to be wrong, and ends a training that cannot recover.

    A verdict of health.stop_on ends it after this step, and `ended_by` is that verdict. Raises Hopeless on NaN or exploding
    gradients, and leaves no checkpoint behind whose weights may be at fault.
    """

    ended_by: Verdict | None = None

    def __init__(self, health: HealthConfig, dpo: DpoConfig, run: Path, console: Console) -> None:
        self.health, self.dpo, self.run, self.console = health, dpo, run, console
        self.said: set[str] = set()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.good_steps = state.global_step + 1
        """How many steps' forward passes gave finite figures: a checkpoint is good if one of them came after it."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        verdicts = judge(state.log_history, self.health, self.dpo, state.max_steps)
        for verdict in verdicts:
            if verdict.sick and verdict.name == "explosion":
                self.stop(state, verdict.line)
            if verdict.sick and verdict.name in self.health.stop_on and state.global_step < state.max_steps:
                at = f"training ended at step {state.global_step} of {state.max_steps}"
                verdict = self.ended_by = verdict._replace(line=f"{verdict.line} ({at})")
                control.should_training_stop = True
            if verdict.sick and verdict.name not in self.said and state.is_world_process_zero:
                self.console.print(Text(f"health  {verdict.line}", style="yellow"))
                self.said.add(verdict.name)
        self.good_steps = max(self.good_steps, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        weights = (weight.detach() for weight in given["model"].parameters() if weight.requires_grad)
        if control.should_save and not all(math.isfinite(weight.sum()) for weight in weights):
            mend = f"try dpo.learning_rate={self.dpo.learning_rate / 10:g}"
            self.stop(state, f"explosion: weights that are not finite at step {state.global_step}; {mend}")

    def stop(self, state: TrainerState, line: str) -> None:
        if state.is_world_process_zero:
            for folder in (self.run / runs.CHECKPOINTS).glob("checkpoint-*"):
                if int(folder.name.partition("-")[2]) >= self.good_steps:
                    shutil.rmtree(folder)
        last = runs.last_checkpoint(self.run)
        kept = f"{last.relative_to(self.run)} is the last good checkpoint" if last else "no good checkpoint yet"
        raise Hopeless(f"{line} (training stopped at step {state.global_step}; {kept})")
