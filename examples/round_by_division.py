"""A transformer with weights of three bits, rounded by learned divisions: ``python round_by_division.py``.

Needs the compression and data extras. The small original is trained on the first run and kept. Fold the normalisations
of a convolutional network before (``rt.replacing.fold_norms``), and keep its first and last layers at ``ends=8`` bits.
"""

import retensor as rt
from retensor.compression import flexround
from retensor.quantizing import Affine

original, data = rt.data.reference("digits-vit")
calibration = data.x[:256]  # without labels

plain = flexround.quantize(original, calibration, weight=Affine(3), method="rtn")
few = flexround.quantize(original, calibration, weight=Affine(3), lr=1e-2, steps=60, batch=16)
for unit in few.report:
    print(f"{unit.name}: error {unit.before:.4f} before, {unit.after:.4f} after")

few.save("few.safetensors")
again = rt.load("few.safetensors", base=original)
whole = sum(4 * original.get_submodule(name).weight.numel() for unit in few.report for name in unit.layers)
print(f"weights of its layers: {whole:,} bytes before, {few.nbytes:,} packed with their steps")

both = rt.compare(
    original,
    plain.model,
    again,
    inputs=(1, 1, 8, 8),
    accelerator="128KiB",
    parameters=True,  # which lie in the scratchpad too
    time_limit=2,
    names=["before", "round to nearest", "FlexRound"],
    accuracy=[rt.data.accuracy(model, data.x_test, data.y_test) for model in (original, plain.model, again)],
)
print(both)
