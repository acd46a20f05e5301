"""What many plans are made of: a task says what to solve, and how an answer is written, checked and improved.

A task is a graph and the settings that decide its answer, so it can be sent to another process, and its ``key``
names the answer on disk. The time limit is no part of it: a longer search answers the same question better.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from retensor.errors import PlanError
from retensor.graph.structure import Graph
from retensor.planning.assemble import sequence_of
from retensor.planning.bounds import Bounds, bounds
from retensor.planning.exact import plan
from retensor.planning.plan import Accelerator, Plan
from retensor.planning.planfile import plan_from_json, plan_to_json
from retensor.planning.problem import minimum_required
from retensor.planning.progress import ProgressCallback
from retensor.planning.verify import verify

BOUNDS_SCHEMA = "retensor.bounds/1"

_SOURCES = (".py", ".c", ".cc", ".cpp", ".h")

AnswerT = TypeVar("AnswerT")


class Task(Protocol[AnswerT]):
    """Something to solve whose answer can be kept."""

    @property
    def key(self) -> str:
        """32 hexadecimal digits: equal for equal graphs, settings and planners."""

    def solve(self, time_limit: float, workers: int | None, progress: ProgressCallback | None) -> AnswerT:
        """Search for the answer."""

    def proved(self, answer: AnswerT) -> bool:
        """Whether no search can improve it."""

    def join(self, one: AnswerT, other: AnswerT) -> AnswerT:
        """The best of two answers: what was found by one, what was proved by either."""

    def write(self, answer: AnswerT) -> dict[str, Any]:
        """It as plain JSON."""

    def read(self, form: Any) -> AnswerT:
        """The answer in a JSON form, replayed against the graph; :class:`PlanError` where it is none of this task's."""


@dataclass(frozen=True)
class PlanTask:
    """The plan of one graph in one scratchpad."""

    graph: Graph
    scratchpad_bytes: int
    alignment: int = 1
    parameters: bool = False
    order: Literal["default"] | None = None
    seed: int = 0

    @functools.cached_property
    def key(self) -> str:
        """32 hexadecimal digits: equal for equal graphs, settings and planners."""
        settings = [self.scratchpad_bytes, self.alignment, self.parameters, self._fixed, self.seed]
        return _key("plan", self.graph, settings)

    @property
    def _fixed(self) -> tuple[str, ...] | None:
        return None if self.order is None else tuple(operator.name for operator in self.graph.operators)

    def solve(self, time_limit: float, workers: int | None, progress: ProgressCallback | None) -> Plan:
        """Search for the plan."""
        return plan(
            self.graph,
            Accelerator(scratchpad=self.scratchpad_bytes, alignment=self.alignment),
            parameters=self.parameters,
            order=self.order,
            time_limit=time_limit,
            seed=self.seed,
            workers=workers,
            progress=progress,
        )

    def proved(self, answer: Plan) -> bool:
        """Whether the plan is optimal."""
        return answer.status == "optimal"

    def join(self, one: Plan, other: Plan) -> Plan:
        """The plan of less traffic, with the higher bound."""
        # A total order that the bound has no part in: plans joined in any order give the same plan.
        first, second = sorted(
            (one, other),
            key=lambda p: (p.non_compulsory_bytes, p.seconds, json.dumps(plan_to_json(replace(p, bound_bytes=0)))),
        )
        # A bound above the traffic of a plan that was replayed is a mistake of whoever claimed it.
        possible = second.bound_bytes <= first.non_compulsory_bytes
        return replace(first, bound_bytes=max(first.bound_bytes, second.bound_bytes)) if possible else first

    def write(self, answer: Plan) -> dict[str, Any]:
        """The plan as its file holds it."""
        return plan_to_json(answer)

    def read(self, form: Any) -> Plan:
        """The plan in a file's object, replayed.

        Raises
        ------
        PlanError
            Where it is no plan of this graph and these settings, or breaks a rule.
        """
        found = plan_from_json(form)
        asked = (self.scratchpad_bytes, self.alignment, self.parameters, self.order is not None)
        if (found.scratchpad_bytes, found.alignment, found.parameters, found.fixed_order) != asked:
            raise PlanError("the plan was made with other settings")
        if self._fixed is not None and found.order != self._fixed:
            raise PlanError("the plan has another order than the one given")
        verify(self.graph, found)
        # Another file of the same graph may have asked first, under another name.
        return replace(found, graph_name=self.graph.name, graph_options=dict(self.graph.options))


