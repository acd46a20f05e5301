"""What the claims about FlexRound put in few bits: digit networks and a sentence encoder, each run a job of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from benchmarks.measuring import on_all_cores
from torch import nn
from torch.nn import functional

from retensor.compression import flexround
from retensor.data import accuracy, digits, fit, minilm, seeded, sentences
from retensor.data.reference import digits_vit
from retensor.quantizing import ActivationQuantizer, Affine
from retensor.replacing import fold_norms

TUNING, SEEDS, FEW_SEEDS = 0, (1, 2, 3), (1, 2, 3)
CALIBRATION, BATCH, STEPS = 256, 16, 250
EPOCHS = {"vit": 40, "cnn": 15}
SENTENCES, WORDS, SENTENCE_BATCH, SENTENCE_STEPS, JUDGED = 96, 24, 8, 50, 128
TUNED_LAYERS = 2
TEST, ENDS = 597 / 1797, 8
"""Share of the pictures to test with, and bits of the first and the last layer of digit networks."""
RATES: dict[tuple[str, int], dict[str, tuple[float, ...]]] = {
    ("vit", 3): {
        "flexround": (1e-2, 3e-2, 1e-1),
        "lrq": (1e-2, 3e-2, 1e-1),
        "adaquant": (3e-4, 1e-3, 3e-3),
        "adaround": (3e-2, 1e-1, 3e-1),
    },
    ("vit", 2): {
        "flexround": (1e-2, 3e-2, 1e-1),
        "adaquant": (1e-3, 3e-3, 1e-2),
        "adaround": (3e-2, 1e-1, 3e-1),
    },
    ("cnn", 3): {
        "flexround": (3e-3, 1e-2, 3e-2),
        "adaquant": (3e-3, 1e-2, 3e-2),
        "adaround": (3e-2, 1e-1, 3e-1),
    },
    ("minilm", 4): {
        "flexround": (1.7e-2, 3e-2, 1e-1),
        "adaquant": (1e-3, 1.7e-3, 3e-3),
        "adaround": (1e-2, 3e-2, 1e-1),
    },
}
"""Around the best of a wider range that was tried once on the tuning seed."""
PENALTIES = (1e-2, 1e-1)
FURTHER = 1
"""How often the next rate is tried where the best so far is the lowest or the highest."""
AHEAD = (1.0, 10.0)
"""Rates of AdaQuant's step relative to that of what is added, which has another unit."""


class Inverted(nn.Module):
    """An inverted residual: 1x1 to four times the channels, depthwise 3x3, 1x1 back, each with normalisation."""

    def __init__(self, channels: int, expand: int = 4) -> None:
        super().__init__()
        inner = channels * expand
        self.up = nn.Conv2d(channels, inner, 1, bias=False)
        self.deep = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.down = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(inner), nn.BatchNorm2d(inner), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = functional.relu6(self.bn1(self.up(x)))
        return x + self.bn3(self.down(functional.relu6(self.bn2(self.deep(inner)))))


