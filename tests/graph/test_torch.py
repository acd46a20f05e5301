"""PyTorch programs as graphs: what is an operator, what is an alias, and that the operators compute the model."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from retensor.errors import GraphError
from retensor.graph.structure import Graph, Operator
from retensor.graph.torch import load_torch
from retensor.planning import Accelerator, execute, plan

VIEWS = {
    "view",
    "_unsafe_view",
    "reshape",
    "flatten",
    "transpose",
    "t",
    "permute",
    "expand",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "dropout",
    "as_strided",
    "narrow",
    "diagonal",
    "unfold",
    "movedim",
    "contiguous",
}


def outputs_by_operator(graph: Graph, seed: int = 0, keep_parameters: bool = True, shift: int = 0):
    """Storages of the outputs from running the operators in order, forgetting each tensor after its last use."""
    program = graph.program
    assert program is not None
    inputs = program.example_inputs(seed)
    held = dict(inputs)
    if not keep_parameters:
        held.update({t.name: program.parameter(t.name) for t in graph.tensors.values() if t.role == "parameter"})
    left = {name: len(users) for name, users in graph.consumers.items()}
    for operator in graph.operators:
        reads = {name: shifted(held[name], shift) for name in operator.inputs if name in held}
        before = {name: array.copy() for name, array in reads.items()}
        made = program.run_operator(operator, reads, keep_parameters)
        assert set(made) == set(operator.outputs)
        for name, array in made.items():
            assert array.dtype == np.uint8
            assert array.shape == (graph.tensors[name].nbytes,)
        for name, array in reads.items():
            assert np.array_equal(array, before[name]), f"'{operator.name}' wrote into its input '{name}'"
            array[:] = 0xA5  # a result that shares its input's memory would change with it
        for name in operator.inputs:
            left[name] -= 1
            if name in held and not left[name] and name not in graph.outputs:
                del held[name]
        held.update({name: array.copy() for name, array in made.items()})
    return inputs, {name: held[name] if name in held else program.parameter(name) for name in graph.outputs}


def shifted(array, shift):
    """A copy that starts ``shift`` bytes off any alignment."""
    room = np.zeros(array.size + 64, np.uint8)
    start = (-room.ctypes.data) % 32 + shift
    room[start : start + array.size] = array
    return room[start : start + array.size]


def assert_runs_bit_equal(graph: Graph, seed: int = 0, keep_parameters: bool = True, shift: int = 0):
    inputs, results = outputs_by_operator(graph, seed, keep_parameters, shift)
    plain = graph.program.run_plain(inputs)
    assert set(plain) == set(graph.outputs)
    for name in graph.outputs:
        assert np.array_equal(results[name], plain[name]), f"output '{name}' differs"
    return inputs, results


def numbers(array, dtype=np.float32):
    return np.frombuffer(array.tobytes(), dtype)


def kinds(graph: Graph) -> list[str]:
    parts = [part for operator in graph.operators for part in operator.kind.split("+")]
    return [part.removeprefix("aten.").split(".")[0] for part in parts]


class Forward(nn.Module):
    """A module whose forward is a given function."""

    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        return self.function(self, x)


def load_function(function, x, fuse=False, **tensors):
    return load_torch(Forward(function, **tensors), example_inputs=x, fuse=fuse)


class Everything(nn.Module):
    """In-place operators, views of many sorts, tied weights, several results, a channel shuffle."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.layer_norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("table", torch.randn(4, 8))

    def forward(self, x):
        x = torch.relu_(self.norm(self.conv(x)))
        x = functional.dropout(x, 0.5, self.training)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        y = x.clone()
        y[:, 0] = 1.0
        y += x[:, ::3].sum(1, keepdim=True)
        left, right = x.chunk(2, -1)
        z = torch.cat([right, left], -1).contiguous()
        values, indices = z.max(1)
        z = self.layer_norm(self.second(self.first(z))) + y + values.unsqueeze(1) + indices.float().unsqueeze(1)
        z = torch.cat([self.token.expand(n, -1, -1), z], 1)
        z = z.transpose(1, 2).reshape(n, -1).view(n, -1, 8)
        z = self.attention(z, z, z, need_weights=False)[0] + self.table[torch.arange(4) % 3].mean(0)
        z = functional.interpolate(z.unsqueeze(1), scale_factor=2, mode="bilinear")
        wide = z.expand(-1, 3, -1, -1)
        return {
            "wide": wide,
            "column": z[..., 1],
            "same": z.to(torch.float32),
            "sum": wide.sum(1),
            "none": None,
            "k": 3,
        }


