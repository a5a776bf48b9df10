"""The wandb run beside a training run. wandb itself is imported only where one is wanted."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fitness_dpo.config import TrainConfig
from fitness_dpo.distributed import rank

ANSWER_SECONDS = 20  # for the server to open a run
UPLOAD_SECONDS = 60  # for what is left to send at the end; it stays in the run folder


class Tracking(TrainerCallback):
    """Reports a training to wandb, its files in the run folder. `run_id` makes a resumed training go on with the same wandb run.

    An outage must not stop a training. Where the server does not answer at the start, a line says so and the run is recorded
    offline; where wandb fails later, a line says so and nothing more is reported. What wandb would gather by itself (command line,
    host, git, code) stays here; the config is what a run is described by.
    """

    def __init__(self, config: TrainConfig, run: Path, run_id: str) -> None:
        self.config, self.run, self.run_id = config, run, run_id
        self.open = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        if self.config.logging.wandb.mode == "disabled" or rank() > 0:
            yield
            return
        os.environ["WANDB_SILENT"] = "true"  # the console is this project's
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        logging.getLogger("wandb").setLevel(logging.ERROR)
        import wandb
        from transformers.integrations.integration_utils import WandbCallback

        try:
            tracked = start(self.config, self.run, self.run_id, self.config.logging.wandb.mode)
        except wandb.errors.Error as error:
            wandb.teardown()  # or the second try finds its own run id in use
            reason = str(error).splitlines()[0]
            say(f"{reason}; recording offline, later: wandb sync {self.run}/wandb/offline-run-*")
            tracked = start(self.config, self.run, self.run_id, "offline")
        self.open, self.figures = True, WandbCallback()
        status = 1
        try:
            yield
            status = 0
        finally:
            if self.open:
                self.attempt(tracked.finish, status)

    def attempt(self, report: Callable[..., None], *arguments: Any, **named: Any) -> None:
        """Report as long as wandb works. It may raise its own errors, those of a pipe to its dead service, or those of an answer
        that is not what it expects."""
        from wandb.errors import Error
        from wandb.sdk.mailbox import MailboxClosedError

        try:
            report(*arguments, **named)
        except (Error, MailboxClosedError, OSError, ValueError) as error:
            self.open = False
            reason = str(error).partition("\n")[0] or type(error).__name__
            say(
                f"{reason}; training goes on without it, what was recorded until here: wandb sync {self.run}/wandb/*run-*"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if self.open:
            self.attempt(self.figures.on_train_begin, args, state, control, **given)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if self.open:
            self.attempt(self.figures.on_log, args, state, control, **given)

    def log_samples(self, rows: list[dict[str, Any]]) -> None:
        """Log every sample answer so far as one table: wandb's tables cannot grow."""
        if self.open:
            self.attempt(log_table, rows)


def say(line: str) -> None:
    print(f"wandb: {line}", file=sys.stderr)  # noqa: T201


def start(config: TrainConfig, run: Path, run_id: str, mode: Any) -> Any:
    import wandb

    settings = config.logging.wandb
    if mode == "auto":
        mode = "online" if wandb.login(prompt=False) else "offline"
    return wandb.init(
        project=settings.project, group=settings.group, name=settings.name or "-".join(run.parts[-2:]), tags=settings.tags,
        mode=mode, dir=str(run), id=run_id, resume="allow",
        config={"settings": OmegaConf.to_container(OmegaConf.structured(config))},
        settings=wandb.Settings(
            silent=True, init_timeout=ANSWER_SECONDS, finish_timeout=UPLOAD_SECONDS, finish_timeout_raises=True, disable_git=True, disable_code=True,
            x_disable_meta=True,
        ),
    )  # fmt: skip


def log_table(rows: list[dict[str, Any]]) -> None:
    import wandb

    columns: list[str | int] = ["step", "prompt", "answer"]
    wandb.log(
        {"samples": wandb.Table(columns=columns, data=[[row[str(column)] for column in columns] for row in rows])}
    )
