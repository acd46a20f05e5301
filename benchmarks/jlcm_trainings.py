"""The models that learned codebooks are measured on, and how each way of learning is run and tuned.

Vision transformers on 8x8 digits (:func:`retensor.data.reference`, seeds 1 to 5); 256 training pictures are the
calibration. Rates are chosen on the model of seed 0, by the error on training pictures that are not among those 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from retensor.compression import jlcm
from retensor.data import Split, accuracy, reference
from retensor.quantizing import reconstruct
from retensor.quantizing.samples import Storage, calibration_samples, caught
from retensor.quantizing.units import LAYERS

SEEDS = (1, 2, 3, 4, 5)
FEW_SEEDS = (1, 2, 3)
TUNING = 0
CALIBRATION = 256
STEPS = 300
RATES = (0.01, 0.03, 0.1, 0.3)
WIDE = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
PILOT = ("blocks.1.mlp.fc1", "blocks.1.attn.qkv")
WAYS = {
    "proximal, 1/t": jlcm.Rule("proximal", "inverse"),
    "proximal, exp(-t)": jlcm.Rule("proximal", "exponential"),
    "softmax": jlcm.Rule("softmax"),
    "linear": jlcm.Rule("linear"),
}
DEFAULT = "softmax"


@dataclass(frozen=True)
class Way:
    """One way to find codes: codewords, gradient, where it starts."""

    k: int
    rule: str = "proximal, 1/t"
    start: str = "k-means"


@cache
def model_of(seed: int) -> tuple[nn.Module, Split, torch.Tensor, torch.Tensor]:
    """A model, its data, its calibration pictures, and training pictures to tune on."""
    model, data = reference("digits-vit", seed=seed)
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))
    return model.requires_grad_(False), data, data.x[order[:CALIBRATION]], data.x[order[CALIBRATION:]]


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LAYERS)]


def start_of(weight: torch.Tensor, way: Way) -> jlcm.Coded:
    """The nearest codes; of the best codebook, or of equal steps from the least weight to the greatest."""
    labels = torch.zeros(len(weight), dtype=torch.int64)
    if way.start == "k-means":
        return jlcm.nearest_codes(weight, way.k, labels, 1)
    rows = weight.detach().reshape(len(weight), -1).double()
    grid = torch.linspace(0, 1, way.k, dtype=torch.float64) * (rows.max() - rows.min()) + rows.min()
    return jlcm.Coded(jlcm.nearest(rows, grid).to(torch.uint8), grid[None], None, labels)


def layerwise(
    seed: int, way: Way, rate: float, names: tuple[str, ...] = (), tuning: bool = False, steps: int | None = None
) -> dict[str, float]:
    """Each layer on its own, with the inputs that it has in the given model: relative error of its output elsewhere.

    Elsewhere are test pictures, or the training pictures that rates are tuned on. No steps keep where it starts.
    """
    model, data, x, other = model_of(seed)
    names = names or tuple(layers_of(model))
    start = {}
    for name in names:
        weight = model.get_submodule(name).weight
        start[name] = jlcm.Coding(way.k, jlcm.Layout(1, len(weight))), start_of(weight, way)
    method = jlcm.JointLearning(start, WAYS[way.rule], rate, 1e-3)
    done = reconstruct(
        model, x, method, blocks=(), steps=STEPS if steps is None else steps, input_mix=0.0, seed=seed
    ).model
    return errors(model, done, other if tuning else data.x_test, names)


@torch.no_grad()
def errors(model: nn.Module, done: nn.Module, x: torch.Tensor, names: tuple[str, ...]) -> dict[str, float]:
    samples = calibration_samples(x, x.device)
    found = {}
    for name in names:
        given = caught(model, name, samples, Storage()).take(slice(None))[0]
        one, other = (made.get_submodule(name) for made in (model, done))
        wanted = one(*given) - (0 if one.bias is None else one.bias.reshape(-1, *[1] * (one.weight.ndim - 2)))
        found[name] = float((other(*given) - one(*given)).square().sum() / wanted.square().sum())
    return found


def whole(
    seed: int, k: int, groups: int, rate: float, steps: int | None = None, tuning: bool = False
) -> dict[str, float]:
    """A whole model, block by block: test accuracy, bytes, bits a weight and the error of its outputs."""
    model, data, x, other = model_of(seed)
    made = jlcm.compress(model, x, k=k, groups=groups, iters=STEPS if steps is None else steps, lr_map=rate, seed=seed)
    judged = other if tuning else data.x_test
    with torch.no_grad():
        wanted = model(judged)
        off = float((made(judged) - wanted).square().sum() / wanted.square().sum())
    right = float("nan") if tuning else 100 * accuracy(made.model, data.x_test, data.y_test)
    return {"accuracy": right, "nbytes": made.nbytes, "bits": made.bits_per_weight, "error": off}


def first_jumps(seed: int, k: int, share: float, flat: bool) -> dict[str, dict[str, float]]:
    """How far indices go at a first step of equal length, at which the default gradient changes a share of them.

    From the negative squared distance of each codeword, where the neighbour is next anyway; or, flat, from logits that
    say which codeword is taken and nothing of the others, so that the gradient alone chooses.
    """
    model, _, x, _ = model_of(seed)
    samples = calibration_samples(x, x.device)
    found: dict[str, dict[str, float]] = {}
    name = PILOT[0]
    layer = model.get_submodule(name)
    given = caught(model, name, samples, Storage()).take(slice(None))[0][0]
    coded = start_of(layer.weight, Way(k))
    length = 0.0
    for label in (DEFAULT, *(way for way in WAYS if way != DEFAULT)):
        learner = jlcm.CodebookLearner(layer.weight, coded, WAYS[label])
        if flat:
            with torch.no_grad():
                learner.logits.zero_().scatter_(2, coded.indices.long()[..., None], 1e-3)
        loss = (given @ (learner() - layer.weight).T).square().sum(-1).mean()
        loss.backward()
        step = learner.logits.grad / learner.logits.grad.square().sum().sqrt()
        begin = learner.logits.detach().clone()

        def moved(length: float, learner=learner, begin=begin, step=step) -> dict[str, float]:
            with torch.no_grad():
                learner.logits.copy_(begin - length * step)
            return jlcm.jumps(coded, learner.coded())

        if label == DEFAULT:
            low, high = 0.0, 1e6
            for _ in range(60):
                length = (low + high) / 2
                low, high = (length, high) if moved(length)["flips"] < share else (low, length)
            length = high
        found[label] = moved(length)
    return found
