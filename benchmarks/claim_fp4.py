"""FP4 training: what scales, rounding, rotation and gradients are worth, what they cost, and how fast the simulator is.

Digits, diabetes and two moons of scikit-learn, and letters of Python's manual, on networks of 10 to 100 thousand
weights, of which all but the first and the last layer are in 4 bits, forward and backward. Stochastic rounding
regularises such small networks, so that the training loss is what is judged; learning rates are chosen by it too, on
three quarters of the training part with seeds that are not judged. The baselines are float32, bfloat16 under autocast,
MXFP4 and NVFP4, each at its best rate.

    retensor claims fp4
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from benchmarks.fp4_rows import Rows, chance, formats, gradient, normal, rotations, scales
from benchmarks.fp4_sweeping import cost_of, frontier
from benchmarks.fp4_trainings import BF16, RATE, TASKS, Way, gradient_errors, in_fp4, network, perceptron, trained
from benchmarks.measuring import Difference, Mean, on_all_cores, paired, power, threads, times, verdict
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from retensor.claims import Claim, Report, Table, Verdict
from retensor.compression import fp4

SOURCE = "R. Hu, C. Luschi, P. Balanca, Elucidating the Design Space of FP4 Training, 2025, arXiv 2509.17791."
SEEDS, TUNING_SEEDS, FEW_SEEDS = tuple(range(1, 9)), (101, 102), (1, 2, 3)
RATES = (8e-3, 1.6e-2, 3.2e-2)
WIDER_RATES = (2e-3, 4e-3, *RATES)
NEAREST, WGRAD = {"rounding_bwd": "nearest"}, {"hadamard": {"wgrad": 16}}
E8M0, E4M3, UE5M3 = (fp4.Format(scale=name) for name in ("e8m0", "e4m3", "ue5m3"))
FULL, MIXED = "float32", "bfloat16"
OURS, MXFP4, NVFP4 = "UE5M3+ts, SR, RHT(dW)", "MXFP4 (floor, B = 32), RTN", "NVFP4, SR, RHT(dW)"
ALONE: dict[str, Any] = dict.fromkeys(("fwd.x", "fwd.w", "dgrad.w", "wgrad.x"))
"""Operands that stay in full precision where the gradient alone is in 4 bits."""
WAYS: dict[str, Way] = {
    FULL: None,
    MIXED: BF16,
    MXFP4: fp4.Recipe(fp4.MXFP4, **NEAREST),  # type: ignore[arg-type]
    NVFP4: fp4.Recipe(fp4.NVFP4, **WGRAD),  # type: ignore[arg-type]
    "E8M0, RTN": fp4.Recipe(E8M0, **NEAREST),  # type: ignore[arg-type]
    "E8M0, SR": fp4.Recipe(E8M0),
    "E4M3, SR": fp4.Recipe(E4M3),
    "E4M3+ts, SR": fp4.Recipe(fp4.NVFP4),
    "UE5M3, SR": fp4.Recipe(UE5M3),
    "UE5M3+ts, RTN": fp4.Recipe(fp4.UE5M3, **NEAREST),  # type: ignore[arg-type]
    "UE5M3+ts, SR": fp4.Recipe(fp4.UE5M3),
    OURS: fp4.Recipe(fp4.UE5M3, **WGRAD),  # type: ignore[arg-type]
    "UE5M3+ts, SR, RHT(all)": fp4.Recipe(fp4.UE5M3, hadamard=dict.fromkeys(fp4.GEMMS, 16)),
    "UE5M3+ts, SR, scale ste": fp4.Recipe(fp4.UE5M3, scale_grad="ste"),
    "UE5M3+ts, SR, scale relaxed": fp4.Recipe(fp4.UE5M3, scale_grad="relaxed"),
    "UE5M3+ts, SR, DGE(W)": fp4.Recipe(fp4.UE5M3, q_grad="dge", q_grad_x="ste"),
    "UE5M3+ts, SR, outliers": fp4.Recipe(fp4.UE5M3, outlier=0.99),
}
SHORT = (FULL, "E8M0, SR", "E4M3, SR", "E4M3+ts, SR", "UE5M3+ts, RTN", "UE5M3+ts, SR", OURS)
PILOT = (FULL, "E4M3, SR", "UE5M3, SR")
OTHERS = tuple(task for task in TASKS if task != "digits")
ROUNDS, SIDE, STEP_WIDTHS = 9, 1024, (128, 512)
Figures = dict[str, list[dict[str, float]]]


def measure(progress: Callable[[str], None]) -> Report:
    claims: list[Claim] = []
    tables: list[Table] = []
    parts: tuple[Callable[[Callable[[str], None]], Rows], ...] = (
        on_digits, on_others, frontier, formats, gradient, scales, chance, rotations, counted, speed,
    )  # fmt: skip
    for part in parts:
        progress(part.__name__.replace("_", " "))
        made, shown = part(progress)
        claims += made
        tables += shown
    libraries = ("torch", "torchao", "ml-dtypes", "gfloat", "scikit-learn", "timm")
    return Report("fp4", "FP4 training: formats, gradients and their overhead", SOURCE, claims, tables, libraries)


def on_digits(progress: Callable[[str], None]) -> Rows:
    """Every way on digits, each at the best of its learning rates."""
    tried = list(itertools.product(WAYS, RATES, TUNING_SEEDS))
    done = on_all_cores(trained, [("digits", WAYS[way], s, rate, True) for way, rate, s in tried], progress, "rates")
    held: dict[tuple[str, float], list[float]] = {}
    for (way, rate, _), out in zip(tried, done, strict=True):
        held.setdefault((way, rate), []).append(out["loss"])
    rates = {way: min(RATES, key=lambda rate: statistics.fmean(held[way, rate])) for way in WAYS}
    asked = list(itertools.product(WAYS, SEEDS))
    runs = on_all_cores(trained, [("digits", WAYS[way], s, rates[way]) for way, s in asked], progress, "digits")
    found: Figures = {way: [] for way in WAYS}
    for (way, _), out in zip(asked, runs, strict=True):
        found[way].append(out)
    asked = list(itertools.product(PILOT, SEEDS))
    runs = on_all_cores(trained, [("digits", WAYS[way], s, RATE) for way, s in asked], progress, "at one rate")
    pilot: Figures = {way: [] for way in PILOT}
    for (way, _), out in zip(asked, runs, strict=True):
        pilot[way].append(out)
    recipes = {way: recipe for way, recipe in WAYS.items() if isinstance(recipe, fp4.Recipe)}
    errors = {way: [gradient_errors(recipe, s) for s in FEW_SEEDS] for way, recipe in recipes.items()}
    for rounding in ("RTN", "SR"):
        recipe = replace(fp4.Recipe(fp4.UE5M3, formats=ALONE), **({} if rounding == "SR" else NEAREST))  # type: ignore[arg-type]
        errors[f"dY alone, {rounding}"] = [gradient_errors(recipe, s) for s in FEW_SEEDS]
    setting = (
        f"perceptron 64-128-128-128-10 on 8x8 digits, both hidden 128x128 layers in FP4, 12 epochs, AdamW, "
        f"{len(SEEDS)} seeds; training loss"
    )
    return _digits_claims(found, pilot, errors, rates, setting)


def _digits_claims(
    found: Figures,
    pilot: Figures,
    errors: dict[str, list[tuple[float, float]]],
    rates: dict[str, float],
    setting: str,
) -> Rows:
    tuned = f"each at the best of {len(RATES)} learning rates for other seeds"
    accuracies = {way: Mean.of([100 * out["accuracy"] for out in found[way]], 1) for way in found}
    lost, kept, full = accuracies["E4M3, SR"], accuracies["UE5M3, SR"], accuracies[FULL]
    missing = _points(found, "E4M3+ts, SR")
    slow = {way: Mean.of([100 * out["accuracy"] for out in pilot[way]], 1) for way in PILOT}
    fails = [_points(one, "E4M3, SR").above(10) for one in (pilot, found)]
    trains = [_points(one, "UE5M3, SR").below(2) for one in (pilot, found)]
    rounding = {scale: _less(found, f"{scale}, SR", f"{scale}, RTN") for scale in ("E8M0", "UE5M3+ts")}
    single = {way: statistics.fmean(one for one, _ in pairs) for way, pairs in errors.items()}
    mean = {way: statistics.fmean(many for _, many in pairs) for way, pairs in errors.items()}
    apart = ("dY alone, RTN", "dY alone, SR")
    combined = {
        "no RHT": _less(found, OURS, "UE5M3+ts, SR"),
        "RTN, no RHT": _less(found, OURS, "UE5M3+ts, RTN"),
        "no tensor scaling, no RHT": _less(found, OURS, "UE5M3, SR"),
    }
    recipes = {way: _less(found, OURS, way) for way in (MIXED, MXFP4, NVFP4)}
    compromise = {
        "E8M0": _less(found, "UE5M3+ts, SR", "E8M0, SR"), "E4M3+ts": _less(found, "UE5M3+ts, SR", "E4M3+ts, SR"),
    }  # fmt: skip
    gradients = {
        name: _less(found, f"UE5M3+ts, SR, {name}", "UE5M3+ts, SR")
        for name in ("scale ste", "scale relaxed", "DGE(W)", "outliers")
    }
    e4m3 = accuracies["E4M3+ts, SR"]
    claims = [
        Claim(
            "Scales are the bottleneck: E4M3 without tensor scaling has not the range to train, UE5M3 has.",
            setting, f"float32; {tuned}", "does not converge",
            f"accuracy at a rate of {RATE:g}: E4M3 {slow['E4M3, SR']} %, UE5M3 {slow['UE5M3, SR']} %, float32 "
            f"{slow[FULL]} %; tuned: E4M3 {lost} %, UE5M3 {kept} %, float32 {full} %",
            verdict(all(fails + trains), fails[0] and trains[0]),
            "Held where the 95 % interval of what E4M3 loses lies above 10 points, and that of UE5M3 below 2, at both "
            "rates; partly, at the low one alone.",
        ),
        Claim(
            "E4M3 scales do not train even with tensor scaling.",
            setting, f"float32; {tuned}", "did not converge (language models)", f"accuracy {e4m3} %, float32: {full} %",
            verdict(missing.above(10)),
            "" if missing.above(10) else "It does on a network and gradients as small as these: their "
            "range within a tensor is less than a large language model's.",
        ),
        _told("Stochastic rounding of gradients trains at least as well as the nearest.",
              setting, f"round to nearest; {tuned}", "needed", rounding, at_least=True,
              note="Held where the 95 % interval does not lie on the wrong side."),
        Claim(
            "(ours) The error of stochastic rounding in a gradient averages out, that of the nearest does not.",
            f"gradient of both hidden weights, half-trained digits, one draw and the mean of 32, "
            f"{len(FEW_SEEDS)} seeds",
            "float32", "none",
            "; ".join(f"{way}: {single[way]:.1%}, mean {mean[way]:.1%}" for way in single if way in apart),
            verdict(mean[apart[1]] < single[apart[1]] / 3 and mean[apart[0]] > single[apart[0]] / 1.5),
            f"In training most of the error is of weights and activations, rounded to the nearest: UE5M3+ts, SR "
            f"{single['UE5M3+ts, SR']:.1%}, mean {mean['UE5M3+ts, SR']:.1%}.",
        ),
        _told("UE5M3 with tensor scaling trains better than E8M0, and than E4M3.",
              setting, tuned, "good compromise", compromise,
              note="Behind a scale of the tensor E4M3 and UE5M3 fall on the same numbers (114688 = 256 * 448) but where"
              " the range of E4M3 ends."),
        _told("Hadamard, tensor scaling and stochastic rounding together are best.",
              setting, f"without one or the other; {tuned}", "best performance-to-overhead", combined),
        _told("(ours) UE5M3 with all three trains at least as well as the recipes of BF16, MXFP4 and NVFP4.",
              setting, f"bfloat16 under autocast; MXFP4, B = 32, floor, RTN; NVFP4, SR, RHT(dW); {tuned}", "none",
              recipes, at_least=True,
              note="Held where the 95 % interval does not lie on the wrong side; NVFP4 falls on the same numbers "
              "wherever the range of E4M3 suffices."),
        _told("Gradients of scales, a smoother slope or apart outliers help beyond straight-through.",
              setting, f"UE5M3+ts, SR; {tuned}", "mixed", gradients),
    ]  # fmt: skip
    rows = [
        (
            way,
            str(Mean.of([out["loss"] for out in found[way]], 4)),
            str(Mean.of([out["test"] for out in found[way]], 3)),
            str(accuracies[way]),
            f"{single[way]:.1%}" if way in single else "",
            f"{mean[way]:.1%}" if way in mean else "",
            f"{rates[way]:g}",
        )
        for way in found
    ]
    columns = ("Way", "Training loss", "Test loss", "Accuracy, %", "Gradient error", "Of its mean", "Rate")
    return claims, [Table(f"Digits: mean and standard error over {len(SEEDS)} seeds", columns, rows)]


def _points(found: Figures, way: str) -> Difference:
    """By how many points of accuracy full precision is better."""
    full, ours = ([100 * out["accuracy"] for out in found[one]] for one in (FULL, way))
    return paired(full, ours)


def _less(found: Figures, ours: str, theirs: str) -> Difference:
    """By how much the training loss of one way is below another's, seed by seed; what failed has the loss of chance."""
    a, b = ([min(out["loss"], 10.0) for out in found[way]] for way in (ours, theirs))
    return paired(b, a, 4)


