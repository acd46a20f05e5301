"""ShiftAddViT: what additions, shifts and mixtures keep of accuracy, save of energy, and take of time on this CPU.

Vision transformers (width 48, 4 blocks) trained on real 8x8 digits with noise; the authors' energy model on DeiT-T and
PVTv2-B0 at their real sizes; and their kernels' sizes on one thread beside torch's own kernels, timed last.

    retensor claims shiftaddvit
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from benchmarks.measuring import Difference, Mean, Times, paired, verdict
from benchmarks.shiftaddvit_kernels import (
    FEW,
    MAT_ADD,
    MAT_SHIFT,
    attention_times,
    mat_add_times,
    mat_shift_times,
    model_times,
)
from benchmarks.shiftaddvit_trainings import (
    ADD,
    ALL_MOE,
    ALL_SHIFT,
    DENSE,
    DEPTH,
    EPOCHS,
    EVEN,
    MOE,
    NOISE,
    RATES,
    SEEDS,
    SHIFT,
    UNSCALED,
    WIDTH,
    Outcome,
    Way,
    all_trained,
    rate_shown,
)
from torch import nn

from retensor.claims import Claim, Report, Table
from retensor.compression import shiftadd
from retensor.data.training import seeded

SOURCE = "H. You, H. Shi, Y. Guo, Y. Lin, ShiftAddViT, NeurIPS 2023, arXiv 2306.06446."
LOST = 1.5
"""Points that additions in attention may cost."""
SHARE, NEAR = 0.4, 0.04
ALPHAS = ((0.6, 0.4), (0.5, 0.5), (0.8, 0.2))
ROUTER_STEPS = 600
SAVED = 0.429
FASTER = 5.18
Parts = tuple[list[Claim], list[Table]]


def measure(progress: Callable[[str], None]) -> Report:
    claims: list[Claim] = []
    tables: list[Table] = []
    parts: tuple[Callable[[Callable[[str], None]], Parts], ...] = (accuracies, balance, rounding, energies, speed)
    with warnings.catch_warnings():
        # The int8 layers that are compared with are announced to move to another package.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        for part in parts:
            progress(part.__name__)
            made, shown = part(progress)
            claims += made
            tables += shown
    libraries = ("torch", "timm", "numba", "scikit-learn")
    return Report(
        "shiftaddvit", "ShiftAddViT: additions, shifts and mixtures of both", SOURCE, claims, tables, libraries
    )


def accuracies(progress: Callable[[str], None]) -> Parts:
    """The headline in miniature: equal training for every way, each at its best rate."""
    rates, found = all_trained(progress)
    return judged(rates, found)


def judged(rates: Mapping[Way, float], found: Mapping[Way, Sequence[Outcome]]) -> Parts:
    """Claims and the table of trained models."""
    after = {how: [100 * one.after for one in outcomes] for how, outcomes in found.items()}
    setting = (
        f"ViT (width {WIDTH}, {DEPTH} blocks) on 8x8 digits with noise of deviation {NOISE}, {EPOCHS} epochs after "
        f"conversion, {len(SEEDS)} seeds"
    )
    tuned = f"each at the best of {len(RATES)} rates, on pictures held out of another model's training"
    dense = f"the model trained on as it is; {tuned}"
    added = paired(after[ADD], after[DENSE], 1)
    claims = [
        Claim(
            "Attention of additions keeps the accuracy.",
            f"{setting}; at most {LOST} points",
            dense,
            "comparable",
            f"{added} points",
            # Held where the whole interval lies above, partly where the mean alone does.
            verdict(added.above(-LOST), added.mean >= -LOST),
            "" if added.above(-LOST) else f"The 95 % interval reaches {added.mean - added.half:+.1f} points. "
            "Binary queries and keys are trained from nothing but a softmax attention's in these epochs; the paper has "
            "100 of ImageNet.",
        )
    ]  # fmt: skip
    spare = "So small a network on 8x8 digits has weights to spare, and learns around their rounding."
    nothing = "Where shifts alone lose nothing, nothing can be won back."
    for bits in (5, 3):
        claims += [
            _order(f"Perceptrons of shifts alone lose accuracy ({bits} bits).", setting, dense,
                   paired(after[DENSE], after[SHIFT[bits]], 1), spare),
            _order(f"Mixtures win it back ({bits} bits).", setting, f"shifts alone; {tuned}",
                   paired(after[MOE[bits]], after[SHIFT[bits]], 1), nothing),
            _between(f"Mixtures are no better than products alone ({bits} bits).", setting, dense,
                     paired(after[DENSE], after[MOE[bits]], 1)),
        ]  # fmt: skip
    claims.append(
        _order("Mixtures win it back where attention adds and every layer is converted.", setting,
               f"shifts in all layers; {tuned}", paired(after[ALL_MOE], after[ALL_SHIFT], 1), "")
    )  # fmt: skip
    begin = [Mean.of([100 * one.before for one in found[how]], 1) for how in (UNSCALED, MOE[5])]
    claims.append(
        _order("(ours) A gate of 1 with the probability's gradient ends higher than the probability.", setting,
               f"outputs times the probability; {tuned}", paired(after[UNSCALED], after[MOE[5]], 1),
               f"Before any training it is {begin[0]} % against {begin[1]} %.")
    )  # fmt: skip
    shares = Mean.of([one.share for one in found[MOE[5]] if one.share is not None])
    wide = Mean.of([one.share for one in found[ALL_MOE] if one.share is not None])
    even = Mean.of([one.share for one in found[EVEN] if one.share is not None])
    # A share that follows the latencies moves with them: a router that ignores them may lie anywhere.
    moved = paired([one.share or 0.0 for one in found[EVEN]], [one.share or 0.0 for one in found[MOE[5]]])
    near = [abs(each.mean - SHARE) <= NEAR and moved.above() for each in (shares, wide)]
    claims.append(
        Claim(
            "Four in ten tokens multiply, after latencies of 6 and 4.",
            f"{setting}, weight 0.01 of the loss, shares of test tokens",
            f"equal latencies, perceptrons: {even}",
            "0.40",
            f"perceptrons: {shares}; all layers: {wide}",
            verdict(all(near), any(near)),
            "" if all(near) else f"Against equal latencies the share moves by {moved}. The task's gradient and so few "
            "steps at this weight leave the router where it is; "
            "with the loss alone it gets there (next claim).",
        )
    )  # fmt: skip
    rows = [
        (
            how.name, str(Mean.of([100 * one.before for one in outcomes], 1)), str(Mean.of(after[how], 1)),
            str(Mean.of([100 * one.frozen for one in outcomes], 1)),
            "" if outcomes[0].share is None else str(Mean.of([one.share for one in outcomes if one.share is not None])),
            rate_shown(rates[how]),
        )
        for how, outcomes in found.items()
    ]  # fmt: skip
    columns = ("Model", "Before training, %", "After, %", "Packed, %", "Tokens that multiply", "Rate")
    return claims, [Table(f"Noisy digits: mean and standard error over {len(SEEDS)} seeds", columns, rows)]


def _between(statement: str, setting: str, baseline: str, loss: Difference) -> Claim:
    """A claim that one way is not above another: held unless the whole interval says that it is."""
    told = not loss.below()
    return Claim(statement, setting, baseline, "at most", f"{loss} points", verdict(told),
                 "" if told else "Above it: the experts and their router have more parameters.")  # fmt: skip


def _order(statement: str, setting: str, baseline: str, gain: Difference, otherwise: str) -> Claim:
    """A claim that one way is above another, and what to say where it is not."""
    why = f"{gain.why} {otherwise}".strip() if gain.why else ""
    return Claim(statement, setting, baseline, "so", f"{gain} points", gain.verdict, why)


def balance(progress: Callable[[str], None]) -> Parts:
    """Routers trained by the balancing loss alone."""
    rows: list[tuple[str, str, str]] = []
    found: dict[tuple[float, float], Mean] = {}
    for alpha in ALPHAS:
        shares = [_router(alpha, seed) for seed in SEEDS]
        found[alpha] = Mean.of(shares, 3)
        rows.append((f"{alpha[0]:g} : {alpha[1]:g}", f"{alpha[1] / sum(alpha):.3f}", str(found[alpha])))
    near = {alpha: abs(mean.mean - alpha[1]) <= NEAR for alpha, mean in found.items()}
    even = found[0.5, 0.5]
    claims = [
        Claim(
            "The latency-aware loss shares tokens by the inverse of the latencies.",
            f"a linear router of two experts, {ROUTER_STEPS} steps of Adam on the loss alone, {len(SEEDS)} seeds",
            f"an ordinary balance loss (equal latencies): {even}",
            ", ".join(f"{alpha[1]:.3f}" for alpha in ALPHAS),
            ", ".join(str(mean) for mean in found.values()),
            verdict(all(near.values()), any(near.values())),
            "" if all(near.values()) else f"Further than {NEAR} from it at some latencies.",
        )
    ]
    return claims, [Table("Share of tokens that multiply", ("Latencies", "Fixed point", "Here"), rows)]


def _router(alpha: tuple[float, float], seed: int) -> float:
    """The share of a trained router's first expert, on tokens that it was not trained on."""
    with seeded(seed):
        layer = shiftadd.MoELinear.from_linear(nn.Linear(16, 4), seed=seed).train()
        optimizer = torch.optim.Adam(layer.router.parameters(), lr=1e-2)
        for _ in range(ROUTER_STEPS):
            layer(0.5 + torch.randn(256, 16))
            optimizer.zero_grad()
            shiftadd.ll_loss(layer, alpha).backward()
            optimizer.step()
        return shiftadd.router_report(layer, 0.5 + torch.randn(20000, 16)).shares[0]


