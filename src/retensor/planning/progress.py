"""What long work tells whoever watches: one record of the stage, the best so far, and what is proved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


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
