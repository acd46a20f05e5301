"""What the planning calls ask of their arguments, each refused with a sentence that names it."""

from __future__ import annotations

from retensor.graph.structure import Graph
from retensor.planning.plan import Accelerator

LARGEST_SEED = 2**31 - 1


def check_graph(graph: object) -> None:
    """Refuse what is no :class:`Graph`."""
    if not isinstance(graph, Graph):
        raise TypeError(f"graph is a Graph, as retensor.graph.load gives it, not {type(graph).__name__}")


def check_accelerator(accelerator: object) -> None:
    """Refuse what is no :class:`Accelerator`."""
    if not isinstance(accelerator, Accelerator):
        raise TypeError(
            f"accelerator is an Accelerator, as in Accelerator(scratchpad='2MiB'), not {type(accelerator).__name__}"
        )


def check_alignment(alignment: int) -> None:
    """Refuse what an :class:`Accelerator` would."""
    Accelerator("M_R", alignment=alignment)


def check_search(time_limit: float, seed: int, workers: int | None = None) -> None:
    """Refuse limits, seeds and thread counts that no search can keep."""
    if isinstance(time_limit, bool) or not isinstance(time_limit, int | float):
        raise TypeError(f"time_limit is a number of seconds, not {type(time_limit).__name__}")
    if not time_limit > 0 or (isinstance(time_limit, int) and time_limit > 10**9):
        raise ValueError(f"time_limit is a positive number of seconds, at most 10**9, not {time_limit}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is an int, not {type(seed).__name__}")
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed is an int from 0 to 2**31 - 1, not {seed}")
    if workers is None:
        return
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise TypeError(f"workers is a number of threads or None, not {type(workers).__name__}")
    if not 1 <= workers <= 1024:
        raise ValueError(f"workers is a number of threads from 1 to 1024, or None for all cores, not {workers}")
