"""``retensor cost`` and ``retensor accelerators``, and presets wherever a scratchpad is wanted."""

import json

import pytest

from retensor.costing import CostSheet
from retensor.planning import PRESETS


def object_of(result):
    assert result.code == 0, result.err
    assert result.err == ""
    return json.loads(result.out)


def test_one_model_is_one_sheet(cli, graph_file):
    found = object_of(cli("cost", graph_file, "--scratchpad", "M_R", "--json"))
    assert found.pop("stopped") is False
    sheet = CostSheet.from_dict(found)
    assert (sheet.name, sheet.m_r_bytes, sheet.m_p_bytes, sheet.activation_peak_bytes) == ("bottleneck", 96, 128, 128)
    assert (sheet.compulsory_bytes, sheet.non_compulsory_bytes, sheet.streamed_bytes) == (80, 64, 10)
    # The graph says nothing of its arithmetic.
    assert (sheet.macs, sheet.uncounted) == (None, {"Conv": 3, "Add": 1})


def test_without_a_scratchpad_there_is_no_traffic(cli, onnx_file):
    found = object_of(cli("cost", onnx_file, "--input", "x=2x4x8x8", "--json"))
    assert (found["accelerator"], found["off_chip_bytes"]) == (None, None)
    assert found["macs"] == 2 * 64 * (4 * 16 + 16 * 4)
    # Two weights, and scale and shift of two normalisations; mean and variance are buffers.
    assert found["parameters"] == 64 + 64 + 2 * 16 + 2 * 4
    assert found["parameter_bytes"] == 4 * (found["parameters"] + 2 * 16 + 2 * 4)
    assert found["m_r_bytes"] > 0


def test_weights_in_the_scratchpad_are_loaded_and_not_streamed(cli, graph_file):
    found = object_of(cli("cost", graph_file, "--scratchpad", "1KiB", "--weights", "--json"))
    assert (found["streamed_bytes"], found["compulsory_bytes"], found["m_r_bytes"]) == (0, 90, 106)


def test_several_models_stand_side_by_side(cli, graph_file, onnx_file, tmp_path):
    picture = tmp_path / "costs.svg"
    arguments = ("cost", graph_file, onnx_file, "--input", "x=1x4x8x8", "--scratchpad", "M_R")
    # A bare graph's shapes are as written.
    assert cli(*arguments).code == 2
    found = object_of(cli("cost", graph_file, graph_file, "--scratchpad", "M_R", "--json", "--picture", picture))
    assert [model["name"] for model in found["models"]] == ["bottleneck (1)", "bottleneck (2)"]
    assert "bottleneck (2)" in picture.read_text()
    result = cli("cost", graph_file, graph_file, "--scratchpad", "M_R")
    assert result.code == 0
    for words in ("bottleneck (1)", "non-compulsory traffic", "64 B", "x1", "not known of: Conv, Add"):
        assert words in result.out


def test_a_chip_too_small_is_a_line_of_the_table_and_no_error(cli, graph_file):
    result = cli("cost", graph_file, "--scratchpad", "90")
    assert result.code == 0
    assert "does not fit: 6 B missing" in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "MODEL"),
        (("{graph}", "--accelerator", "gemini"), "did you mean 'gemmini'"),
        (("{graph}", "--accelerator", "2MiB"), "--scratchpad"),
        (("{graph}", "--scratchpad", "lots"), "size"),
        (("{graph}", "--alignment", "0"), "alignment"),
        (("{graph}", "--time-limit", "0"), "--time-limit"),
        (("{graph}", "--picture", "costs.pdf"), ".svg"),
        (("{graph}", "--picture", "{graph}.svg/x.svg"), "folder"),
        (("no-such-model",), "no-such-model"),
    ],
)
def test_mistakes_are_one_sentence(cli, graph_file, arguments, words):
    result = cli("cost", *(argument.replace("{graph}", str(graph_file)) for argument in arguments))
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("retensor: ")
    assert result.err.count("\n") == 1
    assert words in result.err


@pytest.mark.parametrize("command", ["plan", "compare", "cost"])
def test_a_presets_scratchpad_and_alignment_are_used_unless_others_are_given(cli, graph_file, command):
    def chip_of(*options):
        found = object_of(cli(command, graph_file, *options, "--json"))
        chip = found["accelerator"] if command == "cost" else found
        return chip["scratchpad_bytes"], chip["alignment"]

    assert chip_of("--accelerator", "gemmini") == (256 * 1024, 16)
    assert chip_of("--accelerator", "gemmini", "--scratchpad", "1KiB") == (1024, 16)
    assert chip_of("--accelerator", "gemmini", "--alignment", "4") == (256 * 1024, 4)
    assert chip_of("--scratchpad", "1KiB") == (1024, 1)


def test_a_plan_needs_a_scratchpad_or_an_accelerator(cli, graph_file):
    result = cli("plan", graph_file)
    assert result.code == 2
    assert "--scratchpad SIZE or --accelerator NAME" in result.err


def test_accelerators_are_listed_with_their_sources(cli):
    rows = object_of(cli("accelerators", "--json"))["accelerators"]
    assert [row["name"] for row in rows] == list(PRESETS)
    assert all(row["source"] and row["scratchpad_bytes"] > 0 for row in rows)
    shown = cli("accelerators").out
    assert all(name in shown for name in PRESETS)
    assert "not stated" in shown
