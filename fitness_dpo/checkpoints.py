"""Checkpoints that are whole or not there, and the end of a run that is asked to stop."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fitness_dpo import runs
from fitness_dpo.interruption import Interruption, Stopped
from fitness_dpo.manifest import MANIFEST, seal

PICKLED_ARGUMENTS, REFERENCE = "training_args.bin", "ref"


class Checkpoints(TrainerCallback):
    """Seals each checkpoint, keeps the newest `limit`, and stops training when `interruption` asks for it.

    The trainer's own rotation would delete the old checkpoint before the new one is sealed.
    """

    def __init__(self, interruption: Interruption, run: Path, limit: int) -> None:
        self.interruption, self.run, self.limit = interruption, run, limit
        self.saved = 0
        self.asked = False
        self.in_step = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.interruption.training = True

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.in_step = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.in_step = False
        self.asked = any_process(self.interruption.reason is not None)
        if self.asked:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.world_size == 1 and state.global_step and self.interruption.reason is not None:
            raise Stopped(self.interruption.status)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        any_process(False)  # every process has written its random state
        if state.is_world_process_zero:
            folder = self.run / runs.CHECKPOINTS / f"checkpoint-{state.global_step}"
            (folder / PICKLED_ARGUMENTS).unlink(missing_ok=True)  # a pickle that nothing here reads
            shutil.rmtree(
                folder / REFERENCE, ignore_errors=True
            )  # beside it the trainer would not load the policy's adapter
            seal(folder)
            # a later one was cut off while it was written, and this run will write it anew
            known = [each for each in runs.checkpoint_folders(self.run) if runs.step_of(each) <= state.global_step]
            for old in known[self.limit :]:
                (old / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(old)
        self.saved = state.global_step
        if self.asked and state.global_step < state.max_steps:
            raise Stopped(self.interruption.status)

    @contextmanager
    def saving(self, trainer: Any) -> Iterator[None]:
        """On request, leave with a line that says how to go on. Where the run stands between two steps, in an evaluation or a sample,
        the checkpoint of the last one is written first."""
        try:
            yield
        except Stopped:
            self.interruption.leaving()
            state = trainer.state
            if not self.in_step and trainer.args.world_size == 1 and self.saved < state.global_step < state.max_steps:
                trainer._save_checkpoint(trainer.model, None)
                self.on_save(trainer.args, state, TrainerControl())
            if state.is_world_process_zero:
                print(self.how_to_go_on(state), file=sys.stderr, flush=True)  # noqa: T201
            raise

    def how_to_go_on(self, state: TrainerState) -> str:
        at = f"stopped by {self.interruption.reason} at step {state.global_step} of {state.max_steps}"
        checkpoint = runs.last_checkpoint(self.run)
        if checkpoint is None:
            return f"{at}, before the first checkpoint; start again"
        command = f"python -m fitness_dpo.train {shlex.quote(f'resume={os.path.relpath(self.run)}')}"
        return f"{at}, saved up to step {runs.step_of(checkpoint)}; go on with: {command}"


def any_process(flag: bool) -> bool:
    """Whether `flag` holds in any of the processes that train together; they meet here."""
    if not torch.distributed.is_initialized():
        return flag
    flags = torch.tensor(float(flag))
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags.item())
