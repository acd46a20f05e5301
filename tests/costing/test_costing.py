"""The cost sheet and the comparison: figures, what they are made of, and that models come out as they went in."""

import contextlib
import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import retensor as rt
from retensor.costing import CostSheet, plot_comparison
from retensor.graph import Graph, Operator, Tensor
from retensor.graph.torch import load_torch
from retensor.planning.plan import Accelerator


def net(width=8):
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, width, 3, padding=1),
        torch.nn.BatchNorm2d(width),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(width, 10),
    )


IMAGE = (1, 3, 16, 16)


def skip_graph(macs=5):
    """Two paths: at M_R of 12 bytes the short one is spilled."""
    tensors = [Tensor("x", 4, "input"), Tensor("a", 4), Tensor("b", 6), Tensor("c", 4), Tensor("y", 4)]
    operators = [
        Operator("f", "F", ("x",), ("a",), macs=macs),
        Operator("g", "G", ("a",), ("b",), macs=macs),
        Operator("h", "H", ("b",), ("c",), macs=macs),
        Operator("k", "K", ("a", "c"), ("y",), macs=0 if macs is not None else None),
    ]
    return Graph("skip", operators, tensors, ["y"])


def test_a_modules_sheet_in_closed_form():
    sheet = rt.cost(net(), IMAGE)
    assert sheet.parameters == 3 * 8 * 9 + 8 + 2 * 8 + 8 * 10 + 10
    # Running mean and variance, and the number of batches in eight bytes.
    assert sheet.parameter_bytes == 4 * (sheet.parameters + 16) + 8
    assert sheet.macs == 8 * 27 * 256 + 80
    assert sheet.macs_by_kind == {"conv2d": 8 * 27 * 256, "linear": 80}
    assert sheet.activation_peak_bytes == sheet.m_r_bytes == sheet.m_p_bytes == 4 * (3 + 8) * 256
    assert (sheet.operators, sheet.uncounted, sheet.accelerator, sheet.off_chip_bytes) == (3, {}, None, None)
    assert (sheet.status, sheet.roofline_seconds, sheet.arithmetic_intensity) == (None, None, None)


def test_traffic_is_the_planners_and_parameters_are_streamed_or_resident():
    module = net()
    chip = Accelerator("64KiB", 16, "chip", bandwidth=1e6, macs_per_second=1e9)
    sheet = rt.cost(module, IMAGE, chip)
    graph = load_torch(module, inputs={"x": IMAGE})
    found = rt.plan(graph, chip)
    assert (sheet.compulsory_bytes, sheet.non_compulsory_bytes) == (found.compulsory_bytes, found.non_compulsory_bytes)
    # What no operator reads (the number of batches) is not streamed.
    assert sheet.streamed_bytes == sheet.parameter_bytes - 8
    assert sheet.off_chip_bytes == sheet.compulsory_bytes + sheet.streamed_bytes
    assert sheet.arithmetic_intensity == sheet.macs / sheet.off_chip_bytes
    assert sheet.compute_seconds == sheet.macs / 1e9
    assert sheet.transfer_seconds == sheet.off_chip_bytes / 1e6
    assert sheet.roofline_seconds == max(sheet.compute_seconds, sheet.transfer_seconds)
    assert (sheet.limited_by, sheet.status) == ("bandwidth", "optimal")
    resident = rt.cost(module, IMAGE, chip, parameters=True)
    assert resident.streamed_bytes == 0
    assert resident.compulsory_bytes == sheet.off_chip_bytes
    assert resident.m_r_bytes > sheet.m_r_bytes


def test_a_graph_whose_plan_is_known():
    sheet = rt.cost(skip_graph(), accelerator="M_R")
    assert (sheet.m_r_bytes, sheet.m_p_bytes, sheet.activation_peak_bytes) == (12, 14, 14)
    assert (sheet.compulsory_bytes, sheet.non_compulsory_bytes, sheet.bound_bytes) == (8, 8, 8)
    assert sheet.off_chip_bytes == 16
    assert sheet.arithmetic_intensity == 15 / 16
    assert rt.cost(skip_graph(), accelerator="M_P").non_compulsory_bytes == 0


