"""Watching a solve: progress in one line on stderr, on a terminal only, and what a Ctrl-C during it means.

The planner answers the first Ctrl-C with its best plan so far; a command then skips what it would have
solved next. The second one ends the program.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn
from rich.progress import Progress as Bar
from rich.text import Text

from retensor.cli.output import percent
from retensor.units import format_bytes

if TYPE_CHECKING:
    from retensor.planning.progress import Progress


@dataclass
class Watch:
    """What a solve is given and what it is asked afterwards.

    Attributes
    ----------
    progress : callable or None
        To pass on as ``progress``; None where nobody looks.
    stopped : bool
        Whether Ctrl-C was pressed while it ran.
    """

    progress: Callable[[Progress], None] | None = None
    stopped: bool = False


@contextmanager
def watch(what: str, *, many: bool = False) -> Iterator[Watch]:
    """Show progress and note Ctrl-C while the block runs.

    Parameters
    ----------
    what : str
        What is being solved, as the line's start.
    many : bool
        Whether it is many plans, which fill a bar.
    """
    seen = Watch()
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        seen.stopped = True
        signal.default_int_handler(number, frame)

    # A process started in the background ignores Ctrl-C; that is its parent's choice.
    heeded = before is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, note)
    try:
        console = Console(stderr=True, highlight=False)
        if not console.is_terminal:
            yield seen
            return
        begun = time.monotonic()
        if many:
            columns = ("{task.description}", BarColumn(), "{task.fields[state]}")
            with Bar(*columns, console=console, transient=True) as shown:
                line = shown.add_task(escape(what), total=None, state="")
                seen.progress = lambda state: shown.update(
                    line,
                    total=state.total or None,
                    completed=state.done,
                    state=escape(describe(state, time.monotonic() - begun, "what is done")),
                )
                yield seen
            return
        with console.status(Text(what)) as status:
            seen.progress = lambda state: status.update(Text(f"{what}: {describe(state, time.monotonic() - begun)}"))
            yield seen
    finally:
        if heeded:
            signal.signal(signal.SIGINT, before)


def describe(state: Progress, seconds: float, kept: str = "the best") -> str:
    """One line such as ``packing 3/14 · best 1.2 MiB · bound 1.1 MiB · gap 8.3 % · 12 s``."""
    parts = [f"{state.stage} {state.done}/{state.total}" if state.total > 1 else state.stage]
    if state.incumbent is not None:
        parts.append(f"best {format_bytes(state.incumbent)}")
    # A solver's first bound of a quantity that cannot be negative may be.
    bound = None if state.bound is None else max(0, state.bound)
    if bound is not None:
        parts.append(f"bound {format_bytes(bound)}")
    if state.incumbent is not None and bound is not None:
        gap = 0.0 if state.incumbent <= bound else (state.incumbent - bound) / state.incumbent
        parts.append(f"gap {percent(gap)}")
    parts.append(f"{seconds:.0f} s, Ctrl-C keeps {kept}")
    return " · ".join(parts)
