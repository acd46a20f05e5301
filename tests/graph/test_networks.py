"""Networks by name: the ten of the paper, their sizes, and what is said about a name that nobody knows."""

from __future__ import annotations

import sys

import pytest
import torch

from retensor.errors import GraphError, MissingExtraError
from retensor.graph import networks
from retensor.graph.structure import Graph
from retensor.graph.torch import load_torch

VIEW_WORDS = (
    "view",
    "reshape",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "split",
    "chunk",
    "squeeze",
    "alias",
)

# Operators unmerged, and the operator that sets M_R: elements of its activations, from the architecture by hand.
PAPER = {
    # addition of the first stage: two inputs and one output of 256 x 56 x 56
    "ResNet-50": (174, 3 * 256 * 56 * 56),
    # the stem's activation, and relu of all channels of a block
    "DenseNet-121": (430, 2 * 64 * 112 * 112),
    "ResNeXt-50": (174, 3 * 256 * 56 * 56),
    # activation between the spatial and the temporal convolution: 144 mid channels
    "R(2+1)D-18": (118, 2 * 144 * 16 * 112 * 112),
    "S3D": (256, 2 * 64 * 16 * 112 * 112),
    # dilated last stage keeps 28 x 28
    "FCN": (177, 3 * 2048 * 28 * 28),
    "L-RASPP": (193, 2 * 64 * 112 * 112),
    "DeepLabV3": (198, 3 * 2048 * 28 * 28),
    # activation of the feed-forward layer
    "Transformer": (176, 2 * networks.TRANSFORMER_TOKENS * 2048),
    "ViT": (137, 2 * 197 * 3072),
}


# The same of the searched networks, at 224 pixels.
SEARCHED = {
    # padding of the stem's activation for a 5 x 5, and for a 7 x 7 convolution of stride 2
    "PNASNet-5": (954, 96 * (111 * 111 + 115 * 115)),
    "NASNet-A": (1264, 96 * (111 * 111 + 117 * 117)),
    # the first cell's squeeze to 128 channels before it reduces
    "AmoebaNet-D": (1045, 2 * 128 * 112 * 112),
    # the stem
    "DARTS": (708, 2 * 24 * 112 * 112),
}


def minimum_memory(graph: Graph) -> int:
    return max(
        sum(graph.tensors[name].nbytes for name in graph.operator_tensors(operator, parameters=False))
        for operator in graph.operators
    )


@pytest.fixture(scope="module", params=sorted(PAPER))
def paper_network(request):
    return request.param, load_torch(networks.PAPER_NETWORKS[request.param], dtype="int8", fuse=False)


def test_the_ten_networks_of_the_paper_are_named():
    assert set(networks.PAPER_NETWORKS) == set(PAPER)
    assert set(networks.PAPER_NETWORKS.values()) <= set(networks.names())


def test_a_paper_network_has_its_operators_and_minimum_memory(paper_network):
    name, graph = paper_network
    operators, elements = PAPER[name]
    assert len(graph.operators) == operators
    assert minimum_memory(graph) == elements


def test_the_four_searched_networks_are_named():
    assert set(networks.SEARCHED_NETWORKS) == set(SEARCHED)
    assert set(networks.SEARCHED_NETWORKS.values()) <= set(networks.names())
    assert not set(networks.SEARCHED_NETWORKS) & set(networks.PAPER_NETWORKS)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "DARTS")) for n in SEARCHED])
def test_a_searched_network_has_its_operators_and_minimum_memory_at_224_pixels(name):
    graph = load_torch(name, dtype="int8", fuse=False)
    operators, elements = SEARCHED[name]
    assert len(graph.operators) == operators
    assert minimum_memory(graph) == elements
    assert graph.options["inputs"] == {"x": [1, 3, 224, 224]}
    for operator in graph.operators:
        assert not any(word in operator.kind for word in VIEW_WORDS), operator.kind


def test_a_paper_network_has_no_view_among_its_operators(paper_network):
    _, graph = paper_network
    for operator in graph.operators:
        assert not any(word in operator.kind for word in VIEW_WORDS), operator.kind
        assert operator.outputs
        assert operator.inputs


def test_a_paper_network_counts_one_byte_an_element_and_every_tensor_is_used(paper_network):
    _, graph = paper_network
    for tensor in graph.tensors.values():
        assert tensor.nbytes == torch.Size(tensor.shape).numel()
        assert tensor.dtype == "int8"
        assert graph.consumers[tensor.name] or tensor.name in graph.outputs
    assert graph.program is None


def test_merging_a_paper_network_keeps_its_outputs_and_needs_no_more_memory(paper_network):
    name, graph = paper_network
    merged = load_torch(networks.PAPER_NETWORKS[name], dtype="int8", fuse=True)
    assert merged.outputs == graph.outputs
    assert len(merged.operators) <= len(graph.operators)
    assert minimum_memory(merged) <= minimum_memory(graph)
    nodes = [node for operator in merged.operators for node in operator.nodes]
    assert sorted(nodes) == sorted(operator.name for operator in graph.operators)