def _told(
    statement: str, setting: str, baseline: str, paper: str, gains: dict[str, Difference], at_least: bool = False,
    note: str = "",
) -> Claim:  # fmt: skip
    """A claim that losses fall; or, ``at_least``, that they do not rise."""
    good = [not gain.below() if at_least else gain.above() for gain in gains.values()]
    reasons = [
        f"{name}: {gain.why}" for (name, gain), fine in zip(gains.items(), good, strict=True) if not fine and gain.why
    ]  # fmt: skip
    told: Verdict = verdict(all(good), any(good))
    ours = "loss lower by " + ", ".join(f"{gain} ({name})" for name, gain in gains.items())
    return Claim(statement, setting, baseline, paper, ours, told, " ".join([*reasons, *([note] if note else [])]))


def on_others(progress: Callable[[str], None]) -> Rows:
    """A regression, a transformer of pictures, one of letters, and a diffusion, at a rate tuned in full precision."""
    tried = list(itertools.product(OTHERS, WIDER_RATES, TUNING_SEEDS[:2]))
    jobs: list[tuple[Any, ...]] = [(task, None, seed, rate, True) for task, rate, seed in tried]
    held: dict[tuple[str, float], list[float]] = {}
    for (task, rate, _), out in zip(tried, on_all_cores(trained, jobs, progress, "rates"), strict=True):
        held.setdefault((task, rate), []).append(out["loss"])
    rates = {task: min(WIDER_RATES, key=lambda rate: statistics.fmean(held[task, rate])) for task in OTHERS}
    asked = list(itertools.product(OTHERS, SHORT, FEW_SEEDS))
    # The longest first, so that no core waits at the end.
    order = sorted(range(len(asked)), key=lambda i: asked[i][0] not in ("vit", "letters"))
    jobs = [(asked[i][0], WAYS[asked[i][1]], asked[i][2], rates[asked[i][0]]) for i in order]
    runs = dict(zip(order, on_all_cores(trained, jobs, progress, "trainings"), strict=True))
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for i, (task, way, _) in enumerate(asked):
        found.setdefault((task, way), []).append(runs[i])

    def losses(task: str, way: str, figure: str = "loss") -> list[float]:
        return [min(out[figure], 10.0) for out in found[task, way]]

    good = {task: paired(losses(task, "UE5M3+ts, SR"), losses(task, FULL), 3) for task in OTHERS}
    bad = {task: paired(losses(task, "E4M3, SR"), losses(task, "UE5M3+ts, SR"), 3) for task in OTHERS}
    # Nearer to float32 than to what does not train.
    nearer = {
        task: paired(
            losses(task, "E4M3, SR"),
            [2 * a - b for a, b in zip(losses(task, "UE5M3+ts, SR"), losses(task, FULL), strict=True)],
        )
        for task in OTHERS
    }
    apart = [bad[task].above() and nearer[task].above() for task in OTHERS]
    claim = Claim(
        "In regression, pictures, language and diffusion too UE5M3 trains, and E4M3 without range does not.",
        f"diabetes, ViT on digits, letters of a manual, two moons; {len(FEW_SEEDS)} seeds, training loss",
        "E4M3 without tensor scaling, and float32, at one learning rate tuned in full precision",
        "UE5M3 trains, E4M3 without range does not",
        "; ".join(f"{task}: UE5M3+ts {good[task]} over float32, E4M3 {bad[task]} over that" for task in OTHERS),
        verdict(all(apart), any(apart)),
        "Held where the 95 % intervals say that E4M3 is worse, and that UE5M3+ts is nearer to float32 than to it."
        + ("" if all(apart) else " Not so: "
           + ", ".join(task for task, one in zip(OTHERS, apart, strict=True) if not one) + "."),
    )  # fmt: skip
    rows = [
        (task, way, str(Mean.of(losses(task, way), 3)), str(Mean.of(losses(task, way, "test"), 3)), f"{rates[task]:g}")
        for task, way in found
    ]  # fmt: skip
    return [claim], [Table("Other tasks: means", ("Task", "Way", "Training loss", "Test loss", "Rate"), rows)]


