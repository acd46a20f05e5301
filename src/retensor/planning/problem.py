"""A graph as the search sees it: integers only, without what no decision touches.

A tensor that one operator alone touches (a parameter, an unused output) is *transient*: it lies in the
scratchpad for that step and never costs traffic, so it only adds to what the operator needs. Every
other tensor is decided on. Sizes are bytes; ``room`` counts the units of the alignment that they take.

The problem falls apart exactly in two ways. Operators that share no tensor are independent: keep one
part's operators of any plan and a plan of that part is left, so parts run one after the other. And at an
operator that is before or after every other one, and whose output is the only tensor that crosses it,
the past and the future meet in that tensor alone; it is resident on both sides of the cut, because the
producer has just made it and whatever runs next must read it. The future then starts from a pseudo
operator that makes the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from retensor.errors import InfeasibleError
from retensor.graph.structure import Graph


def bits(mask: int) -> list[int]:
    """Positions of the ones of a mask.

    >>> bits(0b1101)
    [0, 2, 3]
    """
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def turned(table: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Of each operator's predecessors, each operator's successors; or the other way round.

    >>> turned([(), (0,), (0, 1)])
    ((1, 2), (2,), ())
    """
    found: list[list[int]] = [[] for _ in table]
    for operator, row in enumerate(table):
        for other in row:
            found[other].append(operator)
    return tuple(map(tuple, found))


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor that is decided on.

    ``producer`` is -1 for what comes from outside; ``spill`` is the bytes its first eviction writes
    (0 where the bytes are off-chip anyway: inputs, parameters, and network outputs once stored).
    """

    name: str
    size: int
    room: int
    producer: int
    consumers: tuple[int, ...]
    spill: int

    @property
    def users(self) -> tuple[int, ...]:
        """The producer, if any, and the consumers."""
        return self.consumers if self.producer < 0 else (self.producer, *self.consumers)


@dataclass(frozen=True)
class Problem:
    """Operators ``0..n-1`` in an order that runs, and the tensors to decide on.

    Attributes
    ----------
    operators : tuple of int
        Index of each operator in the graph; -1 for the pseudo operator of a cut.
    items : tuple of Item
    transients : tuple of tuple of (str, int)
        Name and size of each operator's transient tensors.
    need : tuple of int
        Units that all tensors of an operator take together.
    alignment : int
    after : tuple of (int, int)
        Pairs of operators of which the second may be run after the first though it reads nothing of it.
    """

    operators: tuple[int, ...]
    items: tuple[Item, ...]
    transients: tuple[tuple[tuple[str, int], ...], ...]
    need: tuple[int, ...]
    alignment: int
    after: tuple[tuple[int, int], ...] = ()

    @property
    def n(self) -> int:
        """Number of operators."""
        return len(self.operators)

    @cached_property
    def touched(self) -> tuple[tuple[int, ...], ...]:
        """Items that each operator reads or writes."""
        table: list[list[int]] = [[] for _ in range(self.n)]
        for i, item in enumerate(self.items):
            for user in item.users:
                table[user].append(i)
        return tuple(tuple(row) for row in table)

    @cached_property
    def made(self) -> tuple[tuple[int, ...], ...]:
        """Items that each operator makes."""
        return tuple(tuple(i for i in row if self.items[i].producer == o) for o, row in enumerate(self.touched))

    @cached_property
    def read(self) -> tuple[tuple[int, ...], ...]:
        """Items that each operator reads."""
        return tuple(tuple(i for i in row if self.items[i].producer != o) for o, row in enumerate(self.touched))

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """Operators that each operator runs right after, if not after others: whose output it reads, mostly."""
        table: list[set[int]] = [set() for _ in range(self.n)]
        for first, second in self.after:
            table[second].add(first)
        for item in self.items:
            if item.producer >= 0:
                for consumer in item.consumers:
                    table[consumer].add(item.producer)
        return tuple(tuple(sorted(row)) for row in table)

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """Operators that have each operator among their predecessors."""
        return turned(self.predecessors)

    @cached_property
    def ancestors(self) -> tuple[int, ...]:
        """Bit mask of the operators that must run before each one."""
        masks: list[int] = []
        for row in self.predecessors:
            mask = 0
            for predecessor in row:
                mask |= masks[predecessor] | 1 << predecessor
            masks.append(mask)
        return tuple(masks)

    @cached_property
    def descendants(self) -> tuple[int, ...]:
        """Bit mask of the operators that must run after each one."""
        masks = [0] * self.n
        for operator in range(self.n - 1, -1, -1):
            for successor in self.successors[operator]:
                masks[operator] |= masks[successor] | 1 << successor
        return tuple(masks)

    @cached_property
    def is_chain(self) -> bool:
        """Whether only one order runs."""
        return all(b - 1 in self.predecessors[b] for b in range(1, self.n))

    @cached_property
    def shape_key(self) -> tuple[object, ...]:
        """Equal for problems that differ in names only (and list their operators alike)."""
        return (
            self.alignment,
            tuple((i.size, i.producer, i.consumers, i.spill) for i in self.items),
            tuple(tuple(size for _, size in row) for row in self.transients),
            self.after,
        )

    def own(self, operator: int) -> int:
        """Units that an operator's transient tensors take."""
        return sum(-(-size // self.alignment) for _, size in self.transients[operator])


def operator_bytes(graph: Graph, index: int, parameters: bool, alignment: int = 1) -> int:
    """Bytes that one operator needs: its tensors side by side, each aligned, the best one last."""
    sizes = [graph.tensors[name].nbytes for name in graph.operator_tensors(graph.operators[index], parameters)]
    padded = [-(-size // alignment) * alignment for size in sizes]
    slack = max((p - s for p, s in zip(padded, sizes, strict=True)), default=0)
    return sum(padded) - slack


def minimum_required(graph: Graph, parameters: bool, alignment: int = 1) -> tuple[int, str]:
    """``M_R`` and the operator that needs it."""
    needs = [operator_bytes(graph, i, parameters, alignment) for i in range(len(graph.operators))]
    worst = max(range(len(needs)), key=needs.__getitem__)
    return needs[worst], graph.operators[worst].name


def check_feasible(graph: Graph, scratchpad: int, parameters: bool, alignment: int) -> None:
    """Raise :class:`InfeasibleError` where one operator alone does not fit."""
    needed, operator = minimum_required(graph, parameters, alignment)
    if needed > scratchpad:
        raise InfeasibleError(operator, needed, scratchpad)


def build_problem(graph: Graph, parameters: bool, alignment: int) -> Problem:
    """The whole graph as one problem."""
    outputs = set(graph.outputs)
    items: list[Item] = []
    transients: list[list[tuple[str, int]]] = [[] for _ in graph.operators]
    need = [0] * len(graph.operators)
    for name, tensor in graph.tensors.items():
        if tensor.role == "parameter" and not parameters:
            continue
        consumers = graph.consumers[name]
        producer = graph.producer.get(name, -1)
        room = -(-tensor.nbytes // alignment)
        spill = tensor.nbytes if tensor.role == "activation" and name not in outputs else 0
        item = Item(name, tensor.nbytes, room, producer, consumers, spill)
        if len(item.users) == 1:
            transients[item.users[0]].append((name, tensor.nbytes))
        elif item.users:
            items.append(item)
        for user in item.users:
            need[user] += room
    return Problem(
        tuple(range(len(graph.operators))),
        tuple(items),
        tuple(tuple(row) for row in transients),
        tuple(need),
        alignment,
    )


def restrict(problem: Problem, chosen: Sequence[int], entering: int | None = None) -> Problem:
    """The problem of some operators alone; ``entering`` is an item a pseudo operator makes before them."""
    shift = 0 if entering is None else 1
    local = {operator: i + shift for i, operator in enumerate(chosen)}
    operators = [problem.operators[o] for o in chosen]
    transients = [list(problem.transients[o]) for o in chosen]
    need = [problem.need[o] for o in chosen]
    if entering is not None:
        operators.insert(0, -1)
        transients.insert(0, [])
        need.insert(0, problem.items[entering].room)
    members = dict.fromkeys(i for o in chosen for i in problem.touched[o])
    items = []
    for i in members:
        item = problem.items[i]
        consumers = tuple(local[c] for c in item.consumers if c in local)
        producer = 0 if i == entering else local.get(item.producer, -1)
        part = Item(item.name, item.size, item.room, producer, consumers, item.spill)
        if len(part.users) == 1:
            transients[part.users[0]].append((item.name, item.size))
        else:
            items.append(part)
    items.sort(key=lambda part: (part.users, part.size))
    if entering is not None:
        # The pseudo operator stands for the one that made what enters.
        local[problem.items[entering].producer] = 0
    after = tuple(sorted((local[a], local[b]) for a, b in problem.after if a in local and b in local))
    return Problem(tuple(operators), tuple(items), tuple(map(tuple, transients)), tuple(need), problem.alignment, after)


def independent_parts(problem: Problem) -> list[list[int]]:
    """Operators that share no tensor, directly or through others, each part in program order."""
    root = list(range(problem.n))

    def find(operator: int) -> int:
        while root[operator] != operator:
            root[operator] = root[root[operator]]
            operator = root[operator]
        return operator

    for item in problem.items:
        first = find(item.users[0])
        for user in item.users[1:]:
            root[find(user)] = first
    parts: dict[int, list[int]] = {}
    for operator in range(problem.n):
        parts.setdefault(find(operator), []).append(operator)
    return list(parts.values())


@dataclass(frozen=True)
class Part:
    """Some operators of a whole problem, and the problem they are on their own.

    ``entering`` is the whole problem's item that the part before made last, if any: the pseudo operator
    0 of ``problem`` makes it.
    """

    operators: tuple[int, ...]
    entering: int | None
    problem: Problem

    @property
    def shift(self) -> int:
        """Local operator ``i`` is ``operators[i - shift]``."""
        return 0 if self.entering is None else 1


def pinned_operators(problem: Problem) -> list[bool]:
    """Which operators are before or after every other one, and so have the same position in each order that runs.

    All operators listed before *i* are its ancestors if each of them has a successor no later than *i*: follow those
    until *i* is met. Likewise all after *i* are descendants if each has a predecessor no earlier than *i*.
    """
    n = problem.n
    pinned = [True] * n
    latest = -1
    for i in range(n):
        pinned[i] = latest <= i
        latest = max(latest, min(problem.successors[i], default=n))
    earliest = n
    for i in range(n - 1, -1, -1):
        pinned[i] = pinned[i] and earliest >= i
        earliest = min(earliest, max(problem.predecessors[i], default=-1))
    return pinned


def make_part(whole: Problem, operators: Sequence[int], entering: int | None) -> Part:
    """The part of ``whole`` that consists of ``operators``, in program order."""
    if entering is None and len(operators) == whole.n:
        return Part(tuple(operators), None, whole)
    return Part(tuple(operators), entering, restrict(whole, operators, entering))


def split(problem: Problem) -> list[Part]:
    """Parts that can be solved apart, in the order they run; their optima add up to the whole's."""
    return [piece for members in independent_parts(problem) for piece in _split_at_cuts(problem, members)]


def _split_at_cuts(whole: Problem, members: list[int]) -> list[Part]:
    problem = make_part(whole, members, None).problem
    crossing = [0] * problem.n
    for item in problem.items:
        crossing[min(item.users)] += 1
        crossing[max(item.users)] -= 1
    for i in range(1, problem.n):
        crossing[i] += crossing[i - 1]
    index = {item.name: i for i, item in enumerate(whole.items)}
    pinned = pinned_operators(problem)
    pieces: list[Part] = []
    start, entering = 0, None
    for i in range(problem.n - 1):
        if crossing[i] != 1 or not pinned[i]:
            continue
        leaving = next((t for t in problem.touched[i] if max(problem.items[t].users) > i), None)
        if leaving is None:
            # What crosses is not its own: the operator only waits there.
            continue
        pieces.append(make_part(whole, members[start : i + 1], entering))
        start, entering = i + 1, index[problem.items[leaving].name]
    pieces.append(make_part(whole, members[start:], entering))
    return pieces
