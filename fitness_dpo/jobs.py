"""One run of a sweep as a process of its own: how it is started, watched, stopped, and why it ended. Imports no torch."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from fitness_dpo import runs
from fitness_dpo.config import Hopeless
from fitness_dpo.gpus import gpu_names

DONE = ("finished", "stopped")
OUTPUT, FAILURE = "output.log", "failure.txt"
OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemoryError|can't allocate memory|MemoryError")
GRACE_SECONDS = 60


@dataclass(slots=True, kw_only=True)
class Job:
    number: int
    setting: int
    """Which of the sweep's settings it trains; one for each seed share it."""
    overrides: list[str]
    """What makes this run differ from the defaults, as on the command line."""
    folder: Path
    state: str = "waiting"
    """waiting, running, finished, stopped (by its own health verdict; it does not run again), failed or interrupted."""
    reason: str | None = None
    """Why it failed, or the verdict that stopped it, in one line."""
    started: float | None = field(default=None, compare=False)

    def progress(self) -> dict[str, Any]:
        """What the run last wrote about itself: step, max_steps, loss, accuracy, seconds_left; empty before its first step."""
        file = self.folder / runs.PROGRESS
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def end(self, status: int, *, killed_for_memory: bool) -> None:
        """Note how the process ended: its exit status, or minus the signal that ended it."""
        if status == 0 and (self.folder / runs.METRICS).is_file():
            self.take_result()
        elif status == Hopeless.status:
            self.state, self.reason = "stopped", last_line(self.folder / OUTPUT)
        else:
            self.fail(reason(status, self.folder / OUTPUT, killed_for_memory=killed_for_memory))

    def take_result(self) -> None:
        """Note what the run's metrics.json says of its end."""
        self.reason = json.loads((self.folder / runs.METRICS).read_text(encoding="utf-8")).get("ended_by")
        self.state = "finished" if self.reason is None else "stopped"

    def fail(self, reason: str) -> None:
        self.state, self.reason = "failed", reason
        runs.write_whole(self.folder / FAILURE, reason + "\n")


def reason(status: int, output: Path, *, killed_for_memory: bool) -> str:
    """Why a process failed, in one line: what the kernel did to it, or the last thing it said."""
    if status < 0:
        name = signal.Signals(-status).name
        if killed_for_memory:
            return f"out of memory: the kernel ended it with {name}; lower dpo.batch_size or sweep.at_once"
        return f"killed by {name}"
    last = last_line(output)
    if OUT_OF_MEMORY.search(last):
        return f"out of memory: {last}; lower dpo.batch_size"
    return f"exit status {status}: {last}"


def last_line(output: Path) -> str:
    """The last thing a process said."""
    lines = output.read_text(encoding="utf-8", errors="replace").split("\n") if output.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing").removeprefix("error: ")


def kernel_kills() -> int:
    """How many processes this machine's kernel has ended for want of memory since it started."""
    statistics = Path("/proc/vmstat")
    lines = statistics.read_text(encoding="utf-8").splitlines() if statistics.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def command(folder: Path) -> list[str]:
    """What runs, or goes on with, the training whose config.yaml lies in `folder`."""
    quoted = str(folder.resolve()).replace('"', '\\"')
    # a time limit is a command's own, so resuming does not bring it back with the other settings
    minutes = OmegaConf.select(OmegaConf.load(folder / runs.CONFIG), "max_minutes")
    limit = [] if minutes is None else [f"max_minutes={minutes}"]
    return [sys.executable, "-m", "fitness_dpo.train", f'resume="{quoted}"', *limit]


def spawn(folder: Path, environment: dict[str, str], lock: int | None = None) -> subprocess.Popen[bytes]:
    """Start the run of `folder` in a process group of its own, its output in `folder`/output.log. `lock` is left open in it."""
    with (folder / OUTPUT).open("ab") as output:
        return subprocess.Popen(
            command(folder), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | environment, pass_fds=[] if lock is None else [lock],
        )  # fmt: skip


def signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask to end, wait, and kill what has not ended after GRACE_SECONDS, or at once on a second Ctrl-C. SIGTERM, since a shell may
    have SIGINT ignored."""
    for process in processes:
        signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        signal_group(process, signal.SIGKILL)
        process.wait()


class Runner(Protocol):
    """Where jobs run."""

    at_once: int

    def start(self, job: Job) -> None: ...

    def ended(self, job: Job) -> bool:
        """Whether the job's process is gone; its state and reason are set then."""

    def stop(self) -> None:
        """End every job that still runs."""


class Processes:
    """Jobs as processes on this machine, one GPU leased to each where there are any, the CPU's threads divided among them."""

    def __init__(self, at_once: int | None, lock: int) -> None:
        gpus = gpu_names()
        self.at_once = at_once or max(1, len(gpus))
        self.free: list[str | None] = [gpus[slot % len(gpus)] if gpus else None for slot in range(self.at_once)]
        self.lock = lock
        self.running: dict[int, tuple[subprocess.Popen[bytes], str | None, int]] = {}

    def start(self, job: Job) -> None:
        gpu = self.free.pop(0)
        environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        if self.at_once > 1 and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // self.at_once))
        self.running[job.number] = (spawn(job.folder, environment, self.lock), gpu, kernel_kills())

    def ended(self, job: Job) -> bool:
        process, gpu, kills = self.running[job.number]
        status = process.poll()
        if status is None:
            return False
        del self.running[job.number]
        self.free.append(gpu)
        job.end(status, killed_for_memory=status == -signal.SIGKILL and kernel_kills() > kills)
        return True

    def stop(self) -> None:
        stop([process for process, _, _ in self.running.values()])
