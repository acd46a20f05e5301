"""The claims on large graphs: their graphs, their arithmetic, and the gates that must not be lost unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.claim_large import (
    FAMILIES,
    GIBIBYTES,
    MINUTES,
    RESULTS,
    SIZES,
    SYNTHETIC,
    Row,
    _table,
    apart,
    draw,
    exponent,
    made,
    measured,
    row_of,
)
from benchmarks.synthetic import cells, layered

from retensor.planning import Accelerator, bounds, plan, verify


def rows(power: float) -> list[Row]:
    return [
        Row(family, n, n, 64, 100, 50, 10, 0.001 * n, 0.01 * n**power, 0.1 * n, 1e-4 * n, 10**6 * n)
        for family in FAMILIES
        for n in SIZES
    ]


@pytest.mark.parametrize("make", [layered, cells])
def test_synthetic_graphs_are_those_of_their_seed_and_size(make: object) -> None:
    for operators in (1, 10, 333):
        graph = make(operators, seed=3)  # type: ignore[operator]
        assert len(graph.operators) == operators
        assert graph.digest == make(operators, seed=3).digest  # type: ignore[operator]
        assert operators == 1 or graph.digest != make(operators, seed=4).digest  # type: ignore[operator]


@pytest.mark.parametrize("make", [layered, cells])
def test_synthetic_graphs_need_evictions_at_the_least_scratchpad(make: object) -> None:
    graph = make(200, seed=0)  # type: ignore[operator]
    found = bounds(graph, time_limit=5)
    assert found.m_p > found.m_r


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_the_exponent_is_that_of_a_power_law(power: float) -> None:
    mine = [row for row in rows(power) if row.source == "layered"]
    assert exponent(mine, lambda row: row.good) == pytest.approx(power)


def test_the_growth_curve_is_drawn_for_both_pages(tmp_path: Path) -> None:
    draw(rows(1.2), tmp_path)
    light, dark = (tmp_path / name for name in ("growth-large.svg", "growth-large-dark.svg"))
    text = light.read_text()
    assert "to a good plan" in text
    assert "20,000" in text
    assert text != dark.read_text()
    draw(rows(1.2), tmp_path)
    assert light.read_text() == text


def test_the_rows_of_the_picture_are_those_of_the_results() -> None:
    found = measured()
    assert {(row.source, row.operators) for row in found} == {(f, n) for f in FAMILIES for n in SIZES}
    tables = json.loads(RESULTS.read_text())["tables"]
    assert [_table(SYNTHETIC, found).rows] == [t["rows"] for t in tables if t["title"].startswith(SYNTHETIC)]


def test_a_row_counts_what_the_verifier_counts() -> None:
    row = row_of("cells", 300, 3.0)
    assert row.operators == 300
    assert row.bound <= row.cost <= row.belady
    assert row.first <= row.good <= row.seconds
    assert 0 <= row.gap <= 1


def test_decoders_load_without_weights_and_are_proved() -> None:
    pytest.importorskip("transformers")
    from benchmarks.networks_large import decoder

    graph = decoder(layers=2)
    assert graph.program is None
    assert sum(t.nbytes for t in graph.tensors.values() if t.role == "parameter") > 600_000_000
    found = plan(graph, Accelerator("M_R"), time_limit=30)
    assert found.status == "optimal"
    verify(graph, found)


@pytest.mark.slow
def test_the_unet_of_stable_diffusion_xl_has_a_small_gap() -> None:
    pytest.importorskip("diffusers")
    graph = made("unet", 0)
    assert 1_500 < len(graph.operators) < 3_000
    found = plan(graph, Accelerator("M_R"), time_limit=40)
    verify(graph, found)
    assert found.gap < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quarter_of_twenty_thousand_operators_takes_a_quarter_of_the_time_and_memory(family: str) -> None:
    row = apart(family, 5_000, 45.0)
    assert row.seconds + row.verifying < 60 * MINUTES / 4
    assert row.memory < GIBIBYTES * 2**30 / 4
    assert row.cost < 0.8 * row.belady
    assert row.bound > 0
