"""PyTorch programs that cannot be planned, and arguments that make no sense: each refused with one sentence."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from retensor.errors import GraphError, MissingExtraError
from retensor.graph.torch import load_torch


class Forward(nn.Module):
    """A module whose forward is a given function."""

    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        return self.function(self, x)


def load_function(function, x, **tensors):
    return load_torch(Forward(function, **tensors), example_inputs=x, fuse=False)


def test_dynamic_shapes_are_refused():
    batch = torch.export.Dim("batch", min=2, max=8)
    exported = torch.export.export(nn.ReLU(), (torch.randn(3, 4),), dynamic_shapes={"input": {0: batch}})
    with pytest.raises(GraphError, match=r"dynamic shape .*inputs= cannot change; export with fixed shapes"):
        load_torch(exported)


@pytest.mark.parametrize("function", [lambda m, x: x.nonzero(), lambda m, x: x[x > 0], lambda m, x: x.unique()])
def test_shapes_that_depend_on_data_are_refused(function):
    with pytest.raises(GraphError, match=r"depend.* on the data"):
        load_function(function, torch.randn(3, 4))


def test_a_failed_export_prints_nothing(capfd):
    def branch(module, x):
        chosen = x[x > 0]
        return chosen if chosen.numel() > 3 else chosen + 1

    with pytest.raises(GraphError, match="data-dependent"):
        load_function(branch, torch.randn(3, 4))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + torch.rand(4),
        lambda m, x: functional.dropout(x, 0.5, training=True),
        lambda m, x: torch.bernoulli(x.sigmoid()),
        lambda m, x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        lambda m, x: x + torch.randn_like(x),
    ],
)
def test_random_operators_are_refused(function):
    with pytest.raises(GraphError, match="is random"):
        load_function(function, torch.randn(2, 3, 4))


def test_control_flow_on_data_is_refused():
    def branch(module, x):
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    with pytest.raises(GraphError, match="cond"):
        load_function(branch, torch.randn(3))


def test_a_written_buffer_and_a_written_input_are_refused():
    def count(module, x):
        module.total.add_(1)
        return x + module.total

    with pytest.raises(GraphError, match=r"changes 'total' .*buffer_mutation"):
        load_function(count, torch.randn(3), total=torch.zeros(()))
    with pytest.raises(GraphError, match=r"changes 'x' .*input_mutation"):
        load_function(lambda m, x: x.add_(1), torch.randn(3))


def test_a_program_exported_in_training_mode_is_refused():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    exported = torch.export.export(module.train(), (torch.randn(2, 3, 6, 6),))
    with pytest.raises(GraphError, match="eval mode"):
        load_torch(exported)


def test_a_module_that_cannot_be_exported_is_refused_and_left_in_its_mode():
    def function(module, x):
        raise RuntimeError("broken on purpose")

    module = Forward(function)
    with pytest.raises(GraphError, match=r"cannot export Forward: .*broken on purpose"):
        load_torch(module, example_inputs=torch.randn(3))
    assert module.training


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": "resnet5O"}, GraphError, "did you mean"),
        ({"source": "keras:resnet50"}, GraphError, "names no library"),
        ({"source": "timm:hf-hub:someone/something"}, GraphError, "no network is named"),
        ({"source": "torch:bert"}, GraphError, "no network is named"),
        ({"source": ""}, GraphError, "no network is named"),
        ({"source": "squeezenet1_1", "inputs": {"y": (1, 3, 64, 64)}}, GraphError, "no input 'y'"),
        ({"source": "squeezenet1_1", "inputs": {"x": (1, 3, 0, 64)}}, GraphError, "positive integers"),
        ({"source": "squeezenet1_1", "inputs": {"x": "1x3x64x64"}}, GraphError, "positive integers"),
        ({"source": "squeezenet1_1", "inputs": {"x": (1, 3, 2**30, 2**30)}}, GraphError, "larger than"),
        ({"source": "squeezenet1_1", "inputs": {"x": (1, 4, 64, 64)}}, GraphError, "cannot export"),
        ({"source": "squeezenet1_1", "dtype": "int3"}, ValueError, "'int3' is not known"),
        ({"source": "squeezenet1_1", "example_inputs": torch.zeros(1)}, ValueError, "go with a module"),
        ({"source": nn.ReLU()}, ValueError, "needs example inputs"),
        ({"source": nn.ReLU(), "example_inputs": torch.zeros(3), "inputs": {"z": (3,)}}, GraphError, "no tensor input"),
        ({"source": 3}, TypeError, "not int"),
    ],
)
def test_bad_arguments_are_refused_with_one_sentence(arguments, error, message):
    source = arguments.pop("source")
    with pytest.raises(error, match=message) as caught:
        load_torch(source, **arguments)
    assert "\n" not in str(caught.value)


def test_an_exported_program_refuses_other_input_shapes():
    exported = torch.export.export(nn.ReLU().eval(), (torch.randn(3, 4),))
    with pytest.raises(GraphError, match="was exported with 'input' of shape"):
        load_torch(exported, inputs={"input": (5, 4)})
    with pytest.raises(GraphError, match="no input 'x'"):
        load_torch(exported, inputs={"x": (3, 4)})


def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r'pip install ".*\[torch\]"'):
        load_torch("resnet50")
