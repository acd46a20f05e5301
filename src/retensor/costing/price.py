"""The cost of a model: its graph's arithmetic and bytes, and the traffic of its best plan on an accelerator."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import numpy as np

from retensor.costing.sheet import CostSheet
from retensor.files import described
from retensor.graph.load import load
from retensor.graph.merge import short_kind
from retensor.graph.structure import Graph, Tensor
from retensor.planning.accelerators import accelerator_named
from retensor.planning.bounds import bounds
from retensor.planning.exact import plan
from retensor.planning.peak import peak_of
from retensor.planning.plan import Accelerator
from retensor.planning.problem import build_problem, minimum_required
from retensor.planning.progress import ProgressCallback
from retensor.units import check_flags, parse_size

if TYPE_CHECKING:
    import torch


def cost(
    model: Any,
    inputs: Any = None,
    accelerator: Accelerator | str | int | None = None,
    *,
    name: str | None = None,
    parameters: bool = False,
    dtype: str | None = None,
    fuse: bool = True,
    in_place: bool = False,
    alignment: int | None = None,
    time_limit: float = 10.0,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> CostSheet:
    """The cost sheet of a model: parameters, bytes, multiply-accumulates, peaks, and traffic on an accelerator.

    Parameters
    ----------
    model : torch.nn.Module, Graph, torch.export.ExportedProgram, str or path
        A module is exported in eval mode and comes out as it went in. Text and paths are what
        :func:`retensor.graph.load` takes.
    inputs : optional
        Of a module: an example tensor, a sequence of arguments, a mapping of keyword arguments, a mapping of names to
        shapes, or the shape of its one input, such as ``(1, 3, 224, 224)``. Of a file or a name: a mapping of names to
        shapes. A graph and an exported program have inputs of their own.
    accelerator : Accelerator, str or int, optional
        Also a preset's name (:data:`retensor.planning.PRESETS`) or a size (``"2MiB"``, ``"M_R"``). Without one there
        is no traffic on the sheet.
    name : str, optional
        What to call the model; its own name by default.
    parameters : bool
        Whether parameters lie in the scratchpad too. If not, every operator reads its own past it.
    dtype : str, optional
        Count floating-point elements at this type (``"int8"``, ``"float16"``); the model's own by default.
    fuse, in_place : bool
        Which operators to merge; see :func:`retensor.graph.merge.merge`. A graph is taken as it is.
    alignment : int, optional
        Every address is a multiple of it; the accelerator's by default, else 1.
    time_limit : float
        Seconds for the bounds, and again for the plan.
    seed : int
        Of the search's random choices.
    progress : callable, optional
        Called with a :class:`~retensor.planning.progress.Progress` now and then.

    Returns
    -------
    CostSheet
        Where a scratchpad is too small for one operator, its ``status`` says so and it has no traffic.

    Raises
    ------
    GraphError
        Where the model cannot be read or exported.
    TypeError, ValueError
        Where an argument does not fit the model.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> sheet = cost(net, (1, 3, 10, 10), "M_R")
    >>> sheet.parameters, sheet.macs, sheet.parameter_bytes
    (240, 13824, 1032)
    >>> sheet.compulsory_bytes, sheet.streamed_bytes, sheet.non_compulsory_bytes
    (3248, 1024, 0)
    """
    check_flags(parameters=parameters, fuse=fuse, in_place=in_place)
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name is text, not {described(name)}")
    chip = None if accelerator is None else accelerator_named(accelerator)
    if alignment is not None:
        chip = None if chip is None else replace(chip, alignment=alignment)
    elif chip is not None:
        alignment = chip.alignment
    unit = 1 if alignment is None else alignment
    state: tuple[int, int] | None = None
    if _is_module(model):
        graph = _exported(model, inputs, dtype, fuse, in_place)
        state = _state_of(model, dtype)
    else:
        graph = _loaded(model, inputs, dtype, fuse, in_place)
    weights = [tensor for tensor in graph.tensors.values() if tensor.role == "parameter"]
    count, nbytes = state or (_elements(weights), sum(tensor.nbytes for tensor in weights))
    limits = bounds(graph, parameters=parameters, alignment=unit, time_limit=time_limit, seed=seed, progress=progress)
    counted = [operator.macs for operator in graph.operators if operator.macs is not None]
    sheet = CostSheet(
        name=name or graph.name,
        operators=len(graph.operators),
        parameters=count,
        parameter_bytes=nbytes,
        macs=sum(counted) if counted else None,
        activation_peak_bytes=_peak(graph, unit),
        m_r_bytes=limits.m_r,
        m_p_bytes=limits.m_p,
        m_p_bound_bytes=limits.m_p_bound,
        m_r_operator=limits.m_r_operator,
        macs_by_kind=_by_kind(graph),
        uncounted=dict(Counter(_first(o.kind) for o in graph.operators if o.macs is None).most_common()),
        dtype=graph.options.get("dtype"),
        parameters_resident=parameters,
    )
    if chip is None:
        return sheet
    size = parse_size(chip.scratchpad, {"M_R": limits.m_r, "M_P": limits.m_p, "M_H": limits.m_h})
    chip = replace(chip, scratchpad=size)
    sheet = replace(sheet, accelerator=chip)
    if size < limits.m_r:
        return sheet
    found = plan(graph, chip, parameters=parameters, time_limit=time_limit, seed=seed, progress=progress)
    return replace(
        sheet,
        compulsory_bytes=found.compulsory_bytes,
        streamed_bytes=0 if parameters else _streamed(graph),
        non_compulsory_bytes=found.non_compulsory_bytes,
        bound_bytes=found.bound_bytes,
    )


def _is_module(model: Any) -> bool:
    """Whether it is an ``nn.Module``; none can be where torch was never imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _exported(module: torch.nn.Module, inputs: Any, dtype: str | None, fuse: bool, in_place: bool) -> Graph:
    from retensor.graph.torch import load_torch

    shapes: Mapping[str, Sequence[int]] | None = None
    if isinstance(inputs, Mapping) and inputs and all(_is_shape(value) for value in inputs.values()):
        shapes, inputs = inputs, None
    elif _is_shape(inputs):
        shapes, inputs = {"x": inputs}, None
    elif isinstance(inputs, int | float):
        raise TypeError(f"inputs are tensors, or shapes such as (1, 3, 224, 224), not {described(inputs)}")
    if shapes is not None:  # NumPy's integers are none to torch
        shapes = {key: [int(size) for size in shape] for key, shape in shapes.items()}
    return load_torch(module, example_inputs=inputs, inputs=shapes, dtype=dtype, fuse=fuse, in_place=in_place)


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, (str, bytes))
        and len(value) > 0
        and all(isinstance(size, int | np.integer) and not isinstance(size, bool) for size in value)
    )


