"""The wandb run beside a training run. wandb itself is imported only where one is wanted."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fitness_dpo.config import TrainConfig
from fitness_dpo.distributed import rank


@contextmanager
def wandb_run(config: TrainConfig, run: Path, run_id: str) -> Iterator[None]:
    """Keep a wandb run open, its files in the run folder. `run_id` makes a resumed training go on with the same one."""
    settings = config.logging.wandb
    if settings.mode == "disabled" or rank() > 0:
        yield
        return
    os.environ["WANDB_SILENT"] = "true"  # the console is this project's
    logging.getLogger("wandb").setLevel(logging.ERROR)
    import wandb

    mode: Any = settings.mode
    if mode == "auto":
        mode = "online" if wandb.login(prompt=False) else "offline"
    name = settings.name or "-".join(run.parts[-2:])
    with wandb.init(
        project=settings.project, group=settings.group, name=name, tags=settings.tags, mode=mode, dir=str(run), id=run_id,
        resume="allow", config={"settings": OmegaConf.to_container(OmegaConf.structured(config))},
        settings=wandb.Settings(silent=True),
    ):  # fmt: skip
        yield


def log_samples(rows: list[dict[str, Any]]) -> None:
    """Log every sample answer so far as one table: wandb's tables cannot grow."""
    import wandb

    columns: list[str | int] = ["step", "prompt", "answer"]
    wandb.log(
        {"samples": wandb.Table(columns=columns, data=[[row[str(column)] for column in columns] for row in rows])}
    )
