"""Size a scratchpad: traffic at several budgets, and beside the baselines: ``python compare_budgets.py [model]``."""

import sys

import retensor as rt

graph = rt.graph.load(sys.argv[1] if len(sys.argv) > 1 else "onnx:densenet121")

for point in rt.planning.sweep(graph, points=4):
    print(
        f"{point.scratchpad_bytes:>12,} bytes of scratchpad: {point.non_compulsory_bytes:>12,} off-chip, {point.status}"
    )

chip = rt.Accelerator(scratchpad="M_H")
print(f"{'COSMA':>20}: {rt.plan(graph, chip).non_compulsory_bytes:,} bytes")
for schedule, replacement in rt.planning.BASELINES:
    other = rt.planning.baseline(graph, chip, schedule=schedule, replacement=replacement)
    print(f"{schedule + ', ' + replacement:>20}: {other.non_compulsory_bytes:,} bytes")
