"""FP4 without training: formats bit for bit, the gradient, scales' range and precision, chance, and rotations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from benchmarks.measuring import Mean, paired, power, verdict

from retensor.claims import Claim, Table
from retensor.compression import fp4
from retensor.quantizing import GRIDS

SCALES = {
    "float32 (ideal)": fp4.Format(scale="float32"),
    "E4M3": fp4.Format(scale="e4m3"),
    "E4M3 + tensor": fp4.Format(scale="e4m3", tensor_scale=True),
    "UE5M3": fp4.Format(scale="ue5m3"),
    "UE5M3 + tensor": fp4.Format(scale="ue5m3", tensor_scale=True),
    "E8M0 ceil": fp4.Format(scale="e8m0"),
    "E8M0 floor": fp4.Format(scale="e8m0", rule="floor"),
}
ROTATIONS = (16, 32, 128)
OUTLIERS = {"normal": 1.0, "a column x5": 5.0, "a column x50": 50.0, "a column x500": 500.0}
HEAVY = "Student t(3)"
DRAWS = range(8)
Rows = tuple[list[Claim], list[Table]]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student(*shape: int, seed: int = 0) -> torch.Tensor:
    drawn = np.random.default_rng(seed).standard_t(3, size=shape)
    return torch.from_numpy(drawn).to(torch.float32)


def formats(progress: Callable[[str], None]) -> Rows:
    """Against the public types, bit for bit."""
    from gfloat import Domain, FormatInfo, decode_float
    from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor

    info = FormatInfo(
        "ue5m3", 8, 4, bias=15, is_signed=False, domain=Domain.Finite, has_nz=False, num_high_nans=1,
        has_subnormals=True, is_twos_complement=False,
    )  # fmt: skip
    theirs = [decode_float(info, code).fval for code in range(255)]
    codes = sum(a != b for a, b in zip(theirs, GRIDS["ue5m3"].values, strict=False))
    x = normal(10_000) * 3
    rounded = x.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    points = int((GRIDS["e2m1"].round(x).numpy() != rounded).sum())
    z = normal(64, 256)
    gaps: dict[str, float] = {}
    for rule, mode in (("floor", "FLOOR"), ("ceil", "RCEIL"), ("even", "EVEN")):
        calculation = getattr(mx_tensor.ScaleCalculationMode, mode)
        peer = mx_tensor.MXTensor.to_mx(z, torch.float4_e2m1fn_x2, 32, calculation).dequantize(torch.float32)
        ours = fp4.quantize(z, fp4.Format(scale="e8m0", block=32, rule=rule))  # type: ignore[arg-type]
        gaps[f"MX {rule}"] = float((ours - peer).abs().max())
    for name, format in (("NVFP4", SCALES["E4M3"]), ("NVFP4 + tensor", SCALES["E4M3 + tensor"])):
        scale = nvfp4_tensor.per_tensor_amax_to_scale(z.abs().amax()) if format.tensor_scale else None
        peer = nvfp4_tensor.NVFP4Tensor.to_nvfp4(z, per_tensor_scale=scale).dequantize(torch.float32)
        gaps[name] = float((fp4.quantize(z, format) - peer).abs().max())
    claim = Claim(
        "(ours) Formats are those of public libraries, bit for bit.",
        "all codes of UE5M3; 10,000 normal numbers in E2M1; randn(64, 256) in MX (three scale rules) and NVFP4",
        "gfloat, ml_dtypes, torchao MXTensor and NVFP4Tensor",
        "none",
        f"{codes} and {points} differ; largest difference to torchao {max(gaps.values()):g}",
        verdict(not codes and not points and not any(gaps.values())),
    )
    return [claim], []


def gradient(progress: Callable[[str], None]) -> Rows:
    """The derived gradient against finite differences of a quantiser whose roundings are smooth functions."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(20):
        x = torch.randn(3, 8, dtype=torch.float64, generator=generator)
        g = torch.randn(3, 8, dtype=torch.float64, generator=generator)

        def made(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            s = z.abs().amax(-1) / 6
            s_t = s.amax() / 448
            s_q = s_t * (s / s_t + 0.2 * torch.sin(s / s_t))
            u = z / s_q[:, None]
            return s_q[:, None] * (u + 0.3 * torch.sin(2 * u)), s_q, s_t

        out, s_q, s_t = made(x)
        most = x.abs().amax(-1)
        found = fp4.pullback(
            g, x, out, most=most, sizes=s_q, largest=6.0, element_slope=1 + 0.6 * torch.cos(2 * x / s_q[:, None]),
            scale_slope=1 + 0.2 * torch.cos(most / 6 / s_t), tensor_scale=s_t, tensor_slope=1 / (6 * 448),
        )  # fmt: skip
        step = 1e-6
        shifts = step * torch.eye(24, dtype=torch.float64).view(24, 3, 8)
        sides = [((g * made(x + d)[0]).sum() - (g * made(x - d)[0]).sum()) / (2 * step) for d in shifts]
        worst = max(worst, float((found.flatten() - torch.stack(sides)).norm() / found.norm()))
    claim = Claim(
        "The gradient of a quantiser has a part of its scale's and of its tensor's scale.",
        "blocks of 8 with tensor scaling, roundings replaced by smooth functions, float64, 20 draws",
        "central finite differences",
        "derived",
        f"largest relative difference {worst:.1e}",
        verdict(worst < 1e-6),
    )
    return [claim], []


def scales(progress: Callable[[str], None]) -> Rows:
    """What precision of a scale is worth, and what its range is."""

    def sqnr(x: torch.Tensor, format: fp4.Format) -> float:
        return float(10 * torch.log10(x.square().sum() / (fp4.quantize(x, format) - x).square().sum()))

    gauss, heavy = normal(4096, 256), student(4096, 256)
    wide = normal(20_000, 16, seed=1) * (4 * normal(20_000, 1)).exp() * 1e-6
    rows = []
    for name, format in SCALES.items():
        lost = float((fp4.quantize(wide, format) == 0).all(1).float().mean())
        rows.append((name, sqnr(gauss, format), sqnr(heavy, format), f"{lost:.1%}"))
    by = {name: (a, b, float(c.rstrip("%")) / 100) for name, a, b, c in rows}
    good = by["UE5M3 + tensor"]
    precise = all(good[i] >= by["E8M0 ceil"][i] + 0.5 for i in (0, 1))
    ranging = good[2] < by["E4M3 + tensor"][2] / 2
    claim = Claim(
        "UE5M3 scales are a good compromise of range and precision.",
        "B = 16; SQNR of randn(4096, 256) and Student's t(3); blocks wiped to zero of block-lognormal data (sigma 4)",
        "E4M3 and E8M0 scales",
        "good compromise",
        f"UE5M3 + tensor: {good[0]:.2f} and {good[1]:.2f} dB, {good[2]:.1%} wiped; E8M0 ceil: "
        f"{by['E8M0 ceil'][0]:.2f} and {by['E8M0 ceil'][1]:.2f} dB, {by['E8M0 ceil'][2]:.1%}; E4M3 + tensor: "
        f"{by['E4M3 + tensor'][0]:.2f} and {by['E4M3 + tensor'][1]:.2f} dB, {by['E4M3 + tensor'][2]:.1%}",
        verdict(precise and ranging, precise or ranging),
        "" if precise and ranging else "Not both half a decibel above E8M0 and half of E4M3's loss.",
    )
    return [claim], [Table("Scales", ("Scale", "SQNR normal, dB", "SQNR t(3), dB", "Blocks wiped"), rows)]


def chance(progress: Callable[[str], None]) -> Rows:
    """Stochastic rounding: the mean of one number, and of a weight's gradient."""
    x = torch.full((200_000, 2), 2.3)
    x[:, 1] = 6.0
    pairs = fp4.Format(scale="e8m0", block=2)
    mean = float(
        fp4.quantize(x, pairs, rounding="stochastic", generator=torch.Generator().manual_seed(0))[:, 0].mean()
    )  # fmt: skip
    nearest = float(fp4.quantize(x, pairs)[0, 0])
    formats: dict[str, Any] = {"wgrad.x": None, "fwd.x": None, "fwd.w": None}
    layer = fp4.FP4Linear(32, 16, bias=False, recipe=fp4.Recipe(fp4.Format(scale="e8m0"), formats=formats))
    a, dy = normal(64, 32), normal(64, 16, seed=2)
    exact, total = dy.T @ a, torch.zeros(16, 32)
    counts, errors = (8, 32, 128, 500), []
    for draw in range(1, counts[-1] + 1):
        layer.weight.grad = None
        layer(a).backward(dy)
        total += layer.weight.grad
        if draw in counts:
            errors.append(float((total / draw - exact).norm() / exact.norm()))
    exponent = power(counts, errors)
    right = abs(mean - 2.3) < 0.003 and abs(exponent + 0.5) < 0.1
    claim = Claim(
        "Stochastic rounding is right in the mean.",
        "2e5 roundings of 2.3; weight gradients of a layer 32 to 16, mean of 8 to 500 draws against dY as it is",
        "round to nearest",
        "unbiased",
        f"2.3 becomes {mean:.4f} (nearest: {nearest:g}); error of the mean gradient falls as n^{exponent:.2f}",
        verdict(right),
    )
    return [claim], []


def rotations(progress: Callable[[str], None]) -> Rows:
    """Where a random Hadamard transform helps a product, and where it does not."""

    def error(x: torch.Tensor, w: torch.Tensor, format: fp4.Format | None, size: int | None, seed: int = 0) -> float:
        recipe = fp4.Recipe(format, hadamard={"fwd": size} if size else {}, seed=seed)
        exact = x @ w.T
        return float((fp4.matmul(x, w.T, recipe) - exact).norm() / exact.norm())

    def drawn(name: str, seed: int) -> torch.Tensor:
        if name == HEAVY:
            return student(256, 256, seed=seed)
        x = normal(256, 256, seed=seed)
        x[:, 7] *= OUTLIERS[name]
        return x

    data = (*OUTLIERS, HEAVY)
    w = [normal(128, 256, seed=100 + seed) for seed in DRAWS]
    exact = max(error(drawn(name, 0), w[0], None, size) for name in data for size in ROTATIONS)
    chosen: Mapping[str, fp4.Format] = {name: SCALES[name] for name in ("E8M0 ceil", "UE5M3 + tensor", "E4M3 + tensor")}
    rows, verdicts = [], []
    for name, (scale, format), block in itertools.product(data, chosen.items(), (16, 32)):
        sized = fp4.Format(scale=format.scale, block=block, tensor_scale=format.tensor_scale)
        found = {
            size: [100 * error(drawn(name, seed), w[seed], sized, size, seed) for seed in DRAWS]
            for size in (None, *ROTATIONS)
        }  # fmt: skip
        gain = paired(found[None], found[block])
        told = "helps" if gain.above() else "hurts" if gain.below() else "no difference"
        verdicts.append(told)
        rows.append((name, scale, block, *(f"{Mean.of(one).mean:.2f}" for one in found.values()), f"{gain}", told))
    helps, hurts = verdicts.count("helps"), verdicts.count("hurts")
    claims = [
        Claim(
            "(ours) A rotated product is the plain one.",
            f"256x256 with 128x256, float32, sizes {', '.join(map(str, ROTATIONS))}",
            "the product as it is",
            "exact",
            f"largest relative difference {exact:.1e}",
            verdict(exact < 1e-5),
        ),
        Claim(
            "The Hadamard transform makes products in FP4 more exact.",
            f"forward products, {len(rows)} pairs of data, scale and block, {len(DRAWS)} draws of data, weights and "
            "signs each; transform as long as the block",
            "without rotation, the same draws",
            "helps",
            f"helps in {helps}, hurts in {hurts} of {len(rows)} (95 % intervals)",
            verdict(helps == len(rows), helps > 0),
            "" if helps == len(rows) else "A transform no longer than the block spreads an outlier over numbers that "
            "its scale had lost already, and E2M1 suits heavy tails better than the normal numbers they become.",
        ),
    ]  # fmt: skip
    columns = ("Data", "Scale", "B", "Plain", *(f"RHT {size}" for size in ROTATIONS), "Gain of RHT B", "RHT B")
    return claims, [Table("Relative error of a product, %, with and without rotation", columns, rows)]
