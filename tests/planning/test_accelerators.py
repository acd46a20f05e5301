"""Public accelerators: each can be planned for, and a name or a size is told apart."""

import math

import pytest

import retensor as rt
from retensor.planning import PRESETS, Accelerator, accelerator_named, accelerators
from retensor.units import parse_size


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_an_accelerator_with_a_source(name):
    preset = PRESETS[name]
    chip = preset.accelerator
    assert chip.name == name
    assert 2**16 <= parse_size(chip.scratchpad) <= 2**24
    assert chip.alignment & (chip.alignment - 1) == 0
    assert preset.source
    assert preset.what
    assert accelerator_named(name) is chip


@pytest.mark.parametrize("name", PRESETS)
def test_each_source_is_a_document_that_the_module_describes(name):
    described = " ".join(accelerators.__doc__.split())
    for piece in PRESETS[name].source.split("; "):
        assert f"- {piece.partition(' (')[0]}" in described or f". {piece}," in described


# Scratchpad, alignment, bytes and multiply-accumulates a second, each from the parts that the documents state.
STATED = {
    "ethos-u55-32": (0x2120_0000 - 0x2100_0000, 16, 8 * 0.125 * 500e6, 32 * 500e6),
    "ethos-u55-64": (0x2120_0000 - 0x2100_0000, 16, 8 * 0.125 * 500e6, 64 * 500e6),
    "ethos-u55-128": (0x2120_0000 - 0x2100_0000, 16, 8 * 0.125 * 500e6, 128 * 500e6),
    "ethos-u55-256": (0x2120_0000 - 0x2100_0000, 16, 8 * 0.125 * 500e6, 256 * 500e6),
    "ethos-u65-256": (393216, 16, 16 * 0.234375 * 1e9, 256e9),
    "ethos-u65-512": (393216, 16, 16 * 0.234375 * 1e9, 2 * 256e9),
    "nvdla-small": (32 * 8 * 512, 8, 1e9, 8 * 8 * 1e9),
    "nvdla-large": (16 * 64 * 512, 32, 20e9, 64 * 32 * 1e9),
    "gemmini": (256 * 1024, 128 // 8, None, None),
    "eyeriss": (108 * 1024, 1, None, 33.6e9),
    "edge-tpu": (8 * 10**6, 1, 5e9 / 10, 4e12 / 2),
    "max78000": (16 * 8192 * 4, 32 // 8, None, 28.8e9),
    "k210": (0x4080_0000 - 0x4060_0000, 64, None, 230e9),
    "gap8": (0x80000, 1, None, None),
    "stm32n6": (0x3435_0000 + 448 * 1024 - 0x3420_0000, 1, None, None),
}


def test_figures_follow_from_the_parts_that_the_documents_state():
    chips = [preset.accelerator for preset in PRESETS.values()]
    assert {
        chip.name: (parse_size(chip.scratchpad), chip.alignment, chip.bandwidth, chip.macs_per_second) for chip in chips
    } == STATED


def test_sizes_and_accelerators_pass_through():
    chip = Accelerator(5)
    assert accelerator_named(chip) is chip
    assert accelerator_named(1024) == Accelerator(1024)
    assert accelerator_named("1.2*M_R") == Accelerator("1.2*M_R")
    with pytest.raises(ValueError, match="did you mean 'gemmini'"):
        accelerator_named("gemini")
    with pytest.raises(ValueError, match="12 monkeys"):
        accelerator_named("12 monkeys")


@pytest.mark.parametrize("field", ["bandwidth", "macs_per_second"])
def test_rates_are_positive_numbers_or_none(field):
    assert getattr(Accelerator(1), field) is None
    for wrong in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=field):
            Accelerator(1, **{field: wrong})
    for wrong in ("1", True, [1]):
        with pytest.raises(TypeError, match=field):
            Accelerator(1, **{field: wrong})


def test_rates_change_no_plan():
    graph = rt.graph.load("onnx:squeezenet", dtype="int8")
    plain = rt.plan(graph, Accelerator("M_R", 16))
    rated = rt.plan(graph, Accelerator("M_R", 16, "chip", 1e9, 1e9))
    forms = [rt.planning.plan_to_json(plan) for plan in (plain, rated)]
    for form in forms:
        form.pop("seconds")
    assert forms[0] == forms[1]


def test_what_a_preset_leaves_out_is_said_beside_its_figures():
    flash, dedicated = PRESETS["ethos-u55-128"].accelerator, PRESETS["ethos-u65-256"].accelerator
    assert accelerators.caveats(flash, "int8") == [f"ethos-u55-128: {PRESETS['ethos-u55-128'].note}"]
    assert "cannot be spilled" in accelerators.caveats(flash, "int8")[0]
    # A rate of integers says nothing of float32, which a model is in where nothing is said.
    for dtype in (None, "float16"):
        assert [line for line in accelerators.caveats(dedicated, dtype) if "int8" in line]
    assert accelerators.caveats(dedicated, "int8") == []
    # An accelerator of the user's own is his, whatever its name.
    assert accelerators.caveats(Accelerator("1MiB", name="ethos-u55-128")) == []
    sheet = rt.cost("squeezenet", accelerator="ethos-u55-128")
    assert "cannot be spilled" in str(sheet)
    assert "for int8 elements" in str(sheet)
    assert "for int8 elements" not in str(rt.cost("squeezenet", accelerator="ethos-u55-128", dtype="int8"))