def _loaded(model: Any, inputs: Any, dtype: str | None, fuse: bool, in_place: bool) -> Graph:
    if isinstance(model, Graph):
        if inputs is not None or dtype is not None:
            raise ValueError("a graph has its inputs and element types already; give them where it is loaded")
        return model
    if inputs is not None and not (isinstance(inputs, Mapping) and all(_is_shape(value) for value in inputs.values())):
        raise TypeError("inputs of a file or a name are a mapping of names to shapes, as in {'x': (1, 3, 224, 224)}")
    if not isinstance(model, (str, os.PathLike)) and "torch" not in sys.modules:
        raise TypeError(f"a cost is worked out for a file, a name, a Graph or an nn.Module, not {type(model).__name__}")
    return load(model, inputs=inputs, dtype=dtype, fuse=fuse, in_place=in_place)


def _state_of(module: torch.nn.Module, dtype: str | None) -> tuple[int, int]:
    """Elements of a module's parameters, and bytes of its parameters and buffers; what shares memory counts once."""
    from retensor.graph.torch import BITS

    def once(tensors: Any) -> dict[Any, torch.Tensor]:
        return {(t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), tuple(t.stride())): t for t in tensors}

    def nbytes(tensor: torch.Tensor) -> int:
        count: int = prod(tensor.shape)
        if dtype is not None and tensor.dtype.is_floating_point:
            return ceil(count * BITS[dtype] / 8)
        return count * int(tensor.element_size())

    learned = once(module.parameters())
    every = once([*module.parameters(), *module.buffers()])
    return sum(prod(t.shape) for t in learned.values()), sum(nbytes(t) for t in every.values())


def _elements(weights: Sequence[Tensor]) -> int | None:
    """Elements of a graph's parameters without buffers; None where a shape is not told."""
    shapes = [tensor.shape for tensor in weights if not tensor.buffer]
    return None if any(shape is None for shape in shapes) else sum(prod(shape or ()) for shape in shapes)


def _by_kind(graph: Graph) -> dict[str, int]:
    found: Counter[str] = Counter()
    for operator in graph.operators:
        found[_first(operator.kind)] += operator.macs or 0
    return {kind: macs for kind, macs in found.most_common() if macs}


def _first(kind: str) -> str:
    """Of a merged operator the first part, which alone has products to add up."""
    return short_kind(kind.split("+")[0])


def _peak(graph: Graph, alignment: int) -> int:
    problem = build_problem(graph, False, alignment)
    peak = peak_of(problem, tuple(range(problem.n))) * alignment
    # Units overstate an operator that need not pad its last tensor.
    return max(minimum_required(graph, False, alignment)[0], peak)


def _streamed(graph: Graph) -> int:
    """Bytes of parameters where each operator reads its own from outside."""
    tensors = graph.tensors
    return sum(tensors[name].nbytes for o in graph.operators for name in o.inputs if tensors[name].role == "parameter")
