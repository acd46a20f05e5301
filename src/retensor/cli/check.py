"""``retensor verify`` and ``retensor run``: replay a plan by its rules, and execute the model inside it."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retensor.cli.arguments import Json, Model, PlanFile, Seed, load_again
from retensor.cli.output import exact_bytes, order_to_json, print_error, print_json, print_lines, print_table

if TYPE_CHECKING:
    from retensor.graph.structure import Graph
    from retensor.planning.plan import Plan


def _option(*names: str) -> Any:
    """An option of ``retensor plan`` that is taken here only to say that the plan records it."""
    return typer.Option(*names, hidden=True, callback=_refuse)


def _refuse(parameter: typer.CallbackParam, value: object) -> None:
    if value not in (None, []):
        option = parameter.secondary_opts[0] if value is False and parameter.secondary_opts else parameter.opts[0]
        raise ValueError(f"the plan records how the model was loaded and planned; leave {option} out")


_Inputs = Annotated[list[str] | None, _option("--input")]
_Text = Annotated[str | None, _option()]
_Fuse = Annotated[bool | None, _option("--fuse/--no-fuse")]
_InPlace = Annotated[bool | None, _option("--in-place")]
_Weights = Annotated[bool | None, _option("--weights")]


def verify(
    plan: PlanFile,
    model: Model,
    json: Json = False,
    inputs: _Inputs = None,
    dtype: _Text = None,
    fuse: _Fuse = None,
    in_place: _InPlace = None,
    weights: _Weights = None,
    alignment: _Text = None,
    scratchpad: _Text = None,
    order: _Text = None,
) -> None:
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
            ("bound it claims", f"{found.bound_bytes:,} B ({_claimed(found)}; a replay cannot prove a bound)"),
        ],
        left=2,
    )


def run(
    plan: PlanFile,
    model: Model,
    seed: Seed = 0,
    json: Json = False,
    inputs: _Inputs = None,
    dtype: _Text = None,
    fuse: _Fuse = None,
    in_place: _InPlace = None,
    weights: _Weights = None,
    alignment: _Text = None,
    scratchpad: _Text = None,
    order: _Text = None,
) -> None:
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
                ("brought on-chip", exact_bytes(done.bytes_in)),
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


_NOISE = {
    "float16": 1e-2,
    "bfloat16": 1e-2,
    "float32": 1e-4,
    "complex64": 1e-4,
    "float64": 1e-12,
    "complex128": 1e-12,
}


def _noise(graph: Graph) -> float:
    """Relative difference that another order of the same sums explains, at the graph's element types.

    One operator run alone may sum in another order than in the plain run, where a runtime fuses and tiles as it
    likes. A sum of n terms then differs by some sqrt(n) roundings and a deep network adds up those of its layers:
    for n up to 10^5 and some hundred layers about 10^3 to 10^4 units in the last place. float32 has 6e-8 of them,
    float64 1e-16. The 16-bit types (5e-4 and 4e-3 a rounding) are summed in float32 by every runtime here, so only
    the few roundings where tensors are stored add up. A wrong byte is not noise: poison reads as not-a-number.
    """
    outputs = {str(graph.tensors[name].dtype) for name in graph.outputs}
    if not outputs & _NOISE.keys():
        return 0.0
    # A float64 that was cast from float32 carries float32's noise: the coarsest type on the way counts.
    types = {str(tensor.dtype) for tensor in graph.tensors.values() if tensor.role == "activation"}
    return max(_NOISE.get(name, 0.0) for name in types | outputs)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _load(plan: PlanFile, model: str) -> tuple[Graph, Plan]:
    from retensor.planning import read_plan

    found = read_plan(plan)
    return load_again(model, found), found


def _claimed(found: Plan) -> str:
    return f"{found.status} for the given order" if found.fixed_order else found.status


def _claims(found: Plan) -> dict[str, Any]:
    return order_to_json(found) | {
        "scratchpad_bytes": found.scratchpad_bytes,
        "alignment": found.alignment,
        "parameters": found.parameters,
        "bound_bytes": found.bound_bytes,
        "gap": found.gap,
    }
