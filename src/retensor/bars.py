"""A bar on a terminal for long work, and nothing in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Step = TypeVar("Step")


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error where that is a terminal, until the block ends; call what it gives after each step.

    >>> with bar("layers", 2) as advance:
    ...     advance()
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda: shown.advance(task)


def watched(steps: Iterable[Step], what: str, total: int) -> Iterator[Step]:
    """The same steps, with a bar for them.

    >>> list(watched("abc", "letters", 3))
    ['a', 'b', 'c']
    """
    with bar(what, total) as advance:
        for step in steps:
            yield step
            advance()
