"""A vision transformer that adds and shifts instead of multiplying: ``python trade_products_for_shifts.py``.

Needs the data extra. The small original is trained on the first run and kept; a DeiT or PVTv2 of timm takes its place.
"""

import retensor as rt
from retensor.compression import shiftadd

original, data = rt.data.reference("digits-vit")

# Attention adds first; then linear layers shift, with a short training after each.
model = shiftadd.convert(original, attention="linear_add", linears=None)
rt.data.fit(model, data.x, data.y, steps=80, lr=3e-3)
model = shiftadd.convert(model, attention=None, linears="shift")
rt.data.fit(model, data.x, data.y, steps=60, lr=1e-3)

packed = shiftadd.freeze(model)
rt.save(packed, "packed.safetensors")
packed = rt.load("packed.safetensors", base=original)

was, now = (shiftadd.energy(m, data.x_test[:64])["pj"] for m in (original, packed))
saved = {level: 1 - now[level] / was[level] for level in ("compute", "total")}
print(f"energy saved: {saved['compute']:.0%} of the operations, {saved['total']:.0%} with memories")

both = rt.compare(
    original,
    packed,
    inputs=(1, 1, 8, 8),
    accelerator="64KiB",
    parameters=True,  # which lie in the scratchpad too
    time_limit=2,
    names=["before", "after"],
    accuracy=[rt.data.accuracy(m, data.x_test, data.y_test) for m in (original, packed)],
)
print(both)