def test_the_peak_is_of_the_models_own_order():
    # Both wide branches first is the order given; one branch at a time needs less.
    tensors = [Tensor("x", 1, "input"), *(Tensor(name, 10) for name in "ab"), *(Tensor(name, 1) for name in "cdy")]
    operators = [
        Operator("a", "A", ("x",), ("a",)),
        Operator("b", "B", ("x",), ("b",)),
        Operator("c", "C", ("a",), ("c",)),
        Operator("d", "D", ("b",), ("d",)),
        Operator("y", "Y", ("c", "d"), ("y",)),
    ]
    sheet = rt.cost(Graph("fork", operators, tensors, ["y"]))
    assert (sheet.activation_peak_bytes, sheet.m_p_bytes) == (21, 12)


def test_a_scratchpad_too_small_is_said_on_the_sheet():
    sheet = rt.cost(skip_graph(), accelerator=Accelerator(10, name="tiny"))
    assert (sheet.status, sheet.missing_bytes, sheet.non_compulsory_bytes) == ("does not fit", 2, None)
    assert "does not fit: 2 B missing" in str(sheet)


def test_what_is_not_known_is_said_and_not_counted():
    sheet = rt.cost(skip_graph(macs=None), accelerator="M_R")
    assert (sheet.macs, sheet.arithmetic_intensity) == (None, None)
    assert sheet.uncounted == {"F": 1, "G": 1, "H": 1, "K": 1}
    mixed = skip_graph()
    operators = [*mixed.operators[:3], Operator("k", "mine.Attend", ("a", "c"), ("y",))]
    sheet = rt.cost(Graph("skip", operators, mixed.tensors, mixed.outputs))
    assert (sheet.macs, sheet.uncounted) == (15, {"mine.Attend": 1})
    assert "at least 15" in str(sheet)
    assert "not known of: mine.Attend" in str(sheet)
    weights = [*mixed.tensors.values(), Tensor("w", 8, "parameter")]
    reads = [Operator("f", "F", ("x", "w"), ("a",)), *mixed.operators[1:]]
    assert rt.cost(Graph("skip", reads, weights, ["y"])).parameters is None


def test_tied_weights_count_once_and_are_streamed_by_every_operator_that_reads_them():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(50, 8)
            self.head = torch.nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    sheet = rt.cost(Tied(), torch.zeros(1, 4, dtype=torch.long), "M_P")
    assert sheet.parameters == 400
    assert sheet.parameter_bytes == 1600
    assert sheet.streamed_bytes == 2 * 1600
    # The same memory under two names, which torch counts twice.
    twins = Tied()
    twins.head.weight = torch.nn.Parameter(twins.embed.weight.data)
    assert sum(p.numel() for p in twins.parameters()) == 800
    assert rt.cost(twins, torch.zeros(1, 4, dtype=torch.long)).parameters == 400


@pytest.mark.parametrize(("dtype", "nbytes"), [(None, 4), ("float32", 4), ("float16", 2), ("int8", 1)])
def test_elements_are_counted_at_the_type_asked_for(dtype, nbytes):
    sheet = rt.cost(net(), IMAGE, dtype=dtype)
    assert sheet.parameter_bytes == nbytes * (sheet.parameters + 16) + 8
    assert sheet.m_r_bytes == nbytes * 11 * 256
    assert sheet.dtype == dtype


def test_a_module_comes_out_as_it_went_in():
    module = net().to(torch.bfloat16)
    module[1].eval()
    module.train()
    module[1].eval()
    calls = []
    module[0].register_forward_hook(lambda *_: calls.append(1))
    module.register_full_backward_hook(lambda *_: None)
    module[5].weight.grad = torch.ones_like(module[5].weight)
    module[5].bias.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    modes = [part.training for part in module.modules()]
    hooks = [(len(part._forward_hooks), len(part._backward_hooks)) for part in module.modules()]
    identities = [id(p) for p in module.parameters()]
    random = torch.random.get_rng_state()
    threads, default = torch.get_num_threads(), torch.get_default_dtype()
    sheet = rt.cost(module, torch.zeros(IMAGE, dtype=torch.bfloat16), "64KiB")
    assert sheet.parameter_bytes == 2 * (sheet.parameters + 16) + 8
    assert [part.training for part in module.modules()] == modes
    assert [(len(part._forward_hooks), len(part._backward_hooks)) for part in module.modules()] == hooks
    assert [id(p) for p in module.parameters()] == identities
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert torch.equal(module[5].weight.grad, torch.ones_like(module[5].weight))
    assert [p.requires_grad for p in module.parameters()] == [True] * 5 + [False]
    assert torch.equal(torch.random.get_rng_state(), random)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, default)
    assert torch.is_grad_enabled()
    module(torch.zeros(IMAGE, dtype=torch.bfloat16))
    assert calls[-1] == 1


