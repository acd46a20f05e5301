"""The columns and rows of the (tensor x step) program that :mod:`.step_formulation` states and solves.

The symbols are those of its equations: create ``C``, preserve ``P`` (here: kept), spill ``W`` (written), retrieve
``R``, load ``F`` (an input's start), resident ``X``, address ``A``, and ``O`` for which of two tensors lies below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retensor.graph.structure import Graph


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor that some operator touches.

    ``room`` and ``highest`` (the highest address it may have) count units; ``producer`` is -1 for what comes from
    outside; ``spill`` is the bytes that writing it off-chip costs.
    """

    name: str
    size: int
    room: int
    highest: int
    producer: int
    consumers: tuple[int, ...]
    spill: int

    @property
    def users(self) -> tuple[int, ...]:
        return self.consumers if self.producer < 0 else (self.producer, *self.consumers)


class Model:
    """Columns, linear rows, and the two kinds of address rows, for either solver to take."""

    def __init__(self, graph: Graph, scratchpad: int, parameters: bool, alignment: int) -> None:
        self.graph, self.scratchpad, self.parameters, self.alignment = graph, scratchpad, parameters, alignment
        self.n = len(graph.operators)
        self._windows()
        self._items()
        # Columns: bounds, cost, and whether integer (addresses need not be: see _addresses).
        self.upper: list[int] = []
        self.lower: list[int] = []
        self.cost: list[int] = []
        self.is_address: list[bool] = []
        # Linear rows: columns, coefficients, least, most.
        self.rows: list[tuple[list[int], list[int], int | None, int | None]] = []
        self.create: list[dict[int, int]] = []
        self.resident: list[dict[int, int]] = []
        self.kept: list[dict[int, int]] = []
        self._operators()
        self._precedence()
        for item in self.items:
            self._tensor(item)
        self._addresses()

    # -- what the graph alone says --------------------------------------------------------------

    def _windows(self) -> None:
        """The earliest and latest step of each operator."""
        ancestors = [0] * self.n
        self.predecessors: list[set[int]] = [set() for _ in range(self.n)]
        for o, operator in enumerate(self.graph.operators):
            for name in operator.inputs:
                if name in self.graph.producer:
                    maker = self.graph.producer[name]
                    self.predecessors[o].add(maker)
                    ancestors[o] |= ancestors[maker] | 1 << maker
        descendants = [0] * self.n
        for o in range(self.n - 1, -1, -1):
            for p in self.predecessors[o]:
                descendants[p] |= descendants[o] | 1 << o
        self.ancestors = ancestors
        self.earliest = [mask.bit_count() for mask in ancestors]
        self.latest = [self.n - 1 - mask.bit_count() for mask in descendants]

    def _items(self) -> None:
        touched = dict.fromkeys(
            name for operator in self.graph.operators for name in self.graph.operator_tensors(operator, self.parameters)
        )
        sizes = {name: self.graph.tensors[name].nbytes for name in touched}
        units = {name: -(-size // self.alignment) for name, size in sizes.items()}
        # Pushed down until each lies on another or on the bottom, all addresses are sums of rooms.
        self.unit = math.gcd(*units.values()) or 1
        self.items = []
        for name, size in sizes.items():
            role = self.graph.tensors[name].role
            self.items.append(
                Item(
                    name=name,
                    size=size,
                    room=units[name] // self.unit,
                    highest=(self.scratchpad - size) // self.alignment // self.unit,
                    producer=self.graph.producer.get(name, -1),
                    consumers=self.graph.consumers[name],
                    spill=size if role == "activation" and name not in self.graph.outputs else 0,
                )
            )
        self.capacity = -(-self.scratchpad // self.alignment) // self.unit

    # -- columns and rows -----------------------------------------------------------------------

    def _column(self, lower: int, upper: int, cost: int = 0, address: bool = False) -> int:
        self.lower.append(lower)
        self.upper.append(upper)
        self.cost.append(cost)
        self.is_address.append(address)
        return len(self.upper) - 1

    def _binaries(self, steps: Iterable[int], cost: int = 0) -> dict[int, int]:
        return {t: self._column(0, 1, cost) for t in steps}

    def _row(
        self, plus: Iterable[int], minus: Iterable[int] = (), *, least: int | None = None, most: int | None = None
    ) -> None:
        """``least <= sum of plus - sum of minus <= most``."""
        columns = [*plus]
        ones = [1] * len(columns)
        columns += minus
        self.rows.append((columns, ones + [-1] * (len(columns) - len(ones)), least, most))

    def _operators(self) -> None:
        steps: list[list[int]] = [[] for _ in range(self.n)]
        for o in range(self.n):
            self.create.append(self._binaries(range(self.earliest[o], self.latest[o] + 1)))
            self._row(self.create[o].values(), least=1, most=1)
            for t, column in self.create[o].items():
                steps[t].append(column)
        for columns in steps:
            self._row(columns, least=1, most=1)

    def _precedence(self) -> None:
        """No operator before what it reads is created: implied by residency in integers, tighter in the relaxation."""
        for o in range(self.n):
            for p in self.predecessors[o]:
                for t in range(self.earliest[o], min(self.latest[o], self.latest[p]) + 1):
                    before = [column for u, column in self.create[p].items() if u < t]
                    upto = [column for u, column in self.create[o].items() if u <= t]
                    self._row(upto, before, most=0)

    def _tensor(self, item: Item) -> None:
        """Everything but the address of one tensor."""
        if len(item.users) == 1:
            # Resident while its one operator runs and never else.
            self.resident.append(self.create[item.users[0]])
            self.kept.append({})
            return
        reads = min(self.earliest[o] for o in item.consumers)
        last = max(self.latest[o] for o in item.consumers)
        first = reads if item.producer < 0 else self.earliest[item.producer]
        starts = self._binaries(range(reads, last + 1)) if item.producer < 0 else self.create[item.producer]
        resident = self._binaries(range(first, last + 1))
        kept = self._binaries(range(first + 1, last + 1))
        retrieved = self._binaries(range(max(reads, first + 1), last + 1), item.size)
        if item.producer < 0:
            self._row(starts.values(), most=1)
        using: dict[int, list[int]] = {}
        for o in item.consumers:
            for t, column in self.create[o].items():
                using.setdefault(t, []).append(column)
        for t, column in resident.items():
            fresh = [table[t] for table in (kept, retrieved) if t in table]
            begun = [starts[t]] if t in starts else []
            self._row([*fresh, *begun], [column], least=0, most=0)
            if t in kept:
                self._row([kept[t]], [resident[t - 1]], most=0)
            if t in using:
                self._row(using[t], fresh + (begun if item.producer < 0 else []), most=0)
        if item.spill:
            written = self._binaries(range(first + 1, last + 1), item.spill)
            self._row(written.values(), most=1)
            for t, column in written.items():
                self._row([column], [resident[t - 1]], most=0)
            for t, column in retrieved.items():
                self._row([column], [w for u, w in written.items() if u <= t], most=0)
        elif item.producer >= 0:
            # An output is stored as soon as it leaves.
            for t, column in retrieved.items():
                self._row([column], [c for u, c in starts.items() if u < t], most=0)
        self.resident.append(resident)
        self.kept.append(kept)

    def _addresses(self) -> None:
        """Addresses, the capacity of each step, and the rows that only bind where a binary says so.

        For given binaries these rows are differences of addresses against integers, so a basic solution has
        whole addresses: they need not be declared integer.
        """
        self.address: list[dict[int, int]] = []
        present: list[list[int]] = [[] for _ in range(self.n)]
        keeps: list[tuple[int, int, int, int]] = []
        for i, item in enumerate(self.items):
            if item.highest < 0:
                # Larger than the scratchpad.
                for column in self.resident[i].values():
                    self.upper[column] = 0
            here = {}
            if item.room:
                for t in self.resident[i]:
                    here[t] = self._column(0, max(0, item.highest), address=True)
                    present[t].append(i)
                for t, column in self.kept[i].items():
                    keeps.append((here[t], here[t - 1], column, max(0, item.highest)))
            self.address.append(here)
        rooms = np.array([item.room for item in self.items], dtype=np.int64)
        tops = np.array([max(0, item.highest) for item in self.items], dtype=np.int64)
        meet = self._may_meet()
        orders = [np.zeros((0, 9), dtype=np.int64)]
        for t, members in enumerate(present):
            if not members:
                continue
            columns = [self.resident[i][t] for i in members]
            # Tensors of one operator alone share its binary.
            taken: dict[int, int] = {}
            for i, column in zip(members, columns, strict=True):
                taken[column] = taken.get(column, 0) + self.items[i].room
            self.rows.append(([*taken], [*taken.values()], None, self.capacity))
            index = np.array(members, dtype=np.int64)
            low, high = np.triu_indices(len(members), 1)
            chosen = meet[index[low], index[high]]
            low, high = low[chosen], high[chosen]
            a, x = np.array([self.address[i][t] for i in members]), np.array(columns)
            below = np.array([self._column(0, 1) for _ in low], dtype=np.int64)
            one, two = index[low], index[high]
            shape = [rooms[one], rooms[two], tops[one], tops[two]]
            orders.append(np.stack([a[low], a[high], x[low], x[high], below, *shape], axis=1))
        #: rows (A_t, A_before, P, highest)
        self.keeps = np.array(keeps, dtype=np.int64).reshape(-1, 4)
        #: rows (A_i, A_j, X_i, X_j, O_ij, room_i, room_j, highest_i, highest_j)
        self.orders = np.concatenate(orders)
        self.row_count = len(self.rows) + 2 * len(self.keeps) + 2 * len(self.orders)

    def _may_meet(self) -> npt.NDArray[np.bool_]:
        """Which pairs of tensors can be needed at one step: not all users of one before all users of the other."""
        used = [sum(1 << o for o in item.users) for item in self.items]
        before = []
        for item in self.items:
            common = -1
            for o in item.users:
                common &= self.ancestors[o]
            before.append(common)
        alone = [item.users[0] if len(item.users) == 1 else -1 for item in self.items]
        table = np.ones((len(used), len(used)), dtype=bool)
        for i, users in enumerate(used):
            for j in range(len(used)):
                if not users & ~before[j] or (alone[i] >= 0 and alone[j] >= 0 and alone[i] != alone[j]):
                    table[i, j] = table[j, i] = False
        return table
