"""Plan a PyTorch model exported with torch.export: ``python plan_a_torchvision_model.py``.

Elements are counted as one byte each, as on a chip that computes in int8. Needs the torch extra.
"""

import torch
import torchvision

import retensor as rt

model = torchvision.models.densenet121().eval()
program = torch.export.export(model, (torch.zeros(1, 3, 64, 64),))
graph = rt.graph.load(program, dtype="int8")

bounds = rt.planning.bounds(graph)
print(f"{graph.name}: no less than {bounds.m_r:,} bytes ({bounds.m_r_operator}); no traffic from {bounds.m_p:,} bytes")

plan = rt.plan(graph, rt.Accelerator(scratchpad="M_H", alignment=16))
print(f"at M_H: {plan.non_compulsory_bytes:,} bytes beyond the compulsory {plan.compulsory_bytes:,}, {plan.status}")