def rounding(progress: Callable[[str], None]) -> Parts:
    """What shifting whole numbers loses against multiplying."""
    rows: list[tuple[int, float, float, float]] = []
    inside = exact = True
    for inputs in (64, 256, 1024):
        with seeded(0):
            layer = shiftadd.ShiftLinear.from_linear(nn.Linear(inputs, 128, bias=False))
            x = torch.randn(256, inputs)
        shift, sign = layer.shift.detach().round().clamp(-14, 0).long(), layer.sign.detach().long()
        whole = (x * 2**16).floor().long()
        sums = shiftadd.mat_shift(whole, shift, sign)
        slow = torch.stack([(sign * (row >> -shift)).sum(1) for row in whole])
        exact &= bool((sums == slow).all())
        product = whole.double() @ (sign * 2.0**shift).double().T
        off = (sums - product) / inputs
        positive = shiftadd.mat_shift(whole, shift, sign.abs()) - whole.double() @ (2.0**shift).double().T
        inside &= float(off.abs().max()) <= 1
        rows.append((inputs, float(off.abs().max()), float(off.mean()), float(positive.mean()) / inputs))
    claims = [
        Claim(
            "A shift layer is a linear layer of powers of two.",
            "16.16 fixed point, 64 to 1,024 inputs, against the float64 product of the same numbers",
            "at most one unit of 2^-16 a term",
            "the same",
            "; ".join(f"{inputs} inputs: at most {most:.2f} units a term" for inputs, most, *_ in rows),
            verdict(inside and exact),
            f"The sums are {'exactly' if exact else 'not'} those of shifts term by term. A right shift rounds down: "
            f"{rows[0][3]:+.2f} units a term where all signs are plus; signs of both kinds make the mean near nothing.",
        )
    ]
    columns = ("Inputs", "Largest error, units a term", "Mean", "Mean where all signs are plus")
    return claims, [Table("Rounding of shifts against products", columns, rows)]


