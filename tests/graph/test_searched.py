"""DARTS and AmoebaNet-D: their cells, published sizes, shapes, and that they export and run."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from retensor.graph.searched import AMOEBANET_D, DARTS_V2, Genotype, amoebanet_d, darts
from retensor.graph.torch import load_torch


def parameters(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def states_read(genotype: Genotype) -> list[list[int]]:
    """For each kind of cell, the states that its edges read."""
    return [[state for _, state in edges] for edges in (genotype.normal, genotype.reduction)]


def test_darts_has_the_edges_of_its_second_order_search():
    assert states_read(DARTS_V2) == [[0, 1, 0, 1, 1, 0, 0, 2], [0, 1, 2, 1, 0, 2, 2, 1]]
    assert Counter(name for name, _ in DARTS_V2.normal) == {"sep_conv_3x3": 5, "identity": 2, "dil_conv_3x3": 1}
    assert Counter(name for name, _ in DARTS_V2.reduction) == {"max_pool_3x3": 5, "identity": 3}
    assert DARTS_V2.normal_concat == DARTS_V2.reduction_concat == (2, 3, 4, 5)


def test_amoebanet_d_has_the_edges_of_its_public_code():
    assert states_read(AMOEBANET_D) == [[1, 1, 1, 0, 0, 0, 2, 2, 1, 5], [0, 0, 2, 1, 2, 2, 3, 1, 2, 3]]
    assert AMOEBANET_D.normal_concat == (0, 3, 4, 6)
    assert AMOEBANET_D.reduction_concat == (4, 5, 6)


@pytest.mark.parametrize("genotype", [DARTS_V2, AMOEBANET_D])
def test_an_edge_reads_an_earlier_state_and_strides_only_where_it_can(genotype):
    for edges, concat in (
        (genotype.normal, genotype.normal_concat),
        (genotype.reduction, genotype.reduction_concat),
    ):
        assert all(state < 2 + i // 2 for i, (_, state) in enumerate(edges))
        assert all(state < 2 + len(edges) // 2 for state in concat)
    assert all(state >= 2 for name, state in genotype.reduction if name == "identity")


def test_darts_has_its_published_parameters():
    # 4.7 million in the paper; exactly so in its code.
    assert parameters(darts()) == 4_718_752


@pytest.mark.parametrize(
    ("cells", "filters", "millions"),
    # Table 1 of the GPipe paper as torchgpipe reproduces it, with the decimals stated there.
    [(18, 208, "81.5"), (18, 416, "319.0"), (18, 544, "542.7"), (36, 544, "1055.8"), (72, 512, "1844.9")],
)
def test_amoebanet_d_has_its_published_parameters(cells, filters, millions):
    with torch.device("meta"):
        assert f"{parameters(amoebanet_d(cells, filters)) / 1e6:.1f}" == millions


@pytest.mark.parametrize(
    ("module", "sizes"),
    [
        # Of 14 cells, 4 and 9 are reductions.
        (darts(8, 14), [28] * 4 + [14] * 5 + [7] * 5),
        # Two reductions, a cell at 28 pixels, a reduction, a cell at 14, a reduction, a cell at 7.
        (amoebanet_d(3, 16), [56, 28, 28, 14, 14, 7, 7]),
    ],
    ids=["darts", "amoebanet_d"],
)
def test_cells_have_the_sizes_of_the_skeleton(module, sizes):
    module.eval()
    found = []
    with torch.no_grad():
        interpreter = torch.fx.Interpreter(module)
        run_node = interpreter.run_node

        def watch(node):
            value = run_node(node)
            # A cell ends in the concatenation of its states, which are more than a reduction's two halves.
            if node.target is torch.cat and len(node.args[0]) > 2:
                found.append(value.shape[-1])
            return value

        interpreter.run_node = watch
        output = interpreter.run(torch.zeros(2, 3, 224, 224))
    assert found == sizes
    assert output.shape == (2, 1000)


@pytest.mark.parametrize("module", [darts(8, 6), amoebanet_d(3, 16)], ids=["darts", "amoebanet_d"])
def test_it_exports_and_its_operators_run_to_what_the_module_gives(module):
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    graph = load_torch(module, example_inputs=image, fuse=False)
    kinds = Counter(operator.kind for operator in graph.operators)
    convolutions = sum(isinstance(part, torch.nn.Conv2d) for part in module.modules())
    assert sum(count for kind, count in kinds.items() if "conv2d" in kind) == convolutions
    assert len(graph.outputs) == 1
    assert sum(tensor.role == "input" for tensor in graph.tensors.values()) == 1
    module.eval()
    with torch.no_grad():
        expected = module(image)
    (name,) = graph.program.example_inputs(0)
    storages = {name: image.numpy().view("uint8").reshape(-1)}
    for operator in graph.operators:
        given = {key: storages[key] for key in operator.inputs if graph.tensors[key].role != "parameter"}
        storages |= graph.program.run_operator(operator, given, keep_parameters=True)
    made = torch.from_numpy(storages[graph.outputs[0]]).view(torch.float32)
    assert torch.equal(made, expected.reshape(-1))


def test_state_0_is_the_older_cell_in_darts_and_the_newer_in_amoebanet_d():
    # Its operations come first, in the order of the published code.
    order = [name.rsplit(".", 1)[0] for name, part in darts(8, 3).named_modules() if isinstance(part, torch.nn.Conv2d)]
    assert order.index("cells.0.preprocess0") < order.index("cells.0.preprocess1")
    older = darts(8, 14).get_submodule("cells.2.preprocess0.conv").in_channels
    newer = darts(8, 14).get_submodule("cells.5.preprocess1.conv").in_channels
    assert (older, newer) == (4 * 8, 4 * 16)
    net = amoebanet_d(3, 16)
    # The second reduction reads the first one (three states of 8 channels) and the stem (4 channels).
    assert net.get_submodule("cells.1.reduce1.conv").in_channels == 3 * 8
    assert net.get_submodule("cells.1.reduce2.conv1").in_channels == 4


@pytest.mark.parametrize(("cells", "filters"), [(0, 16), (4, 16), (-3, 16), (3, 0), (3, 24), (3, -16)])
def test_amoebanet_d_of_no_whole_thirds_or_channels_is_refused(cells, filters):
    with pytest.raises(ValueError, match="AmoebaNet-D has a multiple of"):
        amoebanet_d(cells, filters)


@pytest.mark.parametrize("name", ["conv_9x9", "identity"])
def test_an_operation_that_no_cell_has_is_named(name):
    genotype = Genotype(DARTS_V2.normal, (2,), ((name, 0), ("max_pool_3x3", 0)), (2,))
    with pytest.raises(ValueError, match=f"'{name}' with stride 2"):
        darts(8, 3, genotype)
