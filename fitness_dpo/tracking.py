"""The wandb run beside a training run. wandb itself is imported only where one is wanted."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fitness_dpo.config import TrainConfig
from fitness_dpo.distributed import rank

ANSWER_SECONDS = 20  # for the server to open a run
UPLOAD_SECONDS = 60  # for what is left to send at the end; it stays in the run folder


@contextmanager
def wandb_run(config: TrainConfig, run: Path, run_id: str) -> Iterator[None]:
    """Keep a wandb run open, its files in the run folder. `run_id` makes a resumed training go on with the same one.

    Where the server does not answer, a line says so and the run is recorded offline: an outage must not stop a training. What wandb
    would gather by itself (command line, host, git, code) stays here; the config is what a run is described by.
    """
    if config.logging.wandb.mode == "disabled" or rank() > 0:
        yield
        return
    os.environ["WANDB_SILENT"] = "true"  # the console is this project's
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    logging.getLogger("wandb").setLevel(logging.ERROR)
    import wandb

    try:
        tracked = start(config, run, run_id, config.logging.wandb.mode)
    except wandb.errors.Error as error:
        wandb.teardown()  # or the second try finds its own run id in use
        reason = str(error).splitlines()[0]
        print(f"wandb: {reason}; recording offline, later: wandb sync {run}/wandb/offline-run-*", file=sys.stderr)  # noqa: T201
        tracked = start(config, run, run_id, "offline")
    with tracked:
        yield


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
            silent=True, init_timeout=ANSWER_SECONDS, finish_timeout=UPLOAD_SECONDS, disable_git=True, disable_code=True,
            x_disable_meta=True,
        ),
    )  # fmt: skip


def log_samples(rows: list[dict[str, Any]]) -> None:
    """Log every sample answer so far as one table: wandb's tables cannot grow."""
    import wandb

    columns: list[str | int] = ["step", "prompt", "answer"]
    wandb.log(
        {"samples": wandb.Table(columns=columns, data=[[row[str(column)] for column in columns] for row in rows])}
    )
