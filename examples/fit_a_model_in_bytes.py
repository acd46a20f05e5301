"""A transformer in a tenth of its bytes: ``python fit_a_model_in_bytes.py``.

Every weight becomes an index into a small codebook. Needs the data extra; the small original is trained on the first
run and kept. Any model of timm or transformers takes its place, with some hundred of its inputs without labels.
"""

import copy

import retensor as rt
from retensor.compression import jlcm

original, data = rt.data.reference("digits-vit")
inputs = data.x[:256]

plan = jlcm.plan(original, budget_bytes=40_000, example=inputs, codewords=(2, 4, 8, 16))
print(plan.table())
small = jlcm.compress(original, inputs, plan, iters=150)
small.save("model.jlcm")

again = jlcm.load("model.jlcm", lambda: copy.deepcopy(original))
print(f"outputs equal in every bit: {bool((again(inputs) == small(inputs)).all())}")
print(f"{small.nbytes:,} bytes of tensors, {small.bits_per_weight:.2f} bits a weight")

plain = small.decompress()  # plain layers, for whatever runs plain models
print(f"plain again, outputs within {(plain(inputs) - again(inputs)).abs().max():.0e}")

both = rt.compare(
    original,
    again,
    inputs=(1, 1, 8, 8),
    names=["before", "after"],
    accuracy=[rt.data.accuracy(model, data.x_test, data.y_test) for model in (original, again)],
)
print(both)
