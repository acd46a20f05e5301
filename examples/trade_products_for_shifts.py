"""A vision transformer that adds and shifts instead of multiplying: ``python trade_products_for_shifts.py``.

Needs the data extra. The original is small, so that it is trained here; a pretrained DeiT or PVTv2 takes its place.
"""

import torch

import retensor as rt
from retensor.compression import shiftadd
from retensor.data.reference import digits_vit

torch.manual_seed(0)
data, original = rt.data.digits(), digits_vit(width=32, depth=2)
rt.data.fit(original, data.x, data.y, steps=300, lr=5e-3)
original.eval()

# Attention adds first; then linear layers shift, with a short training after each.
model = shiftadd.convert(original, attention="linear_add", linears=None)
rt.data.fit(model, data.x, data.y, steps=80, lr=5e-3)
model = shiftadd.convert(model, attention=None, linears="shift")
rt.data.fit(model, data.x, data.y, steps=80, lr=5e-3)

packed = shiftadd.freeze(model)
rt.save(packed, "packed.safetensors")
packed = rt.load("packed.safetensors", base=original)

was, now = (shiftadd.energy(m, data.x_test[:8])["pj"] for m in (original, packed))
saved = {level: 1 - now[level] / was[level] for level in ("compute", "total")}
print(f"energy saved: {saved['compute']:.0%} of the operations, {saved['total']:.0%} with memories")

both = rt.compare(
    original,
    packed,
    inputs=(1, 1, 8, 8),
    accelerator="64KiB",
    parameters=True,  # which lie in the scratchpad too
    time_limit=1,
    names=["before", "after"],
    accuracy=[rt.data.accuracy(m, data.x_test, data.y_test) for m in (original, packed)],
)
print(both)
