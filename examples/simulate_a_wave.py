"""A small network that steps waves forward: ``python simulate_a_wave.py``. Needs the compression and data extras.

The wave equation is solved by finite elements to make the data; the network's convolutions are one-way filters from
the start, and learn beside the dense ones that they stand for.
"""

import torch

import retensor as rt
from retensor.compression import apriori
from retensor.data import fit, seeded

waves = apriori.wave2d(n=32, steps=32, sources=16, solver="fem", seed=0)
x, y = apriori.pairs(waves["u"][:12])
x_unseen, y_unseen = apriori.pairs(waves["u"][12:])

with seeded(0):
    dense = apriori.WaveStepper(width=24, depth=3, kernel=5).normalise_(x, y)
small = apriori.compress(dense, rank=24, exclude=("head",))
print(apriori.summary(small, (1, 2, 32, 32)))

accuracy = {}
for name, model in {"dense": dense, "one-way filters": small}.items():
    fit(model, x, y, steps=250, batch=8, lr=1e-2, weight_decay=0, loss=apriori.step_loss(noise=0.03))
    with torch.no_grad():
        accuracy[name] = 1 - apriori.relative_l2(model(x_unseen), y_unseen).item()
    print(f"{name}: {1 - accuracy[name]:.1%} off one step ahead, on unseen sources")

unseen = waves["u"][12]
predicted = torch.cat([unseen[:2], apriori.rollout(small, unseen[None, :2], steps=30)[0]])
apriori.film(unseen, predicted, "wave.gif", dt=waves["dt"], title="one-way filters")
print("wrote wave.gif")

models = (dense.eval(), small.eval())
print(rt.compare(*models, inputs=(1, 2, 32, 32), accelerator="256KiB", names=list(accuracy), accuracy=accuracy))
