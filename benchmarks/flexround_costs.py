"""What FlexRound costs: learned values, bytes, memory, time by blocks and steps, and a step beside AdaRound's."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.measuring import allocated, power, threads, times, verdict
from torch import nn

from retensor.claims import Claim, Table
from retensor.compression import flexround
from retensor.data import seeded
from retensor.quantizing import Affine, Fitting, QuantizedLayer, Storage, find_units
from retensor.quantizing.samples import calibration_samples, outputs

ROUNDS, COUNTS = 9, (2, 4, 8)
STEP_SIZES = {"width 48, 16 tokens, batch 32": (48, 16, 32), "width 384, 24 tokens, batch 8": (384, 24, 8)}


def costs(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """Sizes first; times last."""
    claims: list[Claim] = []
    tables: list[Table] = []
    for part in (sizes, memory, growth, speed):
        progress(part.__name__)
        claim, table = part()
        claims.append(claim)
        tables.append(table)
    return claims, tables


def blocks(width: int, count: int) -> nn.Sequential:
    """Transformer blocks of timm's."""
    from timm.models.vision_transformer import Block

    with seeded(0):
        return nn.Sequential(*(Block(width, max(1, width // 16)) for _ in range(count))).eval()


def tokens(width: int, length: int, batch: int) -> torch.Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0))


def sizes() -> tuple[Claim, Table]:
    """Learned values and packed bytes against their formulas."""
    model, x = blocks(256, 1), tokens(256, 4, 4)
    rows = []
    right = True
    shares = []
    for name, quantizer in (("one step", Affine(4)), ("a step a channel", Affine(4, axis=0))):
        for method in ("flexround", "lrq"):
            few = flexround.quantize(model, x, weight=quantizer, method=method, rank=16, steps=1, batch=2)  # type: ignore[arg-type]
            shapes = [m.shape for m in few.model.modules() if isinstance(m, QuantizedLayer)]
            steps = [o if quantizer.axis is not None else 1 for o, _ in shapes]
            expected = sum(
                (o * i + o if method == "flexround" else 16 * (o + i) + o + i) + s
                for (o, i), s in zip(shapes, steps, strict=True)
            )
            packed = sum(o * i // 2 + 4 * s + math.ceil(s / 2) for (o, i), s in zip(shapes, steps, strict=True))
            weights = sum(o * i for o, i in shapes)
            learned = few.report[0].found["learned"]
            right &= learned == expected and few.nbytes == packed
            shares.append(few.nbytes / (4 * weights))
            rows.append((name, method, weights, learned, expected, few.nbytes, f"{shares[-1]:.4f}"))
    held = right and max(shares) <= 0.135
    claim = Claim(
        "(ours) |W| + outputs + steps are learned of a layer, LRQ r (outputs + inputs) + outputs + inputs + steps; "
        "packed weights take at most 0.135 of their float32 bytes.",
        "one transformer block of width 256, 4 bits, LRQ of rank 16", "formulas", "exact, 0.135",
        f"{'equal' if right else 'not equal'}; {min(shares):.4f} to {max(shares):.4f}", verdict(held),
    )  # fmt: skip
    columns = ("Steps", "Method", "Weights", "Learned", "By the formula", "Packed bytes", "Of float32")
    return claim, Table("Learned values and packed bytes", columns, rows)


def memory() -> tuple[Claim, Table]:
    """The most that is held while twice as many blocks are fitted one by one, and all at once, with samples on disk."""
    rows: list[tuple[Any, ...]] = []
    most: dict[tuple[int, bool], int] = {}
    for count in COUNTS:
        model, x = blocks(32, count), tokens(32, 128, 32)
        for together in (False, True):
            # A single unit that holds all blocks keeps the graph of all, which shows that the record would tell.
            given, units = (nn.Sequential(model), ["0"]) if together else (model, "auto")
            with tempfile.TemporaryDirectory() as folder, threads(1):
                most[count, together] = allocated(
                    lambda: flexround.quantize(given, x, blocks=units, steps=2, storage=Storage(folder=folder))  # noqa: B023
                )
        rows.append((count, *(f"{most[count, together] / 2**20:.2f}" for together in (False, True))))
    apart, at_once = (most[COUNTS[-1], together] / most[COUNTS[-2], together] for together in (False, True))
    copied = sum(value.numel() * value.element_size() for value in blocks(32, 1).parameters()) / 2**20
    claim = Claim(
        "(ours) Twice as many blocks take no more memory beside the samples.",
        f"{COUNTS[-2]} and {COUNTS[-1]} transformer blocks of width 32, 128 tokens, batch 32, samples on disk",
        f"{COUNTS[-2]} blocks, by torch's record of allocations; all blocks as one unit", "1 (asked here: 1.05)",
        f"x{apart:.3f} block by block, x{at_once:.3f} at once", verdict(apart <= 1.05 < at_once),
        f"The copy of the model, {copied:.2f} MiB a block, is in it.",
    )  # fmt: skip
    return claim, Table("Most memory held at once, MiB", ("Blocks", "Block by block", "All as one unit"), rows)


def growth() -> tuple[Claim, Table]:
    """Time by blocks and by steps."""
    x = tokens(48, 16, 64)
    calls: dict[str, Callable[[], Any]] = {}
    models = {count: blocks(48, count) for count in COUNTS}
    for count, model in models.items():
        calls[f"{count} blocks"] = lambda model=model: flexround.quantize(model, x, steps=20, held_out=0)
    for steps in (20, 40, 80):
        calls[f"{steps} steps"] = lambda steps=steps: flexround.quantize(models[2], x, steps=steps, held_out=0)
    with threads(1):
        took = times(calls, 3)
    by_blocks = power(COUNTS, [took[f"{count} blocks"] for count in COUNTS])
    by_steps = power((20, 40, 80), [took[f"{steps} steps"] for steps in (20, 40, 80)])
    held = by_blocks <= 1.1 and by_steps <= 1.1
    claim = Claim(
        "(ours) Time is linear in blocks and in steps.", "transformer blocks of width 48, 20 steps; 2 blocks, 1 thread",
        "an exponent of 1", "1 (asked here: at most 1.1)",
        f"exponents {by_blocks:.2f} in blocks, {by_steps:.2f} in steps", verdict(held),
        "What is done once for a block makes the exponent in steps smaller.",
    )  # fmt: skip
    return claim, Table("Time", ("What", "Seconds"), [(name, f"{took[name]:.3f}") for name in calls])


def speed() -> tuple[Claim, Table]:
    """A step of each method on one block, in turn."""
    rows: list[tuple[Any, ...]] = []
    worst = 0.0
    methods = ("flexround", "lrq", "adaquant", "adaround")
    for name, (width, length, batch) in STEP_SIZES.items():
        calls = {method: stepper(method, width, length, batch) for method in methods}
        with threads(1):
            took = times(calls, ROUNDS, 5)
        ratios = {method: took.ratio(method, "adaround") for method in methods}
        worst = max(worst, ratios["flexround"])
        rows.append((name, *(f"{1e3 * took[method]:.2f}" for method in methods),
                     *(f"{ratios[method]:.2f}" for method in methods[:3])))  # fmt: skip
    claim = Claim(
        "(ours) A step of FlexRound takes at most 1.3 times one of AdaRound.",
        f"one transformer block, {' and '.join(STEP_SIZES)}, 1 thread, medians of {ROUNDS} rounds in turn",
        "AdaRound in the same loop, its regulariser on", "1.3", f"x{worst:.2f} at most", verdict(worst <= 1.3),
    )  # fmt: skip
    columns = ("Block", *(f"{method}, ms" for method in methods), *(f"{m} / adaround" for m in methods[:3]))
    return claim, Table("A step of each method", columns, rows)


def stepper(method: Any, width: int, length: int, batch: int) -> Callable[[], None]:
    """A function that takes one step of a method on a block."""
    model, x = blocks(width, 1), tokens(width, length, batch)
    samples = calibration_samples(x, torch.device("cpu"))
    unit = find_units(model, samples, ["0"])[0]
    student = copy.deepcopy(model).requires_grad_(False)
    target = outputs(model[0], samples, Storage(), "0")
    fitting = Fitting(unit, student, model, samples, samples, target)
    rounding = flexround.Rounding(Affine(4), name=method)
    optimizers = rounding.begin(fitting)
    wanted = target.flatten(0, 1)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        rounding.loss(fitting, fitting.module(x), wanted, 0.5).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step
