"""The claims' machinery, and the claims on speed and proof, which must not be lost unnoticed."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from benchmarks.claim_cosma import rows_of
from benchmarks.claim_searched import rows_of as searched_rows_of

from retensor.claims import (
    README_BLOCK,
    Claim,
    Report,
    Table,
    find_claims,
    run_claims,
    save,
    write_readme,
    write_table,
)
from retensor.errors import RetensorError
from retensor.graph.networks import PAPER_NETWORKS, SEARCHED_NETWORKS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_all_ten_networks_are_proved_in_a_second_at_the_median_and_twenty_at_most() -> None:
    rows = [row for network, source in PAPER_NETWORKS.items() for row in rows_of(network, source, merged=True)]
    assert len(rows) == 60
    assert {row.plan.status for row in rows} == {"optimal"}
    assert statistics.median(row.seconds for row in rows) < 1
    assert max(row.seconds for row in rows) < 20
    assert all(row.plan.non_compulsory_bytes == 0 for row in rows if row.budget == "M_P")
    for row in rows:
        assert all(row.plan.non_compulsory_bytes <= min(theirs) for theirs in row.baselines.values())


@pytest.mark.slow
@pytest.mark.parametrize("network", SEARCHED_NETWORKS)
def test_searched_networks_are_proved_at_m_r_never_above_the_heuristic_and_run(network: str) -> None:
    for row in searched_rows_of(network, budgets=("M_R",)):
        assert row.plan.status == "optimal"
        assert row.plan.non_compulsory_bytes <= row.heuristic
        assert row.plan.non_compulsory_bytes <= min(min(theirs) for theirs in row.baselines.values())
        assert row.runs_bit_equal


def test_results_become_a_table_and_a_readme_block(tmp_path: Path) -> None:
    claim = Claim("It is fast | always.", "two cores", "a peer", "1 s", "0.5 s", "partly held", "once it was not")
    report = Report("demo", "Demo: a system", "Somebody 2020", [claim], [Table("Rows", ["a", "b"], [["x", 12345]])])
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    stored = json.loads(save(report, folder).read_text())
    assert stored["schema"] == "retensor.claims/1"
    assert stored["claims"][0]["ours"] == "0.5 s"
    write_table(folder, tmp_path / "CLAIMS.md")
    table = (tmp_path / "CLAIMS.md").read_text()
    assert "It is fast \\| always." in table
    assert "**partly held**: once it was not" in table
    assert "12,345" in table
    readme = tmp_path / "README.md"
    readme.write_text(f"head\n{README_BLOCK[0]}\nold\n{README_BLOCK[1]}\ntail\n")
    write_readme(folder, readme)
    text = readme.read_text()
    assert "0.5 s" in text
    assert "old" not in text
    assert text.startswith("head\n")
    assert text.endswith("tail\n")


def test_unknown_claims_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(RetensorError, match="no claim is named 'nothing'; there are: aphq_vit, apriori_conv, cosma"):
        run_claims(ROOT / "benchmarks", ["nothing"], print)
    with pytest.raises(RetensorError, match="there is no folder"):
        find_claims(tmp_path / "none")
    with pytest.raises(RetensorError, match="has no file claim_"):
        find_claims(tmp_path)


def test_what_was_measured_against_a_named_peer_is_not_measured_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "claim_demo.py").write_text(
        "from retensor.claims import Claim, Report\n"
        "def measure(progress):\n"
        "    claim = Claim('a', 'b', 'c', 'd', 'e', 'held')\n"
        "    return Report('demo', 'Demo', 'Somebody', [claim], environment=['DEMO'])\n"
    )
    monkeypatch.setenv("DEMO", "here")
    run_claims(tmp_path, ["demo"], print)
    stored = json.loads((tmp_path / "results" / "demo.json").read_text())
    assert stored["command"] == "DEMO=... retensor claims demo"
    monkeypatch.delenv("DEMO")
    with pytest.raises(RetensorError, match="'demo' was measured against what DEMO named; set it"):
        run_claims(tmp_path, ["demo"], print)
    told: list[str] = []
    assert run_claims(tmp_path, [], told.append) == []
    assert told == ["'demo' is left as it is: DEMO is not set"]


def test_results_that_are_broken_are_named_and_those_of_others_passed_over(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "other.json").write_text('{"a": 1}')
    write_table(tmp_path, tmp_path / "CLAIMS.md")
    (tmp_path / "results" / "broken.json").write_text("[1,2")
    with pytest.raises(RetensorError, match=r"broken\.json"):
        write_table(tmp_path, tmp_path / "CLAIMS.md")


def test_claims_md_and_the_readme_are_those_of_the_results(tmp_path: Path) -> None:
    write_table(ROOT / "benchmarks", tmp_path / "CLAIMS.md")
    assert (tmp_path / "CLAIMS.md").read_text() == (ROOT / "CLAIMS.md").read_text()
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    write_readme(ROOT / "benchmarks", copy)
    assert copy.read_text() == (ROOT / "README.md").read_text()
