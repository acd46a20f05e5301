"""Every command says what it promises, as a table and as one JSON object."""

import json

import pytest

COMMANDS = ("bounds", "plan", "verify", "run", "compare", "cost", "accelerators", "sweep", "graph")
ONNX_INPUT = ("--input", "x=1x4x8x8")


def object_of(result):
    """The one object on stdout; anything beside it fails."""
    assert result.code == 0, result.err
    assert result.err == ""
    return json.loads(result.out)


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_an_example_and_json(cli, command, flag):
    result = cli(command, flag)
    assert result.code == 0
    assert f"Example: retensor {command} " in result.out
    assert "--json" in result.out


def test_bare_command_and_help_list_all_commands(cli):
    for arguments in ((), ("-h",)):
        result = cli(*arguments)
        assert result.code == 0
        assert all(f" {command} " in result.out for command in COMMANDS)


def test_the_typer_app_runs_under_typers_own_runner(graph_file):
    from typer.testing import CliRunner

    from retensor.cli.app import app

    result = CliRunner().invoke(app, ["bounds", str(graph_file), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["m_r_bytes"] == 96


def test_version_is_the_packages(cli):
    import retensor

    assert cli("--version").out == f"retensor {retensor.__version__}\n"


def test_bounds_of_a_graph_whose_bounds_are_known(cli, graph_file):
    found = object_of(cli("bounds", graph_file, "--json"))
    assert (found["m_r_bytes"], found["m_p_bytes"], found["m_h_bytes"]) == (96, 128, 112)
    assert found["m_p_bound_bytes"] == 128
    assert found["m_r_operator"] in ("expand", "project", "add")
    assert found["schedule"] == ["stem", "expand", "project", "add"]
    assert (found["operators"], found["tensors"]) == (4, 6)
    assert "m_rp_bytes" not in found


def test_bounds_with_weights_count_parameters_too(cli, graph_file):
    found = object_of(cli("bounds", graph_file, "--weights", "--json"))
    assert (found["m_r_bytes"], found["m_rp_bytes"], found["m_rp_operator"]) == (96, 106, "expand")
    assert (found["m_pp_bytes"], found["m_pp_bound_bytes"], found["m_hp_bytes"]) == (128, 128, 117)


def test_bounds_table_names_all_three_and_prints_the_schedule_on_request(cli, graph_file):
    result = cli("bounds", graph_file, "--schedule")
    assert result.code == 0
    for text in ("M_R", "M_H", "M_P", "96 B", "112 B", "128 B", "proved"):
        assert text in result.out
    assert result.out.split()[-4:] == ["stem", "expand", "project", "add"]
    assert "stem\nexpand" not in cli("bounds", graph_file).out


def test_alignment_raises_the_bounds(cli, graph_file):
    found = object_of(cli("bounds", graph_file, "--weights", "--alignment", "16", "--json"))
    assert found["m_rp_bytes"] >= 106
    assert found["m_pp_bytes"] >= found["m_rp_bytes"]


def test_plan_prints_one_object_with_the_promised_fields(cli, graph_file):
    found = object_of(cli("plan", graph_file, "--scratchpad", "M_R", "--json"))
    assert found["status"] == "optimal"
    assert found["stopped"] is False
    assert (found["operators"], found["tensors"], found["scratchpad_bytes"]) == (4, 6, 96)
    assert (found["compulsory_bytes"], found["non_compulsory_bytes"], found["bound_bytes"]) == (80, 64, 64)
    assert found["gap"] == 0
    assert found["seconds"] >= 0
    assert found["transfers"] == {"load": 1, "store": 1, "spill": 1, "retrieve": 1}


@pytest.mark.parametrize(
    ("size", "scratchpad"),
    [("96", 96), ("0.1KB", 100), ("1KiB", 1024), ("1.25*M_R", 120), ("M_P", 128), ("M_H", 112), ("0.9*M_P", 115)],
)
def test_sizes_may_be_bytes_units_or_relative_to_the_model(cli, graph_file, size, scratchpad):
    found = object_of(cli("plan", graph_file, "--scratchpad", size, "--json"))
    assert found["scratchpad_bytes"] == scratchpad
    assert found["non_compulsory_bytes"] == (0 if scratchpad >= 128 else 64)


def test_plan_writes_plan_report_and_picture_and_compares(cli, graph_file, tmp_path):
    plan, report, picture = tmp_path / "p.json", tmp_path / "r.html", tmp_path / "p.svg"
    result = cli("plan", graph_file, "--scratchpad", "M_R", "-o", plan, "--report", report, "--picture", picture)
    assert result.code == 0, result.err
    assert json.loads(plan.read_text())["non_compulsory_bytes"] == 64
    assert "<html" in report.read_text()[:400]
    assert "<svg" in picture.read_text()[:2000]
    for text in ("optimal, proved", "64 B", "COSMA", "Belady", "greedy", f"wrote {plan}", f"wrote {report}"):
        assert text in result.out
    assert {path.name for path in tmp_path.iterdir()} == {"p.json", "r.html", "p.svg"}


def test_plan_object_carries_the_baselines_only_on_request(cli, graph_file, tmp_path):
    assert "baselines" not in object_of(cli("plan", graph_file, "--scratchpad", "M_R", "--json"))
    found = object_of(cli("plan", graph_file, "--scratchpad", "M_R", "--compare", "--json"))
    assert len(found["baselines"]) == 4
    report = tmp_path / "r.html"
    found = object_of(cli("plan", graph_file, "--scratchpad", "M_R", "--report", report, "--json"))
    assert len(found["baselines"]) == 4
    assert found["files"] == {"report": str(report)}


def test_plan_of_the_default_order_says_so(cli, graph_file):
    found = object_of(cli("plan", graph_file, "--scratchpad", "M_R", "--order", "default", "--json"))
    assert (found["order"], found["status"], found["non_compulsory_bytes"]) == ("given", "optimal", 64)


def test_every_object_and_table_says_for_which_order_a_bound_holds(cli, graph_file, tmp_path):
    given, free = tmp_path / "given.json", tmp_path / "free.json"
    plan = ("plan", graph_file, "--scratchpad", "M_R", "--json")
    for found in (
        object_of(cli(*plan, "-o", free)),
        object_of(cli("verify", free, graph_file, "--json")),
        object_of(cli("compare", graph_file, "--json")),
    ):
        assert (found["fixed_order"], found["bound_holds_for"]) == (False, "any order")
    for found in (
        object_of(cli(*plan, "--order", "default", "-o", given)),
        object_of(cli("verify", given, graph_file, "--json")),
    ):
        assert (found["fixed_order"], found["bound_holds_for"]) == (True, "given order")
    assert "for the given order" not in cli("verify", free, graph_file).out
    assert "optimal for the given order; a replay" in cli("verify", given, graph_file).out


def test_a_plan_short_of_its_bound_says_for_which_order(capsys):
    from dataclasses import replace

    from retensor import Accelerator, planning
    from retensor.cli.plan import print_plan
    from retensor.graph import Graph, Operator, Tensor

    tensors = [Tensor("x", 4, "input"), Tensor("a", 4), Tensor("b", 6), Tensor("c", 4), Tensor("y", 4)]
    operators = [
        Operator("f", "F", ("x",), ("a",)),
        Operator("g", "G", ("a",), ("b",)),
        Operator("h", "H", ("b",), ("c",)),
        Operator("k", "K", ("a", "c"), ("y",)),
    ]
    found = planning.plan(Graph("skip", operators, tensors, ["y"]), Accelerator("M_R"), order="default")
    assert found.non_compulsory_bytes == 8
    print_plan(replace(found, bound_bytes=4), stopped=True)
    shown = capsys.readouterr().out
    assert "best found for the given order before Ctrl-C; gap 50 %" in shown
    assert "proved bound for the given order" in shown
    assert "1 spill, 1 retrieve\n" in "\n".join(line.rstrip() for line in shown.splitlines()) + "\n"
    print_plan(replace(found, bound_bytes=4, fixed_order=False))
    assert "given order" not in capsys.readouterr().out


def test_counts_name_activations_and_parameters(cli, graph_file):
    assert "bottleneck: 4 operators, 1 input, 4 activations, 1 parameter\n" in cli("bounds", graph_file).out
    found = object_of(cli("bounds", graph_file, "--json"))
    assert found["tensors_by_role"] == {"input": 1, "activation": 4, "parameter": 1}


def test_a_network_whose_bounds_are_equal_has_nothing_to_sweep(cli, tmp_path):
    from retensor.graph import Graph, Operator, Tensor
    from retensor.graph.json import write_graph

    path = tmp_path / "one.json"
    write_graph(
        Graph("one", [Operator("f", "F", ("x",), ("y",))], [Tensor("x", 1, "input"), Tensor("y", 1)], ["y"]), path
    )
    assert "M_R = M_P: one point, nothing to sweep" in cli("sweep", path).out


def test_a_size_relative_to_the_bounds_is_worked_out_once(cli, graph_file, tmp_path, monkeypatch):
    import importlib

    from retensor import planning

    calls = []
    real = planning.bounds

    def counted(*arguments, **options):
        calls.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(planning, "bounds", counted)
    monkeypatch.setattr(importlib.import_module("retensor.planning.bounds"), "bounds", counted)
    for command in (
        ("plan", graph_file, "--scratchpad", "M_H", "--compare"),
        ("plan", graph_file, "--scratchpad", "M_H", "--report", tmp_path / "r.html"),
        ("compare", graph_file, "--scratchpad", "0.9*M_P"),
        ("compare", graph_file, "--scratchpad", "M_R"),
    ):
        calls.clear()
        assert cli(*command).code == 0
        assert len(calls) == 1, command


@pytest.mark.parametrize(
    ("types", "allowed"),
    [
        (("float64", "float64"), 1e-12),
        (("float32", "float32"), 1e-4),
        (("float32", "float64"), 1e-4),
        (("float32", "float16"), 1e-2),
        (("bfloat16", "float32"), 1e-2),
        (("float32", "int64"), 0.0),
    ],
)
def test_run_allows_the_noise_of_the_coarsest_type_on_the_way(types, allowed):
    from retensor.cli.check import _noise
    from retensor.graph import Graph, Operator, Tensor

    middle, last = types
    tensors = [Tensor("x", 8, "input", dtype=middle), Tensor("a", 8, dtype=middle), Tensor("y", 8, dtype=last)]
    operators = [Operator("f", "F", ("x",), ("a",)), Operator("g", "Cast", ("a",), ("y",))]
    assert _noise(Graph("net", operators, tensors, ["y"])) == allowed


def test_python_m_retensor_is_the_command_line():
    import subprocess
    import sys

    import retensor

    done = subprocess.run([sys.executable, "-m", "retensor", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"retensor {retensor.__version__}\n")
    refused = subprocess.run(
        [sys.executable, "-m", "retensor", "bounds", "no/such.json"], capture_output=True, text=True, timeout=120
    )
    assert (refused.returncode, refused.stdout) == (2, "")


def test_plan_with_weights_loads_them(cli, graph_file):
    found = object_of(cli("plan", graph_file, "--scratchpad", "M_Rp", "--weights", "--json"))
    assert found["parameters"] is True
    assert (found["scratchpad_bytes"], found["compulsory_bytes"]) == (106, 90)


def test_merges_are_shown_and_off_on_request(cli, onnx_file):
    merged = cli("graph", onnx_file, *ONNX_INPUT)
    assert "merged 7 nodes into 3 operators: Conv+BatchNormalization+Relu x 2" in merged.out
    raw = cli("graph", onnx_file, *ONNX_INPUT, "--no-fuse")
    assert "7 operators" in raw.out
    assert "merged 7" not in raw.out
    found = object_of(cli("bounds", onnx_file, *ONNX_INPUT, "--json"))
    assert found["merged"] == {"Conv+BatchNormalization+Relu": 2}


def test_verify_recounts_a_plan(cli, graph_file, tmp_path):
    plan = tmp_path / "plan.json"
    assert cli("plan", graph_file, "--scratchpad", "M_R", "-o", plan).code == 0
    result = cli("verify", plan, graph_file)
    assert result.code == 0
    assert result.out.startswith(f"valid: {plan} replayed on bottleneck in 4 steps\n")
    found = object_of(cli("verify", plan, graph_file, "--json"))
    assert (found["status"], found["steps"], found["peak_bytes"]) == ("valid", 4, 96)
    assert (found["compulsory_bytes"], found["non_compulsory_bytes"]) == (80, 64)


@pytest.mark.parametrize("options", [(), ("--no-fuse",), ("--in-place", "--alignment", "64"), ("--weights",)])
def test_run_executes_a_plan_with_the_options_it_was_made_with(cli, onnx_file, tmp_path, options):
    plan = tmp_path / "plan.json"
    made = cli("plan", onnx_file, "--scratchpad", "M_R", *ONNX_INPUT, *options, "-o", plan)
    assert made.code == 0, made.err
    assert object_of(cli("verify", plan, onnx_file, "--json"))["status"] == "valid"
    found = object_of(cli("run", plan, onnx_file, "--seed", "3", "--json"))
    assert found["status"] in ("equal", "within noise")
    assert found["arena_bytes"] == json.loads(plan.read_text())["accelerator"]["scratchpad_bytes"]
    assert found["peak_bytes"] <= found["arena_bytes"]
    result = cli("run", plan, onnx_file)
    assert result.code == 0
    assert "compared with the plain run" in result.out


def test_run_reports_outputs_that_differ_with_code_2(cli, onnx_file, tmp_path, monkeypatch):
    from dataclasses import replace

    from retensor import planning

    plan = tmp_path / "plan.json"
    assert cli("plan", onnx_file, "--scratchpad", "M_R", *ONNX_INPUT, "-o", plan).code == 0
    real = planning.execute
    monkeypatch.setattr(
        planning,
        "execute",
        lambda *a, **k: replace(real(*a, **k), bit_equal=False, max_relative_difference=float("inf")),
    )
    result = cli("run", plan, onnx_file, "--json")
    assert result.code == 2
    assert json.loads(result.out)["status"] == "different"
    assert json.loads(result.out)["max_relative_difference"] is None
    assert "differ" in result.err


def test_int8_plans_count_one_byte_an_element_and_do_not_run(cli, onnx_file, tmp_path):
    plan = tmp_path / "plan.json"
    full = object_of(cli("bounds", onnx_file, *ONNX_INPUT, "--json"))
    made = object_of(
        cli("plan", onnx_file, "--scratchpad", "M_R", *ONNX_INPUT, "--dtype", "int8", "-o", plan, "--json")
    )
    assert made["scratchpad_bytes"] * 4 == full["m_r_bytes"]
    assert cli("verify", plan, onnx_file).code == 0
    refused = cli("run", plan, onnx_file)
    assert refused.code == 2
    assert "element type" in refused.err


def test_compare_lists_cosma_and_the_baselines_in_both_placements_none_of_them_better(cli, graph_file):
    found = object_of(cli("compare", graph_file, "--scratchpad", "M_R", "--json"))
    assert found["non_compulsory_bytes"] == 64
    pairs = [(row["schedule"], row["replacement"], row["placement"]) for row in found["baselines"]]
    four = [("default", "belady"), ("default", "greedy"), ("mpmf", "belady"), ("mpmf", "greedy")]
    assert sorted(pairs) == sorted((*pair, placement) for pair in four for placement in ("arena", "online"))
    for row in found["baselines"]:
        assert row["non_compulsory_bytes"] >= 64
        assert row["reduction"] == pytest.approx(1 - 64 / row["non_compulsory_bytes"])
    table = cli("compare", graph_file)
    assert table.code == 0
    assert [line.split()[0] for line in table.out.splitlines()[-9:]] == [
        "COSMA",
        *["model's", "model's", "MPMF", "MPMF"] * 2,
    ]


def test_compare_with_nothing_to_remove_says_so(cli, graph_file):
    found = object_of(cli("compare", graph_file, "--scratchpad", "1KiB", "--json"))
    assert {row["reduction"] for row in found["baselines"]} == {None}
    assert "nothing to remove" in cli("compare", graph_file, "--scratchpad", "1KiB").out


def test_sweep_goes_from_m_p_without_traffic_to_m_r(cli, graph_file, tmp_path):
    picture = tmp_path / "sweep.svg"
    found = object_of(cli("sweep", graph_file, "--points", "3", "--picture", picture, "--json"))
    rows = [(p["scratchpad_bytes"], p["non_compulsory_bytes"], p["bound_bytes"], p["status"]) for p in found["points"]]
    assert rows == [(128, 0, 0, "optimal"), (112, 64, 64, "optimal"), (96, 64, 64, "optimal")]
    assert "<svg" in picture.read_text()[:2000]
    table = cli("sweep", graph_file, "--points", "3")
    assert table.code == 0
    assert table.out.count("█" * 24) == 2


def test_graph_file_goes_out_and_in_again(cli, onnx_file, tmp_path):
    bare = tmp_path / "bare.json"
    assert cli("graph", onnx_file, *ONNX_INPUT, "-o", bare).code == 0
    printed = object_of(cli("graph", onnx_file, *ONNX_INPUT, "--json"))
    assert printed == json.loads(bare.read_text())
    assert printed["schema"] == "retensor.graph/1"
    direct = object_of(cli("bounds", onnx_file, *ONNX_INPUT, "--json"))
    again = object_of(cli("bounds", bare, "--json"))
    assert [direct[k] for k in ("m_r_bytes", "m_p_bytes")] == [again[k] for k in ("m_r_bytes", "m_p_bytes")]


def test_graph_table_lists_every_operator_with_its_bytes(cli, graph_file):
    lines = cli("graph", graph_file).out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert rows["expand"] == ["Conv", "96", "10"]
    assert rows["stem"] == ["Conv", "80", "0"]
