"""``retensor verify`` and ``retensor run``: replay a plan by its rules, and execute the model inside it."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from retensor.cli.arguments import Json, Model, PlanFile, Seed, load_again
from retensor.cli.output import exact_bytes, print_error, print_json, print_lines, print_table

if TYPE_CHECKING:
    from retensor.graph.structure import Graph
    from retensor.planning.plan import Plan


def verify(plan: PlanFile, model: Model, json: Json = False) -> None:
    """Replay a plan step by step, recount its bytes, and name the first violation if there is one.

    The model is loaded with the options recorded in the plan. A plan that breaks a rule exits with code 2.
    """
    graph, found = _load(plan, model)
    from retensor.planning import verify as replay

    counted = replay(graph, found)
    if json:
        print_json({"status": "valid", "graph": graph.name} | _claims(found) | asdict(counted))
        return
    print_lines(f"valid: {plan} replayed on {graph.name} in {counted.steps:,} steps")
    print_table(
        ("recounted", ""),
        [
            ("peak address", f"{counted.peak_bytes:,} of {found.scratchpad_bytes:,} B"),
            ("non-compulsory", exact_bytes(counted.non_compulsory_bytes)),
            ("compulsory", exact_bytes(counted.compulsory_bytes)),
            ("bound it claims", f"{found.bound_bytes:,} B ({found.status}; a replay cannot prove a bound)"),
        ],
        left=2,
    )


def run(plan: PlanFile, model: Model, seed: Seed = 0, json: Json = False) -> None:
    """Execute the model inside one arena of the plan's scratchpad and compare with the plain run.

    The inputs are random, made from the seed. Bytes that the plan frees are poisoned. Outputs that differ by
    more than the arithmetic's own noise exit with code 2.
    """
    graph, found = _load(plan, model)
    from retensor.planning import execute

    done = execute(graph, found, seed=seed)
    relative = done.max_relative_difference or 0.0
    allowed = _noise(graph)
    same = bool(done.bit_equal) or relative <= allowed
    if json:
        print_json(
            {
                "status": "equal" if done.bit_equal else "within noise" if same else "different",
                "graph": graph.name,
                "seed": seed,
                "bit_equal": done.bit_equal,
                "max_abs_difference": _finite(done.max_abs_difference),
                "max_relative_difference": _finite(done.max_relative_difference),
                "allowed_relative_difference": allowed,
                "bytes_in": done.bytes_in,
                "bytes_out": done.bytes_out,
                "peak_bytes": done.peak_bytes,
                "arena_bytes": done.arena_bytes,
                "seconds": round(done.seconds, 3),
            }
        )
    else:
        outcome = "equal in every bit" if done.bit_equal else f"largest difference {relative:.3g} of the largest value"
        print_lines(f"ran {graph.name} by {plan} in an arena of {exact_bytes(done.arena_bytes)}")
        print_table(
            ("run", ""),
            [
                ("outputs", f"{len(graph.outputs)} compared with the plain run: {outcome}"),
                ("peak address", f"{done.peak_bytes:,} B"),
                ("read on-chip", exact_bytes(done.bytes_in)),
                ("written off-chip", exact_bytes(done.bytes_out)),
                ("time", f"{done.seconds:.2f} s, one operator at a time"),
            ],
            left=2,
        )
    if not same:
        print_error(
            f"the planned run's outputs differ from the plain run's by {relative:.3g} of the largest value, "
            f"{allowed:g} is allowed; please report the model and the plan"
        )
        raise typer.Exit(2)


def _noise(graph: Graph) -> float:
    """Relative difference that another order of the same sums explains, at the outputs' element types."""
    types = {str(graph.tensors[name].dtype) for name in graph.outputs}
    if types & {"float16", "bfloat16"}:
        return 1e-2
    return 1e-4 if types & {"float32", "float64", "complex64", "complex128"} else 0.0


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _load(plan: PlanFile, model: str) -> tuple[Graph, Plan]:
    from retensor.planning import read_plan

    found = read_plan(plan)
    return load_again(model, found.graph_options), found


def _claims(found: Plan) -> dict[str, Any]:
    return {
        "scratchpad_bytes": found.scratchpad_bytes,
        "alignment": found.alignment,
        "parameters": found.parameters,
        "bound_bytes": found.bound_bytes,
        "gap": found.gap,
    }
