"""Weights kept as codes are read as codes: no operator's output is the weight that they stand for."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import retensor as rt
from retensor.graph.onnx import load_onnx
from retensor.graph.torch import load_torch
from retensor.quantizing import Affine, quantize_onnx, quantized_layer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).relu().mean((2, 3)))


def few(bits, **settings):
    torch.manual_seed(0)
    model = Net().eval()
    return rt.replace(
        model,
        {
            (nn.Conv2d, nn.Linear)[i]: lambda layer: quantized_layer(
                layer, Affine(bits, **settings).encode(layer.weight.detach())
            )
            for i in (0, 1)
        },
    )


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_layer_of_codes_is_one_operator_and_runs_as_the_model_does(bits, symmetric):
    graph = load_torch(few(bits, axis=0, symmetric=symmetric), example_inputs=torch.zeros(1, 3, 9, 9))
    kinds = [operator.kind for operator in graph.operators]
    assert sum(kind.startswith("decode+") for kind in kinds) == 2
    assert len(kinds) == 3
    weights = [t for t in graph.tensors.values() if t.role == "parameter" and t.dtype == "uint8" and len(t.shape) == 1]
    assert {t.nbytes for t in weights} >= {-(-216 * bits // 8), -(-40 * bits // 8)}
    plan = rt.plan(graph, rt.Accelerator(scratchpad="M_R"))
    assert rt.planning.execute(graph, plan).bit_equal


def test_without_fusing_what_decodes_stays():
    graph = load_torch(few(4), example_inputs=torch.zeros(1, 3, 9, 9), fuse=False)
    assert not any("decode" in operator.kind for operator in graph.operators)
    assert len(graph.operators) > 10


@pytest.fixture
def network(tmp_path):
    random = np.random.default_rng(0)
    weights = {"w": (4, 3, 3, 3), "v": (16, 5)}
    graph = onnx.parser.parse_graph(
        """net (float[1, 3, 6, 6] x) => (float[1, 5] y) {
        a = Conv(x, w)
        b = Relu(a)
        c = ReduceMean(b, axes)
        d = Concat<axis = 1>(c, c, c, c)
        y = MatMul(d, v) }"""
    )
    graph.initializer.append(numpy_helper.from_array(np.array([2, 3], np.int64), "axes"))
    graph.node[2].attribute.append(helper.make_attribute("keepdims", 0))
    for name, shape in weights.items():
        graph.initializer.append(numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


@pytest.mark.parametrize("quantizer", [Affine(4), Affine(3, symmetric=True), Affine(8), Affine(6, symmetric=True)])
def test_a_file_of_codes_takes_their_bytes_and_runs_bit_for_bit(network, tmp_path, quantizer):
    quantize_onnx(network, tmp_path / "few.onnx", quantizer)
    dense, graph = load_onnx(network), load_onnx(tmp_path / "few.onnx")
    assert [o.kind for o in graph.operators] == [
        {"Conv+Relu": "decode+Conv+Relu", "MatMul": "decode+MatMul"}.get(o.kind, o.kind) for o in dense.operators
    ]
    width = 1 if quantizer.bits > 4 else 0.5
    codes = [t for t in graph.tensors.values() if t.name.endswith(".codes")]
    assert sorted(t.nbytes for t in codes) == [80 * width, 108 * width]
    assert all(not t.buffer for t in codes)
    accelerator = rt.Accelerator(scratchpad="M_R")
    for weights in (False, True):
        plan = rt.plan(graph, accelerator, parameters=weights)
        rt.planning.verify(graph, plan)
        assert rt.planning.execute(graph, plan).bit_equal


def test_a_weight_that_two_read_and_one_that_is_moved(network, tmp_path):
    quantize_onnx(network, tmp_path / "few.onnx", Affine(8))
    model = onnx.load(tmp_path / "few.onnx")
    decoded = next(node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear")
    model.graph.node.append(helper.make_node("Transpose", [decoded], ["z"], perm=[1, 0, 3, 2]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (3, 4, 3, 3)))
    onnx.save(model, tmp_path / "two.onnx")
    graph = load_onnx(tmp_path / "two.onnx")
    kinds = [operator.kind for operator in graph.operators]
    # Two read the weight itself, so one makes it; it moves nothing that others need.
    assert "DequantizeLinear" in kinds
    assert "Transpose" in kinds
    plan = rt.plan(graph, rt.Accelerator(scratchpad="M_P"))
    assert rt.planning.execute(graph, plan).bit_equal


def test_constants_of_floating_point_and_positions_are_as_they_were():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.register_buffer("ids", torch.arange(7))

        def forward(self, x):
            return x + self.table(self.ids) * 2.0

    graph = load_torch(Positions(), example_inputs=torch.zeros(2, 7, 4))
    assert not any("decode" in operator.kind for operator in graph.operators)
