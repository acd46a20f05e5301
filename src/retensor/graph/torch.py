"""PyTorch programs as graphs: an ``ExportedProgram``, a module, or a torchvision or timm name.

The program is made functional (no operator writes into its inputs), with composite operators kept whole, and each
node is run on fake tensors, which have sizes and strides but no data. A node whose results all lie in storages
that exist already is a view and becomes an alias; every other node is an operator, and each of its results that
somebody reads is a tensor. No list of view operators is needed, and ``reshape`` counts as a copy just where it is one.
"""

from __future__ import annotations

import operator as python_operator
import warnings
from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from retensor.errors import GraphError, MissingExtraError
from retensor.graph import networks
from retensor.graph.arithmetic import torch_macs
from retensor.graph.structure import LARGEST_TENSOR, Graph, Operator, Role, Tensor
from retensor.graph.torch_program import Layout, TorchProgram, Wiring, contiguous_strides, dense, elements

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Node

BITS = {"int4": 4, "int8": 8, "uint8": 8, "float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}


def load_torch(
    source: str | ExportedProgram | torch.nn.Module,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | torch.Tensor | None = None,
    inputs: Mapping[str, Sequence[int]] | None = None,
    dtype: str | None = None,
    fuse: bool = True,
    in_place: bool = False,
) -> Graph:
    """Load a PyTorch program as a graph.

    Parameters
    ----------
    source : str, torch.export.ExportedProgram or torch.nn.Module
        A name (see :mod:`retensor.graph.networks`), a program of fixed shapes, or a module, which is exported in
        eval mode and left in the mode it was in.
    example_inputs : tensor, sequence of arguments or mapping of keyword arguments, optional
        What to export a module with.
    inputs : mapping of str to sequence of int, optional
        Shapes by input name. For an ``ExportedProgram`` they must be its own.
    dtype : str, optional
        Count floating-point tensors at this element type (``"int8"``: one byte an element, as the COSMA paper
        does; one of int4, int8, uint8, float16, bfloat16, float32, float64). Where that changes a size, the graph
        can be planned but not run.
    fuse, in_place : bool
        Which operators to merge; see :func:`retensor.graph.merge.merge`.

    Returns
    -------
    Graph
        Operators in program order; ``program`` runs them.

    Raises
    ------
    GraphError
        Where the name is unknown, the module cannot be exported, shapes are dynamic or depend on data, an operator
        is random, or the program writes into its own buffers or inputs.
    MissingExtraError
        Where torch is not installed.
    ValueError
        Where ``dtype`` is not one of the above.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Flatten(), torch.nn.ReLU())
    >>> graph = load_torch(net, example_inputs=torch.zeros(2, 4), fuse=False)
    >>> [operator.kind for operator in graph.operators]
    ['aten.linear.default', 'aten.relu.default']
    >>> graph.tensors[graph.outputs[0]].nbytes
    64
    """
    try:
        import torch
        from torch.export import ExportedProgram
    except ImportError as error:
        raise MissingExtraError("loading a PyTorch program", "torch") from error
    if dtype is not None and dtype not in BITS:
        raise ValueError(f"element type '{dtype}' is not known; give one of {', '.join(BITS)}")
    if example_inputs is not None and not isinstance(source, torch.nn.Module):
        raise ValueError("example inputs go with a module; a name and an exported program have inputs of their own")
    if isinstance(source, str):
        network = networks.build(source, inputs)
        name, exported = network.name, networks.export(network.module, (), network.arguments)
    elif isinstance(source, ExportedProgram):
        name, exported = _class_name(source), source
    elif isinstance(source, torch.nn.Module):
        args, kwargs = networks.module_arguments(source, example_inputs, inputs)
        name, exported = type(source).__name__, networks.export(source, args, kwargs)
    else:
        raise TypeError(f"a name, an ExportedProgram or a module can be loaded, not {type(source).__name__}")
    trace = _Trace(exported)
    if isinstance(source, ExportedProgram) and inputs:
        _check_inputs(trace.input_layouts, inputs)
    graph = trace.graph(name, dtype, {"fuse": fuse, "in_place": in_place, "dtype": dtype})
    if not fuse and not in_place:
        return graph
    from retensor.graph.merge import merge

    return merge(graph, fuse=fuse, in_place=in_place)


def _class_name(program: ExportedProgram) -> str:
    """The class of the module that was exported, as its operators remember it."""
    for node in program.graph.nodes:
        for path, kind in node.meta.get("nn_module_stack", {}).values():
            if path == "":
                return str(kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
    return "exported"


def _check_inputs(has: Sequence[Any], inputs: Mapping[str, Sequence[int]]) -> None:
    shapes = {layout.storage: layout.shape for layout in has if isinstance(layout, Layout)}
    for key, shape in inputs.items():
        if key not in shapes:
            raise GraphError(f"the program has no input '{key}'; its inputs are {', '.join(shapes) or 'none'}")
        if networks.checked_shape(key, shape) != shapes[key]:
            raise GraphError(
                f"the program was exported with '{key}' of shape {shapes[key]}, not {tuple(shape)}; "
                "export it with that shape"
            )


class _Trace:
    """Runs a program's live nodes on fake tensors and notes which storage each value lies in."""

    def __init__(self, exported: ExportedProgram) -> None:
        self.exported = exported
        self.functional = _functional(exported)
        self.signature = self.functional.graph_signature
        self.nodes: list[Node] = list(self.functional.graph.nodes)
        self.values: dict[Node, Any] = {}
        self.bases: dict[int, str] = {}  # address of a fake storage -> tensor name
        self.layouts: dict[str, Layout] = {}  # base layout of each tensor
        self.roles: dict[str, Role] = {}
        self.held: dict[str, Layout] = {}
        self.made: dict[str, tuple[Layout | None, ...]] = {}
        self.single: set[str] = set()
        self.host: dict[str, Any] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.learned: set[str] = set()
        self.operators: list[Operator] = []
        self.aliases: dict[str, str] = {}
        self.input_layouts: list[Layout | tuple[Any]] = []
        self.output_layouts: list[Layout | None] = []
        self.keep: list[torch.Tensor] = []
        self.runnable = True
        self.results = self._results()
        self.live = self._live()
        self._run()

    def _results(self) -> list[Any]:
        """What the module returns, flat: nodes and constants."""
        kinds = {"USER_OUTPUT", "LOSS_OUTPUT"}
        returned = list(self.nodes[-1].args[0])
        for spec in self.signature.output_specs:
            if spec.kind.name not in kinds:
                raise GraphError(
                    f"the program changes '{spec.target or spec.arg.name}' when it runs ({spec.kind.name.lower()}); "
                    "put it in eval mode or return the new value instead"
                )
        return returned

    def _live(self) -> set[Node]:
        """Nodes that the results depend on."""
        import torch

        stack = [result for result in self.results if isinstance(result, torch.fx.Node)]
        live = set(stack)
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in live:
                    live.add(source)
                    stack.append(source)
        return live

    def _run(self) -> None:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(), torch.no_grad():
            self._placeholders()
            for node in self.nodes:
                if node not in self.live or node.op in ("placeholder", "output"):
                    continue
                if node.op == "get_attr":
                    self._attribute(node)
                else:
                    self._call(node)
            for result in self.results:
                value = self.values[result] if isinstance(result, torch.fx.Node) else None
                self.output_layouts.append(self._layout(value) if isinstance(value, torch.Tensor) else None)

    def _placeholders(self) -> None:
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        state: dict[Node, torch.Tensor] = {}
        for node, spec in zip(placeholders, self.signature.input_specs, strict=True):
            kind = spec.kind.name
            if kind == "USER_INPUT":
                self._user_input(node, spec)
            elif kind in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
                table = self.functional.state_dict
                state[node] = table[spec.target] if spec.target in table else self.functional.constants[spec.target]
                if kind == "PARAMETER":
                    self.learned.add(node.name)
            elif node in self.live:
                raise GraphError(f"the program reads '{node.name}', a {kind.lower()}; only tensors can be planned")
        self._state({node: tensor for node, tensor in state.items() if node in self.live})

    def _user_input(self, node: Node, spec: Any) -> None:
        import torch

        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                raise GraphError(f"input '{node.name}' is a dynamic number; export with fixed shapes and numbers")
            constant = getattr(spec.arg, "value", value)
            self.input_layouts.append((constant,))
            self.values[node] = self.host[node.name] = constant
            return
        if not all(type(size) is int for size in value.shape):
            shape = "x".join(str(size) for size in value.shape)
            raise GraphError(
                f"input '{node.name}' has dynamic shape {shape}; an exported program has its shapes, "
                "which inputs= cannot change; export with fixed shapes: torch.export.export(module, example_inputs) "
                "without dynamic_shapes"
            )
        _plain(value, node.name)
        strides = tuple(value.stride()) if dense(value.shape, value.stride()) else contiguous_strides(value.shape)
        layout = Layout(node.name, value.dtype, tuple(value.shape), strides)
        self.input_layouts.append(layout)
        if node in self.live:
            self.held[node.name] = layout
            self.values[node] = self._fake(layout, value.device, "input")

    def _state(self, state: Mapping[Node, torch.Tensor]) -> None:
        """Parameters, one tensor for each storage: tied ones share it, whatever their names."""
        shared: dict[int, list[Node]] = {}
        for node, tensor in state.items():
            _plain(tensor, node.name)
            shared.setdefault(tensor.untyped_storage()._cdata, []).append(node)
        for nodes in shared.values():
            first = state[nodes[0]]
            alike = all(_same_view(state[node], first) for node in nodes)
            count = first.untyped_storage().nbytes() // first.element_size()
            if alike and (dense(first.shape, first.stride()) or first.numel() < count):
                self._whole_parameter(nodes, first)
            else:
                self._shared_parameter(nodes, state, count)

    def _whole_parameter(self, nodes: Sequence[Node], tensor: torch.Tensor) -> None:
        strides = tuple(tensor.stride())
        if not dense(tensor.shape, strides):
            strides = contiguous_strides(tensor.shape)
        layout = Layout(nodes[0].name, tensor.dtype, tuple(tensor.shape), strides)
        value = self._fake(layout, tensor.device, "parameter")
        self._keep_data(layout, tensor)
        for node in nodes:
            self._hold(node, layout, value)

    def _shared_parameter(self, nodes: Sequence[Node], state: Mapping[Node, torch.Tensor], count: int) -> None:
        """Several different views of one storage, or one that repeats it: the tensor is the storage."""
        first = state[nodes[0]]
        base = Layout(nodes[0].name, first.dtype, (count,), (1,))
        whole = self._fake(base, first.device, "parameter")
        self._keep_data(base, first)
        for node in nodes:
            tensor = state[node]
            layout = Layout(
                base.storage, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset()
            )
            elements = whole if tensor.dtype == first.dtype else whole.view(tensor.dtype)
            self._hold(node, layout, elements.as_strided(layout.shape, layout.strides, layout.offset))

    def _hold(self, node: Node, layout: Layout, value: torch.Tensor) -> None:
        self.held[node.name] = layout
        self.values[node] = value
        if node.name != layout.storage:
            self.aliases[node.name] = layout.storage

    def _keep_data(self, layout: Layout, tensor: torch.Tensor) -> None:
        from torch._subclasses.fake_tensor import FakeTensor

        self.parameters[layout.storage] = tensor
        self.runnable = self.runnable and tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)

    def _attribute(self, node: Node) -> None:
        import torch

        value: Any = self.functional.graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor):
            self._state({node: value})
        else:
            self.values[node] = self.host[node.name] = value

    def _call(self, node: Node) -> None:
        import torch
        from torch.fx.node import map_arg

        self._check(node)
        args = map_arg(node.args, self.values.__getitem__)
        kwargs = map_arg(node.kwargs, self.values.__getitem__)
        try:
            result = node.target(*args, **kwargs)
        except Exception as error:
            if "DataDependent" in type(error).__name__ or "DynamicOutputShape" in type(error).__name__:
                reason = "its result depends on the data; only fixed shapes can be planned"
            else:
                reason = networks.first_line(error)
            raise GraphError(f"node '{node.name}' ({node.target}) cannot be sized: {reason}") from error
        if node.target is python_operator.getitem:
            self.values[node] = result
            if isinstance(result, torch.Tensor):
                self.aliases[node.name] = self._base(result)
            return
        single = isinstance(result, torch.Tensor)
        results = [result] if single else list(result) if isinstance(result, (list, tuple)) else []
        tensors = [value for value in results if isinstance(value, torch.Tensor)]
        if not tensors:
            if isinstance(result, (list, tuple)) and any(isinstance(value, (list, tuple)) for value in results):
                raise GraphError(f"node '{node.name}' ({node.target}) returns nested lists, which no plan can name")
            self.values[node] = self.host[node.name] = result
        elif all(self._aliases_something(value) for value in tensors):
            self.values[node] = result
            if single:
                self.aliases[node.name] = self._base(result)
        else:
            self._operator(node, results, single, torch_macs(str(node.target), _arguments(node, args, kwargs), results))

    def _check(self, node: Node) -> None:
        """Refuse what cannot be one step of a plan: nested programs, mutation, chance."""
        import torch

        target = node.target
        if target is python_operator.getitem:
            return
        if not isinstance(target, torch._ops.OpOverload):
            raise GraphError(
                f"node '{node.name}' calls {getattr(target, '__name__', target)}, which is not a tensor operator; "
                "export the module without control flow on data"
            )
        if target._schema.is_mutable:
            raise GraphError(f"node '{node.name}' ({target}) writes into its input; only functional operators can run")
        if torch.Tag.nondeterministic_seeded in target.tags and _draws(node):
            raise GraphError(f"node '{node.name}' ({target}) is random; put the module in eval mode or take it out")

    def _operator(self, node: Node, results: Sequence[Any], single: bool, macs: int | None) -> None:
        import torch

        read = dict.fromkeys(base for source in node.all_input_nodes for base in self._bases_of(self.values[source]))
        wanted = self._wanted(node, len(results))
        layouts: list[Layout | None] = []
        values: list[Any] = []
        for index, value in enumerate(results):
            if not isinstance(value, torch.Tensor) or index not in wanted:
                layouts.append(None)
                values.append(value)
                continue
            name = node.name if single else f"{node.name}.{index}"
            _plain(value, name)
            self.runnable = self.runnable and value.device.type == "cpu"
            strides = tuple(value.stride()) if dense(value.shape, value.stride()) else contiguous_strides(value.shape)
            layout = Layout(name, value.dtype, tuple(value.shape), strides)
            layouts.append(layout)
            values.append(self._fake(layout, value.device, "activation"))
        self.made[node.name] = tuple(layouts)
        if single:
            self.single.add(node.name)
        self.values[node] = values[0] if single else values
        outputs = tuple(layout.storage for layout in layouts if layout is not None)
        self.operators.append(Operator(node.name, str(node.target), tuple(read), outputs, (node.name,), macs))

    def _wanted(self, node: Node, count: int) -> set[int]:
        """Which results of a node are read; the rest need not be computed and take no room."""
        readers = [user for user in node.users if user in self.live]
        if node in self.results or any(user.target is not python_operator.getitem for user in readers):
            return set(range(count))
        return {int(user.args[1]) for user in readers}

    def _fake(self, layout: Layout, device: torch.device, role: Role) -> torch.Tensor:
        """A new storage with no data, and its name."""
        import torch

        value = torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype, device=device)
        self.bases[value.untyped_storage()._cdata] = layout.storage
        self.layouts[layout.storage] = layout
        self.roles[layout.storage] = role
        # A storage must outlive the trace, or another could take its address.
        self.keep.append(value)
        return value

    def _aliases_something(self, value: torch.Tensor) -> bool:
        # A lazily conjugated or negated view means other bytes than its storage has: counted as a copy.
        return value.untyped_storage()._cdata in self.bases and not value.is_conj() and not value.is_neg()

    def _base(self, value: torch.Tensor) -> str:
        return self.bases[value.untyped_storage()._cdata]

    def _bases_of(self, value: Any) -> list[str]:
        import torch

        values = value if isinstance(value, (list, tuple)) else [value]
        return [self._base(v) for v in values if isinstance(v, torch.Tensor)]

    def _layout(self, value: torch.Tensor) -> Layout:
        return Layout(self._base(value), value.dtype, tuple(value.shape), tuple(value.stride()), value.storage_offset())

    def wiring(self) -> Wiring:
        """What :class:`TorchProgram` needs to run the nodes."""
        return Wiring(
            self.held,
            self.made,
            frozenset(self.single),
            self.host,
            tuple(self.input_layouts),
            tuple(self.output_layouts),
            {name: elements(tensor, self.layouts[name]) for name, tensor in self.parameters.items()},
        )

    def graph(self, name: str, dtype: str | None, options: Mapping[str, Any]) -> Graph:
        """The graph, with floating-point tensors counted as ``dtype`` where it is given."""
        outputs = [layout.storage for layout in self.output_layouts if layout is not None]
        used = dict.fromkeys(outputs)
        for step in self.operators:
            used.update(dict.fromkeys(step.inputs + step.outputs))
        # Of tied weights the storage has one name.
        learned = {self.held[name].storage for name in self.learned if name in self.held}
        tensors: list[Tensor] = []
        changed = False
        for key, layout in self.layouts.items():
            if key not in used:
                continue
            own = str(layout.dtype).removeprefix("torch.")
            count, counted = prod(layout.shape), own
            nbytes = count * layout.dtype.itemsize
            if dtype is not None and layout.dtype.is_floating_point:
                counted, nbytes = dtype, ceil(count * BITS[dtype] / 8)
            changed = changed or counted != own
            buffer = self.roles[key] == "parameter" and key not in learned
            tensors.append(Tensor(key, nbytes, self.roles[key], layout.shape, counted, buffer))
        shapes = {lay.storage: list(lay.shape) for lay in self.input_layouts if isinstance(lay, Layout)}
        return Graph(
            name,
            self.operators,
            tensors,
            outputs,
            aliases={key: base for key, base in self.aliases.items() if base in used},
            options={**options, "inputs": shapes},
            program=TorchProgram(self.exported, self.functional, self.wiring())
            if self.runnable and not changed
            else None,
        )


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """The program without mutation, composite operators kept."""
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return exported.run_decompositions({})
        except Exception as error:
            raise GraphError(
                f"torch.export cannot make the program functional: {networks.first_line(error)}"
            ) from error


