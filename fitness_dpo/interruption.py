"""A request to stop a run: SIGTERM, Ctrl-C or a time limit. Imports no torch."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAVE_SECONDS = 15  # for the step under way and the checkpoint
LEAVE_SECONDS = 10  # for closing what the run holds open, wandb above all
TIME_LIMIT_STATUS = 124  # as `timeout` has it; a signal gives 128 and its number


class Stopped(KeyboardInterrupt):
    """Leaves a run on request. Like Ctrl-C it is no Exception, so that no library swallows it."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status
        """The exit status of the process."""


class Interruption:
    """Whether this run was asked to stop.

    Until `training` is set a signal raises Stopped at once: there is nothing to save yet. From then on it is only noted, for the run
    to stop at the end of a step; if no checkpoint is written within SAVE_SECONDS, Stopped is raised wherever the run stands, and
    LEAVE_SECONDS later the process ends. A second signal ends it at once.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.ends = None if max_minutes is None else time.monotonic() + max_minutes * 60
        self.signal: signal.Signals | None = None
        self.asked = 0.0
        self.training = False

    @property
    def reason(self) -> str | None:
        """What asked to stop, for people; None as long as nothing did."""
        if self.signal is not None:
            return "Ctrl-C" if self.signal == signal.SIGINT else self.signal.name
        return "max_minutes" if self.ends is not None and time.monotonic() >= self.ends else None

    @property
    def status(self) -> int:
        return TIME_LIMIT_STATUS if self.signal is None else 128 + self.signal

    @contextmanager
    def watching(self) -> Iterator["Interruption"]:
        """Take the signals of this process, and give them back."""
        handlers = {signal.SIGINT: self._ask, signal.SIGTERM: self._ask, signal.SIGALRM: self._overdue}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def leaving(self) -> None:
        """From here on the process ends within LEAVE_SECONDS, whatever it still waits for."""
        self.training = False
        signal.setitimer(signal.ITIMER_REAL, LEAVE_SECONDS)

    def _ask(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is not None:
            if number == signal.SIGINT and now - self.asked > 1:  # a launcher passes on what the terminal sent already
                os.write(2, b"stopped at once\n")
                os._exit(128 + number)
            return
        self.signal, self.asked = signal.Signals(number), now
        if self.training:
            signal.setitimer(signal.ITIMER_REAL, SAVE_SECONDS)
        else:
            os.write(2, b"stopped before the first step; nothing was lost\n")
            self.leaving()
            raise Stopped(self.status)

    def _overdue(self, _: int, __: FrameType | None) -> None:
        if not self.training:
            os._exit(self.status)
        self.leaving()
        raise Stopped(self.status)
