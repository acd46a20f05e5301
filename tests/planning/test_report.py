"""The HTML report and the pictures: complete, self-contained, safe with hostile names, and true to the plan."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import random
import re
import shutil
import struct
import subprocess
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote
from xml.etree import ElementTree

import pytest
from PIL import Image

from retensor.errors import PlanError, RetensorError
from retensor.graph import Graph, Operator, Tensor
from retensor.planning.appearance import occupancy_of, palette, role_of, shades, status_sentence
from retensor.planning.assemble import transfers_of
from retensor.planning.curves import plot_sweep
from retensor.planning.picture import plot_plan
from retensor.planning.plan import Plan, Residency, Transfer
from retensor.planning.report import write_report


def layered_graph(operators: int, seed: int = 0, name: str = "layered") -> Graph:
    """A random network of ``operators`` steps with branches, skips, parameters and two outputs."""
    rng = random.Random(seed)
    tensors = [Tensor("image", 3 * 64 * 64, "input", (1, 3, 64, 64), "uint8")]
    made: list[Operator] = []
    live = ["image"]
    for i in range(operators):
        kind = rng.choice(["Conv+Relu", "Conv+Relu", "Conv", "Add", "Concat", "MaxPool"])
        nearby = live[-9:] if i % 3 == 2 else live[-3:]
        readers = rng.sample(nearby, min(len(nearby), 2 if kind in ("Add", "Concat") else 1))
        channels, side = rng.choice([16, 24, 32, 48]), rng.choice([16, 16, 24, 32])
        output = f"stage{i // 12}/block{i % 12}/{kind.lower()}_out"
        tensors.append(Tensor(output, channels * side * side, "activation", (1, channels, side, side), "uint8"))
        inputs = list(readers)
        if kind.startswith("Conv"):
            weight = f"stage{i // 12}.block{i % 12}.weight"
            tensors.append(Tensor(weight, channels * 16 * 9, "parameter", (channels, 16, 3, 3), "uint8"))
            inputs.append(weight)
        made.append(Operator(f"{kind.split('+')[0].lower()}_{i}", kind, tuple(inputs), (output,)))
        live.append(output)
    return Graph(name, made, tensors, live[-2:])


def greedy_plan(graph: Graph, scratchpad: float = 1.02, parameters: bool = True, policy: str = "greedy") -> Plan:
    """Keep tensors while there is room at the first gap, evict the furthest used, compact when nothing fits."""
    order = tuple(operator.name for operator in graph.operators)
    size = {tensor.name: tensor.nbytes for tensor in graph.tensors.values()}
    needed = [graph.operator_tensors(operator, parameters) for operator in graph.operators]
    budget = int(scratchpad * max(sum(size[name] for name in names) for names in needed))
    uses: dict[str, list[int]] = {}
    for step, names in enumerate(needed):
        for name in names:
            uses.setdefault(name, []).append(step)
    placed: dict[str, tuple[int, int]] = {}
    stays: list[Residency] = []

    def leave(name: str, step: int) -> None:
        start, address = placed.pop(name)
        if step > start:
            stays.append(Residency(name, start, step, address))

    def gap(nbytes: int) -> int | None:
        address = 0
        for low, high in sorted((a, a + size[n]) for n, (_, a) in placed.items()):
            if low - address >= nbytes:
                return address
            address = max(address, high)
        return address if budget - address >= nbytes else None

    for step, names in enumerate(needed):
        for name in [n for n in placed if uses[n][-1] < step]:
            leave(name, step)
        for name in sorted((n for n in names if n not in placed), key=lambda n: -size[n]):
            while (address := gap(size[name])) is None:
                others = [n for n in placed if n not in names]
                if not others:
                    break
                future = {n: next(s for s in uses[n] if s > step) for n in others}
                pick = max if policy == "belady" else min
                leave(pick(others, key=lambda n: (future[n] if policy == "belady" else size[n], n)), step)
            if address is None:
                break
            placed[name] = (step, address)
        else:
            continue
        # Only the operator's own tensors are left and there is still no gap: move them all together.
        for name in list(placed):
            leave(name, step)
        address = 0
        for name in names:
            placed[name] = (step, address)
            address += size[name]
    for name in list(placed):
        leave(name, len(order))
    residencies = tuple(sorted(stays, key=lambda stay: (stay.start, stay.address)))
    transfers = transfers_of(graph, order, residencies)
    traffic = sum(t.nbytes for t in transfers if t.kind in ("spill", "retrieve"))
    return Plan(
        graph_name=graph.name,
        graph_digest=graph.digest,
        scratchpad_bytes=budget,
        alignment=1,
        parameters=parameters,
        order=order,
        residencies=residencies,
        transfers=transfers,
        bound_bytes=traffic * 7 // 8,
        solver=policy,
        seconds=0.0123,
    )


def page_data(page: str) -> dict[str, Any]:
    """The JSON that the page embeds, as a browser would read it."""
    blocks = re.findall(r'<script type="application/json" id="plan">(.*?)</script>', page, re.DOTALL)
    assert len(blocks) == 1
    return json.loads(blocks[0])


class Outline(HTMLParser):
    """Counts tags and collects attributes, and fails where tags do not nest."""

    VOID: ClassVar = {"meta", "input", "br", "path"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"


def outline(page: str) -> Outline:
    parsed = Outline()
    parsed.feed(page)
    parsed.close()
    assert parsed.open == []
    return parsed


HOSTILE = (
    "</script><img src=x onerror=document.documentElement.dataset.owned=1>",
    "<!--<script>",
    "]]>&lt;script&gt;",
    "%%DATA%% %%SCRIPT%%",
    "$x^{$ \\frac \\1 \\g<0>",
    "quote\" 'single' `tick` ${document.title}",
    "line\nbreak\ttab\x00null\x1b\u2028\u2029",
    "lone \ud800 surrogate",
    "\u202eright to left",
    "日本語テンソル 🙂",
    "__proto__",
    "",
)


def hostile_graph() -> Graph:
    """Every name of :data:`HOSTILE` as a tensor and as an operator, and as the graph's own name."""
    tensors = [Tensor("start", 64, "input")]
    operators = []
    for i, name in enumerate(HOSTILE):
        tensors.append(Tensor(name, 64 * (i % 3), shape=(64 * (i % 3),), dtype=HOSTILE[0]))
        operators.append(Operator(name, HOSTILE[i - 1], (tensors[-2].name,), (name,)))
    return Graph(HOSTILE[0], operators, tensors, [HOSTILE[-1]])


