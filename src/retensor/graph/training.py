"""A step of training as a graph: the forward pass, the loss, and the gradient of every parameter.

Automatic differentiation runs while :func:`torch.fx.experimental.proxy_tensor.make_fx` records what is computed, so
the backward pass becomes operators like those of the forward pass, and what the backward pass needs of the forward pass
becomes tensors that live from the one to the other. The recorded program is exported and read like any other
(:mod:`.torch`). Its outputs are the loss, the gradients, and buffers that the step changes (running statistics).
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from retensor.errors import GraphError, MissingExtraError
from retensor.graph import networks
from retensor.graph.structure import Graph

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


def training_graph(
    module: torch.nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | torch.Tensor | None = None,
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
    inputs: Mapping[str, Sequence[int]] | None = None,
    dtype: str | None = None,
    fuse: bool = False,
    in_place: bool = False,
) -> Graph:
    """Load one step of training, forward and backward, as a graph.

    Parameters
    ----------
    module : torch.nn.Module
        In the mode it is to be traced in (``module.train()`` for batch statistics); it is left as it is. Modules on
        fake tensors (:class:`torch._subclasses.fake_tensor.FakeTensorMode`) take no memory for their weights; their
        graphs can be planned but not run.
    example_inputs : tensor, sequence of arguments or mapping of keyword arguments, optional
        What to trace the module with.
    loss : callable, optional
        The loss, a tensor of one element, of what the module returns. By default the mean of its first tensor.
    inputs : mapping of str to sequence of int, optional
        Shapes by input name, in place of or beside ``example_inputs``.
    dtype : str, optional
        Count floating-point tensors at this element type; see :func:`retensor.graph.torch.load_torch`.
    fuse, in_place : bool
        Which operators to merge; see :func:`retensor.graph.merge.merge`.

    Returns
    -------
    Graph
        Its first output is the loss; then come the gradients in the order of ``module.named_parameters()`` that require
        one, and the buffers that the step changes.

    Raises
    ------
    GraphError
        Where no parameter requires a gradient, the loss is no single number that depends on one, or an operator is
        random or cannot be traced.
    MissingExtraError
        Where torch is not installed.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> graph = training_graph(net, torch.zeros(16, 4))
    >>> [graph.tensors[name].nbytes // 4 for name in graph.outputs]
    [1, 32, 8, 16, 2]
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("loading a PyTorch program", "torch") from error
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"training_graph takes a torch.nn.Module, not {type(module).__name__}")
    from retensor.graph.torch import load_torch

    args, kwargs = networks.module_arguments(module, example_inputs, inputs)
    step = _record(module, args, kwargs, loss or _mean_of_first)
    loaded = load_torch(step, dtype=dtype, fuse=fuse, in_place=in_place)
    name = f"{type(module).__name__} training"
    return Graph(name, loaded.operators, loaded.tensors, loaded.outputs, loaded.aliases, loaded.options, loaded.program)


def _mean_of_first(output: Any) -> torch.Tensor:
    """The mean of the first floating-point tensor that a module returns."""
    import torch
    from torch.utils import _pytree as pytree

    found = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    if not found:
        raise GraphError("the module returns no floating-point tensor; give loss=, a function of what it returns")
    return found[0].mean()


def _record(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Callable[[Any], torch.Tensor]
) -> ExportedProgram:
    """The exported program of one step."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils import _pytree as pytree

    learned = {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
    if not learned:
        raise GraphError("no parameter of the module requires a gradient; there is nothing to train")
    frozen = {name: value.detach() for name, value in module.named_parameters() if not value.requires_grad}
    state = {**frozen, **dict(module.named_buffers())}
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    written = _written_buffers(module, args, kwargs) if state else frozenset()

    def step(
        weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor], leaves: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        rest = iter(leaves)
        own_args, own_kwargs = pytree.tree_unflatten(
            [next(rest) if isinstance(value, torch.Tensor) else value for value in flat], spec
        )

        def forward(chosen: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
            # What the module writes into is a copy, so that the step has results and no side effects.
            own = {name: value.clone() if name in written else value for name, value in others.items()}
            value = loss(torch.func.functional_call(module, {**chosen, **own}, own_args, own_kwargs))
            if not isinstance(value, torch.Tensor) or value.numel() != 1:
                raise GraphError("the loss must be a tensor of one element, such as the mean of the output")
            return value.reshape(()), [own[name] for name in others if name in written]

        gradients, (value, changed) = torch.func.grad_and_value(forward, has_aux=True)(weights)
        return [value, *gradients.values(), *changed]

    try:
        recorded = make_fx(step)(learned, state, tensors)
    except GraphError:
        raise
    except Exception as error:
        # torch raises errors of many types here.
        raise GraphError(
            f"the training step of {type(module).__name__} cannot be traced: {networks.first_line(error)}"
        ) from error
    return networks.export(_step_module(recorded, learned, state), tuple(tensors), {})


def _written_buffers(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[str]:
    """Names of the buffers that the module writes into when it runs in the mode it is in."""
    import torch

    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(module, args, kwargs).run_decompositions({})
        except Exception as error:
            raise GraphError(
                f"torch.export cannot export {type(module).__name__}: {networks.first_line(error)}"
            ) from error
    return frozenset(program.graph_signature.buffers_to_mutate.values())


def _step_module(
    recorded: torch.fx.GraphModule, learned: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> torch.nn.Module:
    """The recorded step as a module of the tensors alone that come from outside, so that weights stay parameters."""
    import torch

    class Step(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
        def __init__(self) -> None:
            super().__init__()
            self.recorded = recorded
            for name, value in {**learned, **state}.items():
                if isinstance(value, torch.nn.Parameter) or name in learned:
                    self.register_parameter(_flat_name(name), torch.nn.Parameter(value, requires_grad=False))
                else:
                    self.register_buffer(_flat_name(name), value)

        def forward(self, *tensors: torch.Tensor) -> Any:
            own = {name: getattr(self, _flat_name(name)) for name in (*learned, *state)}
            weights, others = ({name: own[name] for name in names} for names in (learned, state))
            return self.recorded(weights, others, list(tensors))

    return Step()


def _flat_name(name: str) -> str:
    """A parameter's name without dots, which a module's own attributes may not have."""
    return "of_" + name.replace(".", "_")