def test_a_module_without_memory_has_the_same_sheet():
    with torch.device("meta"):
        empty = net()
    assert rt.cost(empty, torch.zeros(IMAGE, device="meta")) == rt.cost(net(), IMAGE)


def test_the_same_model_costs_the_same_however_it_is_given(tmp_path):
    module = net().eval()
    by_shape = rt.cost(module, IMAGE)
    assert rt.cost(module, list(IMAGE)) == by_shape
    assert rt.cost(module, tuple(np.array(IMAGE))) == by_shape
    assert rt.cost(module, {"input": IMAGE}) == by_shape
    assert rt.cost(module, torch.zeros(IMAGE)) == by_shape
    assert rt.cost(module, (torch.zeros(IMAGE),)) == by_shape
    assert rt.cost(module, {"input": torch.zeros(IMAGE)}) == by_shape
    program = rt.cost(torch.export.export(module, (torch.zeros(IMAGE),)), name="Sequential")
    # The number of batches is never read, so a program does not know it.
    assert program.parameter_bytes == by_shape.parameter_bytes - 8
    assert (program.parameters, program.macs, program.m_p_bytes) == (
        by_shape.parameters,
        by_shape.macs,
        by_shape.m_p_bytes,
    )
    graph = load_torch(module, inputs={"input": IMAGE})
    rt.graph.write_graph(graph, tmp_path / "net.json")
    assert rt.cost(tmp_path / "net.json", name="Sequential") == program
    assert rt.cost(graph) == program


@pytest.mark.slow
def test_an_exported_onnx_file_costs_what_the_module_does(tmp_path):
    import torchvision

    for module in (torchvision.models.resnet18(), torchvision.models.mobilenet_v3_small()):
        path = tmp_path / "net.onnx"
        torch.onnx.export(module.eval(), (torch.zeros(1, 3, 64, 64),), path, optimize=False, verbose=False)
        ours, theirs = rt.cost(module, (1, 3, 64, 64), fuse=False), rt.cost(path, fuse=False)
        assert ours.macs == theirs.macs
        assert ours.parameters == theirs.parameters
        assert ours.activation_peak_bytes == theirs.activation_peak_bytes


def test_the_light_resnet_costs_what_torchvisions_does():
    sheet = rt.cost("onnx:resnet50", time_limit=1)
    assert (sheet.parameters, sheet.macs) == (25_557_032, 4_089_184_256)
    assert sheet.parameter_bytes == 4 * (25_557_032 + 53_120)


LIGHT = {
    "bvlc_alexnet": (60_965_224, 654_560_384),
    "squeezenet": (1_235_496, 349_151_936),
    "vgg19": (143_667_240, 19_632_062_464),
}


