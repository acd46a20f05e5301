"""What long work tells whoever watches: one record of the stage, the best so far, and what is proved."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType


@dataclass(frozen=True, slots=True)
class Progress:
    """One report of a running search.

    Attributes
    ----------
    stage : str
        What is being done now.
    seconds : float
        Since the call began.
    incumbent, bound : int or None
        Non-compulsory bytes of the best decisions so far, and the proved lower bound, where known. Until
        addresses are found, the plan may cost more than the incumbent shows.
    done, total : int
        Parts finished and parts in all.
    """

    stage: str
    seconds: float
    incumbent: int | None = None
    bound: int | None = None
    done: int = 0
    total: int = 0


ProgressCallback = Callable[[Progress], None]


class Clock:
    """Counts the seconds of one call, and those left of its time limit.

    A stage takes a share of what is left; a stop asked for anywhere stops the whole call.
    """

    def __init__(self, time_limit: float) -> None:
        self._start = time.monotonic()
        self._limit = time_limit
        self._stop: list[bool] = [False]

    def share(self, fraction: float) -> Clock:
        """A clock with a fraction of what is left, stopped together with this one."""
        part = Clock(self.left * fraction)
        part._stop = self._stop
        return part

    def stop(self) -> None:
        """Let what remains take the first answer at hand: the user has asked to stop."""
        self._stop[0] = True

    @property
    def stopped(self) -> bool:
        """Whether the user has asked to stop."""
        return self._stop[0]

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds left; 0 after a stop."""
        return 0.0 if self.stopped else max(0.0, self._limit - self.seconds)


@contextmanager
def stop_on_interrupt(clock: Clock) -> Iterator[None]:
    """Let the first Ctrl-C stop ``clock``, so that work ends where it can; the second does what it always did.

    A handler of the caller's own hears both. Handlers can be set in the main thread only; elsewhere, and where
    Ctrl-C is ignored, nothing changes.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if clock.stopped:
            before(number, frame)
        clock.stop()
        if before is not signal.default_int_handler:
            with suppress(KeyboardInterrupt):
                before(number, frame)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
