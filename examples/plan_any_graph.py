"""Plan a graph that no loader knows, as any compiler can write it: ``python plan_any_graph.py``.

All that a plan needs is operators, tensors and bytes; the same as a JSON file is in graph.json.
"""

import retensor as rt
from retensor.graph import Graph, Operator, Tensor
from retensor.graph.json import write_graph

KIB = 1024
tensors = [
    Tensor("image", 48 * KIB, "input"),
    Tensor("skip", 32 * KIB),
    Tensor("wide", 64 * KIB),
    Tensor("deep", 32 * KIB),
    Tensor("sum", 32 * KIB),
    Tensor("score", 1 * KIB),
]
operators = [
    Operator("stem", "Conv", ("image",), ("skip",)),
    Operator("expand", "Conv", ("skip",), ("wide",)),
    Operator("project", "Conv", ("wide",), ("deep",)),
    Operator("add", "Add", ("skip", "deep"), ("sum",)),
    Operator("head", "Gemm", ("sum",), ("score",)),
]
graph = Graph("bottleneck", operators, tensors, outputs=["score"])
write_graph(graph, "graph.json")

plan = rt.plan(rt.graph.load("graph.json"), rt.Accelerator(scratchpad="96KiB"))
for step, name in enumerate(plan.order):
    resident = [stay for stay in plan.residencies if stay.start <= step < stay.end]
    places = ", ".join(f"{stay.tensor} at {stay.address:,}" for stay in sorted(resident, key=lambda stay: stay.address))
    print(f"step {step}: {name:8} {places}")
print(f"{plan.non_compulsory_bytes:,} bytes spilled and retrieved, {plan.status}")
