"""Where tensors live: bounds, the exact planner, baselines, verifier and executor."""

from retensor.planning.baselines import BASELINES, baseline
from retensor.planning.bounds import Bounds, bounds
from retensor.planning.exact import plan
from retensor.planning.plan import Accelerator, Plan, Residency, Transfer
from retensor.planning.progress import Progress

__all__ = [
    "BASELINES",
    "Accelerator",
    "Bounds",
    "Plan",
    "Progress",
    "Residency",
    "Transfer",
    "baseline",
    "bounds",
    "plan",
]