def _plain(value: torch.Tensor, name: str) -> None:
    """Refuse tensors whose bytes are not one strided stretch of known size."""
    import torch

    if value.layout != torch.strided or value.is_quantized:
        raise GraphError(f"tensor '{name}' is {value.layout} {value.dtype}; only plain dense tensors can be planned")
    if not all(type(size) is int for size in value.shape):
        raise GraphError(f"the shape of tensor '{name}' depends on the data; only fixed shapes can be planned")
    if prod(value.shape) * value.element_size() > LARGEST_TENSOR:
        raise GraphError(f"tensor '{name}' of shape {tuple(value.shape)} is larger than 2**50 bytes")


def _same_view(one: torch.Tensor, other: torch.Tensor) -> bool:
    views = [(view.dtype, tuple(view.shape), view.stride(), view.storage_offset()) for view in (one, other)]
    return views[0] == views[1]


def _arguments(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What an operator is called with, by the names of its schema; defaults where nothing is given."""
    arguments = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments}
    return given | dict(zip((argument.name for argument in arguments), args, strict=False)) | dict(kwargs)


def _draws(node: Node) -> bool:
    """Whether an operator that may draw random numbers does: not where its dropout is zero or training is off."""
    given = _arguments(node, node.args, node.kwargs)
    if any(given.get(flag) is False for flag in ("train", "training")):
        return False
    return not any(rate in given and given[rate] == 0 for rate in ("dropout_p", "dropout", "p"))
