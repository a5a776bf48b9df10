"""The run folder: where it is, what was recorded in it, which one is the newest. Imports no torch."""

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig, ListConfig, OmegaConf

from fitness_dpo.config import InputError
from fitness_dpo.distributed import rank
from fitness_dpo.manifest import is_whole

OUTPUTS = Path("outputs")
CONFIG, RECORD, METRICS, SAMPLES, ADAPTER, CHECKPOINTS, PROGRESS, REPORT = (
    "config.yaml", "versions.json", "metrics.json", "samples.jsonl", "adapter", "checkpoints", "progress.json", "report.html",
)  # fmt: skip
RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "unsloth",
    "unsloth_zoo",
)
FREE_ON_RESUME = ("resume", "allow_changes", "max_minutes")
Schema = TypeVar("Schema")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part. Text becomes UTF-8."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    beside.replace(path)


def all_runs() -> Iterator[Path]:
    """Every run folder under outputs/, sweeps included, newest first."""
    configs = [*OUTPUTS.glob(f"*/*/{CONFIG}"), *OUTPUTS.glob(f"multirun/*/*/*/{CONFIG}")]
    return (path.parent for path in sorted(configs, key=lambda path: path.stat().st_mtime, reverse=True))


def finished_run(name: str) -> Path:
    """The folder of the run called `name`: `latest` is the newest finished one, anything else a path."""
    if name == "latest":
        run = next((run for run in all_runs() if (run / METRICS).is_file()), None)
        if run is None:
            raise InputError(
                f"run=latest: no finished run under {OUTPUTS.resolve()}; train one with python -m fitness_dpo.train, "
                "or ask an untuned model with model.name=embedded:smollm2-135m-instruct"
            )
        return run
    if not (Path(name) / CONFIG).is_file():
        raise InputError(f"run={name}: no {CONFIG} there, so it is no run folder; give one, such as outputs/DATE/TIME")
    if not (Path(name) / METRICS).is_file():
        raise InputError(f"run={name}: not finished, no {METRICS} there; wait for its end, or go on with resume={name}")
    return Path(name)


def interrupted_run(name: str) -> Path:
    """The folder to go on with: `latest` is the newest run that has checkpoints and did not finish. One named by its path
    may have no checkpoint yet; it starts over with its own settings."""
    if name == "latest":
        unfinished = (run for run in all_runs() if not (run / METRICS).is_file())
        run = next((run for run in unfinished if last_checkpoint(run) is not None), None)
    else:
        run = Path(name) if (Path(name) / CONFIG).is_file() else None
    if run is None:
        raise InputError(f"resume={name}: no interrupted run with a checkpoint there; start anew without resume")
    if (run / METRICS).is_file():
        raise InputError(f"resume={name}: that run is finished; start a new one without resume")
    return run


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Let no other process train into the run's folder meanwhile. Raises InputError where one does."""
    if rank() > 0:
        yield
        return
    handle = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"resume={run}: that run is training still; wait for its end, or stop it first") from None
    else:
        yield
    finally:
        os.close(handle)


def run_folder(resume: str | None) -> Path:
    """Where this run writes: the interrupted run's folder, or a new one, made by the first of several processes."""
    if resume is not None:
        return interrupted_run(resume)
    return new_folder(OUTPUTS) if rank() == 0 else OUTPUTS


def new_folder(parent: Path) -> Path:
    """A new folder `parent`/DATE/TIME that nothing else holds."""
    stem = parent / datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        folder = stem.with_name(stem.name + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(
                f"{stem}: no folder can be made there ({error.strerror}); choose another with hydra.run.dir=..."
            ) from error
        return folder
    raise InputError(f"{stem}: a thousand runs started in this second; wait one")


def checkpoint_folders(run: Path) -> list[Path]:
    """Every checkpoint of a run, the newest first, whole or not."""
    return sorted((run / CHECKPOINTS).glob("checkpoint-*"), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run: one that was cut off while it was written, or has changed since, is passed over."""
    return next((folder for folder in checkpoint_folders(run) if is_whole(folder)), None)


def resumed_settings(run: Path, asked: DictConfig, overrides: list[str], allowed: list[str]) -> DictConfig:
    """The settings a run was started with and, where `allowed` names them, the changes that `overrides` asks for.

    Raises InputError with the difference for every other change.
    """
    saved = OmegaConf.load(run / CONFIG)
    if not isinstance(saved, DictConfig):
        raise InputError(f"{run / CONFIG}: not a config of this version; train again")
    changes: list[str] = []
    for override in OverridesParser.create().parse_overrides(overrides=overrides):
        key = override.key_or_group
        if key in FREE_ON_RESUME:
            OmegaConf.update(saved, key, OmegaConf.select(asked, key))
            continue
        if override.type is not OverrideType.CHANGE or "." not in key:
            raise InputError(
                f"{override.input_line}: a resumed run keeps its own choices; leave this out, or start a new run"
            )
        before, after = OmegaConf.select(saved, key), OmegaConf.select(asked, key)
        if before == after:
            continue
        changes += [] if key in allowed else [f"{key}: {before} -> {after}"]
        OmegaConf.update(saved, key, after)
    if changes:
        names = ",".join(change.partition(":")[0] for change in changes)
        raise InputError(
            f"resume={run}: a resumed run keeps its own settings, but {'; '.join(changes)}; leave this out, or allow it with "
            f"allow_changes=[{names}]"
        )
    return saved


def load_config(run: Path, schema: type[Schema]) -> Schema:
    """The resolved config a run was started with."""
    return to_settings(run, OmegaConf.load(run / CONFIG), schema)


def to_settings(run: Path, saved: DictConfig | ListConfig, schema: type[Schema]) -> Schema:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), saved))
    if not isinstance(config, schema):
        raise InputError(f"{run / CONFIG}: not a config of this version; train again")
    return config


def provenance(fingerprints: dict[str, str]) -> dict[str, Any]:
    """What is needed to repeat a run beside its config: versions, commit, machine, the rows' fingerprints."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    git = subprocess.run(command, capture_output=True, text=True, check=False).stdout if shutil.which("git") else ""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES if _installed(name)},
        "commit": git.strip() or None,
        "dataset": fingerprints,
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def write_start(run: Path, config: object, recorded: dict[str, Any]) -> None:
    """Write config.yaml and versions.json."""
    run.mkdir(parents=True, exist_ok=True)
    write_whole(run / RECORD, json.dumps(recorded, indent=1))
    write_whole(run / CONFIG, OmegaConf.to_yaml(OmegaConf.structured(config)))


def read_record(run: Path) -> dict[str, Any] | None:
    """What write_start recorded, for a run that is resumed."""
    file = run / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def read_samples(run: Path) -> list[dict[str, Any]]:
    """Every sample answer so far: step, prompt, answer. Not by splitlines, which also cuts at characters an answer may hold."""
    file = run / SAMPLES
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


def run_id(run: Path) -> str | None:
    """What tells this run from every other, wherever its folder was moved."""
    return (read_record(run) or {}).get("wandb_id")