@pytest.mark.parametrize("name", LIGHT)
def test_light_models_have_the_published_parameters_and_arithmetic(name):
    sheet = rt.cost(f"onnx:{name}", time_limit=1)
    assert (sheet.parameters, sheet.macs) == LIGHT[name]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rt.cost(net()), ValueError, "example inputs"),
        (lambda: rt.cost(net(), IMAGE, "ethos-u65-265"), ValueError, "did you mean 'ethos-u65-256'"),
        (lambda: rt.cost(net(), IMAGE, "2 parsecs"), ValueError, "unit"),
        (lambda: rt.cost(net(), IMAGE, 3.5), TypeError, "scratchpad"),
        (lambda: rt.cost(net(), IMAGE, alignment=0), ValueError, "alignment"),
        (lambda: rt.cost(skip_graph(), IMAGE), ValueError, "graph has its inputs"),
        (lambda: rt.cost(skip_graph(), dtype="int8"), ValueError, "graph has its inputs"),
        (lambda: rt.cost("onnx:squeezenet", IMAGE), TypeError, "mapping"),
        (lambda: rt.cost("no such net"), rt.GraphError, "no network"),
        (lambda: rt.cost(7), TypeError, "int"),
        (lambda: rt.cost(net(), IMAGE, dtype="int7"), ValueError, "int7"),
        (lambda: rt.compare(), ValueError, "nothing to compare"),
        (lambda: rt.compare(skip_graph(), acelerator="M_R"), TypeError, "no argument 'acelerator'"),
        (lambda: rt.compare(skip_graph(), accuracy=[0.1, 0.2]), ValueError, "2 figures"),
        (lambda: rt.compare(skip_graph(), accuracy={"other": 0.1}), ValueError, "'other'"),
        (lambda: rt.compare(skip_graph(), accuracy=[float("nan")]), ValueError, "finite"),
        (lambda: rt.compare(skip_graph(), skip_graph(), names=["a", "a"]), ValueError, "2 names"),
        (lambda: rt.compare(skip_graph(), names="a"), TypeError, "names"),
    ],
)
def test_mistakes_are_refused_with_a_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    "accelerator", [None, "M_R", 5, Accelerator("1KiB", 8, "chip", 1e6, 2e9)], ids=["none", "M_R", "small", "chip"]
)
def test_sheets_go_through_json(accelerator):
    sheet = rt.cost(skip_graph(), accelerator=accelerator)
    form = json.loads(json.dumps(sheet.as_dict(), allow_nan=False))
    assert CostSheet.from_dict(form) == sheet
    schema = json.loads(Path(rt.costing.__file__).with_name("cost.schema.json").read_text())
    described = schema["$defs"]["sheet"]
    assert set(form) == set(described["properties"])
    assert set(described["required"]) <= set(form)
    chip = form["accelerator"]
    assert chip is None or set(chip) == set(described["properties"]["accelerator"]["required"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", "retensor.cost/9"), ("macs", -1), ("macs", "many"), ("name", 7), ("parameters", True),
        ("parameters_resident", 1), ("accelerator", {"name": "x"}), ("macs_by_kind", {"conv": "x"}), ("extra", 1),
        ("m_r_bytes", None), ("dtype", 3),
    ],
)  # fmt: skip
def test_a_broken_sheet_is_refused(key, value):
    form = rt.cost(skip_graph(), accelerator="M_R").as_dict()
    with pytest.raises(rt.RetensorError):
        CostSheet.from_dict(form | {key: value})
    with pytest.raises(rt.RetensorError):
        CostSheet.from_dict({name: entry for name, entry in form.items() if name != "operators"})


def test_models_and_sheets_stand_side_by_side():
    before = rt.cost(net(16), IMAGE, "64KiB")
    found = rt.compare(
        before,
        net(8),
        net(4),
        inputs=IMAGE,
        accelerator="64KiB",
        accuracy=[0.9, 0.8, None],
        loss={"Sequential (2)": 1.0},
    )
    assert found.names == ("Sequential (1)", "Sequential (2)", "Sequential (3)")
    assert found.sheets[0] is before
    assert found["Sequential (2)"] == rt.cost(net(8), IMAGE, "64KiB")
    assert found.columns == {"accuracy": (0.9, 0.8, None), "loss": (None, 1.0, None)}
    form = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert form["schema"] == "retensor.comparison/1"
    assert form["models"][1]["columns"] == {"accuracy": 0.8, "loss": 1.0}
    assert CostSheet.from_dict(form["models"][0]["sheet"]) == before
    with pytest.raises(KeyError, match="Sequential"):
        found["other"]