def energies(progress: Callable[[str], None]) -> Parts:
    """The authors' energy model."""
    import timm

    claims: list[Claim] = []
    rows: list[tuple[str, str, float, float, float, float, float, float]] = []
    saved: dict[str, tuple[float, float]] = {}
    honest: dict[str, float] = {}
    for name in ("deit_tiny_patch16_224", "pvt_v2_b0"):
        with seeded(0):
            model = timm.create_model(name, pretrained=False).eval()
            x = torch.randn(1, 3, 224, 224)
        ways = {
            "as it is": model,
            "additions": shiftadd.convert(model, linears=None),
            "additions and mixtures": shiftadd.convert(model),
            "additions and shifts": shiftadd.convert(model, linears="shift"),
        }
        found = {how: shiftadd.energy(one, x) for how, one in ways.items()}
        for how, each in found.items():
            pj = each["pj"]
            rows.append((
                name, how, *(pj[level] / 1e6 for level in ("compute", "dram", "buffer", "noc", "register", "total"))
            ))  # type: ignore[arg-type]  # fmt: skip
        base, mixed = found["as it is"]["pj"], found["additions and mixtures"]["pj"]
        saved[name] = 1 - mixed["compute"] / base["compute"], 1 - mixed["total"] / base["total"]
        with_sums = [
            shiftadd.energy(ways[how], x, accumulations=True)["pj"]["compute"]
            for how in ("as it is", "additions and mixtures")
        ]
        honest[name] = 1 - with_sums[1] / with_sums[0]
    most = max(total for _, total in saved.values())
    claims.append(
        Claim(
            "Up to 42.9 % of the energy is saved.",
            "DeiT-T and PVTv2-B0 of timm at 224 pixels, one picture, additions in attention and mixtures in all "
            "layers, routers that are not trained (about half the tokens shift), memories of an Eyeriss-like chip",
            "the model as it is, counted the same way",
            "42.9 %",
            "; ".join(f"{name}: {total:.1%} ({ops:.1%} of operations)" for name, (ops, total) in saved.items()),
            verdict(most >= SAVED, most > 0),
            "One picture: both experts' weights come from DRAM for few tokens. With every sum charged its addition, of "
            "operations: " + ", ".join(f"{name} {share:.1%}" for name, share in honest.items()) + ".",
        )
    )
    plain = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    shifted = shiftadd.convert(plain, attention=None, linears="shift", include="*")
    x = torch.zeros(196, 64)
    price = shiftadd.energy(shifted, x)["pj"]["compute"] / shiftadd.energy(plain, x)["pj"]["compute"]
    summed = [shiftadd.energy(each, x, accumulations=True)["pj"]["compute"] for each in (shifted, plain)]
    claims.append(
        Claim(
            "A perceptron of shifts takes 3.5 % of the energy of operations.",
            "one perceptron, 32 bits, a shift charged in a multiply-accumulate's place as the authors do",
            "multiplications",
            "0.13 / 3.7 pJ",
            f"{price:.1%}",
            verdict(abs(price - 0.13 / 3.7) < 1e-6),
            f"With the additions of its sums, which the authors charge neither, {summed[0] / summed[1]:.1%}.",
        )
    )
    columns = ("Model", "Converted", "Operations, uJ", "DRAM", "Buffer", "Network", "Registers", "All")
    return claims, [Table("Energy of one picture, microjoules, by the authors' figures", columns, rows)]


