"""A transformer with a third of its weights, repaired by its original: ``python shrink_a_vit_by_rank.py``.

Needs the data extra. The small original is trained on the first run and kept. Any model of timm or transformers takes
its place; the student is saved, loaded and fine-tuned like any other model.
"""

from torch.nn.functional import cross_entropy

import retensor as rt
from retensor.compression import pela

original, data = rt.data.reference("digits-vit")

plan = pela.plan(original, ratio=3.0)
print(plan.table())
student = pela.compress(original, plan)

# Repair it: the task, with the original's blocks as the teacher. It is not needed afterwards.
loss = pela.PELALoss(teacher=original, student=student)
rt.data.fit(
    student, data.x, data.y, steps=60, lr=5e-4, loss=lambda _, x, y: loss(x, lambda logits: cross_entropy(logits, y))[0]
)
rt.save(student, "student.safetensors")
again = pela.load("student.safetensors", base=original)
print(f"{plan.before:,} parameters before, {sum(p.numel() for p in again.parameters()):,} after")

both = rt.compare(
    original,
    again,
    inputs=(1, 1, 8, 8),
    accelerator="64KiB",
    parameters=True,  # which lie in the scratchpad too
    time_limit=2,
    names=["before", "after"],
    accuracy=[rt.data.accuracy(model, data.x_test, data.y_test) for model in (original, again)],
)
print(both)
