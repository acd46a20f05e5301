"""Plan an ONNX model for a chip and keep the plan: ``python plan_an_onnx_file.py [model.onnx] [scratchpad]``.

Without arguments: DenseNet-121, as the onnx package ships it, in a scratchpad halfway between the least that can run
it and the least that needs no traffic.
"""

import sys

import retensor as rt

model = sys.argv[1] if len(sys.argv) > 1 else "onnx:densenet121"
scratchpad = sys.argv[2] if len(sys.argv) > 2 else "M_H"

graph = rt.graph.load(model)
plan = rt.plan(graph, rt.Accelerator(scratchpad=scratchpad))

print(f"{graph.name}: {len(graph.operators)} operators in {plan.scratchpad_bytes:,} bytes")
print(f"off-chip: {plan.non_compulsory_bytes:,} bytes, proved bound {plan.bound_bytes:,}: {plan.status}")
for transfer in plan.transfers:
    if transfer.kind in ("spill", "retrieve"):
        print(f"  before step {transfer.step}: {transfer.kind} {transfer.tensor} ({transfer.nbytes:,} bytes)")

rt.planning.write_plan(plan, "plan.json")
rt.planning.write_report("report.html", graph, plan)
print("wrote plan.json and report.html")
