"""``retensor systems`` lists what there is, in a checkout with how the claims came out."""

import json
from pathlib import Path

from retensor.cli import run
from retensor.systems import SYSTEMS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_table_names_every_system(capfd):
    assert run(["systems", "--benchmarks", str(BENCHMARKS)]) == 0
    shown = capfd.readouterr().out
    assert all(system.name.split()[0] in shown for system in SYSTEMS)
    assert "held" in shown


def test_json_has_every_field(capfd):
    assert run(["systems", "--json", "--benchmarks", str(BENCHMARKS)]) == 0
    found = json.loads(capfd.readouterr().out)["systems"]
    assert [entry["module"] for entry in found] == [system.module for system in SYSTEMS]
    assert set(found[0]) == {"name", "wing", "module", "does", "paper", "arxiv", "claims"}


def test_outside_of_a_checkout_nothing_is_measured(capfd, tmp_path):
    assert run(["systems", "--benchmarks", str(tmp_path / "none")]) == 0
    shown = capfd.readouterr().out
    assert "claims are measured in a checkout" in shown
    assert "held" not in shown
