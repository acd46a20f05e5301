"""What a smaller layer buys on a chip: ``python cost_of_a_model.py``. Needs the torch extra.

A classifier's wide convolution is replaced by a depthwise and a pointwise one, and both are priced at one byte an
element on a public accelerator. ``accuracy`` stands for whatever you measured.
"""

from torch import nn

import retensor as rt


def classifier(middle: nn.Module) -> nn.Module:
    """A small network around the layer in question."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        middle,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


before = classifier(nn.Conv2d(32, 64, 3, padding=1))
after = classifier(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 64, 1)))

sheet = rt.cost(before, (1, 3, 96, 96), dtype="int8")
print(
    f"{sheet.parameters:,} parameters, {sheet.macs:,} multiply-accumulates, peak {sheet.activation_peak_bytes:,} bytes"
)

both = rt.compare(
    before,
    after,
    inputs=(1, 3, 96, 96),
    dtype="int8",
    accelerator="ethos-u65-256",  # `retensor accelerators` lists them
    names=["before", "after"],
    accuracy={"before": 0.914, "after": 0.902},
)
print(both)
both.plot("cost.svg")