class DepthwiseNet(nn.Module):
    """A small network in the manner of MobileNetV2 for 8x8 digits."""

    def __init__(self, channels: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(*(Inverted(channels) for _ in range(depth)))
        self.head = nn.Linear(4 * channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(functional.relu6(self.bn(self.conv(x))))
        logits: torch.Tensor = self.head(functional.adaptive_avg_pool2d(x, 2).flatten(1))
        return logits


def vit() -> nn.Module:
    """Four blocks of width 48 on patches of 2x2."""
    return digits_vit(48, 4)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"vit": vit, "cnn": DepthwiseNet}


@dataclass(frozen=True)
class Setting:
    """One way to put a network in few bits."""

    network: str
    bits: int
    method: str
    lr: float = 0.0
    regularisation: float = 0.01
    ahead: float = 1.0
    """By how many times the rate of the step ``s1`` is that of the rest."""
    learn_step: bool = True
    scales: bool = True
    act: str = ""
    """Empty, or the mode in which inputs are put in 8 bits."""

    @property
    def rival(self) -> Setting:
        """The same without what is tuned."""
        return replace(self, lr=0.0, regularisation=0.01, ahead=1.0)


@dataclass(frozen=True)
class Outcome:
    """What became of a network."""

    error: float
    """Mean square of the difference from the given network's logits; for sentences, 1 less the cosine."""
    accuracy: float
    whole: float
    """Accuracy of the given network."""
    blocks: tuple[float, ...]
    """Relative mean square of the error of each block as it reaches it."""
    beyond: tuple[float, ...]
    """The part of the weights of each unit whose code is neither of the two beside it."""


def trained(network: str, seed: int) -> dict[str, torch.Tensor]:
    """The state of a digit network after training, without normalisations; a job of its own."""
    data = digits(test=TEST)
    with seeded(seed):
        model = NETWORKS[network]()
    fit(model, data.x, data.y, steps=EPOCHS[network] * len(data.x) // 64, seed=seed)
    return fold_norms(model.eval(), example=data.x[:2]).state_dict()


def rebuilt(network: str, state: dict[str, torch.Tensor]) -> nn.Module:
    """The network of a state that :func:`trained` gave."""
    with seeded(0):
        model = fold_norms(NETWORKS[network](), example=torch.zeros(2, 1, 8, 8))
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def digits_run(state: dict[str, torch.Tensor], seed: int, setting: Setting, judged: bool) -> Outcome:
    """Put a digit network in few bits; it is judged by test pictures, or by others for training that it did not see."""
    model, data = rebuilt(setting.network, state), digits(test=TEST)
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))
    seen, others = data.x[order[:CALIBRATION]], order[CALIBRATION:]
    x, y = (data.x_test, data.y_test) if judged else (data.x[others], data.y[others])
    with torch.enable_grad():
        few = put(model, seen, setting, STEPS, BATCH, seed, ends=ENDS)
    error = float((few.model(x) - model(x)).square().mean())
    return outcome(few, error, accuracy(few.model, x, y), accuracy(model, x, y))


@cache
def encoder() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The sentence encoder, and ids and masks of sentences in an order of their own."""
    model, tokenizer = minilm()
    model.pooler = None
    texts = sentences()
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:1000].tolist()
    made = tokenizer(
        [texts[i] for i in chosen], padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt"
    )
    return model, made["input_ids"], made["attention_mask"]


def embedded(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sentences as the encoder's authors embed them: the mean over words."""
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
def sentence_run(seed: int, setting: Setting, judged: bool) -> Outcome:
    """Put the encoder in few bits; rates are tried on its first layers, by sentences that are for nothing else."""
    model, ids, mask = encoder()
    if not judged:
        model = first_layers(model)
    drawn = torch.randperm(700, generator=torch.Generator().manual_seed(seed))[:SENTENCES]
    seen = {"input_ids": ids[drawn], "attention_mask": mask[drawn]}
    at = slice(700, 700 + JUDGED) if judged else slice(700 + JUDGED, 700 + 2 * JUDGED)
    with torch.enable_grad():
        few = put(model, seen, setting, SENTENCE_STEPS, SENTENCE_BATCH, seed, ends=None)
    both = [embedded(one, ids[at], mask[at]) for one in (few.model, model)]
    alike = float(functional.cosine_similarity(*both).mean())
    return outcome(few, 1 - alike, math.nan, math.nan)


def first_layers(model: Any) -> Any:
    """The encoder without its later layers."""
    shorter = copy.deepcopy(model)
    shorter.encoder.layer = shorter.encoder.layer[:TUNED_LAYERS]
    return shorter


