"""A process that has imported everything a training needs and forks a child for each one: imports are most of a tiny run's cost.

Each line on standard input is a JSON object with argv, cwd and environment; the answer is the child's pid. The child runs
`python -m fitness_dpo.train *argv` as a process of its own that can be stopped, killed and waited for like any other; its output goes to
`out` and `err` in its folder, and its exit status, once it has ended, to `status`.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, Popen
from typing import NamedTuple


class Child(NamedTuple):
    pid: int
    folder: Path

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text(encoding="utf-8")

    def status(self, timeout_seconds: float = 300) -> int:
        """The exit status, negative for the signal that ended it. Waits for the end."""
        ends = time.monotonic() + timeout_seconds
        while not (self.folder / "status").is_file():
            if time.monotonic() > ends:
                raise TimeoutError(f"still running: {self.out}{self.err}")
            time.sleep(0.01)
        return int((self.folder / "status").read_text())

    def wait_for(self, line: str) -> None:
        """Until a line of its output begins so."""
        while not any(said.startswith(line) for said in self.out.splitlines()):
            assert not (self.folder / "status").is_file(), self.out + self.err
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(self.pid, number)


class Trainings:
    """Starts trainings in a folder of its own making for each."""

    def __init__(self, server: "Popen[str]", folder: Path) -> None:
        self.server, self.folder, self.started = server, folder, 0

    def start(self, *arguments: str, cwd: Path, **environment: str) -> Child:
        self.started += 1
        folder = self.folder / str(self.started)
        folder.mkdir()
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        order = {"argv": arguments, "cwd": str(cwd), "environment": environment, "folder": str(folder)}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return Child(int(self.server.stdout.readline()), folder)

    def run(self, *arguments: str, cwd: Path, **environment: str) -> Child:
        child = self.start(*arguments, cwd=cwd, **environment)
        child.status()
        return child


@contextmanager
def preloaded(folder: Path) -> Iterator[Trainings]:
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error",  # cli.verb sets these before the imports
    }  # fmt: skip
    with Popen([sys.executable, "-m", "tests.preloaded"], stdin=PIPE, stdout=PIPE, text=True, env=environment,
               cwd=Path(__file__).parents[1]) as server:  # fmt: skip
        yield Trainings(server, folder)
        assert server.stdin is not None
        server.stdin.close()


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the imports print is no answer
    from fitness_dpo import checkpoints, cli, train, trainer  # noqa: F401
    from fitness_dpo.config import TrainConfig

    children: dict[int, Path] = {}
    while True:
        readable = select.select([sys.stdin], [], [], 0.01)[0]
        while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            beside = children[ended[0]] / "status.part"
            beside.write_text(str(os.waitstatus_to_exitcode(ended[1])))
            beside.rename(children.pop(ended[0]) / "status")
        if not readable:
            continue
        line = sys.stdin.readline()
        if not line:
            return
        order = json.loads(line)
        folder = Path(order["folder"])
        for name in ("out", "err"):
            (folder / name).touch()
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for name, stream in (("out", 1), ("err", 2)):
                os.dup2(os.open(folder / name, os.O_WRONLY), stream)
            os.chdir(order["cwd"])
            os.environ |= order["environment"]
            sys.argv = ["train", *order["argv"]]
            cli.verb("config", TrainConfig, train.main)
        children[pid] = folder
        print(pid, file=answers, flush=True)


if __name__ == "__main__":
    serve()