@dataclass(frozen=True)
class BoundsTask:
    """``M_R``, ``M_P`` and ``M_H`` of one graph."""

    graph: Graph
    alignment: int = 1
    parameters: bool = False
    seed: int = 0

    @functools.cached_property
    def key(self) -> str:
        """32 hexadecimal digits: equal for equal graphs, settings and planners."""
        return _key("bounds", self.graph, [self.alignment, self.parameters, self.seed])

    def solve(self, time_limit: float, workers: int | None, progress: ProgressCallback | None) -> Bounds:
        """Search for the schedule of least peak."""
        return bounds(
            self.graph,
            parameters=self.parameters,
            alignment=self.alignment,
            time_limit=time_limit,
            seed=self.seed,
            workers=workers,
            progress=progress,
        )

    def proved(self, answer: Bounds) -> bool:
        """Whether ``M_P`` is the minimum."""
        return answer.m_p <= answer.m_p_bound

    def join(self, one: Bounds, other: Bounds) -> Bounds:
        """The schedule of less peak, with the higher bound."""
        first, second = sorted((one, other), key=lambda b: (b.m_p, b.seconds, b.order))
        possible = second.m_p_bound <= first.m_p
        return replace(first, m_p_bound=max(first.m_p_bound, second.m_p_bound)) if possible else first

    def write(self, answer: Bounds) -> dict[str, Any]:
        """The bounds as plain JSON."""
        return {"schema": BOUNDS_SCHEMA, "graph": self.graph.digest, "alignment": self.alignment} | asdict(answer)

    def read(self, form: Any) -> Bounds:
        """The bounds in a JSON form; the schedule's peak is counted again.

        Raises
        ------
        PlanError
            Where they are none of this graph and these settings, or not what the schedule says.
        """
        if not isinstance(form, dict) or form.get("schema") != BOUNDS_SCHEMA:
            raise PlanError(f'these are no bounds of schema "{BOUNDS_SCHEMA}"')
        if (form.get("graph"), form.get("alignment")) != (self.graph.digest, self.alignment):
            raise PlanError("the bounds are another graph's, or were made with another alignment")
        order, proved, seconds = form.get("order"), form.get("m_p_bound"), form.get("seconds")
        if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
            raise PlanError("the schedule of the bounds is no list of names")
        if type(proved) is not int or not isinstance(seconds, int | float):
            raise PlanError("the bounds hold something that is no number")
        m_r, operator = minimum_required(self.graph, self.parameters, self.alignment)
        m_p = max(m_r, peak_bytes(self.graph, order, self.parameters, self.alignment))
        found = Bounds(m_r, operator, m_p, proved, (m_r + m_p) // 2, tuple(order), self.parameters, float(seconds))
        if self.write(found) != form | {"order": tuple(order)} or not m_r <= proved <= m_p:
            raise PlanError("the bounds are not those of their own schedule")
        return found


def peak_bytes(graph: Graph, order: Sequence[str], parameters: bool, alignment: int = 1) -> int:
    """Most bytes alive at once when operators run in ``order`` and nothing is evicted; tensors are padded.

    Raises
    ------
    PlanError
        Where ``order`` is not one that runs.
    """
    sequence = sequence_of(graph, order)
    step_of = {operator: step for step, operator in enumerate(sequence)}
    change = [0] * (len(sequence) + 1)
    for name, tensor in graph.tensors.items():
        users = [step_of[user] for user in graph.consumers[name]]
        if name in graph.producer:
            users.append(step_of[graph.producer[name]])
        if users and (parameters or tensor.role != "parameter"):
            padded = -(-tensor.nbytes // alignment) * alignment
            change[min(users)] += padded
            change[max(users) + 1] -= padded
    alive = peak = 0
    for step in change:
        alive += step
        peak = max(peak, alive)
    return peak


def _key(kind: str, graph: Graph, settings: list[Any]) -> str:
    form = json.dumps([kind, _planner(), graph.digest, settings], separators=(",", ":"))
    return hashlib.sha256(form.encode()).hexdigest()[:32]


@functools.cache
def _planner() -> str:
    """Changes whenever the code that plans does: an answer of another planner may be worse, or wrong."""
    digest = hashlib.sha256(importlib.metadata.version("retensor").encode())
    folder = Path(__file__).parent
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES):
        data = path.read_bytes()
        digest.update(f"\n{path.relative_to(folder).as_posix()} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()