@pytest.fixture(scope="module")
def case() -> tuple[Graph, Plan, Plan]:
    graph = layered_graph(60, seed=60)
    return graph, greedy_plan(graph), greedy_plan(graph, policy="belady")


@dataclass(frozen=True)
class Sizes:
    m_r: int = 90_000
    m_r_operator: str = "conv_1"
    m_p: int = 200_000
    m_p_bound: int = 190_000
    m_h: int = 145_000
    parameters: bool = True


def written(path: Path, *arguments: Any) -> str:
    write_report(path, *arguments)
    return path.read_bytes().decode("utf-8")


def test_the_greedy_plans_of_these_tests_are_plans() -> None:
    for operators, parameters in ((10, True), (60, True), (60, False), (900, True)):
        graph = layered_graph(operators, seed=operators)
        plan = greedy_plan(graph, parameters=parameters)
        size = {name: tensor.nbytes for name, tensor in graph.tensors.items()}
        resident: list[dict[str, tuple[int, int]]] = [{} for _ in plan.order]
        for stay in plan.residencies:
            for step in range(stay.start, stay.end):
                assert stay.tensor not in resident[step]
                resident[step][stay.tensor] = (stay.address, stay.address + size[stay.tensor])
        for operator, there in zip(graph.operators, resident, strict=True):
            assert set(graph.operator_tensors(operator, parameters)) <= set(there)
            spans = sorted(there.values())
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
            assert spans[-1][1] <= plan.scratchpad_bytes


