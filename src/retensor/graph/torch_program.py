"""Runs the operators of an exported PyTorch program one at a time, on nothing but the bytes of their storages.

A storage arrives as flat ``uint8`` bytes; :class:`Layout` says which element type, shape and strides eager
execution gives it. An operator runs the nodes it stands for, recomputing the views in between from the storages
(views cost no bytes, so the plan does not know them), and its results leave as dense bytes in their planned
strides. :meth:`TorchProgram.run_plain` runs the exported module the ordinary way, as what to compare with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retensor.errors import GraphError
from retensor.graph.structure import Bytes, Operator

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Node


@dataclass(frozen=True)
class Layout:
    """How a value lies in the storage that holds it.

    Attributes
    ----------
    storage : str
        Name of the tensor (in the graph's sense) whose bytes hold it.
    dtype : torch.dtype
    shape, strides : tuple of int
        In elements.
    offset : int
        Of the first element, in elements.
    """

    storage: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class Wiring:
    """What the loader found out about a program, by node name.

    Attributes
    ----------
    held : mapping of str to Layout
        Placeholders and constants: where each lies.
    made : mapping of str to tuple
        Operator nodes: layout of each result, None for results that nobody reads; ``single`` says whether
        the node returns one tensor rather than a sequence.
    single : frozenset of str
    host : mapping of str to object
        Nodes whose result is a Python value, not a tensor.
    inputs : tuple
        Each flat argument of the module: the layout of a tensor, or ``(value,)`` for a constant.
    outputs : tuple
        Each flat result of the module: its layout in its storage, or None for a constant.
    parameters : mapping of str to torch.Tensor
        Flat elements, in storage order, of each parameter tensor.
    """

    held: Mapping[str, Layout]
    made: Mapping[str, tuple[Layout | None, ...]]
    single: frozenset[str]
    host: Mapping[str, Any]
    inputs: tuple[Layout | tuple[Any], ...]
    outputs: tuple[Layout | None, ...]
    parameters: Mapping[str, torch.Tensor]


class TorchProgram:
    """The :class:`~retensor.graph.structure.Program` of an exported PyTorch module.

    Parameters
    ----------
    exported : torch.export.ExportedProgram
        As exported; what :meth:`run_plain` runs.
    functional : torch.export.ExportedProgram
        The same without mutation; its nodes are the graph's operators and views.
    wiring : Wiring

    Notes
    -----
    Parameters are shared with the module that was exported, not copied.
    """

    def __init__(self, exported: ExportedProgram, functional: ExportedProgram, wiring: Wiring) -> None:
        self._exported = exported
        self._wiring = wiring
        self._nodes: dict[str, Node] = {node.name: node for node in functional.graph.nodes}
        self._functional = functional
        self._measured = False
        self._index()

    def _index(self) -> None:
        """Find layouts and producers by tensor name."""
        self._layouts: dict[str, Layout] = {}
        self._source: dict[str, tuple[str, int]] = {}
        for layout in self._wiring.inputs:
            if isinstance(layout, Layout):
                self._layouts.setdefault(layout.storage, layout)
        for node, layouts in self._wiring.made.items():
            for index, made in enumerate(layouts):
                if made is not None:
                    self._layouts[made.storage] = made
                    self._source[made.storage] = (node, index)

    def _measure(self) -> None:
        """Before the first run, replace the strides that fake tensors foretold by those of real execution.

        Fake kernels sometimes choose another memory format than the real ones do, and another format is another
        order of summation. One plain run tells; data do not matter. Where the real strides do not suit a view
        that the program was exported with, or it does not run on random inputs, the foretold ones stay.
        """
        if self._measured:
            return
        self._measured = True
        with contextlib.suppress(RuntimeError, IndexError):
            self._wiring = _measured(self._wiring, list(self._functional.graph.nodes), self.example_inputs(0))
            self._index()

    @property
    def exported(self) -> ExportedProgram:
        """The exported program, as :meth:`run_plain` runs it."""
        return self._exported

    def example_inputs(self, seed: int) -> dict[str, Bytes]:
        """Random inputs: normal floats, and integers 0 or 1, which every embedding accepts."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        examples: dict[str, Bytes] = {}
        for layout in self._wiring.inputs:
            if not isinstance(layout, Layout):
                continue
            if layout.dtype.is_floating_point or layout.dtype.is_complex:
                wide = torch.complex64 if layout.dtype.is_complex else torch.float32
                value = torch.randn(layout.shape, generator=generator, dtype=wide)
            else:
                value = torch.randint(0, 2, layout.shape, generator=generator)
            examples[layout.storage] = _dense_bytes(value.to(layout.dtype), layout)
        return examples

    def parameter(self, name: str) -> Bytes:
        """Bytes of a parameter tensor, in the order they have in memory."""
        elements = self._wiring.parameters.get(name)
        if elements is None:
            raise GraphError(f"the program has no parameter '{name}'")
        return _as_bytes(elements.clone())

    def run_operator(
        self, operator: Operator, storages: Mapping[str, Bytes], keep_parameters: bool
    ) -> dict[str, Bytes]:
        """Run the nodes of one operator, in order, on its input storages.

        Raises
        ------
        GraphError
            Where the operator is not of this program, a storage it reads is missing or has the wrong size,
            or a result has another shape than the graph says.
        """
        import torch

        self._measure()
        run = _Run(self._wiring, storages, keep_parameters)
        with torch.no_grad():
            for name in operator.nodes or (operator.name,):
                node = self._nodes.get(name)
                if node is None or name not in self._wiring.made:
                    raise GraphError(f"operator '{operator.name}' stands for node '{name}', which is not an operator")
                run.settle(node, run.evaluate(node))
            results: dict[str, Bytes] = {}
            for name in operator.outputs:
                source = self._source.get(name)
                if source is None or source[0] not in run.values:
                    raise GraphError(f"operator '{operator.name}' does not make tensor '{name}'")
                value = run.values[source[0]]
                value = value if source[0] in self._wiring.single else value[source[1]]
                results[name] = _dense_bytes(value, self._layouts[name])
        return results

    def run_plain(self, inputs: Mapping[str, Bytes]) -> dict[str, Bytes]:
        """Run the exported module plainly; bytes of the storages that hold its outputs.

        Where an output is a view of part of its storage, the rest of the storage's bytes comes from running the
        functional program from start to end.
        """
        import torch
        from torch.utils import _pytree as pytree

        self._measure()
        flat: list[Any] = []
        for given in self._wiring.inputs:
            if not isinstance(given, Layout):
                flat.append(given[0])
            elif given.storage in inputs:
                flat.append(_value(_own(inputs[given.storage], given.storage), given).clone())
            else:
                # An input that no operator reads is not in the graph; any value will do.
                flat.append(torch.zeros(given.shape, dtype=given.dtype))
        args, kwargs = pytree.tree_unflatten(flat, self._exported.call_spec.in_spec)
        with torch.no_grad():
            produced = pytree.tree_leaves(self._exported.module()(*args, **kwargs))
        results: dict[str, torch.Tensor] = {}
        for value, layout in zip(produced, self._wiring.outputs, strict=True):
            if layout is None:
                continue
            if layout.storage not in results:
                results[layout.storage] = self._whole(layout, inputs)
            _write(value, results[layout.storage], layout)
        return {name: _as_bytes(elements) for name, elements in results.items()}

    @property
    def outputs(self) -> tuple[str, ...]:
        """A name for each tensor that the module returns, flat and in order: ``output0``, ``output1``, ..."""
        return tuple(f"output{i}" for i, layout in enumerate(self._wiring.outputs) if layout is not None)

    def storage_of(self, value: str) -> str:
        """Name of the tensor that holds the bytes of the output ``value``."""
        return self._output(value).storage

    def decode(self, value: str, storage: Bytes) -> npt.NDArray[Any]:
        """The output ``value`` in its shape, from the bytes of its tensor; bfloat16 comes as float32."""
        import torch

        found = _value(_own(storage, value), self._output(value))
        array: npt.NDArray[Any] = (found.float() if found.dtype == torch.bfloat16 else found).clone().numpy()
        return array

    def _output(self, value: str) -> Layout:
        self._measure()
        index = value.removeprefix("output")
        layout = self._wiring.outputs[int(index)] if value in self.outputs else None
        if layout is None:
            raise ValueError(f"the module has no output '{value}'; it has {', '.join(self.outputs)}")
        return layout

    def _whole(self, layout: Layout, inputs: Mapping[str, Bytes]) -> torch.Tensor:
        """Flat bytes of the storage that an output lies in, before the output is written over them."""
        import torch

        name = layout.storage
        if name in inputs:
            return _own(inputs[name], name)
        if name in self._wiring.parameters:
            return _flat(self._wiring.parameters[name].clone())
        base = self._layouts[name]
        if covers(layout, base):
            return torch.zeros(_numel(base.shape) * base.dtype.itemsize, dtype=torch.uint8)
        node, index = self._source[name]
        with torch.no_grad():
            run = _Run(self._wiring, inputs, keep_parameters=True)
            needed = _needed(self._nodes[node])
            for step in self._functional.graph.nodes:
                if step.name in needed and step.name in self._wiring.made:
                    run.settle(step, run.evaluate(step))
        value = run.values[node] if node in self._wiring.single else run.values[node][index]
        return torch.from_numpy(_dense_bytes(value, base))


class _Run:
    """The values of one operator's nodes while it runs; views are recomputed where they are asked for."""

    def __init__(self, wiring: Wiring, storages: Mapping[str, Bytes], keep_parameters: bool) -> None:
        self.wiring = wiring
        self.storages = storages
        self.keep_parameters = keep_parameters
        self.values: dict[str, Any] = {}
        self.owned: dict[str, torch.Tensor] = {}

    def evaluate(self, node: Node) -> Any:
        """Run one node on the values of its arguments."""
        from torch.fx.node import map_arg

        args = map_arg(node.args, self.value)
        kwargs = map_arg(node.kwargs, self.value)
        return node.target(*args, **kwargs)

    def settle(self, node: Node, result: Any) -> None:
        """Keep a result in the strides that the plan gives it, whatever the kernel chose."""
        layouts = self.wiring.made[node.name]
        if node.name in self.wiring.single:
            assert layouts[0] is not None
            self.values[node.name] = _settled(result, layouts[0], node.name)
        else:
            pairs = zip(result, layouts, strict=True)
            self.values[node.name] = [v if lay is None else _settled(v, lay, node.name) for v, lay in pairs]

    def value(self, node: Node) -> Any:
        """The value of any node: already computed, in a storage, a Python value, or a view of one of these."""
        import operator

        name = node.name
        if name in self.values:
            return self.values[name]
        if name in self.wiring.host:
            return self.wiring.host[name]
        if name in self.wiring.held:
            return _value(self.storage(self.wiring.held[name].storage), self.wiring.held[name])
        if name in self.wiring.made:
            layouts = self.wiring.made[name]
            if name in self.wiring.single:
                assert layouts[0] is not None
                return _value(self.storage(layouts[0].storage), layouts[0])
            return [None if lay is None else _value(self.storage(lay.storage), lay) for lay in layouts]
        if node.target is operator.getitem and node.args[0].name in self.wiring.made:
            # One result of an operator: its other results need not be in the scratchpad.
            made, index = node.args
            if made.name not in self.values:
                layout = self.wiring.made[made.name][index]
                assert layout is not None
                return _value(self.storage(layout.storage), layout)
        self.values[name] = self.evaluate(node)
        return self.values[name]

    def storage(self, name: str) -> torch.Tensor:
        """Flat bytes of a storage, copied: aligned as fresh memory is, and safe from whoever owns the arena."""
        if self.keep_parameters and name in self.wiring.parameters:
            return _flat(self.wiring.parameters[name])
        if name not in self.owned:
            if name not in self.storages:
                raise GraphError(f"the operator reads tensor '{name}', which was not given")
            self.owned[name] = _own(self.storages[name], name)
        return self.owned[name]


def _measured(wiring: Wiring, nodes: Sequence[Node], inputs: Mapping[str, Bytes]) -> Wiring:
    """``wiring`` with the strides of one real run, which leaves every result in the strides its kernel chose."""
    import torch

    live = _needed(nodes[-1])
    steps = [node for node in nodes[:-1] if node.name in live and node.op == "call_function"]
    last = {source.name: node.name for node in steps for source in node.all_input_nodes}
    kept = {node.name for node in nodes[-1].all_input_nodes}
    run = _Run(wiring, inputs, keep_parameters=True)
    made: dict[str, tuple[Layout | None, ...]] = {}
    with torch.no_grad():
        for node in steps:
            if node.name in wiring.made:
                single = node.name in wiring.single
                result = run.evaluate(node)
                values: list[Any] = []
                layouts: list[Layout | None] = []
                for value, planned in zip([result] if single else result, wiring.made[node.name], strict=True):
                    layout = None if planned is None else _natural(value, planned)
                    layouts.append(layout)
                    values.append(value if layout is None else _copy(value, layout))
                made[node.name] = tuple(layouts)
                run.values[node.name] = values[0] if single else values
            else:
                run.value(node)
            for source in node.all_input_nodes:
                if last[source.name] == node.name and source.name not in kept:
                    run.values.pop(source.name, None)
        outputs = list(wiring.outputs)
        for index, result in enumerate(nodes[-1].args[0]):
            layout = outputs[index]
            if layout is not None:
                value = run.value(result)
                outputs[index] = replace(layout, strides=tuple(value.stride()), offset=value.storage_offset())
    return replace(wiring, made=made, outputs=tuple(outputs))


def _needed(node: Node) -> set[str]:
    """Names of the nodes that ``node`` depends on, itself among them."""
    needed, stack = {node.name}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source.name not in needed:
                needed.add(source.name)
                stack.append(source)
    return needed


def _natural(value: torch.Tensor, layout: Layout) -> Layout:
    strides = tuple(value.stride())
    return replace(layout, strides=strides if dense(layout.shape, strides) else contiguous_strides(layout.shape))


def dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill a stretch of memory without holes or overlap."""
    expected = 1
    for stride, size in sorted((t, s) for s, t in zip(shape, strides, strict=True) if s != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor laid out row by row."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def elements(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The elements of a parameter's storage, flat and in storage order; shared with ``tensor`` where it can be.

    ``layout`` has the strides of ``tensor``, or is one-dimensional and takes all of its storage.
    """
    import torch

    source = tensor.detach()
    if layout.strides == (1,) and tuple(source.shape) != layout.shape:
        return source.as_strided(layout.shape, (1,), 0)
    if tuple(source.stride()) != layout.strides or source.is_conj() or source.is_neg():
        source = torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype).copy_(source)
    return source.as_strided((source.numel(),), (1,))


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def covers(view: Layout, base: Layout) -> bool:
    """Whether a view reaches every byte of the dense storage ``base``."""
    axes = [(size, stride) for size, stride in zip(view.shape, view.strides, strict=True) if stride != 0]
    whole = _numel([size for size, _ in axes]) * view.dtype.itemsize == _numel(base.shape) * base.dtype.itemsize
    return whole and dense([size for size, _ in axes], [stride for _, stride in axes])