@pytest.fixture(scope="module")
def everything():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Everything()


# What is an operator and what is an alias


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.view(-1, 4),
        lambda m, x: x.reshape(2, -1),
        lambda m, x: x.transpose(0, 1),
        lambda m, x: x.permute(2, 0, 1),
        lambda m, x: x[:, 1],
        lambda m, x: x[:, ::2, 1:],
        lambda m, x: x.unsqueeze(0).expand(5, -1, -1, -1),
        lambda m, x: x.split(1, 1)[1],
        lambda m, x: x.chunk(2, 0)[0],
        lambda m, x: x.unbind(2)[3],
        lambda m, x: x.contiguous(),
        lambda m, x: x.to(torch.float32),
        lambda m, x: x.detach(),
        lambda m, x: functional.dropout(x, 0.3, training=False),
        lambda m, x: x.flatten(),
        lambda m, x: x.squeeze(),
        lambda m, x: x.diagonal(0, 1, 2),
        lambda m, x: x.unfold(2, 2, 1),
        lambda m, x: x.view(torch.int32).view(torch.float32),
        lambda m, x: x.transpose(0, 1).transpose(0, 1).contiguous(),
    ],
)
def test_a_view_is_an_alias_and_its_reader_reads_the_whole_base(function):
    x = torch.randn(2, 4, 4)
    graph = load_function(lambda m, x: function(m, x.exp()).neg(), x)
    assert kinds(graph) == ["exp", "neg"]
    assert graph.operators[1].inputs == ("exp",)
    assert graph.tensors["exp"].nbytes == 128
    inputs, results = assert_runs_bit_equal(graph)
    expected = function(None, torch.from_numpy(numbers(inputs["x"]).reshape(2, 4, 4).copy()).exp()).neg()
    # The result keeps whatever dense strides eager execution gives it: its bytes are compared in memory order.
    assert sorted(numbers(results["neg"]).tolist()) == sorted(expected.flatten().tolist())


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda m, x: x.transpose(0, 1).reshape(-1), "clone"),
        (lambda m, x: x.transpose(0, 1).contiguous(), "clone"),
        (lambda m, x: x.clone(), "clone"),
        (lambda m, x: torch.cat([x]), "cat"),
        (lambda m, x: x.to(torch.float64), "_to_copy"),
        (lambda m, x: x[:, torch.tensor([0, 1])], "index"),
        (lambda m, x: x.repeat(1, 2), "repeat"),
    ],
)
def test_what_copies_is_an_operator(function, kind):
    graph = load_function(lambda m, x: function(m, x.exp()).neg(), torch.randn(2, 4))
    assert kinds(graph)[0] == "exp"
    assert kinds(graph)[-2:] == [kind, "neg"]
    assert_runs_bit_equal(graph)


def test_in_place_operators_become_functional_and_leave_their_input_alone():
    def function(module, x):
        y = x * 2
        kept = y + 1
        y.relu_()
        y.add_(kept)
        y[0] = 5.0
        return y, kept

    graph = load_function(function, torch.randn(3, 4))
    assert not [kind for kind in kinds(graph) if kind.endswith("_")]
    inputs, results = assert_runs_bit_equal(graph)
    x = numbers(inputs["x"]).reshape(3, 4)
    expected = np.maximum(x * 2, 0) + (x * 2 + 1)
    expected[0] = 5.0
    assert np.array_equal(numbers(results[graph.outputs[0]]).reshape(3, 4), expected)
    assert np.array_equal(numbers(results[graph.outputs[1]]).reshape(3, 4), x * 2 + 1)


def test_a_slice_and_an_expansion_of_a_parameter_are_the_whole_parameter():
    graph = load_function(
        lambda m, x: x + m.table[1].expand(2, 4) + m.table[0], torch.randn(2, 4), table=torch.randn(3, 4)
    )
    assert kinds(graph) == ["add", "add"]
    parameters = [tensor for tensor in graph.tensors.values() if tensor.role == "parameter"]
    assert [tensor.nbytes for tensor in parameters] == [48]
    assert all(parameters[0].name in operator.inputs for operator in graph.operators)
    assert_runs_bit_equal(graph, keep_parameters=False)


