"""A mistake is one sentence on stderr, the right exit code, one object with --json, and nothing half-written."""

import json
import os
import stat

import onnx
import pytest
from onnx import TensorProto, helper

ONNX_INPUT = ("--input", "x=1x4x8x8")


def assert_refused(result, *words, code=2):
    """One sentence on stderr, no traceback, nothing on stdout."""
    assert result.code == code, (result.out, result.err)
    assert result.err.startswith("retensor: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    assert result.out == ""
    for word in words:
        assert word in result.err


@pytest.mark.parametrize(
    "size", ["0", "-1", "-2MiB", "0MiB", "2PiB", "1e9", "lots", "", "M_X", "0*M_R", "999999999999999999999"]
)
def test_budgets_that_make_no_sense_are_refused(cli, graph_file, size):
    assert_refused(cli("plan", graph_file, f"--scratchpad={size}"))
    assert_refused(cli("compare", graph_file, f"--scratchpad={size}"))


def test_infeasible_budget_names_operator_and_missing_bytes_with_code_3(cli, graph_file, tmp_path):
    output = tmp_path / "plan.json"
    result = cli("plan", graph_file, "--scratchpad", "95", "-o", output)
    assert_refused(result, "96 bytes", "1 bytes are missing", code=3)
    assert any(name in result.err for name in ("expand", "project", "add"))
    assert list(tmp_path.iterdir()) == []
    assert cli("compare", graph_file, "--scratchpad", "0.5*M_R").code == 3


def test_infeasible_budget_as_json(cli, graph_file):
    result = cli("plan", graph_file, "--scratchpad", "90", "--json")
    assert result.code == 3
    found = json.loads(result.out)
    assert (found["status"], found["required_bytes"], found["missing_bytes"]) == ("infeasible", 96, 6)
    assert found["operator"] in ("expand", "project", "add")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "{graph}"),
        ("plan", "--scratchpad", "1MiB"),
        ("plan", "{graph}", "--scratchpad", "1MiB", "--nonsense"),
        ("plan", "{graph}", "--scratchpad", "1MiB", "--order", "best"),
        ("plan", "{graph}", "--scratchpad", "1MiB", "--time-limit", "0"),
        ("plan", "{graph}", "--scratchpad", "1MiB", "--time-limit", "nan"),
        ("plan", "{graph}", "--scratchpad", "1MiB", "--time-limit", "-3"),
        ("plan", "{graph}", "--scratchpad", "1MiB", "--alignment", "0"),
        ("plan", "{graph}", "--scratchpad", "1MiB", "--alignment", "x"),
        ("plan", "{graph}", "--scratchpad", "1MiB", "--workers", "0"),
        ("plan", "{graph}", "--scratchpad", "1MiB", "--seed", "-1"),
        ("bounds", "{graph}", "--alignment", "-4"),
        ("bounds", "{onnx}", "--dtype", "int7", "--input", "x=1x4x8x8"),
        ("bounds", "{onnx}", "--input", "x"),
        ("bounds", "{onnx}", "--input", "x="),
        ("bounds", "{onnx}", "--input", "=1x2"),
        ("bounds", "{onnx}", "--input", "x=1x-4"),
        ("bounds", "{onnx}", "--input", "x=0x4x8x8"),
        ("bounds", "{onnx}", "--input", "x=1x4x8x8", "--input", "x=1x4x8x8"),
        ("bounds", "{onnx}", "--input", "nobody=1x4x8x8"),
        ("sweep", "{graph}", "--points", "1"),
        ("sweep", "{graph}", "--points", "100000"),
        ("sweep", "{graph}", "--time-limit", "inf"),
        ("nonsense",),
        ("bounds", "no-such-network"),
        ("bounds", "no/such/file.onnx"),
        ("bounds", "no/such/file.json"),
        ("bounds", ""),
        ("verify", "no-such-plan.json", "{graph}"),
        ("run", "no-such-plan.json", "{graph}"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_bad_arguments_are_one_sentence(cli, graph_file, onnx_file, arguments):
    filled = [argument.format(graph=graph_file, onnx=onnx_file) for argument in arguments]
    assert_refused(cli(*filled))
    as_json = cli(*filled, "--json")
    assert as_json.code == 2
    assert json.loads(as_json.out)["status"] == "error"
    assert json.loads(as_json.out)["error"] in as_json.err


def test_a_free_dimension_asks_for_the_input_option(cli, onnx_file):
    assert_refused(cli("bounds", onnx_file), "--input x=1x4x8x8", "inputs={'x': [1, 4, 8, 8]}")


def model_of(nodes, inputs, outputs, opset=17):
    graph = helper.make_graph(nodes, "bad", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def info(name, shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


BAD_MODELS = {
    "cyclic": lambda: model_of(
        [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])],
        [info("x", [2, 2])],
        [info("b", [2, 2])],
    ),
    "unsupported opset": lambda: model_of(
        [helper.make_node("Relu", ["x"], ["y"])], [info("x", [2])], [info("y", [2])], opset=9999
    ),
    "shapeless": lambda: model_of([helper.make_node("Relu", ["x"], ["y"])], [info("x", None)], [info("y", None)]),
    "huge dimension": lambda: model_of(
        [helper.make_node("Relu", ["x"], ["y"])], [info("x", [2**40, 2**40])], [info("y", [2**40, 2**40])]
    ),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_bad_models_are_one_sentence(cli, tmp_path, kind):
    path = tmp_path / "bad.onnx"
    path.write_bytes(BAD_MODELS[kind]().SerializeToString())
    output = tmp_path / "plan.json"
    assert_refused(cli("plan", path, "--scratchpad", "1GiB", "-o", output))
    assert not output.exists()


@pytest.mark.parametrize("keep", [0, 1, 40, 0.5, 0.99])
def test_truncated_models_are_one_sentence(cli, tmp_path, onnx_file, keep):
    whole = onnx_file.read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    assert_refused(cli("bounds", path, *ONNX_INPUT))


@pytest.mark.parametrize("suffix", [".onnx", ".json"])
@pytest.mark.parametrize("content", [b"hello, I am no model\n", b"\x00" * 64, b"\xff\xfe{}", b"{}", b"[]", b"{" * 5000])
def test_files_that_are_no_models_are_one_sentence(cli, tmp_path, suffix, content):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    assert_refused(cli("bounds", path))


def test_a_directory_for_a_file_is_one_sentence(cli, tmp_path, graph_file):
    assert_refused(cli("bounds", tmp_path), str(tmp_path))
    folder = tmp_path / "model.onnx"
    folder.mkdir()
    assert_refused(cli("bounds", folder), str(folder))
    assert_refused(cli("verify", tmp_path, graph_file), str(tmp_path))
    for option in ("-o", "--report", "--picture"):
        named = tmp_path / {"-o": "d.json", "--report": "d.html", "--picture": "d.svg"}[option]
        named.mkdir(exist_ok=True)
        assert_refused(cli("plan", graph_file, "--scratchpad", "M_R", option, named), str(named), "directory")


@pytest.mark.parametrize("option", ["-o", "--report", "--picture"])
def test_outputs_that_cannot_be_written_are_refused_before_any_work(cli, tmp_path, monkeypatch, option):
    """The model does not exist either: the output is what is complained of, because it is looked at first."""
    suffix = {"-o": ".json", "--report": ".html", "--picture": ".png"}[option]
    locked = tmp_path / f"locked{suffix}"
    locked.write_text("precious")
    locked.chmod(stat.S_IRUSR)
    command = ("plan", "no-such-model", "--scratchpad", "M_R", option)
    assert_refused(cli(*command, locked), "read-only", str(locked))
    assert locked.read_text() == "precious"
    assert_refused(cli(*command, tmp_path / "nowhere" / f"p{suffix}"), "no folder")
    assert_refused(cli(*command, locked / f"p{suffix}"), "no folder")
    assert_refused(cli(*command, tmp_path / ("n" * 300 + suffix)))
    assert [path.name for path in tmp_path.iterdir()] == [locked.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write into a read-only folder")
def test_a_read_only_folder_is_refused_before_any_work(cli, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert_refused(cli("plan", "no-such-model", "--scratchpad", "M_R", "-o", tmp_path / "p.json"), "p.json")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_outputs_do_not_replace_the_model_or_each_other(cli, graph_file, tmp_path):
    before = graph_file.read_bytes()
    assert_refused(cli("plan", graph_file, "--scratchpad", "M_R", "-o", graph_file), "the input")
    assert_refused(cli("graph", graph_file, "-o", graph_file), "the input")
    assert graph_file.read_bytes() == before
    both = tmp_path / "both.html"
    assert_refused(cli("plan", graph_file, "--scratchpad", "M_R", "-o", both, "--report", both), "also")
    assert_refused(cli("plan", graph_file, "--scratchpad", "M_R", "--picture", tmp_path / "p.pdf"), ".svg")
    assert_refused(cli("sweep", graph_file, "--picture", tmp_path / "p.txt"), ".svg")
    assert_refused(cli("plan", graph_file, "--scratchpad", "M_R", "-o", "/dev/null"), "ordinary")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_edited_by_hand_is_refused_with_what_is_wrong(cli, graph_file, tmp_path):
    path = tmp_path / "plan.json"
    assert cli("plan", graph_file, "--scratchpad", "M_R", "-o", path).code == 0
    whole = json.loads(path.read_text())

    def edited(change):
        copy = json.loads(json.dumps(whole))
        change(copy)
        path.write_text(json.dumps(copy))
        return cli("verify", path, graph_file)

    def move(plan):
        stay = next(stay for stay in plan["residencies"] if stay["tensor"] == "wide")
        stay["address"] += 1

    def swap(plan):
        plan["order"][0], plan["order"][1] = plan["order"][1], plan["order"][0]

    def drop(plan):
        plan["transfers"] = [t for t in plan["transfers"] if t["kind"] != "spill"]

    def shrink(plan):
        plan["accelerator"]["scratchpad_bytes"] -= 1

    def lie(plan):
        plan["non_compulsory_bytes"] = 0

    for change in (move, swap, drop, shrink, lie, lambda p: p.pop("order"), lambda p: p.update(extra=1)):
        assert_refused(edited(change))
    assert edited(lambda plan: None).code == 0
    path.write_bytes(json.dumps(whole).encode()[:-30])
    assert_refused(cli("verify", path, graph_file), "JSON")
    assert_refused(cli("run", path, graph_file), "JSON")


def test_a_plan_for_another_graph_is_refused(cli, graph_file, onnx_file, tmp_path):
    path = tmp_path / "plan.json"
    assert cli("plan", graph_file, "--scratchpad", "M_R", "-o", path).code == 0
    other = tmp_path / "other.json"
    content = json.loads(graph_file.read_text())
    text = json.dumps(content).replace('"stem"', '"root"')
    other.write_text(text)
    assert_refused(cli("verify", path, other), "another graph")
    assert_refused(cli("run", path, other), "another graph")


def test_a_plan_for_another_model_is_refused_before_its_options_make_a_misleading_error(
    cli, graph_file, onnx_file, tmp_path
):
    path = tmp_path / "plan.json"
    assert cli("plan", onnx_file, *ONNX_INPUT, "--scratchpad", "M_R", "-o", path).code == 0
    for other in (graph_file, "onnx:squeezenet"):
        name = "bottleneck" if other == graph_file else "squeezenet"
        for command in ("verify", "run"):
            result = cli(command, path, other)
            assert_refused(result, f"was made for graph 'residual', not '{name}'")
            assert "input 'x'" not in result.err
    missing = tmp_path / "gone.onnx"
    assert_refused(cli("verify", path, missing), "gone.onnx")
    assert "was made for" not in cli("verify", path, missing).err


def test_a_plan_whose_options_the_model_does_not_take_says_for_which_graph_it_was_made(cli, onnx_file, tmp_path):
    path = tmp_path / "plan.json"
    assert cli("plan", onnx_file, *ONNX_INPUT, "--scratchpad", "M_R", "-o", path).code == 0
    other = tmp_path / "other.onnx"
    model = onnx.load(onnx_file)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
    onnx.save(model, other)
    assert_refused(cli("verify", path, other), "made for graph 'residual'", "cannot be loaded as that was")


@pytest.mark.parametrize("command", ["verify", "run"])
@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (("--input", "x=1x4x8x8"), "--input"),
        (("--dtype", "int8"), "--dtype"),
        (("--no-fuse",), "--no-fuse"),
        (("--fuse",), "--fuse"),
        (("--in-place",), "--in-place"),
        (("--weights",), "--weights"),
        (("--alignment", "64"), "--alignment"),
        (("--scratchpad", "M_R"), "--scratchpad"),
        (("--order", "default"), "--order"),
    ],
)
def test_options_that_a_plan_records_are_refused_beside_it(cli, onnx_file, command, typed, named):
    """The plan does not even exist: the option is answered first."""
    result = cli(command, "plan.json", onnx_file, *typed)
    assert_refused(result, "the plan records how the model was loaded", f"leave {named} out")
    assert named not in cli(command, "-h").out


@pytest.mark.parametrize(("suffix", "line"), [(".pt2", "torch.export.load("), (".pt", "torch.export.export(")])
def test_a_torch_file_says_which_lines_load_it(cli, tmp_path, suffix, line):
    path = tmp_path / f"model{suffix}"
    assert_refused(cli("bounds", path), suffix, line, "retensor.graph.load(program)")
    path.write_bytes(b"PK\x03\x04")
    assert_refused(cli("bounds", path), "can run code", line)


def test_a_bare_graph_does_not_run(cli, graph_file, tmp_path):
    path = tmp_path / "plan.json"
    assert cli("plan", graph_file, "--scratchpad", "M_R", "-o", path).code == 0
    assert_refused(cli("run", path, graph_file), "cannot be run")


def test_a_bug_is_not_dressed_up_as_a_mistake(cli, graph_file, monkeypatch):
    """An error from inside a library we call keeps its traceback instead of blaming the user."""
    from retensor import planning

    monkeypatch.setattr(planning, "bounds", lambda *a, **k: json.loads("{"))
    with pytest.raises(ValueError):
        cli("bounds", graph_file)
