"""A sweep: many runs out of one command, what has become of each in sweep.json, and how to go on with it. Imports no torch."""

import fcntl
import json
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.live import Live
from rich.table import Table

from fitness_dpo import runs
from fitness_dpo.config import InputError, TrainConfig
from fitness_dpo.jobs import DONE, FAILURE, Job, Runner

RECORD, LOCK = "sweep.json", ".lock"
POLL_SECONDS = 0.25
STYLES = {
    "finished": "green",
    "stopped": "magenta",
    "failed": "red",
    "interrupted": "yellow",
    "running": "bold",
    "waiting": "dim",
}


class Sweep:
    """The sweep in `folder`, new or known. `overrides` is the command that makes it; `hydra` the words that say how it is run,
    which may change."""

    def __init__(self, folder: Path, overrides: Sequence[str], hydra: Sequence[str]) -> None:
        self.folder = folder
        self.overrides = [word for word in overrides if not word.startswith(("sweep.resume=", "sweep.at_once="))]
        self.hydra = [word for word in hydra if not word.startswith(("hydra.mode=", "hydra.sweep.dir="))]
        known = read_record(folder) or {"overrides": self.overrides, "jobs": []}
        if known["overrides"] != self.overrides:
            raise InputError(
                f"sweep.resume={folder}: another command made that sweep; go on with it by {command(known, folder)}"
            )
        self.jobs = {each["number"]: Job(**each | {"folder": folder / each["folder"]}) for each in known["jobs"]}

    def add(self, place: int, overrides: list[str], config: TrainConfig) -> list[Job]:
        """The jobs of one setting, the `place`th of the sweep: one for each of sweep.seeds values of dpo.seed."""
        overrides = [word for word in overrides if not word.startswith("sweep.")]
        count = config.sweep.seeds
        if count == 1:
            return [self.add_job(place, place, overrides, config)]
        others = [word for word in overrides if not word.startswith("dpo.seed=")]
        jobs = []
        for number in range(count):
            seeded = replace(config, dpo=replace(config.dpo, seed=config.dpo.seed + number))
            jobs.append(self.add_job(place * count + number, place, [*others, f"dpo.seed={seeded.dpo.seed}"], seeded))
        return jobs

    def add_job(self, number: int, setting: int, overrides: list[str], config: TrainConfig) -> Job:
        """A job, new or known. Writes its config.yaml; raises InputError where it differs from what was written before."""
        wandb = config.logging.wandb
        wandb = replace(
            wandb,
            group=wandb.group or "-".join(self.folder.resolve().parts[-2:]),
            name=f"{wandb.name}-{number}" if wandb.name else None,
        )
        config = replace(config, logging=replace(config.logging, wandb=wandb), sweep=replace(config.sweep, resume=None))
        job = Job(number=number, setting=setting, overrides=overrides, folder=self.folder / str(number))
        file = job.folder / runs.CONFIG
        if file.is_file():
            written: Any = OmegaConf.to_container(OmegaConf.load(file))
            free = {key: written.get(key) for key in runs.FREE_ON_RESUME}  # a job is a resumed run, and says so
            changed = first_difference(written, plain(config) | free)
            if changed is not None:
                key, before, now = changed
                raise InputError(
                    f"sweep.resume={self.folder}: {key}={now} now, and job {number} was made with {key}={before}; "
                    "put it back, or start a new sweep"
                )
        else:
            job.folder.mkdir(parents=True, exist_ok=True)
            runs.write_whole(file, OmegaConf.to_yaml(OmegaConf.structured(config)))
        known = self.jobs.get(number)
        if (job.folder / runs.METRICS).is_file():
            job.take_result()
        elif known is not None and known.state == "stopped":
            job.state, job.reason = known.state, known.reason
        self.jobs[number] = job
        return job

    def run(self, jobs: Sequence[Job], runner: Runner, console: Console) -> None:
        """Run those of `jobs` that are not done. Each one's end is recorded, whatever it is; a KeyboardInterrupt ends them all."""
        waiting = [job for job in jobs if job.state not in DONE]
        running: list[Job] = []
        self.write()
        with interruptible(), Board(list(self.jobs.values()), console) as board:
            try:
                while waiting or running:
                    while waiting and len(running) < runner.at_once:
                        job = waiting.pop(0)
                        (job.folder / FAILURE).unlink(missing_ok=True)
                        job.state, job.reason, job.started = "running", None, time.monotonic()
                        runner.start(job)
                        running.append(job)
                        self.changed(job, board)
                    time.sleep(POLL_SECONDS)
                    for job in [job for job in running if runner.ended(job)]:
                        running.remove(job)
                        self.changed(job, board)
                    board.update()
            except KeyboardInterrupt:
                runner.stop()
                for job in running:
                    job.state = "interrupted"
                    if (job.folder / runs.METRICS).is_file():
                        job.take_result()
                    self.changed(job, board)
                raise

    def changed(self, job: Job, board: "Board") -> None:
        board.tell(job)
        self.write()

    def write(self) -> None:
        """Write sweep.json."""
        jobs = [
            {
                "number": job.number,
                "setting": job.setting,
                "folder": job.folder.name,
                "overrides": job.overrides,
                "state": job.state,
                "reason": job.reason,
            }
            for job in self.jobs.values()
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"overrides": self.overrides, "hydra": self.hydra, "jobs": jobs}
        runs.write_whole(self.folder / RECORD, json.dumps(record, indent=1))


