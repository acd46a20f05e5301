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
        Bytes of the best plan so far and the proved lower bound, where known.
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
    """Counts the seconds of one call, and those left of its time limit."""

    def __init__(self, time_limit: float) -> None:
        self._start = time.monotonic()
        self._limit = time_limit
        self.stopped = False
        """Set once the user has asked to stop: what remains takes the first answer at hand."""

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds left; 0 after a stop."""
        return 0.0 if self.stopped else max(0.0, self._limit - self.seconds)