def test_a_report_nests_its_tags_and_repeats_no_id(tmp_path: Path, case: tuple[Graph, Plan, Plan]) -> None:
    graph, plan, other = case
    parsed = outline(written(tmp_path / "r.html", graph, plan, [("Belady", other)], Sizes()))
    ids = [value for _, key, value in parsed.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert parsed.tags["h1"] == parsed.tags["canvas"] == parsed.tags["title"] == 1
    labelled = [value for _, key, value in parsed.attributes if key in ("aria-labelledby", "aria-describedby", "list")]
    assert labelled
    assert set(labelled) <= set(ids)


def test_a_report_names_no_address_outside_itself(tmp_path: Path, case: tuple[Graph, Plan, Plan]) -> None:
    graph, plan, _ = case
    page = written(tmp_path / "r.html", graph, plan)
    # The name of the SVG namespace is an identifier that nothing fetches.
    assert re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}[^\s\"']*", page) == ["http://www.w3.org/2000/svg"]
    assert not re.search(
        r"@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|innerHTML|outerHTML|document\.write|eval\(", page
    )
    parsed = outline(page)
    assert not [a for a in parsed.attributes if a[1] in ("src", "srcset", "action", "style") or a[1].startswith("on")]
    assert [value for _, key, value in parsed.attributes if key == "href"] == ["#picture"]


def test_the_security_policy_admits_the_one_script_and_the_one_style(
    tmp_path: Path, case: tuple[Graph, Plan, Plan]
) -> None:
    page = written(tmp_path / "r.html", *case[:2])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    # The policy binds only what follows it.
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_the_embedded_data_is_the_plan(tmp_path: Path, case: tuple[Graph, Plan, Plan]) -> None:
    graph, plan, other = case
    data = page_data(written(tmp_path / "r.html", graph, plan, [("Belady", other)], Sizes()))
    names = [row[0] for row in data["tensors"]]
    stays = [data["residencies"][i : i + 4] for i in range(0, len(data["residencies"]), 4)]
    assert tuple(Residency(names[t], start, end, address) for t, start, end, address in stays) == plan.residencies
    moves = [data["transfers"][i : i + 4] for i in range(0, len(data["transfers"]), 4)]
    kinds = data["kindsOfTransfer"]
    assert tuple(Transfer(names[t], kinds[k], step, nbytes) for t, k, step, nbytes in moves) == plan.transfers
    assert tuple(row[0] for row in data["operators"]) == plan.order
    for row, operator in zip(data["operators"], graph.operators, strict=True):
        assert {names[t] for t in row[2] + row[3]} == set(graph.operator_tensors(operator, plan.parameters))
        assert data["kinds"][row[1]] == operator.kind
    for name, nbytes, role, _, shape, dtype in data["tensors"]:
        tensor = graph.tensors[name]
        assert (nbytes, tuple(shape), dtype) == (tensor.nbytes, tensor.shape, tensor.dtype)
        expected = "output" if name in graph.outputs else tensor.role
        assert data["roles"][role] == expected
    assert data["nonCompulsory"] == plan.non_compulsory_bytes > 0
    assert data["compulsory"] == plan.compulsory_bytes
    assert (data["bound"], data["scratchpad"], data["status"]) == (plan.bound_bytes, plan.scratchpad_bytes, "feasible")
    assert data["gap"] == pytest.approx(plan.gap)
    assert [(b["label"], b["nonCompulsory"]) for b in data["baselines"]] == [("Belady", other.non_compulsory_bytes)]
    assert (data["bounds"]["r"], data["bounds"]["p"], data["bounds"]["pBound"]) == (90_000, 200_000, 190_000)


def test_counts_are_those_of_the_graph_and_torch_kinds_are_short(tmp_path: Path) -> None:
    kind = "aten.conv2d.default+aten._native_batch_norm_legit_no_training.default"
    tensors = [Tensor("x", 4, "input"), Tensor("w", 4, "parameter"), Tensor("y", 4)]
    graph = Graph("net", [Operator("f", kind, ("x", "w"), ("y",))], tensors, ["y"])
    data = page_data(written(tmp_path / "r.html", graph, greedy_plan(graph, parameters=False)))
    assert data["counts"] == {"input": 1, "activation": 1, "parameter": 1}
    assert data["kinds"] == ["conv2d+batch_norm"]


