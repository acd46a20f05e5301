"""Where tensors live: bounds, the exact planner, baselines, verifier, executor and reports."""

from retensor.planning.accelerators import PRESETS, Preset, accelerator_named, caveats
from retensor.planning.baselines import BASELINES, baseline
from retensor.planning.bounds import Bounds, bounds
from retensor.planning.bufferfile import BufferTable, read_buffers
from retensor.planning.cache import cache_folder
from retensor.planning.curves import plot_sweep
from retensor.planning.divide import divide_and_conquer
from retensor.planning.exact import plan
from retensor.planning.execute import Execution, execute
from retensor.planning.packing import Buffer, PackedBuffers, pack_buffers
from retensor.planning.packing_picture import plot_packing
from retensor.planning.picture import plot_plan
from retensor.planning.plan import Accelerator, Plan, Residency, Transfer
from retensor.planning.planfile import plan_from_json, plan_to_json, read_plan, write_plan
from retensor.planning.progress import Progress
from retensor.planning.report import write_report
from retensor.planning.sweep import SweepPoint, sweep
from retensor.planning.verify import Verification, verify

__all__ = [
    "BASELINES",
    "PRESETS",
    "Accelerator",
    "Bounds",
    "Buffer",
    "BufferTable",
    "Execution",
    "PackedBuffers",
    "Plan",
    "Preset",
    "Progress",
    "Residency",
    "SweepPoint",
    "Transfer",
    "Verification",
    "accelerator_named",
    "baseline",
    "bounds",
    "cache_folder",
    "caveats",
    "divide_and_conquer",
    "execute",
    "pack_buffers",
    "plan",
    "plan_from_json",
    "plan_to_json",
    "plot_packing",
    "plot_plan",
    "plot_sweep",
    "read_buffers",
    "read_plan",
    "sweep",
    "verify",
    "write_plan",
    "write_report",
]