def test_tied_weights_are_one_tensor_even_as_a_transpose():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 6, bias=False)
            self.two = nn.Linear(4, 6, bias=False)
            self.two.weight = self.one.weight
            self.back = nn.Linear(6, 4, bias=False)
            self.back.weight = nn.Parameter(self.one.weight.detach().t())

        def forward(self, x):
            return self.back(self.two(x)) + self.back(self.one(x))

    graph = load_torch(Tied(), example_inputs=torch.randn(2, 4), fuse=False)
    parameters = [tensor for tensor in graph.tensors.values() if tensor.role == "parameter"]
    assert [tensor.nbytes for tensor in parameters] == [96]
    assert_runs_bit_equal(graph)
    assert_runs_bit_equal(graph, keep_parameters=False)


def test_a_parameter_that_repeats_a_small_storage_counts_the_storage():
    graph = load_function(lambda m, x: x * m.row, torch.randn(5, 4), row=torch.randn(4).expand(5, 4))
    assert [t.nbytes for t in graph.tensors.values() if t.role == "parameter"] == [16]
    assert_runs_bit_equal(graph, keep_parameters=False)


def test_a_parameter_that_is_a_strided_part_of_a_big_storage_counts_its_own_elements():
    graph = load_function(lambda m, x: x * m.part, torch.randn(5, 4), part=torch.randn(50, 8)[5:10, ::2])
    assert [t.nbytes for t in graph.tensors.values() if t.role == "parameter"] == [80]
    assert_runs_bit_equal(graph, keep_parameters=False)


def test_only_the_results_that_are_read_are_tensors():
    graph = load_function(lambda m, x: x.exp().max(1)[0].neg(), torch.randn(3, 4))
    assert graph.operators[1].outputs == ("max_1.0",)
    both = load_function(lambda m, x: x.exp().max(1)[1].neg() + x.exp().max(1)[0], torch.randn(3, 4))
    assert [operator.outputs for operator in both.operators if "max" in operator.name] == [
        ("max_1.1",),
        ("max_2.0",),
    ]
    assert both.tensors["max_1.1"].nbytes == 24
    assert both.tensors["max_1.1"].dtype == "int64"
    assert_runs_bit_equal(both)


def test_dead_nodes_and_unused_parameters_and_inputs_are_dropped():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(4, 4)

        def forward(self, x, y):
            self.unused(x).sum()
            return x + 1

    graph = load_torch(Dead(), example_inputs=(torch.randn(2, 4), torch.randn(3)), fuse=False)
    assert kinds(graph) == ["add"]
    assert set(graph.tensors) == {"x", "add"}
    inputs, _ = outputs_by_operator(graph)
    assert np.array_equal(numbers(graph.program.run_plain({"x": inputs["x"]})["add"]), numbers(inputs["x"]) + 1)


def test_scalars_and_none_are_not_tensors_but_zero_dimensional_tensors_are():
    graph = load_function(lambda m, x: (x.sum() * 2, x.shape[0], None), torch.randn(3, 4))
    assert graph.tensors["sum_1"].nbytes == 4
    assert graph.tensors["sum_1"].shape == ()
    assert graph.outputs == ("mul",)
    assert_runs_bit_equal(graph)


def test_an_input_or_a_parameter_that_is_also_an_output_keeps_its_role():
    graph = load_function(lambda m, x: (x.t(), m.table[0], x + 1), torch.randn(3, 4), table=torch.randn(2, 4))
    roles = [graph.tensors[name].role for name in graph.outputs]
    assert roles == ["input", "parameter", "activation"]
    assert_runs_bit_equal(graph)


def test_an_output_that_is_part_of_a_storage_yields_the_whole_storage():
    graph = load_function(lambda m, x: (x.exp()[:, 1:3], x.exp().unfold(1, 2, 1)), torch.randn(3, 4))
    inputs, results = assert_runs_bit_equal(graph)
    for result in results.values():
        assert np.array_equal(numbers(result), torch.from_numpy(numbers(inputs["x"]).copy()).exp().numpy())