@pytest.mark.parametrize(
    ("name", "module", "parameters"),
    [
        # Published parameter counts.
        ("ResNet-50", "ResNet", 25_557_032),
        ("DenseNet-121", "DenseNet", 7_978_856),
        ("torch:transformer", "Transformer", 44_140_544),
        ("ViT", "VisionTransformer", 86_567_656),
        ("R(2+1)D-18", "VideoResNet", 31_505_325),
        ("PNASNet-5", "PNASNet5Large", 86_057_668),
        ("NASNet-A", "NASNetALarge", 88_753_150),
        ("AmoebaNet-D", "AmoebaNetD", 122_470_120),
        ("torch:darts", "DARTS", 4_718_752),
    ],
)
def test_a_network_is_the_published_one(name, module, parameters):
    network = networks.build(name)
    assert type(network.module).__name__ == module
    assert sum(weight.numel() for weight in network.module.parameters()) == parameters
    assert not network.module.training


@pytest.mark.parametrize(
    ("name", "full", "shapes"),
    [
        ("squeezenet1_1", "torchvision:squeezenet1_1", {"x": (1, 3, 224, 224)}),
        ("torchvision:r2plus1d_18", "torchvision:r2plus1d_18", {"x": (1, 3, 16, 224, 224)}),
        ("S3D", "torchvision:s3d", {"x": (1, 3, 16, 224, 224)}),
        ("vit_tiny_patch16_224", "timm:vit_tiny_patch16_224", {"x": (1, 3, 224, 224)}),
        ("timm:efficientnet_b1", "timm:efficientnet_b1", {"x": (1, 3, 224, 224)}),
        ("timm:mixer_s32_224", "timm:mixer_s32_224", {"x": (1, 3, 224, 224)}),
        ("timm:test_vit", "timm:test_vit", {"x": (1, 3, 160, 160)}),
        ("PNASNet-5", "timm:pnasnet5large", {"x": (1, 3, 224, 224)}),
        ("timm:pnasnet5large", "timm:pnasnet5large", {"x": (1, 3, 331, 331)}),
        ("DARTS", "torch:darts", {"x": (1, 3, 224, 224)}),
        ("torch:darts", "torch:darts", {"x": (1, 3, 224, 224)}),
        ("AmoebaNet-D", "torch:amoebanet_d", {"x": (1, 3, 224, 224)}),
        ("torch:transformer", "torch:transformer", {"src": (128, 1, 512), "tgt": (128, 1, 512)}),
    ],
)
def test_a_name_has_its_library_and_default_inputs(name, full, shapes):
    network = networks.build(name)
    assert network.name == full
    if full == "timm:efficientnet_b1":
        shapes = {"x": (1, *network.module.default_cfg["input_size"])}
    assert {key: tuple(value.shape) for key, value in network.arguments.items()} == shapes


def test_a_name_in_both_libraries_is_torchvisions_unless_said_otherwise():
    assert networks.build("resnet18").name == "torchvision:resnet18"
    assert networks.build("timm:resnet18").name == "timm:resnet18"


def test_inputs_are_given_by_argument_name_and_the_others_keep_their_default():
    network = networks.build("torch:transformer", {"tgt": (10, 1, 512)})
    assert {key: tuple(value.shape) for key, value in network.arguments.items()} == {
        "src": (128, 1, 512),
        "tgt": (10, 1, 512),
    }
    # The only input answers to "x" under any name.
    assert networks.build("DARTS", {"x": (2, 3, 96, 96)}).arguments["x"].shape == (2, 3, 96, 96)
    assert networks.build("alexnet", {"x": (2, 3, 96, 96)}).arguments["x"].shape == (2, 3, 96, 96)
    assert networks.module_shapes(torch.nn.ReLU(), {"x": [3]}, None) == {"input": (3,)}


def test_weights_are_the_same_each_time_and_the_callers_random_state_stays():
    before = torch.get_rng_state()
    one, other = networks.build("squeezenet1_1").module, networks.build("squeezenet1_1").module
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_building_reaches_for_no_network(monkeypatch):
    import socket

    def refuse(*arguments, **keywords):
        raise AssertionError("a network was reached for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    networks.build("FCN")
    networks.build("timm:vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("resnet5O", "torchvision:resnet50"),
        ("torchvision:densnet121", "torchvision:densenet121"),
        ("timm:vit_tiny_patch16_24", "timm:vit_tiny_patch16_224"),
        ("torch:transfomer", "torch:transformer"),
        ("torch:amoebanet", "torch:amoebanet_d"),
        ("RESNET50", "torchvision:resnet50"),
    ],
)
def test_an_unknown_name_is_met_with_a_near_one(name, suggestion):
    with pytest.raises(GraphError, match=f"no network is named '{name}'; did you mean .*'{suggestion}'"):
        networks.build(name)


@pytest.mark.parametrize("name", ["", ":", "qqqqqqqqqqqq", "torch:", "timm:local-dir:/", "../resnet50", "a" * 10_000])
def test_nonsense_names_are_refused(name):
    with pytest.raises(GraphError, match=r"no network is named|names no library"):
        networks.build(name)


@pytest.mark.parametrize("shape", [None, 3, "3x3", (3, -1), (3, 0), (3, 2.0), (3, True), (2**40, 2**40), (1,) * 65])
def test_shapes_that_are_none_are_refused(shape):
    with pytest.raises(GraphError, match="input 'x'"):
        networks.checked_shape("x", shape)


@pytest.mark.parametrize("missing", ["torch", "torchvision", "timm"])
def test_a_missing_library_is_named_by_its_extra(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r"the torch extra: pip install \".*\[torch\]\""):
        networks.names() if missing != "torch" else networks.build("torch:transformer")
