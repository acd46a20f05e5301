"""Trainings in 4 bits: digits, diabetes, letters of a manual, and a diffusion of two moons, each by one function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import retensor as rt
from retensor.compression import fp4
from retensor.data import seeded
from retensor.data.reference import digits_vit

EPOCHS = 12
STEPS = {"diabetes": 200, "vit": 120, "letters": 100, "moons": 400}
HELD, TESTED = 4, 400
BATCH, RATE = 64, 2e-3
CONTEXT, WIDTH = 32, 64


class Letters(nn.Module):
    """A transformer of one block that tells the next letter."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(letters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, letters)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.letter(ids) + self.place.weight[: ids.shape[1]]
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        x = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm3(x))


def perceptron(inputs: int, outputs: int, width: int = 128) -> nn.Module:
    """Three hidden layers, of which the two square ones are in 4 bits."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, outputs),
    )  # fmt: skip


HIDDEN: dict[str, list[str]] = {
    "digits": ["2", "4"],
    "diabetes": ["2", "4"],
    "moons": ["2", "4"],
    "vit": ["blocks.*.attn.*", "blocks.*.mlp.fc*"],
    "letters": ["qkv", "proj", "fc1", "fc2"],
}
"""What of each task's network is in 4 bits: neither its first nor its last layer."""


def held(
    x: torch.Tensor, y: torch.Tensor, tests: tuple[torch.Tensor, torch.Tensor], tuning: bool
) -> list[torch.Tensor]:
    """What to train on and what to judge by: the test part, or for tuning a quarter of the training part."""
    if not tuning:
        return [x, y, *tests]
    cut = len(x) - len(x) // HELD
    return [x[:cut], y[:cut], x[cut:], y[cut:]]


BF16 = "bfloat16"
"""The recipe of mixed precision: products in bfloat16, parameters and losses in float32."""
Way = fp4.Recipe | str | None


class Mixed(nn.Module):
    """A model under autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x).float()


def in_fp4(model: nn.Module, recipe: Way, task: str) -> nn.Module:
    """A task's network by a recipe: in 4 bits, in bfloat16, or as it is."""
    if isinstance(recipe, fp4.Recipe):
        return fp4.convert(model, recipe, include=HIDDEN[task])
    return model if recipe is None else Mixed(model)