def put(
    model: nn.Module, seen: Any, setting: Setting, steps: int, batch: int, seed: int, ends: int | None
) -> flexround.Quantized:
    """A model in few bits by a setting: one step for each weight, by its range."""
    return flexround.quantize(
        model, seen, weight=Affine(setting.bits), method=setting.method, lr=setting.lr,
        step_lr=setting.ahead * setting.lr, steps=steps, batch=batch,
        act=ActivationQuantizer(8, mode=setting.act) if setting.act else None, ends=ends, seed=seed,  # type: ignore[arg-type]
        regularisation=setting.regularisation, learn_step=setting.learn_step, rows=setting.scales,
        columns=setting.scales,
    )  # fmt: skip


def outcome(few: flexround.Quantized, error: float, right: float, whole: float) -> Outcome:
    """With what is reported of blocks."""
    beyond = []
    for unit in few.report:
        layers = unit.found["layers"]
        sizes = {name: few.model.get_submodule(name).kept().codes.numel() for name in layers}
        beyond.append(sum(layers[name]["beyond"] * size for name, size in sizes.items()) / sum(sizes.values()))
    return Outcome(error, right, whole, tuple(unit.after for unit in few.report), tuple(beyond))


def grid(setting: Setting) -> list[Setting]:
    """What is tried of a method at first: three rates, AdaRound's at weights of its regulariser, AdaQuant's at two of
    the step's own."""
    if setting.method == "rtn":
        return [setting]
    rates = RATES[setting.network, setting.bits][setting.method]
    penalties = PENALTIES if setting.method == "adaround" else (0.01,)
    ahead = AHEAD if setting.method == "adaquant" else (1.0,)
    return [
        replace(setting, lr=lr, regularisation=weight, ahead=factor)
        for lr in rates
        for weight in penalties
        for factor in ahead
    ]


def tuned(
    run: Callable[..., Outcome], before: Mapping[int, tuple[Any, ...]], settings: Sequence[Setting],
    progress: Callable[[str], None], what: str,
) -> dict[Setting, Setting]:  # fmt: skip
    """Each setting with what came out best for it on the tuning seed."""
    errors: dict[Setting, dict[Setting, float]] = {s: {} for s in settings if s.method != "rtn"}
    choices = [choice for setting in errors for choice in grid(setting)]
    for _ in range(1 + FURTHER):
        jobs = [(run, *before[TUNING], TUNING, choice, False) for choice in choices]
        for choice, out in zip(choices, on_all_cores(attempt, jobs, progress, what), strict=True):
            errors[choice.rival][choice] = out.error
        choices = [choice for tried in errors.values() if (choice := next_rate(tried)) is not None]
        if not choices:
            break
    return {s: min(errors[s], key=lambda choice: errors[s][choice]) if s in errors else s for s in settings}


def next_rate(errors: Mapping[Setting, float]) -> Setting | None:
    """The best of what was tried at the next rate, where its own is the lowest or the highest."""
    best = min(errors, key=lambda choice: errors[choice])
    rates = sorted({choice.lr for choice in errors})
    if best.lr not in (rates[0], rates[-1]):
        return None
    return replace(best, lr=best.lr * (10**0.5 if best.lr == rates[-1] else 10**-0.5))


def attempt(run: Callable[..., Outcome], *arguments: Any) -> Outcome:
    """A run, or an infinite error where its rate was too high."""
    try:
        return run(*arguments)
    except RuntimeError as error:
        if "lower learning rate" not in str(error):
            raise
        return Outcome(math.inf, 0.0, 0.0, (), ())


def measured(
    run: Callable[..., Outcome], before: Mapping[int, tuple[Any, ...]], settings: Sequence[Setting],
    progress: Callable[[str], None], what: str,
) -> list[list[Outcome]]:  # fmt: skip
    """For each setting its outcomes over the seeds of ``before``, but for the tuning seed."""
    seeds = [seed for seed in before if seed != TUNING]
    jobs = [(*before[seed], seed, setting, True) for setting in settings for seed in seeds]
    found = on_all_cores(run, jobs, progress, what)
    return [found[i : i + len(seeds)] for i in range(0, len(found), len(seeds))]
