"""Operations that really run, counted by what torch dispatches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_BY_INPUT = {"amax", "sum", "max", "kthvalue"}
_PRODUCTS = {"mm", "bmm", "addmm"}


class OperationCounter(TorchDispatchMode):
    """Counts elements by operation while it is entered: ``counter["rand"]`` random numbers, and so on.

    Names are those of ATen without an overload; an operation in place has a ``_`` at its end. Reductions are counted by
    the elements they read, everything else by those it writes, and products of matrices (``"product"``) by
    multiply-adds twice. Only floating-point numbers count. A stack, and what only looks at memory in another way,
    counts as itself and not as arithmetic.

    Examples
    --------
    >>> with OperationCounter() as counter:
    ...     _ = torch.ones(2, 8) @ torch.ones(8, 4) + torch.rand(2, 4)
    >>> counter["product"], counter["add"], counter["rand"]
    (128, 8, 8)
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __getitem__(self, name: str) -> int:
        """How many of one kind."""
        return self.counts[name]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run it, and count."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            left = args[1] if name == "addmm" else args[0]
            self.counts["product"] += 2 * out.numel() * left.shape[-1]
        elif name in _BY_INPUT and args[0].is_floating_point():
            self.counts[name] += args[0].numel()
        elif isinstance(out, torch.Tensor) and out.is_floating_point():
            self.counts[name] += out.numel()
        return out