def _own(given: Bytes, name: str) -> torch.Tensor:
    """A copy of flat bytes in torch's own, aligned memory."""
    import torch

    array = np.ascontiguousarray(given).reshape(-1)
    if array.dtype != np.uint8:
        raise GraphError(f"tensor '{name}' was given as {array.dtype}; a storage is uint8 bytes")
    own = torch.empty(array.size, dtype=torch.uint8)
    own.numpy()[:] = array
    return own


def _flat(elements: torch.Tensor) -> torch.Tensor:
    """A dense one-dimensional tensor as bytes."""
    import torch

    return elements.view(torch.uint8)


def _value(storage: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The tensor that ``layout`` describes, over the bytes of its storage."""
    import torch

    size = layout.dtype.itemsize
    last = sum((s - 1) * t for s, t in zip(layout.shape, layout.strides, strict=True))
    needed = 0 if 0 in layout.shape else (layout.offset + last + 1) * size
    if storage.numel() < needed:
        raise GraphError(f"tensor '{layout.storage}' has {storage.numel()} bytes; its layout needs {needed}")
    elements = storage[: storage.numel() // size * size].view(layout.dtype)
    return torch.as_strided(elements, layout.shape, layout.strides, layout.offset)


def _settled(value: torch.Tensor, layout: Layout, where: str) -> torch.Tensor:
    """``value`` in the strides of ``layout``; copied where the kernel chose others."""

    if tuple(value.shape) != layout.shape or value.dtype != layout.dtype:
        raise GraphError(
            f"node '{where}' made {value.dtype} of shape {tuple(value.shape)}; "
            f"the graph says {layout.dtype} of shape {layout.shape}"
        )
    if value.stride() == layout.strides and not value.is_conj() and not value.is_neg():
        return value
    return _copy(value, layout)


def _copy(value: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``value`` in a storage of its own, dense, in the strides of ``layout``."""
    import torch

    return torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype).copy_(value)


def _dense_bytes(value: torch.Tensor, layout: Layout) -> Bytes:
    """A copy of ``value`` as dense bytes in the strides of ``layout``."""
    import torch

    own = _copy(value, layout)
    return _as_bytes(torch.as_strided(own, (own.numel(),), (1,)))


def _as_bytes(elements: torch.Tensor) -> Bytes:
    array: Bytes = _flat(elements).numpy()
    return array


def _write(value: torch.Tensor, storage: torch.Tensor, layout: Layout) -> None:
    """Write ``value`` into the part of a storage that ``layout`` describes."""
    target = _value(storage, layout)
    reach = 0
    for stride, size in sorted((t, s) for s, t in zip(layout.shape, layout.strides, strict=True) if s > 1 and t > 0):
        if stride <= reach:
            # Windows that overlap (`unfold`): the storage holds the functional program's bytes already.
            return
        reach += stride * (size - 1)
    for axis, (size, stride) in enumerate(zip(layout.shape, layout.strides, strict=True)):
        if stride == 0 and size > 1:
            # An expanded axis repeats the same bytes; writing them once is enough, and all torch allows.
            target, value = target.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    target.copy_(value)