def test_parameters_that_are_streamed_are_not_shown_as_resident(tmp_path: Path) -> None:
    graph = layered_graph(30, seed=3)
    data = page_data(written(tmp_path / "r.html", graph, greedy_plan(graph, parameters=False)))
    assert "parameter" not in {data["roles"][row[2]] for row in data["tensors"]}


def test_a_page_of_900_operators_stays_small(tmp_path: Path) -> None:
    graph = layered_graph(900, seed=1)
    plan = greedy_plan(graph)
    page = written(tmp_path / "r.html", graph, plan)
    assert len(plan.residencies) > 1300
    assert len(page) < 400_000


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    graph = hostile_graph()
    plan = greedy_plan(graph, 2.0)
    ordinary = layered_graph(10)
    page = written(tmp_path / "r.html", graph, plan, [(HOSTILE[0], plan)])
    expected = outline(written(tmp_path / "s.html", ordinary, greedy_plan(ordinary)))
    assert outline(page).tags == expected.tags
    data = page_data(page)
    assert [row[0] for row in data["operators"]] == list(HOSTILE)
    assert data["baselines"][0]["label"] == HOSTILE[0]
    assert "<img" not in page
    assert page.count("<script") == 2


@pytest.mark.parametrize(
    ("bound", "fixed", "sentence"),
    [
        (1000, False, "proved optimal"),
        (1000, True, "proved optimal, for the given order"),
        (0, False, "not proved: the bound is still 0"),
        (875, False, "within 12.5 % of the best possible"),
        (999, False, "within 0.1 % of the best possible"),
        (666, False, "within 33.4 % of the best possible"),
    ],
)
def test_the_status_never_claims_more_than_was_proved(
    case: tuple[Graph, Plan, Plan], bound: int, fixed: bool, sentence: str
) -> None:
    moved = (Transfer("image", "retrieve", 3, 1000),)
    assert status_sentence(replace(case[1], transfers=moved, bound_bytes=bound, fixed_order=fixed)) == sentence


def test_a_plan_of_another_graph_is_refused(tmp_path: Path, case: tuple[Graph, Plan, Plan]) -> None:
    graph, plan, _ = case
    foreign = greedy_plan(layered_graph(10))
    for call in (
        lambda: write_report(tmp_path / "r.html", graph, foreign),
        lambda: write_report(tmp_path / "r.html", graph, plan, [("other", foreign)]),
        lambda: plot_plan(tmp_path / "p.svg", graph, foreign),
    ):
        with pytest.raises(PlanError, match="was made for graph"):
            call()
    forged = replace(plan, order=("nobody", *plan.order[1:]))
    with pytest.raises(PlanError, match="'nobody'"):
        write_report(tmp_path / "r.html", graph, forged)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_half_written(tmp_path: Path, case: tuple[Graph, Plan, Plan]) -> None:
    graph, plan, _ = case
    target = tmp_path / "r.html"
    target.mkdir()
    with pytest.raises(RetensorError, match="directory"):
        write_report(target, graph, plan)
    with pytest.raises(RetensorError, match="cannot write"):
        plot_plan(tmp_path / "nowhere" / "p.svg", graph, plan)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    for name, write in (("a.html", write_report), ("a.svg", plot_plan)):
        write(tmp_path / name, graph, plan)
        first = (tmp_path / name).read_bytes()
        write(tmp_path / name, graph, plan)
        assert (tmp_path / name).read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.svg", "r.html"]