def test_dense_strides_of_eager_execution_are_kept():
    # channels_last: the convolution's result is dense in memory but not row by row.
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    graph = load_torch(conv, example_inputs=torch.randn(1, 3, 6, 6).to(memory_format=torch.channels_last), fuse=False)
    inputs, results = assert_runs_bit_equal(graph)
    x = torch.from_numpy(numbers(inputs["input"]).copy()).view(1, 6, 6, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = conv(x).permute(0, 2, 3, 1).contiguous().numpy()
    assert np.array_equal(numbers(results[graph.outputs[0]]), expected.ravel())


def test_conjugate_views_run_as_operators():
    graph = load_function(lambda m, x: torch.view_as_real((x * 1j).conj() * 2), torch.randn(3, 4))
    assert graph.tensors["mul"].dtype == "complex64"
    assert graph.tensors["mul"].nbytes == 96
    assert_runs_bit_equal(graph)


def test_fused_transformer_layers_are_not_taken_and_the_setting_is_restored():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.requires_grad_(False)
    graph = load_torch(layer, example_inputs=torch.randn(1, 5, 8), fuse=False)
    assert "scaled_dot_product_attention" in kinds(graph)
    assert kinds(graph).count("linear") == 4
    assert torch.backends.mha.get_fastpath_enabled()
    assert layer.training
    assert layer.self_attn.training


def test_no_grad_and_autocast_blocks_are_inlined():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            with torch.enable_grad():
                x = self.linear(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.linear(x).relu()

    graph = load_torch(Blocks(), example_inputs=torch.randn(2, 4), fuse=False)
    assert graph.tensors[graph.outputs[0]].dtype == "bfloat16"
    assert_runs_bit_equal(graph)


# Running


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("keep_parameters", [True, False])
def test_everything_at_once_is_bit_equal_operator_by_operator(everything, fuse, keep_parameters):
    graph = load_torch(everything, example_inputs=torch.randn(1, 3, 6, 6), fuse=fuse)
    assert not set(kinds(graph)) & VIEWS
    for seed in (0, 1):
        assert_runs_bit_equal(graph, seed, keep_parameters)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_storages_at_any_address_work(everything, shift):
    graph = load_torch(everything, example_inputs=torch.randn(1, 3, 6, 6), fuse=False)
    assert_runs_bit_equal(graph, keep_parameters=False, shift=shift)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet18", (1, 3, 64, 64)),
        ("torchvision:shufflenet_v2_x0_5", (2, 3, 64, 64)),
        ("squeezenet1_1", (1, 3, 96, 96)),
        ("mobilenet_v3_small", (1, 3, 64, 64)),
        ("timm:vit_tiny_patch16_224", (1, 3, 224, 224)),
        ("lraspp_mobilenet_v3_large", (1, 3, 64, 64)),
        ("swin_t", (1, 3, 64, 64)),
        # Fake kernels foretell other strides than the real ones of its depthwise convolutions.
        ("timm:pvt_v2_b0", (1, 3, 224, 224)),
    ],
)
def test_small_networks_are_bit_equal_operator_by_operator(name, shape, fuse):
    graph = load_torch(name, inputs={"x": shape}, fuse=fuse)
    assert_runs_bit_equal(graph, seed=3)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("fuse", [False, True])
def test_a_small_transformer_is_bit_equal_operator_by_operator(fuse):
    module = nn.Transformer(16, 4, 2, 2, 32)
    arguments = {"src": torch.randn(7, 2, 16), "tgt": torch.randn(5, 2, 16)}
    graph = load_torch(module, example_inputs=arguments, fuse=fuse)
    assert {tensor.name for tensor in graph.tensors.values() if tensor.role == "input"} == {"src", "tgt"}
    assert_runs_bit_equal(graph, keep_parameters=False)


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", ["resnet50", "densenet121", "vit_b_16", "r2plus1d_18", "torch:transformer"])
def test_large_networks_are_bit_equal_operator_by_operator(name, fuse):
    assert_runs_bit_equal(load_torch(name, fuse=fuse))


def test_in_place_merging_is_bit_equal(everything):
    graph = load_torch(everything, example_inputs=torch.randn(1, 3, 6, 6), fuse=True, in_place=True)
    assert graph.options["in_place"] is True
    assert_runs_bit_equal(graph)


