"""Execute a model inside its plan and compare with the plain run: ``python run_and_check.py [model]``."""

import sys

import retensor as rt

graph = rt.graph.load(sys.argv[1] if len(sys.argv) > 1 else "onnx:densenet121")
plan = rt.plan(graph, rt.Accelerator(scratchpad="M_H"))

counted = rt.planning.verify(graph, plan)
print(f"valid: {counted.steps} steps, highest address {counted.peak_bytes:,} of {plan.scratchpad_bytes:,} bytes")

done = rt.planning.execute(graph, plan, seed=0)
same = "equal in every bit" if done.bit_equal else f"within {done.max_relative_difference:.2g} of the largest value"
for name, array in done.output_arrays().items():
    print(f"output {name}: {array.dtype} of shape {array.shape}")
print(f"executed in an arena of {done.arena_bytes:,} bytes: outputs {same}")
