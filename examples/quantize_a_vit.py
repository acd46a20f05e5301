"""A vision transformer with weights and activations of four bits: ``python quantize_a_vit.py``.

Needs the compression and data extras. The small original is trained on the first run and kept. Published settings are
20 000 iterations a block (``aphq.Config()``); with so few as here the rates are to be higher.
"""

import retensor as rt
from retensor.compression import aphq

original, data = rt.data.reference("digits-vit")
images = data.x[:128]  # without labels

config = aphq.Config(w_bits=4, a_bits=4, iters=40, lr=3e-2, act_lr=1e-3, mlp_lr=1e-3, calib=32, rounds=1)
few = aphq.quantize(original, images, config)
for unit in few.report:
    print(f"{unit.name}: error {unit.before:.4f} before, {unit.after:.4f} after")

few.save("few.safetensors")
again = rt.load("few.safetensors", base=original).eval()
print(f"packed weights: {few.nbytes:,} bytes; the file gives the same outputs: {again(images).equal(few(images))}")

both = rt.compare(
    original,
    again,
    inputs=(1, 1, 8, 8),
    accelerator="128KiB",
    parameters=True,  # which lie in the scratchpad too
    time_limit=2,
    names=["before", "4 bits"],
    accuracy=[rt.data.accuracy(model, data.x_test, data.y_test) for model in (original, again)],
)
print(both)
