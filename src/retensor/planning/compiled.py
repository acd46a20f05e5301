"""Functions that are compiled when they are first called, and found compiled in later runs.

numba compiles them from Python, so that an install needs no C compiler. The first call of the first run takes some
seconds; what was compiled is kept beside the source, or in the user's cache where that cannot be written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile ``function``, whose arguments are numbers and NumPy arrays; other threads run meanwhile.

    >>> @compiled
    ... def twice(x):
    ...     return 2 * x
    >>> twice(21)
    42
    """
    try:
        made = njit(cache=True, nogil=True)(function)
    except RuntimeError:
        # Nowhere to keep it (or no file it comes from): it is compiled anew in each run.
        made = njit(nogil=True)(function)
    return cast("Function", made)
