"""Multiply-accumulates: a product of arrays of ones sums to their number, so torch itself is the second count."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import retensor as rt
from retensor.graph import Graph, Operator, Tensor, graph_from_json, graph_to_json, merge
from retensor.graph.arithmetic import onnx_macs, torch_macs
from retensor.graph.torch import load_torch

small = st.integers(1, 4)


@settings(deadline=None)
@given(small, small, small, small, st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
def test_convolutions_count_the_products_that_a_sum_of_ones_counts(
    batch, groups, ins, outs, kernel, stride, dilation, axes
):
    size = dilation * (kernel - 1) + 3
    data = torch.ones(batch, groups * ins, *[size] * axes)
    weight = torch.ones(groups * outs, ins, *[kernel] * axes)
    plain = getattr(torch.nn.functional, f"conv{axes}d")(data, weight, stride=stride, dilation=dilation, groups=groups)
    arguments = {"input": data, "weight": weight}
    assert torch_macs(f"aten.conv{axes}d.default", arguments, [plain]) == int(plain.sum())
    assert torch_macs("aten.convolution.default", arguments | {"transposed": False}, [plain]) == int(plain.sum())
    assert onnx_macs("Conv", [data.shape, weight.shape], [plain.shape], {"group": groups}) == int(plain.sum())
    turned = torch.ones(groups * ins, outs, *[kernel] * axes)
    function = getattr(torch.nn.functional, f"conv_transpose{axes}d")
    back = function(data, turned, stride=stride, dilation=dilation, groups=groups)
    arguments = {"input": data, "weight": turned}
    assert torch_macs(f"aten.conv_transpose{axes}d.input", arguments, [back]) == int(back.sum())
    assert torch_macs("aten.convolution.default", arguments | {"transposed": True}, [back]) == int(back.sum())
    assert onnx_macs("ConvTranspose", [data.shape, turned.shape], [back.shape], {"group": groups}) == int(back.sum())


def test_padding_is_computed_with_like_data_and_one_sample_needs_no_batch():
    layer = torch.nn.Conv2d(3, 8, 3, padding=1)
    assert sum_of(layer, torch.zeros(2, 3, 10, 10)) == 2 * 8 * 10 * 10 * 3 * 9
    assert sum_of(layer, torch.zeros(3, 10, 10)) == 8 * 10 * 10 * 3 * 9


@settings(deadline=None)
@given(st.lists(small, max_size=2), st.lists(st.booleans(), min_size=2, max_size=2), small, small, small)
def test_matrix_products_count_the_products_that_a_sum_of_ones_counts(batch, stretched, rows, length, columns):
    left = [size if keep else 1 for size, keep in zip(batch, stretched, strict=False)]
    a, b = torch.ones(*left, rows, length), torch.ones(*batch, length, columns)
    count = int((a @ b).sum())
    assert torch_macs("aten.matmul.default", {"self": a, "other": b}, [a @ b]) == count
    assert onnx_macs("MatMul", [a.shape, b.shape], [(a @ b).shape], {}) == count
    flat = a.reshape(-1, length)
    rowwise = torch.nn.functional.linear(a, b.reshape(-1, columns, length)[0])
    weight = torch.ones(columns, length)
    assert torch_macs("aten.linear.default", {"input": a, "weight": weight}, [rowwise]) == int(rowwise.sum())
    assert onnx_macs("Gemm", [flat.shape, weight.shape], [None], {"transB": 1}) == int((flat @ weight.T).sum())
    assert onnx_macs("Gemm", [flat.T.shape, weight.T.shape], [None], {"transA": 1}) == int((flat @ weight.T).sum())


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda: torch.mv(torch.ones(3, 4), torch.ones(4)), 12),
        (lambda: torch.dot(torch.ones(5), torch.ones(5)), 5),
        (lambda: torch.inner(torch.ones(2, 5), torch.ones(3, 5)), 30),
        (lambda: torch.addmm(torch.zeros(3), torch.ones(2, 4), torch.ones(4, 3)), 24),
        (lambda: torch.baddbmm(torch.zeros(3), torch.ones(7, 2, 4), torch.ones(7, 4, 3)), 168),
        (lambda: torch.addbmm(torch.zeros(3), torch.ones(7, 2, 4), torch.ones(7, 4, 3)), 168),
        (lambda: torch.tensordot(torch.ones(2, 3, 4), torch.ones(4, 3, 5), dims=([1, 2], [1, 0])), 120),
        (lambda: torch.einsum("bhid,bhjd->bhij", torch.ones(2, 3, 4, 5), torch.ones(2, 3, 6, 5)), 720),
        (lambda: torch.einsum("...i,ij->...j", torch.ones(2, 3, 4), torch.ones(4, 5)), 120),
    ],
)
def test_each_product_of_torch_counts_what_a_sum_of_ones_counts(call, count):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            names = [argument.name for argument in function._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            seen.append(torch_macs(str(function), given, [result]))
            return result

    with Watch():
        result = call()
    assert sum(seen) == int(result.sum()) == count


EINSUMS = [
    ("ij,jk->ik", [(2, 3), (3, 4)], 24),
    ("ij,jk", [(2, 3), (3, 4)], 24),
    ("ij,ij->ij", [(2, 3), (2, 3)], 0),
    ("i,j->ij", [(2,), (3,)], 0),
    ("ij,ij->", [(2, 3), (2, 3)], 6),
    ("bij,bjk->bik", [(5, 2, 3), (5, 3, 4)], 120),
    ("b...i,...ij->b...j", [(5, 7, 2), (7, 2, 3)], 210),
    ("...ij,...jk", [(7, 2, 3), (1, 3, 4)], 168),
    # First i j k with j summed, then i k l with k summed.
    ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)], 24 + 40),
    ("ii->i", [(3, 3)], 0),
]


@pytest.mark.parametrize(("equation", "shapes", "count"), EINSUMS)
def test_einsum_counts_pairs_from_the_left(equation, shapes, count):
    tensors = [torch.ones(shape) for shape in shapes]
    result = torch.einsum(equation, *tensors)
    assert torch_macs("aten.einsum.default", {"equation": equation, "tensors": tensors}, [result]) == count
    assert onnx_macs("Einsum", shapes, [result.shape], {"equation": equation}) == count


def sum_of(module, *inputs, **options):
    graph = load_torch(module.eval(), example_inputs=inputs, **options)
    assert all(operator.macs is not None for operator in graph.operators)
    return sum(operator.macs for operator in graph.operators)


class Calls(torch.nn.Module):
    def __init__(self, function, *weights):
        super().__init__()
        self.function, self.weights = function, torch.nn.ParameterList(weights)

    def forward(self, *inputs):
        return self.function(*inputs, *self.weights)


def test_exported_programs_count_every_kind_of_product():
    weight = torch.randn(6, 3, 4)
    bilinear = Calls(torch.nn.functional.bilinear, weight)
    assert sum_of(bilinear, torch.zeros(5, 3), torch.zeros(5, 4)) == 5 * 6 * 3 * 4 + 5 * 6 * 3
    einsum = Calls(lambda x, w: torch.einsum("bi,oij->boj", x, w), weight)
    assert sum_of(einsum, torch.zeros(5, 3)) == 5 * 6 * 3 * 4
    attend = Calls(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    query, key, value = torch.zeros(2, 4, 10, 8), torch.zeros(2, 4, 12, 8), torch.zeros(2, 4, 12, 6)
    assert sum_of(attend, query, key, value) == 2 * 4 * 10 * 12 * (8 + 6)
    assert sum_of(torch.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), torch.zeros(1, 4, 5, 5)) == 25 * 4 * 3 * 9
    plain = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.GELU(), torch.nn.Softmax(-1))
    assert sum_of(plain, torch.zeros(3, 4)) == 0


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers_count_the_matrices_of_every_step(kind, gates):
    layer = getattr(torch.nn, kind)(5, 7, num_layers=2, bidirectional=True, batch_first=True)
    steps, batch = 11, 3
    first = 2 * gates * 7 * (5 + 7)
    second = 2 * gates * 7 * (2 * 7 + 7)
    assert sum_of(layer, torch.zeros(batch, steps, 5)) == steps * batch * (first + second)


def test_multihead_attention_counts_its_four_projections_and_two_products():
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.zeros(2, 10, 16)
    assert sum_of(layer, x, x, x) == 2 * (4 * 10 * 16 * 16 + 2 * 10 * 10 * 16)


def test_backward_passes_count_twice_the_convolution_and_five_halves_of_the_attention():
    data, weight, grad = torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3), torch.zeros(2, 4, 6, 6)
    arguments = {"grad_output": grad, "input": data, "weight": weight, "transposed": False}
    forward = 2 * 4 * 3 * 9 * 36
    for mask, times in (([True, True, True], 2), ([False, True, True], 1), ([False, False, True], 0)):
        found = torch_macs("aten.convolution_backward.default", arguments | {"output_mask": mask}, [])
        assert found == times * forward
    q = torch.zeros(2, 4, 10, 8)
    name = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"
    once = torch_macs("aten.scaled_dot_product_attention.default", {"query": q, "key": q, "value": q}, [q])
    assert 2 * torch_macs(name, {"query": q, "key": q, "value": q}, []) == 5 * once


@pytest.mark.parametrize("name", ["aten.fft_rfft.default", "aten.linalg_qr.default", "mine.conv2d.default"])
def test_what_has_no_one_count_is_unknown_and_not_zero(name):
    assert torch_macs(name, {}, []) is None


@pytest.mark.parametrize("name", ["aten.add.Tensor", "aten.linalg_vector_norm.default", "torchvision.nms.default"])
def test_what_adds_up_no_products_counts_zero(name):
    assert torch_macs(name, {}, []) == 0


@pytest.mark.parametrize("kind", ["If", "Loop", "DFT", "com.microsoft.FusedConv"])
def test_onnx_nodes_with_bodies_or_of_other_domains_are_unknown(kind):
    assert onnx_macs(kind, [(1,)], [(1,)], {}) is None


def test_shapes_that_do_not_fit_the_node_make_the_count_unknown():
    assert onnx_macs("Conv", [(1, 3)], [None], {}) is None
    assert onnx_macs("Einsum", [(2,)], [(2,)], {"equation": "ij->i"}) is None
    assert onnx_macs("Conv", [(2**31,) * 4, (2**31,) * 4], [(2**31,) * 4], {}) is None


def test_quantised_recurrent_and_attention_nodes_of_onnx(tmp_path):
    def weight(name, kind, *shape):
        return numpy_helper.from_array(np.ones(shape, kind), name)

    f, i8 = np.dtype("float32"), np.dtype("int8")
    weights = [
        weight("w8", i8, 4, 3, 3, 3), weight("s", f), weight("z", i8), weight("wl", f, 1, 28, 5),
        weight("rl", f, 1, 28, 7), weight("m8", i8, 6, 5),
    ]  # fmt: skip
    nodes = [
        helper.make_node("QLinearConv", ["x8", "s", "z", "w8", "s", "z", "s", "z"], ["c"], name="conv"),
        helper.make_node("ConvInteger", ["x8", "w8"], ["ci"], name="integer"),
        helper.make_node("LSTM", ["t", "wl", "rl"], ["", "h"], hidden_size=7, name="lstm"),
        helper.make_node("MatMulInteger", ["a8", "m8"], ["mm"], name="product"),
        helper.make_node("Attention", ["q", "k", "k"], ["y"], q_num_heads=4, kv_num_heads=2, name="attention"),
    ]
    values = {
        "x8": (3, (1, 3, 8, 8)),
        "t": (1, (11, 2, 5)),
        "a8": (3, (2, 6)),
        "q": (1, (2, 10, 32)),
        "k": (1, (2, 12, 16)),
    }
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in values.items()]
    outputs = [
        helper.make_tensor_value_info(name, kind, None)
        for name, kind in (
            ("c", TensorProto.INT8),
            ("ci", TensorProto.INT32),
            ("h", 1),
            ("mm", TensorProto.INT32),
            ("y", 1),
        )
    ]
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    loaded = rt.graph.load(path, fuse=False)
    assert {o.name: o.macs for o in loaded.operators} == {
        "conv": 4 * 27 * 36,
        "integer": 4 * 27 * 36,
        "lstm": 11 * 2 * 28 * (5 + 7),
        "product": 2 * 6 * 5,
        "attention": 2 * 4 * 10 * 12 * (8 + 8),
    }
    learned = {tensor.name for tensor in loaded.tensors.values() if tensor.role == "parameter" and not tensor.buffer}
    assert learned == {"w8", "wl", "rl", "m8"}


@pytest.mark.parametrize("name", ["onnx:densenet121", "onnx:shufflenet", "onnx:resnet50"])
def test_merging_adds_up(name):
    raw = rt.graph.load(name, fuse=False)
    total = sum(operator.macs for operator in raw.operators)
    assert total > 10**8
    for options in (
        {"fuse": True, "in_place": False},
        {"fuse": False, "in_place": True},
        {"fuse": True, "in_place": True},
    ):
        merged = merge(raw, **options)
        assert len(merged.operators) < len(raw.operators)
        assert sum(operator.macs for operator in merged.operators) == total


def pair(macs, second=0):
    tensors = [Tensor("x", 8, "input"), Tensor("w", 4, "parameter", buffer=True), Tensor("a", 8), Tensor("b", 8)]
    operators = [
        Operator("c", "Conv", ("x", "w"), ("a",), macs=macs),
        Operator("r", "Relu", ("a",), ("b",), macs=second),
    ]
    return Graph("net", operators, tensors, ["b"])


def test_what_is_not_known_of_a_part_is_not_known_of_the_whole():
    assert merge(pair(7, 3), fuse=True, in_place=False).operators[0].macs == 10
    assert merge(pair(7, None), fuse=True, in_place=False).operators[0].macs is None


def test_macs_and_buffers_go_through_json_and_are_no_part_of_a_graphs_identity():
    graph = pair(7)
    form = graph_to_json(graph)
    assert graph_from_json(form) == graph
    assert form["operators"][0]["macs"] == 7
    assert form["tensors"][1]["buffer"] is True
    plain = pair(None, None)
    assert "macs" not in graph_to_json(plain)["operators"][0]
    bare = Graph("net", plain.operators, [dataclasses.replace(t, buffer=False) for t in plain.tensors.values()], ["b"])
    assert graph.digest == plain.digest == bare.digest


@pytest.mark.parametrize("macs", [-1, 1.5, "7", True, 2**81])
def test_counts_that_make_no_sense_are_refused(macs):
    with pytest.raises(rt.GraphError, match="multiply-accumulates"):
        Operator("c", "Conv", (), (), macs=macs)
    form = graph_to_json(pair(7))
    form["operators"][0]["macs"] = macs
    with pytest.raises(rt.GraphError, match="macs"):
        graph_from_json(form)


def test_a_buffer_is_true_or_false():
    with pytest.raises(rt.GraphError, match="buffer"):
        Tensor("x", 1, "parameter", buffer=1)
    form = graph_to_json(pair(7))
    form["tensors"][1]["buffer"] = "yes"
    with pytest.raises(rt.GraphError, match="buffer"):
        graph_from_json(form)
