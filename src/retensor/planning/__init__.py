"""Where tensors live: bounds, the exact planner, baselines, verifier, executor and reports."""

from retensor.planning.baselines import BASELINES, baseline
from retensor.planning.bounds import Bounds, bounds
from retensor.planning.exact import plan
from retensor.planning.execute import Execution, execute
from retensor.planning.picture import plot_plan, plot_sweep
from retensor.planning.plan import Accelerator, Plan, Residency, Transfer
from retensor.planning.planfile import plan_from_json, plan_to_json, read_plan, write_plan
from retensor.planning.progress import Progress
from retensor.planning.report import write_report
from retensor.planning.sweep import SweepPoint, sweep
from retensor.planning.verify import Verification, verify

__all__ = [
    "BASELINES",
    "Accelerator",
    "Bounds",
    "Execution",
    "Plan",
    "Progress",
    "Residency",
    "SweepPoint",
    "Transfer",
    "Verification",
    "baseline",
    "bounds",
    "execute",
    "plan",
    "plan_from_json",
    "plan_to_json",
    "plot_plan",
    "plot_sweep",
    "read_plan",
    "sweep",
    "verify",
    "write_plan",
    "write_report",
]