def test_embeddings_get_valid_indices_and_inputs_follow_the_seed():
    graph = load_torch(nn.Embedding(2, 5), example_inputs=torch.zeros(3, 4, dtype=torch.int64), fuse=False)
    one, again, other = (graph.program.example_inputs(seed) for seed in (0, 0, 1))
    name = next(iter(one))
    assert set(numbers(one[name], np.int64)) <= {0, 1}
    assert np.array_equal(one[name], again[name])
    assert not np.array_equal(one[name], other[name])
    assert_runs_bit_equal(graph)


def test_the_callers_random_state_and_threads_stay():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    graph = load_torch("squeezenet1_1", inputs={"x": (1, 3, 64, 64)}, fuse=False)
    assert_runs_bit_equal(graph)
    assert torch.equal(torch.rand(1), expected)
    assert torch.is_grad_enabled()
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)


def test_an_operator_of_another_program_and_a_missing_storage_are_refused():
    program = load_function(lambda m, x: x.exp().neg(), torch.randn(3)).program
    with pytest.raises(GraphError, match="'elsewhere'"):
        program.run_operator(Operator("elsewhere", "aten.exp.default", ("x",), ("y",)), {}, True)
    with pytest.raises(GraphError, match="'x', which was not given"):
        program.run_operator(Operator("exp", "aten.exp.default", ("x",), ("exp",)), {}, True)
    with pytest.raises(GraphError, match="needs 12"):
        program.run_operator(Operator("exp", "aten.exp.default", ("x",), ("exp",)), {"x": np.zeros(8, np.uint8)}, True)
    with pytest.raises(GraphError, match="uint8"):
        program.run_operator(Operator("exp", "e", ("x",), ("exp",)), {"x": np.zeros(3, np.float32)}, True)
    with pytest.raises(GraphError, match="does not make tensor 'neg'"):
        program.run_operator(Operator("exp", "e", ("x",), ("neg",)), {"x": np.zeros(12, np.uint8)}, True)
    with pytest.raises(GraphError, match="no parameter"):
        program.parameter("nothing")


# Sources, element types, options


def test_an_exported_program_and_its_module_give_the_same_graph(everything):
    x = torch.randn(1, 3, 6, 6)
    everything.eval()
    with torch.no_grad():
        exported = torch.export.export(everything, (x,))
    one, other = load_torch(exported, fuse=False), load_torch(everything, example_inputs=x, fuse=False)
    assert (one.name, one.digest) == (other.name, other.digest)
    assert one.options == {"fuse": False, "in_place": False, "dtype": None, "inputs": {"x": [1, 3, 6, 6]}}
    assert load_torch(exported, fuse=False, inputs={"x": (1, 3, 6, 6)}).digest == one.digest


def test_options_load_the_same_graph_again():
    graph = load_torch("squeezenet1_1", inputs={"x": (1, 3, 64, 64)}, dtype="int8", fuse=False)
    assert load_torch("squeezenet1_1", **graph.options).digest == graph.digest


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [(None, 60), ("int8", 15), ("float16", 30), ("int4", 8), ("float64", 120), ("float32", 60)]
)
def test_an_element_type_recounts_floating_point_tensors_only(dtype, nbytes):
    graph = load_torch(
        Forward(lambda m, x: (x.exp(), x.argmax(1), x > 0)), example_inputs=torch.randn(3, 5), dtype=dtype, fuse=False
    )
    assert [graph.tensors[name].nbytes for name in graph.outputs] == [nbytes, 24, 15]
    assert graph.options["dtype"] == dtype
    # A program runs at its own element type only.
    assert (graph.program is not None) == (dtype in (None, "float32"))


def test_modules_on_the_meta_device_can_be_planned_but_not_run():
    with torch.device("meta"):
        module, x = nn.Linear(4, 4), torch.randn(2, 4)
    graph = load_torch(module, example_inputs=x, fuse=False)
    assert graph.tensors["linear"].nbytes == 32
    assert graph.program is None


def test_inputs_reshape_the_example_inputs_of_a_module():
    graph = load_torch(nn.ReLU(), example_inputs=torch.randn(2, 4), inputs={"input": (7, 3)}, fuse=False)
    assert graph.tensors[graph.outputs[0]].shape == (7, 3)
    assert load_torch(nn.ReLU(), inputs={"input": (7, 3)}, fuse=False).digest == graph.digest