def speed(progress: Callable[[str], None]) -> Parts:
    """Real times on this CPU, side by side, whatever comes out."""
    shifts, adds = mat_shift_times(), mat_add_times()
    growth, sequences = attention_times()
    models, size = model_times()
    return timed(shifts, adds, growth, sequences, models, size)


def timed(
    shifts: Mapping[tuple[int, int, int], Times],
    adds: Mapping[tuple[int, int, int, int], Times],
    growth: Mapping[str, float],
    sequences: Times,
    models: Times,
    size: Mapping[str, int],
) -> Parts:
    """Claims and tables of times."""
    against = {
        name: [found.ratio(name, "MatShift") for found in shifts.values()]
        for name in ("fake shift", "float32", "int8", "int8 product", "numba float32", "MatShift, 8 bits")
    }
    few = [found.ratio("int8", "MatShift, 8 bits") for found in shifts.values()]
    forward = [found.ratio("float32", "MatAdd") for found in adds.values()]
    backward = [found.ratio("float32, transposed", "MatAdd, transposed") for found in adds.values()]
    whole = models.ratio("float32", "additions and packed shifts")
    mixed = models.ratio("float32", "additions and packed mixtures")
    faster = max(whole, mixed)
    resident = size["packed"] / size["float32"]
    one = "one thread, float inputs and outputs, packed weights unpacked in every call"
    claims = [
        _speed("Shifts are faster than the float product they stand for.",
               f"MatShift at {len(MAT_SHIFT)} sizes, {one}", "torch's float32 linear layer (MKL)", against["float32"]),
        _speed("Shifts are faster than powers of two multiplied by torch.", f"the same, {one}",
               "2^P sign, then torch's linear layer, in every call", against["fake shift"]),
        _speed("(ours) Shifts are faster than int8.", f"the same, {one}",
               "torch's dynamic int8 linear layer (x86 engine)", against["int8"]),
        _speed("(ours) Shifts are faster than the float product of the same compiler.", f"the same, {one}",
               "the same loops on the same vectors, with float32 products", against["numba float32"]),
        _speed("(ours) Shifts of numbers as coarse as int8's are faster than int8.",
               f"MatShift with {FEW} bits behind the point, added in 16, {one}",
               "torch's dynamic int8 linear layer (x86 engine)", few),
        _speed("Masked additions are faster than the float product.",
               f"MatAdd b(q) (KV) at {len(MAT_ADD)} sizes, one thread, codes packed before",
               "torch.matmul, float32 (MKL)", forward),
        _speed("Masked additions are faster than the float product, transposed.",
               f"MatAdd b(k)^T v at {len(MAT_ADD)} sizes, one thread, codes packed before",
               "torch.matmul, float32 (MKL)", backward),
        Claim(
            "Attention of additions is linear in the tokens.",
            "both products of one head of 32, packed, 784 and 3,136 tokens, one thread",
            f"the quadratic order: x{growth['quadratic']:.1f}; fused softmax: x{growth['fused softmax']:.1f}",
            "x4, against x16",
            f"x{growth['linear']:.1f}",
            verdict(growth["linear"] <= 5 and growth["quadratic"] > 8, growth["linear"] <= 5),
        ),
        Claim(
            f"Inference is up to {FASTER} times as fast.",
            "PVTv2-B0 at 224 pixels, one picture, one thread, on this CPU; the paper's figure is a GPU's, none is here",
            "the model as it is, float32",
            f"x{FASTER}",
            f"packed shifts: x{whole:.2f}; packed mixtures: x{mixed:.2f}",
            verdict(faster >= FASTER, faster > 1),
            "" if faster >= FASTER else "One vector instruction of this CPU multiplies and "
            "adds, and an addition alone takes it as long: nothing is gained by leaving products out. No GPU was "
            "measured.",
        ),
        Claim(
            "Weights of shifts stay in memory at 5 bits.",
            "linear layers of PVTv2-B0 that shift, while the model runs",
            "float32",
            "5/32 = 0.156",
            f"x{resident:.4f}",
            verdict(resident <= 0.17),
        ),
    ]  # fmt: skip
    columns = ("Tokens x inputs x outputs", "MatShift, us", *(f"{name}, us" for name in against))
    rows = [
        (" x ".join(map(str, each)), *(1e6 * found[name] for name in ("MatShift", *against)))
        for each, found in shifts.items()
    ]
    names = ("MatAdd", "float32", "MatAdd, transposed", "float32, transposed", "packing")
    added = [
        (" x ".join(map(str, each)), *(1e6 * found[name] for name in names)) for each, found in adds.items()
    ]  # fmt: skip
    return claims, [
        Table("MatShift on one thread, medians", columns, rows),
        Table("MatAdd on one thread, medians", ("Heads x tokens x code x value", *(f"{n}, us" for n in names)), added),
        Table("Products of attention, medians", ("Order and tokens", "us"),
              [(name, 1e6 * sequences[name]) for name in sequences.seconds]),
        Table("PVTv2-B0, one picture of 224 pixels, medians", ("Model", "ms"),
              [(name, 1e3 * models[name]) for name in models.seconds]),
    ]  # fmt: skip


def _speed(statement: str, setting: str, baseline: str, ratios: Sequence[float]) -> Claim:
    """Ratios of the baseline's time to ours, one a size: above 1 ours is faster."""
    return Claim(
        statement, setting, baseline, "faster (on a GPU)",
        f"x{statistics.median(ratios):.2f} (median of sizes; {min(ratios):.2f} to {max(ratios):.2f})",
        verdict(all(ratio > 1 for ratio in ratios), any(ratio > 1 for ratio in ratios)),
        "" if all(ratio > 1 for ratio in ratios) else
        f"Slower at {sum(ratio <= 1 for ratio in ratios)} of {len(ratios)} sizes.",
    )  # fmt: skip
