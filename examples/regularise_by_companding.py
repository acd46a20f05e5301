"""Train on 100 images with companded weights, and fold them away: ``python regularise_by_companding.py``.

Every weight is a bounded function of a free one, which the optimiser holds. What comes out is the plain network again,
with other weights in it. Needs the data extra.
"""

import copy

import torch

import retensor as rt
from retensor.compression import weight_compander as wc
from retensor.data import accuracy, digits, fit
from retensor.data.reference import digits_mlp

data = digits().few(100)
torch.manual_seed(0)
untrained = digits_mlp()
models = {"plain": copy.deepcopy(untrained), "companded": wc.apply(untrained, a=0.3, b=0.2)}
for model in models.values():
    optimizer = torch.optim.SGD(wc.param_groups(model, lr=0.05, weight_decay=5e-4), momentum=0.9)
    fit(model, data.x, data.y, steps=300, batch=50, optimizer=optimizer, schedule="cosine")
print(wc.report(models["companded"]))

before, after = models["plain"].eval(), rt.fold(models["companded"]).eval()
assert torch.equal(after(data.x_test), models["companded"](data.x_test))
print("plain weights again, outputs equal in every bit")

print(
    rt.compare(
        before,
        after,
        inputs=(1, 1, 8, 8),
        accelerator="M_R",
        names=["plain", "companded"],
        accuracy=[accuracy(model, data.x_test, data.y_test) for model in (before, after)],
    )
)
