"""retensor: put another tensor in the place of one a network has, and price it on a real accelerator.

The public surface in short. Every name is loaded when it is first used, so that ``import retensor`` is
quick and needs neither torch nor onnx nor a solver:

>>> import retensor as rt
>>> rt.Accelerator(scratchpad="2MiB").scratchpad
'2MiB'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from retensor import compression, costing, data, errors, graph, planning, quantizing, replacing, systems
    from retensor.costing.compare import compare
    from retensor.costing.price import cost
    from retensor.costing.sheet import CostSheet
    from retensor.errors import GraphError, InfeasibleError, MissingExtraError, PlanError, RetensorError
    from retensor.planning.exact import plan
    from retensor.planning.plan import Accelerator
    from retensor.replacing import fold, load, replace, save

_MODULES = ("compression", "costing", "data", "errors", "graph", "planning", "quantizing", "replacing", "systems")
_NAMES = {
    "Accelerator": "retensor.planning.plan",
    "CostSheet": "retensor.costing",
    "GraphError": "retensor.errors",
    "InfeasibleError": "retensor.errors",
    "MissingExtraError": "retensor.errors",
    "PlanError": "retensor.errors",
    "RetensorError": "retensor.errors",
    "compare": "retensor.costing",
    "cost": "retensor.costing",
    "fold": "retensor.replacing",
    "load": "retensor.replacing",
    "plan": "retensor.planning",
    "replace": "retensor.replacing",
    "save": "retensor.replacing",
}

__all__ = [
    "Accelerator",
    "CostSheet",
    "GraphError",
    "InfeasibleError",
    "MissingExtraError",
    "PlanError",
    "RetensorError",
    "__version__",
    "compare",
    "compression",
    "cost",
    "costing",
    "data",
    "errors",
    "fold",
    "graph",
    "load",
    "plan",
    "planning",
    "quantizing",
    "replace",
    "replacing",
    "save",
    "systems",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name in _MODULES:
        return importlib.import_module(f"retensor.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'retensor' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
