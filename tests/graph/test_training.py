"""A step of training as a graph: its gradients are autograd's, it runs in an arena, and it needs no weights to plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from retensor.errors import GraphError
from retensor.graph import training_graph
from retensor.planning import Accelerator, bounds, execute, plan, verify

torch = pytest.importorskip("torch")


class Small(torch.nn.Module):  # type: ignore[misc,name-defined]
    """Convolution, batch statistics, a residual connection, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.second = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.out = torch.nn.Linear(4, 5)
        self.frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, x: Any) -> Any:
        y = torch.relu(self.norm(self.first(x)))
        y = y + self.second(y)
        return self.out(y.mean((2, 3)) * self.frozen * self.scale)


def loss_of(output: Any) -> Any:
    return torch.nn.functional.cross_entropy(output, torch.arange(len(output)) % 5)


def example() -> Any:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def made() -> Any:
    torch.manual_seed(0)
    return Small().train()


def test_loss_and_gradients_are_those_of_autograd() -> None:
    net, x = made(), example()
    graph = training_graph(net, x, loss=loss_of)
    assert graph.program is not None
    (name,) = [tensor.name for tensor in graph.tensors.values() if tensor.role == "input"]
    found = graph.program.run_plain({name: x.reshape(-1).numpy().view(np.uint8)})
    loss = loss_of(net(x))
    loss.backward()
    expected = [loss.detach(), *(p.grad for p in net.parameters() if p.requires_grad)]
    for output, value in zip(graph.outputs, expected, strict=False):
        got = torch.from_numpy(found[output].view(np.float32).copy())
        torch.testing.assert_close(got, value.reshape(-1), rtol=1e-5, atol=1e-6)
    # And the running statistics, and the batches counted, after one step.
    changed = {key: net.state_dict()[key] for key in ("norm.running_mean", "norm.running_var")}
    statistics = graph.outputs[len(expected) :]
    assert len(statistics) == 3
    for output, value in zip(statistics, changed.values(), strict=False):
        torch.testing.assert_close(torch.from_numpy(found[output].view(np.float32).copy()), value)


def test_the_module_is_left_as_it_is() -> None:
    net, x = made(), example()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    training_graph(net, x)
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in Small().parameters()]


@pytest.mark.parametrize("parameters", [False, True])
def test_a_step_runs_in_an_arena_of_the_least_bytes(parameters: bool) -> None:
    graph = training_graph(made(), example(), loss=loss_of)
    least = bounds(graph, parameters=parameters).m_r
    best = plan(graph, Accelerator(least), parameters=parameters)
    verify(graph, best)
    assert execute(graph, best).bit_equal


def test_the_backward_pass_reads_what_the_forward_pass_made() -> None:
    graph = training_graph(made(), example())
    kinds = [operator.kind for operator in graph.operators]
    assert sum("convolution_backward" in kind for kind in kinds) == 2
    backward = next(operator for operator in graph.operators if "batch_norm_backward" in operator.kind)
    maker = graph.operators[graph.producer[next(t for t in backward.inputs if t in graph.producer)]]
    assert graph.operators.index(maker) < graph.operators.index(backward)


def test_fake_tensors_are_enough_to_plan() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        # 4 GB of weights, were they there.
        net = torch.nn.Sequential(torch.nn.Linear(32_768, 16_384), torch.nn.ReLU(), torch.nn.Linear(16_384, 32_768))
        graph = training_graph(net, torch.zeros(4, 32_768))
    assert graph.program is None
    best = plan(graph, Accelerator("M_R"))
    assert best.status == "optimal"
    verify(graph, best)


def test_eight_bits_count_one_byte_an_element() -> None:
    whole, small = (training_graph(made(), example(), dtype=dtype) for dtype in (None, "int8"))
    gradient = small.outputs[1]
    assert whole.tensors[gradient].nbytes == 4 * small.tensors[gradient].nbytes
    assert small.program is None


def frozen() -> Any:
    return made().requires_grad_(False)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (frozen, {}, "no parameter of the module requires a gradient"),
        (made, {"loss": lambda output: output}, "a tensor of one element"),
        (made, {"loss": lambda output: 1.0}, "a tensor of one element"),
        (lambda: torch.nn.Sequential(made(), torch.nn.Dropout(0.5)), {}, "is random"),
    ],
)
def test_what_cannot_be_trained_is_named(module: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        training_graph(module(), example(), **options)


def test_what_is_no_module_is_named() -> None:
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, not str"):
        training_graph("resnet50", example())
