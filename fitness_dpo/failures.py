"""What a machine runs out of, said in one line. Import it after the model is loaded."""

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from fitness_dpo import runs
from fitness_dpo.config import Fault, InputError, TrainConfig
from fitness_dpo.folder import is_full_error
from fitness_dpo.manifest import is_whole
from fitness_dpo.memory import mends

FULL_BYTES = 2**20


@contextmanager
def explained(config: TrainConfig, run: Path) -> Iterator[None]:
    """Raise InputError, with what to change, where memory or disk runs out or a checkpoint holds more than tensors."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Fault(out_of_memory(config)) from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{run / runs.CHECKPOINTS}: the newest checkpoint holds a pickle of something other than tensors, which could run code; "
            "it was not loaded: delete that checkpoint"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if not (is_full_error(error) or shutil.disk_usage(run).free < FULL_BYTES):
            raise
        for folder in runs.checkpoint_folders(run):
            if not is_whole(folder):  # the one that was being written: it only takes room
                shutil.rmtree(folder, ignore_errors=True)
        step = runs.last_checkpoint(run)
        kept = (
            f"the checkpoint of step {runs.step_of(step)} is kept, then go on with resume={run}"
            if step
            else "then start again"
        )
        raise Fault(f"{run}: no space is left on this disk; make room, {kept}") from error


def out_of_memory(config: TrainConfig) -> str:
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    return f"out of memory on the GPU ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free): {mends(config)}"