def command(record: dict[str, Any], folder: Path) -> str:
    """What goes on with the sweep in `folder`."""
    words = [*record["hydra"], *record["overrides"], f"sweep.resume={folder}"]
    return shlex.join(["python", "-m", "fitness_dpo.train", "-m", *words])


def how_to_resume(folder: Path) -> str:
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    left = sum(job["state"] not in DONE for job in record["jobs"])
    return f"{left} of {len(record['jobs'])} jobs are left; go on with\n  {command(record, folder)}"


def read_record(folder: Path) -> dict[str, Any] | None:
    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def sweep_folder(key: str, name: str) -> Path:
    """The folder of an earlier sweep: `latest` is the newest, anything else a path. `key` is the setting that named it."""
    if name == "latest":
        records = (runs.OUTPUTS / "multirun").glob(f"*/*/{RECORD}")
        newest = max(records, key=lambda file: file.stat().st_mtime, default=None)
        if newest is None:
            raise InputError(f"{key}=latest: no sweep under {runs.OUTPUTS.resolve()}; start one without {key}")
        return newest.parent
    if not (Path(name) / RECORD).is_file():
        raise InputError(
            f"{key}={name}: no {RECORD} there, so it is no sweep's folder; give one, such as outputs/multirun/DATE/TIME"
        )
    return Path(name)


def folder_to_fill(resume: str | None) -> Path:
    """Where a sweep writes: the folder of the one it goes on with, or a new one."""
    return runs.new_folder(runs.OUTPUTS / "multirun") if resume is None else sweep_folder("sweep.resume", resume)


def plain(config: TrainConfig) -> dict[str, Any]:
    """The config as plain dictionaries, as its YAML has it."""
    held: Any = OmegaConf.to_container(OmegaConf.structured(config))
    return dict(held)


def first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first dotted key at which two plain configs differ, and both values; what the sweep itself was told aside."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            dotted = f"{key}.{name}" if key else str(name)
            if dotted == "sweep":
                continue
            found = first_difference(before.get(name), now.get(name), dotted)
            if found is not None:
                return found
        return None
    return None if before == now else (key, before, now)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the sweep's folder. The processes it starts hold it too, so that a sweep whose own process was killed counts as
    running until the last of them is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"sweep.resume={folder}: that sweep still runs; wait for it, or stop it first") from error
        yield file.fileno()


@contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM, which a cluster sends before it takes a machine away, end the sweep as Ctrl-C does, and Ctrl-C too where
    the shell has it ignored, as for a job in the background of a script."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Board:
    """The jobs of a sweep as a live table in a terminal; one line at each change anywhere else."""

    def __init__(self, jobs: list[Job], console: Console) -> None:
        self.jobs, self.console = jobs, console
        self.live = Live(self.table(), console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Board":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.update(self.table(), refresh=True)
            self.live.stop()

    def update(self) -> None:
        if self.live:
            self.live.update(self.table(), refresh=True)

    def tell(self, job: Job) -> None:
        if self.live is None:
            line = f"job {job.number} {job.state}: {job.reason or ' '.join(job.overrides)}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def table(self) -> Table:
        """As many jobs as the terminal has room for, those that run first."""
        order = {"running": 0, "failed": 1, "interrupted": 2, "waiting": 3, "stopped": 4, "finished": 5}
        room = max(3, self.console.height - 5)
        shown = sorted(
            sorted(self.jobs, key=lambda job: (order[job.state], job.number))[:room], key=lambda job: job.number
        )
        done = sum(job.state in DONE for job in self.jobs)
        table = Table(title=f"{done} of {len(self.jobs)} done", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for name in ("job", "state", "step", "loss", "accuracy", "left"):
            table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
        table.add_column("settings", overflow="ellipsis", no_wrap=True)
        for job in shown:
            known = job.progress() if job.state != "waiting" else {}
            steps = f"{known['step']}/{known['max_steps']}" if known else ""
            left = (
                duration(known["seconds_left"])
                if job.state == "running" and known.get("seconds_left") is not None
                else ""
            )
            table.add_row(
                str(job.number), f"[{STYLES[job.state]}]{job.state}[/]", steps, figure(known.get("loss")),
                figure(known.get("accuracy")), left, job.reason or " ".join(job.overrides),
            )  # fmt: skip
        return table


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
