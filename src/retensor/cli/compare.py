"""``retensor compare``: COSMA's plan beside the four baselines of the paper, each placed in two ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from retensor.cli.arguments import (
    Chip,
    ChipAlignment,
    Dtype,
    Fuse,
    InPlace,
    Input,
    Json,
    Model,
    Scratchpad,
    Seed,
    TimeLimit,
    Weights,
    check_time_limit,
    chosen_accelerator,
    load_model,
)
from retensor.cli.output import (
    describe_graph,
    describe_merges,
    exact_bytes,
    graph_counts,
    order_to_json,
    percent,
    print_json,
    print_lines,
    print_table,
)
from retensor.cli.watch import watch

if TYPE_CHECKING:
    from retensor.graph.structure import Graph
    from retensor.planning import Bounds
    from retensor.planning.baselines import Placement, Replacement, Schedule
    from retensor.planning.plan import Accelerator, Plan
    from retensor.planning.progress import Progress


@dataclass(frozen=True)
class Baseline:
    """Which baseline: its schedule, replacement policy and placement of addresses."""

    schedule: Schedule
    replacement: Replacement
    placement: Placement

    @property
    def name(self) -> str:
        """For people: ``MPMF order, greedy, arena``."""
        order = {"default": "model's order", "mpmf": "MPMF order"}[self.schedule]
        policy = {"belady": "Belady", "greedy": "greedy"}[self.replacement]
        return f"{order}, {policy}, {self.placement}"


@dataclass(frozen=True)
class Comparison:
    """The baselines' plans, and the bounds whose schedule half of them follow."""

    plans: Sequence[tuple[Baseline, Plan]]
    bounds: Bounds

    @property
    def named(self) -> list[tuple[str, Plan]]:
        """The plans by the baselines' names."""
        return [(baseline.name, plan) for baseline, plan in self.plans]