def counted(progress: Callable[[str], None]) -> Rows:
    """The cost model against operations that ran."""
    right = total = 0
    rows = []
    for way, recipe in WAYS.items():
        if not isinstance(recipe, fp4.Recipe):
            continue
        model, batch = network("digits")
        made = in_fp4(model, recipe, "digits")
        cost = cost_of(recipe)

        def step(layers: torch.nn.Module = made, rows: torch.Tensor = batch) -> None:
            hidden = torch.relu(layers[0](rows)).detach().requires_grad_()
            functional.mse_loss(layers[2:6](hidden), torch.ones(len(rows), 128)).backward()

        with FlopCounterMode(display=False) as flops:
            step()
        with fp4.OperationCounter() as counter:
            step()
        pairs = _counts(recipe, cost, counter, flops.get_total_flops(), len(batch))
        right += sum(run == told for run, told in pairs.values())
        total += len(pairs)
        shown = ("{:,} / {:,}".format(*pairs[name]) if name in pairs else "" for name in COUNTS)
        rows.append((way, *shown))
    claim = Claim(
        "(ours) The cost model counts what runs, forward and backward.",
        f"both hidden layers of the digits' perceptron, a batch of {len(batch)}, every recipe of the table",
        "FlopCounterMode, and operations that torch dispatches, less what the simulation finds twice",
        "none",
        f"equal in {right} of {total} counts",
        verdict(right == total),
    )
    return [claim], [Table("Operations of a training step, run / told", ("Way", *COUNTS), rows)]


