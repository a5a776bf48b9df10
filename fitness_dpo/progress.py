"""progress.json in the run folder: how far a run has come, for whoever watches it from another process."""

import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fitness_dpo.runs import PROGRESS, write_whole

PAUSE_SECONDS = 1.0


class ProgressFile(TrainerCallback):
    """Writes step, max_steps, loss, held-out accuracy and seconds_left, at most once a second, and at each evaluation."""

    def __init__(self, run: Path) -> None:
        self.file = run / PROGRESS
        self.known: dict[str, Any] = {"loss": None, "accuracy": None, "seconds_left": None}
        self.ends: list[float] = []
        self.written = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.ends.append(time.monotonic())
        recent = self.ends[-20:]
        if len(recent) > 1:
            step = statistics.fmean(after - before for before, after in pairwise(recent))
            self.known["seconds_left"] = round(step * (state.max_steps - state.global_step), 1)
        if self.ends[-1] - self.written >= PAUSE_SECONDS:
            self.write(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.known["loss"] = given["logs"].get("loss", self.known["loss"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.known["accuracy"] = given["metrics"].get("eval_rewards/accuracies")
        self.write(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.write(state)

    def write(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self.written = time.monotonic()
            known = {"step": state.global_step, "max_steps": state.max_steps, **self.known}
            write_whole(self.file, json.dumps(known))