@pytest.mark.parametrize("operators", [1, 10, 30, 900])
@pytest.mark.parametrize("dark", [False, True])
def test_pictures_are_svg_and_png_of_1200_by_700(tmp_path: Path, operators: int, dark: bool) -> None:
    graph = layered_graph(operators, seed=operators)
    plan = greedy_plan(graph)
    plot_plan(tmp_path / "p.SVG", graph, plan, dark=dark)
    root = ElementTree.parse(tmp_path / "p.SVG").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("viewBox") == "0 0 864 504"
    # Text is text, so that it can be searched, and a path for each rectangle at the least.
    assert graph.name in [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert len(root.findall(".//{http://www.w3.org/2000/svg}path")) >= len(plan.residencies)
    plot_plan(tmp_path / "p.png", graph, plan, dark=dark)
    content = (tmp_path / "p.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1200, 700)
    with Image.open(tmp_path / "p.png") as image:
        # Opaque ground in every corner: legible on any page.
        corner = image.convert("RGBA").getpixel((0, 0))
        assert corner == ((15, 20, 27, 255) if dark else (255, 255, 255, 255))


def test_pictures_bear_hostile_names_and_empty_tensors(tmp_path: Path) -> None:
    graph = hostile_graph()
    plan = greedy_plan(graph, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_plan(tmp_path / "p.svg", graph, plan)
        plot_plan(tmp_path / "p.png", graph, plan)
    ElementTree.parse(tmp_path / "p.svg")


@dataclass(frozen=True)
class Point:
    scratchpad_bytes: int
    non_compulsory_bytes: int
    bound_bytes: int
    baselines: dict[str, int] | None = None


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_sweep_is_drawn_with_and_without_baselines(tmp_path: Path, suffix: str) -> None:
    many = [
        Point(1000 + 100 * i, 800 - 100 * i, 700 - 100 * i, {"$x^{$ \\frac": 900 - 100 * i, "_b": 900 - 100 * i})
        for i in range(8)
    ]
    for points in (many, [Point(5, 0, 0)], [Point(7, 3, 3), Point(7, 3, 3)]):
        path = tmp_path / f"s.{suffix}"
        plot_sweep(path, points, title="$x^{$ & <b>", dark=True)
        content = path.read_bytes()
        if suffix == "svg":
            ElementTree.fromstring(content)
        else:
            assert content.startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one point"):
        plot_sweep(tmp_path / f"t.{suffix}", [])


@pytest.mark.parametrize("name", ["p.pdf", "p", "p.svg.gz", ".svg"])
def test_pictures_refuse_other_suffixes(tmp_path: Path, case: tuple[Graph, Plan, Plan], name: str) -> None:
    with pytest.raises(ValueError, match=r"neither \.svg nor \.png"):
        plot_plan(tmp_path / name, *case[:2])
    with pytest.raises(ValueError, match=r"neither \.svg nor \.png"):
        plot_sweep(tmp_path / name, [Point(1, 0, 0)])
    assert list(tmp_path.iterdir()) == []


def test_drawing_leaves_the_callers_matplotlib_alone(tmp_path: Path, case: tuple[Graph, Plan, Plan]) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_plan(tmp_path / "p.svg", *case[:2])
    assert dict(matplotlib.rcParams) == before


def test_tensors_that_touch_differ_in_colour(case: tuple[Graph, Plan, Plan]) -> None:
    graph, plan, _ = case
    shade = shades(graph, plan)
    assert set(shade) == {stay.tensor for stay in plan.residencies}
    same = pairs = 0
    for a, b in itertools.combinations(plan.residencies, 2):
        top_a, top_b = (stay.address + graph.tensors[stay.tensor].nbytes for stay in (a, b))
        touch = a.start <= b.end and b.start <= a.end and a.address <= top_b and b.address <= top_a
        if touch and a.tensor != b.tensor:
            pairs += 1
            colour_a, colour_b = ((role_of(graph, s.tensor), shade[s.tensor]) for s in (a, b))
            same += colour_a == colour_b
    assert pairs > 100
    assert same <= pairs // 50


def test_the_occupancy_counts_every_resident_byte(case: tuple[Graph, Plan, Plan]) -> None:
    graph, plan, _ = case
    resident, needed = occupancy_of(graph, plan)
    for step, operator in enumerate(graph.operators):
        there = [stay.tensor for stay in plan.residencies if stay.start <= step < stay.end]
        assert resident[step] == sum(graph.tensors[name].nbytes for name in there)
        own = graph.operator_tensors(operator, plan.parameters)
        assert needed[step] == sum(graph.tensors[name].nbytes for name in own) <= resident[step]


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_names_on_rectangles_are_legible(dark: bool) -> None:
    ink = "#f4f7fb" if dark else "#10151d"
    fills = palette(dark)
    assert all(contrast(ink, fill) >= 4.5 for role in fills for fill in role)
    assert len({fill for role in fills for fill in role}) == 4 * 6


def test_text_colours_of_the_page_are_legible() -> None:
    style = resources.files("retensor.planning").joinpath("report.css").read_text()
    for block in re.findall(r':root(?:\[data-theme="dark"\])? \{(.*?)\n\}', style, re.DOTALL)[:2]:
        value = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
        for ground in ("card", "page", "soft"):
            for text in ("ink", "muted", "accent", "spill", "good"):
                assert contrast(value[text], value[ground]) >= 4.5, (text, ground)
        assert contrast(value["good"], value["good-soft"]) >= 4.5
        assert contrast(value["warn"], value["warn-soft"]) >= 4.5


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def rendered(page: Path, tmp_path: Path, fragment: str = "") -> str:
    """The document after its script ran in a browser without a network."""
    command = [
        str(browser()),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000",
        "--window-size=1280,1600",
        "--dump-dom",
        page.as_uri() + fragment,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(browser() is None, reason="no chromium in this environment")
class TestInABrowser:
    def test_the_page_runs_and_shows_the_plan(self, tmp_path: Path, case: tuple[Graph, Plan, Plan]) -> None:
        graph, plan, other = case
        page = tmp_path / "r.html"
        write_report(page, graph, plan, [("Belady", other)], Sizes())
        (moved, *_) = [t.tensor for t in plan.transfers if t.kind == "retrieve"]
        seen = rendered(page, tmp_path, f"#dark&tensor={quote(moved, safe='')}")
        assert 'data-status="ready"' in seen
        assert 'data-theme="dark"' in seen
        assert f'<h1 id="network">{graph.name}</h1>' in seen
        free = sum(t.kind in ("spill", "retrieve") for t in plan.transfers)
        assert seen.count("<tr>") >= free
        assert f"{free} non-compulsory transfers" in seen
        details = seen[seen.index('id="details"') : seen.index('id="keys"')]
        assert moved in details
        assert f"{graph.tensors[moved].nbytes:,}" in details
        tip = seen[seen.index('id="tip"') :]
        assert f"<h3>{moved}</h3>" in tip
        assert "hidden" not in tip[: tip.index(">")]

    def test_steps_count_from_0_as_in_the_plan(self, tmp_path: Path, case: tuple[Graph, Plan, Plan]) -> None:
        graph, plan, _ = case
        page = tmp_path / "r.html"
        write_report(page, graph, plan)
        first = plan.order[0]
        seen = rendered(page, tmp_path, f"#operator={quote(first, safe='')}")
        assert f"<span>step</span><span>0 · {graph.operators[0].kind}</span>" in seen
        (stay, *_) = [r for r in plan.residencies if r.end - r.start > 1 and r.start > 0]
        seen = rendered(page, tmp_path, f"#tensor={quote(stay.tensor, safe='')}")
        assert f"steps {stay.start} to {stay.end - 1} at {stay.address:,} to " in seen
        moves = [t for t in plan.transfers if t.kind in ("spill", "retrieve") and t.step < len(plan.order)]
        rows = re.findall(r'<td class="number">(\d+)</td><td class="name">', seen)
        assert sorted(map(int, rows)) == sorted(t.step for t in moves)

    def test_900_operators_render_without_an_error(self, tmp_path: Path) -> None:
        graph = layered_graph(900, seed=2)
        write_report(tmp_path / "r.html", graph, greedy_plan(graph))
        assert 'data-status="ready"' in rendered(tmp_path / "r.html", tmp_path, "#steps=200-260")

    @pytest.mark.parametrize("scratchpad", [1.0, 50.0])
    def test_hostile_names_and_empty_tensors_do_nothing(self, tmp_path: Path, scratchpad: float) -> None:
        graph = hostile_graph()
        plan = greedy_plan(graph, scratchpad)
        write_report(tmp_path / "r.html", graph, plan, [(HOSTILE[0], plan)])
        seen = rendered(tmp_path / "r.html", tmp_path, f"#tensor={quote(HOSTILE[0], safe='')}&steps=9-%zz&%ff")
        assert 'data-status="ready"' in seen
        assert "data-owned" not in seen
        assert "<img" not in seen