def fitted(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    steps: int,
    seed: int,
    rate: float,
    loss: Any = None,
    batch: int = BATCH,
    schedule: Any = "cosine",
) -> float:
    """Trained with AdamW along a cosine, transformers with a warm-up; the loss of the last twentieth of the steps."""
    losses = rt.data.fit(
        model, x, y, steps=steps, batch=batch, lr=rate, schedule=schedule, seed=seed, loss=loss
    )  # fmt: skip
    tail = losses[-max(1, steps // 20) :]
    return sum(tail) / len(tail)


def digits(recipe: Way, seed: int, rate: float = RATE, tuning: bool = False) -> dict[str, float]:
    """64-128-128-128-10 on digits, 12 epochs."""
    data = rt.data.digits()
    x, y, x_test, y_test = held(data.x.flatten(1), data.y, (data.x_test.flatten(1), data.y_test), tuning)
    with seeded(seed):
        model = perceptron(64, 10)
    model = in_fp4(model, recipe, "digits")
    fitted(model, x, y, EPOCHS * -(-len(x) // BATCH), seed, rate)
    model.eval()
    with torch.no_grad():
        train = float(functional.cross_entropy(model(x), y))
        test = float(functional.cross_entropy(model(x_test), y_test))
    return {"loss": train, "test": test, "accuracy": rt.data.accuracy(model, x_test, y_test)}


def diabetes(recipe: Way, seed: int, rate: float = RATE, tuning: bool = False) -> dict[str, float]:
    """A regression of the progress of 442 patients, in units of its standard deviation."""
    from sklearn.datasets import load_diabetes
    from sklearn.model_selection import train_test_split

    found = load_diabetes()
    parts = [torch.tensor(part, dtype=torch.float32) for part in
             train_test_split(found.data, found.target, test_size=0.4, random_state=0)]  # fmt: skip
    x, x_test, y, y_test = parts
    mean, deviation = x.mean(0), x.std(0)
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    y_test, y = (y_test - y.mean()) / y.std(), (y - y.mean()) / y.std()
    x, y, x_test, y_test = held(x, y, (x_test, y_test), tuning)
    with seeded(seed):
        model = perceptron(10, 1)
    model = in_fp4(model, recipe, "diabetes")

    def squares(model: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (model(a)[:, 0] - b).square().mean()

    fitted(model, x, y, STEPS["diabetes"], seed, rate, squares)
    model.eval()
    with torch.no_grad():
        return {"loss": float(squares(model, x, y)), "test": float(squares(model, x_test, y_test))}


def vit(recipe: Way, seed: int, rate: float = RATE, tuning: bool = False) -> dict[str, float]:
    """A vision transformer of two blocks on digits."""
    data = rt.data.digits()
    x, y, x_test, y_test = held(data.x, data.y, (data.x_test, data.y_test), tuning)
    with seeded(seed):
        model = digits_vit(48, 2)
    model = in_fp4(model, recipe, "vit")
    last = fitted(model, x, y, STEPS["vit"], seed, rate, schedule="onecycle")
    model.eval()
    with torch.no_grad():
        test = float(functional.cross_entropy(model(x_test), y_test))
    return {"loss": last, "test": test, "accuracy": rt.data.accuracy(model, x_test, y_test)}


@functools.cache
def text() -> tuple[torch.Tensor, int]:
    """Python's manual as letters."""
    whole = "\n".join(rt.data.sentences())
    letters = {letter: i for i, letter in enumerate(sorted(set(whole)))}
    return torch.tensor([letters[letter] for letter in whole]), len(letters)


def letters(recipe: Way, seed: int, rate: float = RATE, tuning: bool = False) -> dict[str, float]:
    """A language model of letters; the last tenth of the text is for testing."""
    ids, count = text()
    rows = ids[: len(ids) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    cut = len(rows) * 9 // 10
    x, y, x_test, y_test = held(rows[:cut, :-1], rows[:cut, 1:], (rows[cut:, :-1], rows[cut:, 1:]), tuning)
    x_test, y_test = x_test[:TESTED], y_test[:TESTED]
    with seeded(seed):
        model = Letters(count)
    model = in_fp4(model, recipe, "letters")

    def next_letter(model: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model(a).flatten(0, 1), b.flatten())

    last = fitted(model, x, y, STEPS["letters"], seed, rate, next_letter, BATCH // 2, "onecycle")
    model.eval()
    with torch.no_grad():
        return {"loss": last, "test": float(next_letter(model, x_test, y_test))}


def moons(recipe: Way, seed: int, rate: float = RATE, tuning: bool = False) -> dict[str, float]:
    """A diffusion model that tells the noise on points of two moons (scikit-learn's)."""
    from sklearn.datasets import make_moons

    points = torch.tensor(make_moons(4000, noise=0.05, random_state=0)[0], dtype=torch.float32)
    points = (points - points.mean(0)) / points.std(0)
    x, _, x_test, _ = held(points[:3000], points[:3000], (points[3000:], points[3000:]), tuning)
    with seeded(seed):
        model = perceptron(6, 2)
    model = in_fp4(model, recipe, "moons")

    def noise(model: nn.Module, clean: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        t = torch.rand(len(clean), 1)
        drawn = torch.randn_like(clean)
        angle = t * (torch.pi / 2)
        seen = torch.cos(angle) * clean + torch.sin(angle) * drawn
        features = torch.cat([seen, t, torch.sin(angle), torch.cos(angle), torch.cos(4 * angle)], 1)
        return (model(features) - drawn).square().mean()

    last = fitted(model, x, x, STEPS["moons"], seed, rate, noise)
    model.eval()
    with torch.no_grad(), seeded(seed):
        tests = [float(noise(model, x_test, x_test)) for _ in range(20)]
    return {"loss": last, "test": sum(tests) / len(tests)}


TASKS: dict[str, Callable[..., dict[str, float]]] = {
    "digits": digits, "diabetes": diabetes, "vit": vit, "letters": letters, "moons": moons,
}  # fmt: skip


def trained(task: str, recipe: Way, seed: int, rate: float = RATE, tuning: bool = False) -> dict[str, float]:
    """One training; a loss that is not finite makes no figures but the loss."""
    try:
        return TASKS[task](recipe.seeded(seed) if isinstance(recipe, fp4.Recipe) else recipe, seed, rate, tuning)
    except FloatingPointError:
        return {"loss": float("inf"), "test": float("inf"), "accuracy": 0.1}


def network(task: str) -> tuple[nn.Module, torch.Tensor]:
    """A task's network and a batch, for its cost."""
    if task == "vit":
        return digits_vit(48, 2), torch.zeros(BATCH, 1, 8, 8)
    if task == "letters":
        return Letters(text()[1]), torch.zeros(BATCH // 2, CONTEXT, dtype=torch.int64)
    inputs, outputs = {"digits": (64, 10), "diabetes": (10, 1), "moons": (6, 2)}[task]
    return perceptron(inputs, outputs), torch.zeros(BATCH, inputs)


def gradient_errors(recipe: fp4.Recipe, seed: int, draws: int = 32, steps: int = 60) -> tuple[float, float]:
    """How far the hidden weights' gradient is from full precision's, relative, on half-trained digits.

    Of one draw, and of the mean of several: what averages out, and what does not.
    """
    data = rt.data.digits()
    x = data.x.flatten(1)
    with seeded(seed):
        model = perceptron(64, 10)
    fitted(model, x, data.y, steps, seed, RATE)
    made = in_fp4(model, recipe.seeded(seed), "digits").train()

    def gradient(one: nn.Module) -> torch.Tensor:
        one.zero_grad()
        functional.cross_entropy(one(x[:BATCH]), data.y[:BATCH]).backward()
        return torch.cat([one[int(name)].weight.grad.flatten() for name in HIDDEN["digits"]])

    exact = gradient(model)
    found = torch.stack([gradient(made) for _ in range(draws)])
    return tuple(float((one - exact).norm() / exact.norm()) for one in (found[0], found.mean(0)))  # type: ignore[return-value]