COUNTS = ("Products", "Random numbers", "Comparisons", "Hadamard additions", "Projections", "Slopes", "Selections")


def _counts(
    recipe: fp4.Recipe, cost: fp4.Overhead, counter: fp4.OperationCounter, products: int, batch: int
) -> dict[str, tuple[int, int]]:
    """What ran and what was told."""
    operands = cost.operands
    # The first layer is no overhead, nor are biases; outliers are multiplied as if they were dense.
    first, biases = 2 * 64 * batch * 128, 2 * batch * 128
    dense = 0 if recipe.outlier is None else 2 * 6 * batch * 128 * 128
    # Gradients of quantisers look for the largest numbers again, which hardware keeps from the forward pass.
    again = sum(one.elements for one in operands if one.gradient_operations or one.slope_operations)
    blocks = again // recipe.fwd.block if recipe.fwd is not None and recipe.fwd.tensor_scale else 0
    scaled = recipe.scale_grad != "none"
    found = {
        "Products": (products - first - dense, cost.product_operations),
        "Random numbers": (counter["rand"], sum(one.randoms for one in operands)),
        "Comparisons": (
            counter["amax"] - again - blocks * (1 + scaled), sum(one.comparisons for one in operands)
        ),
    }  # fmt: skip
    if scaled:
        run = counter["sum"] - biases - blocks
        found["Projections"] = (run, sum(one.gradient_operations for one in operands) // 3)
    elif recipe.outlier is None and recipe.q_grad == "ste":
        run = counter["add"] + counter["sub"] - biases
        found["Hadamard additions"] = (run, sum(one.hadamard_adds for one in operands))
    if recipe.q_grad == "dge":
        found["Slopes"] = (counter["pow"], sum(one.slope_operations for one in operands) // fp4.SLOPE_OPERATIONS["dge"])
    if recipe.outlier is not None:
        found["Selections"] = (counter["kthvalue"], sum(one.outlier_operations for one in operands) // 4)
    return found


def speed(progress: Callable[[str], None]) -> Rows:
    """Fake quantisation against torchao's, and a training step against float32's, on one thread."""
    from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor

    claims, rows = [], []
    with threads(1):
        x = normal(SIDE, SIDE)
        rceil = mx_tensor.ScaleCalculationMode.RCEIL
        mx = fp4.Format(scale="e8m0", block=32)

        def nvfp4() -> torch.Tensor:
            scale = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().amax())
            return nvfp4_tensor.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)

        found = times(
            {
                "torchao MX": lambda: mx_tensor.MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, rceil).dequantize(
                    torch.float32
                ),
                "ours MX": lambda: fp4.quantize(x, mx),
                "torchao NVFP4": nvfp4,
                "ours NVFP4": lambda: fp4.quantize(x, fp4.NVFP4),
                "ours NVFP4, SR": lambda: fp4.quantize(x, fp4.NVFP4, rounding="stochastic"),
            },
            ROUNDS,
        )
        ratios = {name: found.ratio(f"ours {name}", f"torchao {name}") for name in ("MX", "NVFP4")}
        rows += [(f"fake quantisation, {name}", f"{1000 * found[name]:.2f} ms") for name in found.seconds]
        claims.append(
            Claim(
                "(ours) Fake quantisation is at least as fast as encoding and decoding of torchao.",
                f"{SIDE}x{SIDE} float32, one thread, medians of {ROUNDS}, in turn",
                "MXTensor.to_mx(RCEIL), NVFP4Tensor.to_nvfp4, and dequantize",
                "none",
                ", ".join(f"{name}: x{ratio:.2f} of its time" for name, ratio in ratios.items()),
                verdict(max(ratios.values()) <= 1, min(ratios.values()) <= 1),
            )
        )
        sides = [SIDE // 2, SIDE, 2 * SIDE, 4 * SIDE]
        tensors = {str(side): normal(side, side) for side in sides}
        sized = times({name: lambda z=z: fp4.quantize(z, mx) for name, z in tensors.items()}, ROUNDS)
        exponent = power([side**2 for side in sides], [sized[str(side)] for side in sides])
        claims.append(
            Claim(
                "(ours) Time is linear in the number of elements.",
                f"{sides[0]}² to {sides[-1]}² elements, one thread",
                "a power law of time over elements",
                "1",
                f"exponent {exponent:.2f}",
                verdict(abs(exponent - 1) < 0.15),
                "" if abs(exponent - 1) < 0.15 else "Small tensors stay in the cache.",
            )
        )
        slow = {}
        for width, name in itertools.product(STEP_WIDTHS, ("UE5M3+ts, RTN", "UE5M3+ts, SR, RHT(dW)")):
            plain = perceptron(64, 10, width)
            made = in_fp4(plain, WAYS[name], "digits")
            batch, labels = normal(256, 64), torch.arange(256) % 10

            def step(model: torch.nn.Module, batch: torch.Tensor = batch, labels: torch.Tensor = labels) -> None:
                functional.cross_entropy(model(batch), labels).backward()

            both = times(
                {"float32": lambda m=plain, s=step: s(m), "fp4": lambda m=made, s=step: s(m)}, ROUNDS, inner=5
            )  # fmt: skip
            slow[f"{name}, width {width}"] = both.ratio("fp4", "float32")
    claims.append(
        Claim(
            "(ours) A training step in simulated FP4 takes at most 8 times that of float32.",
            f"perceptrons of widths {', '.join(map(str, STEP_WIDTHS))}, a batch of 256, one thread",
            "the same network in float32",
            "8",
            ", ".join(f"x{ratio:.1f} ({name})" for name, ratio in slow.items()),
            verdict(max(slow.values()) <= 8, min(slow.values()) <= 8),
            ""
            if max(slow.values()) <= 8
            else "Small products leave the simulation's fixed costs nothing to hide behind.",
        )
    )
    rows += [(f"step, {name}", f"x{ratio:.2f}") for name, ratio in slow.items()]
    rows += [(f"fake quantisation, {side}²", f"{1000 * sized[str(side)]:.3f} ms") for side in sides]
    assert all(math.isfinite(ratio) for ratio in slow.values())
    return claims, [Table("Times, one thread", ("What", "Time"), rows)]
