"""A network trained with 4-bit operands, and what recipes cost and give: ``python train_in_four_bits.py``.

Needs the data extra. Any ``nn.Linear`` and ``nn.Conv2d`` of any model takes the place of the perceptron's hidden layer.
"""

import torch

import retensor as rt
from retensor.compression import fp4
from retensor.data.reference import digits_mlp

data = rt.data.digits()
x, y, held_x, held_y = data.x[:-300], data.y[:-300], data.x[-300:], data.y[-300:]


def train(recipe: fp4.Recipe | None, seed: int) -> torch.nn.Module:
    """A perceptron; its first and last layer stay in full precision."""
    with rt.data.seeded(seed):
        model = digits_mlp()
    if recipe is not None:
        model = fp4.convert(model, recipe, include=["3"])
    rt.data.fit(model, x, y, steps=150, seed=seed)
    return model.eval()


found = fp4.sweep(
    lambda recipe, seed: 1 - rt.data.accuracy(train(recipe, seed), held_x, held_y),
    {"scale": ["e4m3", "ue5m3"], "tensor_scale": [False, True], "rounding_bwd": ["nearest", "stochastic"]},
    seeds=[0],
    out="runs.jsonl",  # run the script again, and nothing is trained twice
    cost=lambda recipe: fp4.overhead(digits_mlp(), recipe, x[:64], include=["3"]),
)
found.plot("frontier.svg")
for point in found.pareto():
    print(f"{point.name}: {point.y:.1%} wrong of the part held out, {point.x:.1%} operations beside the products")

models = [train(recipe, 0) for recipe in (None, fp4.Recipe(fp4.UE5M3, hadamard={"wgrad": 16}))]
print(f"trained in {fp4.UE5M3}; the same names and shapes as in float32")
both = rt.compare(
    models[0],
    rt.fold(models[1]),
    inputs=(1, 1, 8, 8),
    time_limit=2,
    names=["float32", "FP4"],
    accuracy=[rt.data.accuracy(model, data.x_test, data.y_test) for model in models],
)
print(both)
