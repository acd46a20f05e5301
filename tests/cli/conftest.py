"""Small models that every test of the command line can plan in milliseconds, and ways to run a command."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from retensor.cli import run
from retensor.graph import Graph, Operator, Tensor
from retensor.graph.json import write_graph


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd):
    """Run one command line in this process."""

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def graph_file(models) -> Path:
    """A bare graph: M_R is 96 bytes (``expand``), M_P is 128, and at M_R ``skip`` must leave and come back."""
    tensors = [
        Tensor("image", 48, "input"),
        Tensor("skip", 32),
        Tensor("wide", 64),
        Tensor("deep", 32),
        Tensor("sum", 32),
        Tensor("weight", 10, "parameter"),
    ]
    operators = [
        Operator("stem", "Conv", ("image",), ("skip",)),
        Operator("expand", "Conv", ("skip", "weight"), ("wide",)),
        Operator("project", "Conv", ("wide",), ("deep",)),
        Operator("add", "Add", ("skip", "deep"), ("sum",)),
    ]
    path = models / "bottleneck.json"
    write_graph(Graph("bottleneck", operators, tensors, ["sum"]), path)
    return path


@pytest.fixture(scope="session")
def onnx_file(models) -> Path:
    """A residual block of two Conv-BatchNormalization-Relu, with a free batch dimension, float32."""
    random_numbers = np.random.default_rng(0)

    def weight(name, *shape):
        return numpy_helper.from_array(random_numbers.random(shape, dtype=np.float32), name)

    weights, nodes = [], []
    for i, (source, channels) in enumerate((("x", 4), ("r0", 16))):
        weights += [weight(f"w{i}", 16 if i == 0 else 4, channels, 1, 1)]
        weights += [weight(f"{part}{i}", 16 if i == 0 else 4) for part in ("scale", "shift", "mean", "var")]
        nodes += [
            helper.make_node("Conv", [source, f"w{i}"], [f"c{i}"], name=f"conv{i}"),
            helper.make_node(
                "BatchNormalization",
                [f"c{i}", f"scale{i}", f"shift{i}", f"mean{i}", f"var{i}"],
                [f"b{i}"],
                name=f"norm{i}",
            ),
            helper.make_node("Relu", [f"b{i}"], [f"r{i}"], name=f"relu{i}"),
        ]
    nodes.append(helper.make_node("Add", ["x", "r1"], ["y"], name="add"))
    shape = ["batch", 4, 8, 8]
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = models / "residual.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def hard_file(models) -> Path:
    """A graph far too tangled to be proved optimal within any test's patience."""
    dice = random.Random(5)
    tensors = [Tensor("in", 50, "input")]
    operators = []
    made = ["in"]
    for i in range(60):
        inputs = tuple(dict.fromkeys(dice.choice(made[-20:]) for _ in range(3)))
        tensors.append(Tensor(f"t{i}", dice.randint(20, 100)))
        operators.append(Operator(f"op{i}", "Mix", inputs, (f"t{i}",)))
        made.append(f"t{i}")
    read = {name for operator in operators for name in operator.inputs}
    path = models / "tangle.json"
    write_graph(Graph("tangle", operators, tensors, [name for name in made if name not in read]), path)
    return path
