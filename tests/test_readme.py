"""What README.md and docs/ tell a reader to type works, and their pictures and captions show the plans they name."""

import io
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from xml.etree import ElementTree

import pytest

import retensor as rt
from retensor.cli import run
from retensor.units import format_bytes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
IMAGES = ROOT / "docs" / "images"
PAGES = sorted((ROOT / "docs").glob("*.md"))


def fences(text, language=""):
    """The fenced blocks of one language."""
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if name == language]


def commands(text):
    """Every ``retensor ...`` line of the fences that names no file which only the user has."""
    lines = [line.split("#")[0].strip() for block in fences(text) for line in block.splitlines()]
    return [line for line in lines if line.startswith("retensor ") and "model.onnx" not in line]


def test_the_first_fence_is_the_two_make_commands_and_both_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", fences(README)[0], re.M)
    assert targets == ["plan", "test"]
    for target in (*targets, "pictures"):
        assert f"\n{target}:" in makefile


def shown_by(block, names=None):
    """What a block of Python prints."""
    shown = io.StringIO()
    with redirect_stdout(shown):
        exec(compile(block, "page", "exec"), {} if names is None else names)
    return shown.getvalue()


def test_the_python_blocks_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    planning, replacing = fences(README, "python")
    assert shown_by(planning) == "optimal 5619712 5619712\nTrue (1, 1000, 1, 1)\n"
    table = shown_by(replacing)
    assert re.search(r"dense +rank\n", table)
    assert re.search(r"off-chip traffic .* x0\.\d+", table)
    assert (tmp_path / "student.safetensors").stat().st_size > 0


@pytest.mark.parametrize("page", ["replace.md", "few-bits.md"])
def test_the_python_blocks_of_a_page_run_one_after_another(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    names = {"__name__": "page"}
    printed = [shown_by(block, names) for block in fences(text, "python")]
    assert [shown for shown in printed if shown] == fences(text, "text")


def test_the_commands_of_the_readme_run_in_their_order(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    typed = commands(README) + [
        " ".join(line.split()) for line in re.findall(r"`(retensor (?:plan|compare) densenet121[^`]*)`", README)
    ]
    assert len(typed) == 7
    for line in typed:
        assert run(shlex.split(line)[1:]) == 0, (line, capfd.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "report.html", "plan.svg", "sweep.svg"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_graph_and_the_commands_of_a_page_belong_together(page, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    graphs = fences(text, "json")
    for block in graphs:
        Path("graph.json").write_text(block)
        for line in commands(text):
            assert run(shlex.split(line)[1:]) == 0, (line, capfd.readouterr().err)
    assert graphs or not commands(text)


def test_the_graph_page_states_the_bytes_of_its_plan(monkeypatch, tmp_path, capfd):
    text = (ROOT / "docs" / "graph-file.md").read_text(encoding="utf-8")
    (tmp_path / "graph.json").write_text(fences(text, "json")[0])
    graph = rt.graph.load(tmp_path / "graph.json")
    plan = rt.plan(graph, rt.Accelerator(scratchpad="96KiB"))
    assert (plan.status, plan.non_compulsory_bytes) == ("optimal", 65_536)
    assert {move.tensor for move in plan.transfers if move.kind in ("spill", "retrieve")} == {"skip"}
    assert "65,536 bytes" in text


@pytest.fixture(scope="module")
def hero():
    graph = rt.graph.load("densenet121")
    plan = rt.plan(graph, rt.Accelerator(scratchpad="M_H"))
    others = {
        rt.planning.baseline(graph, rt.Accelerator(scratchpad="M_H"), schedule=s, replacement=r).non_compulsory_bytes
        for s, r in rt.planning.BASELINES
    }
    return plan, others


def test_the_caption_of_the_first_picture_states_this_plan(hero):
    plan, others = hero
    caption = " ".join(re.search(r"^\*DenseNet-121 in .*?\)\*$", README, re.M | re.S)[0].split())
    figures = re.findall(r"[\d.]+ [KM]iB", caption)
    assert len(others) == 1
    sizes = (plan.scratchpad_bytes, plan.non_compulsory_bytes, *others)
    assert figures == [format_bytes(size) for size in sizes]
    assert plan.status == "optimal"
    assert "proved optimal" in caption


@pytest.mark.parametrize("name", ["plan-densenet121.svg", "plan-densenet121-dark.svg"])
def test_the_first_picture_is_of_this_plan_and_its_text_is_text(hero, name):
    plan, _ = hero
    root = ElementTree.parse(IMAGES / name).getroot()
    words = [" ".join("".join(node.itertext()).split()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "densenet121" in words
    assert (
        f"{len(plan.order)} operators in {format_bytes(plan.scratchpad_bytes)} · "
        f"{format_bytes(plan.non_compulsory_bytes)} spilled and retrieved, proved optimal"
    ) in words


def test_every_picture_is_linked_and_every_link_to_a_file_leads_somewhere():
    linked = set(re.findall(r"docs/images/([\w.-]+)", README))
    assert linked == {path.name for path in IMAGES.iterdir()}
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_dark_pictures_have_light_twins_that_differ():
    for dark in IMAGES.glob("*dark*"):
        light = IMAGES / dark.name.replace("report-dark", "report-light").replace("-dark", "")
        assert light.exists()
        assert light.read_bytes() != dark.read_bytes()


def test_make_pictures_draws_the_same_pictures(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_pictures.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn >= {path.name for path in IMAGES.glob("*.svg")}
    assert drawn == {path.name for path in IMAGES.iterdir()} or "no chromium here" in done.stderr