def test_the_table_says_what_changed():
    found = rt.compare(
        net(16), net(8), inputs=IMAGE, accelerator="64KiB", names=["wide", "narrow"], accuracy=[0.9, 0.85]
    )
    lines = [" ".join(line.split()) for line in str(found).splitlines()]
    assert lines[0].split() == ["wide", "narrow"]
    assert "multiply-accumulates 110.8 k 55.38 k x0.5" in lines
    assert "accuracy 0.9 0.85 -0.05" in lines
    assert lines[-1] == "on a scratchpad (64 KiB); parameters read past the scratchpad"
    page = found._repr_html_()
    assert "<th>narrow</th>" in page
    assert "x0.5" in page
    assert "&lt;b&gt;" in rt.compare(net(4), inputs=IMAGE, names=["<b>"])._repr_html_()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_pictures_are_drawn_and_the_same_each_time(tmp_path, suffix, dark):
    found = rt.compare(net(16), net(8), inputs=IMAGE, accelerator="64KiB", names=["wide", "narrow $x$ <b>"])
    points = rt.compare(*found.sheets, names=found.names, accuracy=[0.9, 0.8], loss=[1, 2])
    paths = [tmp_path / f"{name}.{suffix}" for name in ("bars", "again", "points", "loss")]
    plot_comparison(paths[0], found, dark=dark)
    found.plot(paths[1], dark=dark)
    points.plot(paths[2], dark=dark)
    points.plot(paths[3], against="loss", dark=dark)
    contents = [path.read_bytes() for path in paths]
    assert contents[0] == contents[1]
    assert len(set(contents)) == 3
    if suffix == "svg":
        text = contents[0].decode()
        for words in ("multiply-accumulates", "off-chip traffic", "narrow $x$ &lt;b&gt;", "110.8 k"):
            assert words in text
        assert "accuracy against cost" in contents[2].decode()
        assert "loss against cost" in contents[3].decode()


def test_a_picture_of_a_model_that_does_not_fit_says_so(tmp_path):
    fits, large = rt.cost(skip_graph(), accelerator=14), rt.cost(skip_graph(), accelerator=10)
    rt.compare(fits, large).plot(tmp_path / "a.svg")
    assert "does not fit" in (tmp_path / "a.svg").read_text()
    rt.compare(fits, large, accuracy=[0.5, 0.5]).plot(tmp_path / "b.svg")
    assert "1 without a figure" in (tmp_path / "b.svg").read_text()


def test_pictures_refuse_other_suffixes_and_columns(tmp_path):
    found = rt.compare(skip_graph())
    with pytest.raises(ValueError, match="svg"):
        found.plot(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="no column 'accuracy'"):
        found.plot(tmp_path / "a.svg", against="accuracy")


def test_the_functions_stay_functions_after_their_folder_is_imported():
    import retensor.costing

    assert callable(rt.cost)
    assert rt.cost is retensor.costing.cost
    assert rt.compare is retensor.costing.compare


@pytest.mark.parametrize("option", ["parameters", "fuse", "in_place"])
def test_flags_are_true_or_false(option: str) -> None:
    with pytest.raises(TypeError, match=f"{option} is True or False, not str"):
        rt.cost("onnx:squeezenet", **{option: "no"})
    with pytest.raises(TypeError, match="name is text, not 5"):
        rt.cost("onnx:squeezenet", name=5)  # type: ignore[arg-type]


def test_no_two_names_of_points_lie_on_each_other(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    models = [net(width) for width in (8, 9, 10, 11, 12)]
    accuracy = [0.9, 0.901, 0.902, 0.899, 0.9]
    with contextlib.suppress(Exception):
        rt.compare(*models, inputs=IMAGE, accuracy=accuracy).plot(tmp_path / "a.svg")
    (figure,) = drawn
    figure.canvas.draw()
    titles = [panel.get_title(loc="left") for panel in figure.axes]
    assert "parameters" in titles
    for panel in figure.axes:
        boxes = [text.get_window_extent() for text in panel.texts]
        assert len(boxes) == len(models)
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other), panel.get_title(loc="left")


def test_what_is_the_same_for_all_models_is_no_panel_of_points(tmp_path):
    same = rt.compare(net(), net(), inputs=IMAGE, names=["one", "two"], accuracy=[0.5, 0.6])
    same.plot(tmp_path / "same.svg")
    assert (tmp_path / "same.svg").read_text().count("parameters") >= 1
    wide = rt.compare(net(), net(9), inputs=IMAGE, names=["one", "two"], accuracy=[0.5, 0.6])
    wide.plot(tmp_path / "wide.svg")
    assert "multiply-accumulates" in (tmp_path / "wide.svg").read_text()
    assert "multiply-accumulates" not in (tmp_path / "same.svg").read_text()