def test_importing_the_loader_does_not_import_torch():
    code = "import sys, retensor.graph.torch, retensor.graph.torch_program; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Any small module


def _steps():
    names = st.sampled_from(sorted(STEPS))
    return st.lists(st.tuples(names, st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=12)


STEPS = {
    "relu": lambda m, a, b: a.relu(),
    "relu_": lambda m, a, b: a.clone().relu_(),
    "set": lambda m, a, b: _set_first(a),
    "transpose": lambda m, a, b: a.transpose(0, -1),
    "flatten": lambda m, a, b: a.reshape(-1, a.shape[-1]),
    "merge": lambda m, a, b: a.transpose(0, -1).flatten(),
    "slice": lambda m, a, b: a[..., ::2],
    "select": lambda m, a, b: a[0] if a.dim() > 1 else a,
    "expand": lambda m, a, b: a.unsqueeze(0).expand(2, *a.shape) if a.dim() < 4 else a,
    "chunk": lambda m, a, b: a.chunk(2, -1)[-1],
    "unbind": lambda m, a, b: torch.stack(a.unbind(0)[::-1]),
    "cat": lambda m, a, b: torch.cat([a, a.flip(0)], -1) if a.numel() < 500 else a,
    "add": lambda m, a, b: a + b.mean(),
    "add_": lambda m, a, b: a.clone().add_(b.sum()),
    "max": lambda m, a, b: a.max(0).values + a.max(0).indices.float().mean(),
    "softmax": lambda m, a, b: a.softmax(-1),
    "scale": lambda m, a, b: a * m.weight[1:3].sum() + m.weight[0],
    "sort": lambda m, a, b: torch.sort(a, -1)[0],
    "matmul": lambda m, a, b: a.reshape(1, -1) @ m.weight.new_ones(a.numel(), 3),
    "norm": lambda m, a, b: functional.layer_norm(a, a.shape[-1:]),
    "double": lambda m, a, b: a.double().square().float(),
    "contiguous": lambda m, a, b: a.contiguous(),
}


def _set_first(tensor):
    tensor = tensor.clone()
    tensor[..., :1] = tensor.mean()
    return tensor


class Random(nn.Module):
    """Steps on earlier values, chosen by number."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, 5))

    def forward(self, x):
        values = [x * 1.5]
        for name, one, other in self.steps:
            value = STEPS[name](self, values[one % len(values)], values[other % len(values)])
            values.append(value if value.dim() else value.reshape(1))
        return torch.cat([value.flatten() for value in values]), values[-1]


@given(
    steps=_steps(), shape=st.lists(st.integers(1, 5), min_size=2, max_size=3), fuse=st.booleans(), keep=st.booleans()
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_small_module_is_bit_equal_operator_by_operator(steps, shape, fuse, keep):
    module = Random(steps)
    graph = load_torch(module, example_inputs=torch.zeros(shape), fuse=fuse)
    inputs, results = assert_runs_bit_equal(graph, keep_parameters=keep)
    assert not set(kinds(graph)) & VIEWS
    with torch.no_grad():
        expected = module(torch.from_numpy(numbers(inputs["x"]).reshape(shape).copy()))[0]
    assert np.array_equal(numbers(results[graph.outputs[0]]), expected.numpy(), equal_nan=True)


def test_outputs_come_back_in_the_shapes_that_the_module_returns() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.conv(x)
            return {"turned": y.transpose(1, 3), "mean": y.mean((2, 3)), "half": y.to(torch.bfloat16)}

    module = Two().eval()
    example = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    graph = load_torch(module, example_inputs=(example,))
    made = plan(graph, Accelerator("M_R", alignment=4))
    name = next(t.name for t in graph.tensors.values() if t.role == "input")
    arrays = execute(graph, made, inputs={name: example.numpy()}).output_arrays()
    with torch.no_grad():
        expected = list(module(example).values())
    assert [array.shape for array in arrays.values()] == [tuple(value.shape) for value in expected]
    for array, value in zip(arrays.values(), expected, strict=True):
        assert torch.equal(torch.from_numpy(array), value.float())