def compare(
    model: Model,
    scratchpad: Scratchpad = None,
    chip: Chip = None,
    weights: Weights = False,
    inputs: Input = None,
    dtype: Dtype = None,
    fuse: Fuse = True,
    in_place: InPlace = False,
    alignment: ChipAlignment = None,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Set COSMA beside four baselines, each in two placements: bytes, how much of them COSMA removes, and time.

    The four are two schedules (the model's, and MPMF, the one of least peak memory footprint) by two eviction
    policies (Belady's, which evicts what is used last, and the greedy choice of the fewest bytes). Each is placed
    by a linear allocator twice: all tensors in advance (arena), and each when its step comes (online). Comparing
    takes extra time: MPMF is a search of its own, and all 4 x 2 baselines are run. Without a scratchpad or an
    accelerator it is done at M_R.
    """
    check_time_limit(time_limit)
    from retensor import planning

    accelerator = chosen_accelerator("M_R" if scratchpad is chip is None else scratchpad, chip, alignment)
    assert accelerator is not None
    graph = load_model(model, inputs, dtype, fuse, in_place)
    with watch("planning") as seen:
        accelerator, limits = resolve(
            graph, accelerator, parameters=weights, time_limit=time_limit, seed=seed, progress=seen.progress
        )
        found = planning.plan(
            graph, accelerator, parameters=weights, time_limit=time_limit, seed=seed, progress=seen.progress
        )
    beside = compare_with_baselines(
        graph, accelerator, found, ("arena", "online"), limits=limits, time_limit=time_limit, seed=seed
    )
    if json:
        print_json(
            graph_counts(graph)
            | {
                "status": found.status,
                "scratchpad_bytes": found.scratchpad_bytes,
                "alignment": found.alignment,
                "parameters": found.parameters,
                "compulsory_bytes": found.compulsory_bytes,
                "non_compulsory_bytes": found.non_compulsory_bytes,
                "bound_bytes": found.bound_bytes,
                "gap": found.gap,
                **order_to_json(found),
                "seconds": round(found.seconds, 3),
                "baselines": comparison_to_json(found, beside),
            }
        )
        return
    print_lines(describe_graph(graph), describe_merges(graph), f"scratchpad {exact_bytes(found.scratchpad_bytes)}", "")
    print_comparison(found, beside)


def resolve(
    graph: Graph,
    accelerator: Accelerator,
    *,
    parameters: bool,
    time_limit: float,
    seed: int,
    progress: Callable[[Progress], None] | None,
) -> tuple[Accelerator, Bounds | None]:
    """The accelerator with a size in bytes where its own needs the graph's bounds, and these bounds.

    They are the costly part of a size such as M_H; the MPMF baselines follow their schedule, so they are kept.
    """
    from retensor import planning
    from retensor.units import parse_size

    size = accelerator.scratchpad
    if not isinstance(size, str) or not ("M_P" in size or "M_H" in size):
        return accelerator, None
    limits = planning.bounds(
        graph,
        parameters=parameters,
        alignment=accelerator.alignment,
        time_limit=time_limit,
        seed=seed,
        progress=progress,
    )
    nbytes = parse_size(size, {"M_R": limits.m_r, "M_P": limits.m_p, "M_H": limits.m_h})
    return replace(accelerator, scratchpad=nbytes), limits


def compare_with_baselines(
    graph: Graph,
    accelerator: Accelerator,
    found: Plan,
    placements: Sequence[Placement] = ("arena",),
    *,
    limits: Bounds | None = None,
    time_limit: float,
    seed: int,
) -> Comparison:
    """Run the four baselines at the scratchpad of ``found``; ``limits`` brings the MPMF schedule, else solved once."""
    from retensor import planning

    # The size is resolved already; a relative one would be worked out again for every baseline.
    budget = replace(accelerator, scratchpad=found.scratchpad_bytes)
    with watch("baselines") as seen:
        limits = limits or planning.bounds(
            graph,
            parameters=found.parameters,
            alignment=found.alignment,
            time_limit=time_limit,
            seed=seed,
            progress=seen.progress,
        )
        plans = [
            (
                Baseline(schedule, replacement, placement),
                planning.baseline(
                    graph,
                    budget,
                    schedule=schedule,
                    replacement=replacement,
                    placement=placement,
                    parameters=found.parameters,
                    order=limits.order if schedule == "mpmf" else None,
                ),
            )
            for placement in placements
            for schedule, replacement in planning.BASELINES
        ]
    return Comparison(plans, limits)


def reduction(ours: int, theirs: int) -> float | None:
    """Share of a baseline's bytes that are saved; None where it has none to save."""
    return (theirs - ours) / theirs if theirs else None


def comparison_to_json(found: Plan, beside: Comparison) -> list[dict[str, Any]]:
    """The baselines as objects, in the order of the table."""
    return [
        {
            "name": baseline.name,
            "schedule": baseline.schedule,
            "replacement": baseline.replacement,
            "placement": baseline.placement,
            "compulsory_bytes": other.compulsory_bytes,
            "non_compulsory_bytes": other.non_compulsory_bytes,
            "reduction": reduction(found.non_compulsory_bytes, other.non_compulsory_bytes),
            "seconds": round(other.seconds, 3),
        }
        for baseline, other in beside.plans
    ]


def print_comparison(found: Plan, beside: Comparison) -> None:
    """The table: the plan first, then each baseline and what the plan saves of it."""
    mark = "" if found.status == "optimal" else f" (gap {percent(found.gap)})"
    rows = [(f"COSMA{mark}", f"{found.non_compulsory_bytes:,}", "", f"{found.seconds:.2f} s")]
    for name, other in beside.named:
        saved = reduction(found.non_compulsory_bytes, other.non_compulsory_bytes)
        shown = "nothing to remove" if saved is None else percent(saved)
        rows.append((name, f"{other.non_compulsory_bytes:,}", shown, f"{other.seconds:.2f} s"))
    print_table(("method", "non-compulsory bytes", "removed by COSMA", "time"), rows)
