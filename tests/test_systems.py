"""The table of systems says what is there, and the claims' results say how it came out."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import retensor as rt
from retensor.claims import SCHEMA, SYSTEMS_BLOCK, find_claims, statuses
from retensor.systems import SYSTEMS

ROOT = Path(__file__).parents[1]
IN_WINGS = [system for system in SYSTEMS if system.wing != "planning"]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_a_system_lies_in_its_wing_and_cites_its_paper(system) -> None:
    module = importlib.import_module(system.module)
    assert system.module.startswith(f"retensor.{system.wing}")
    assert re.fullmatch(r"\d{4}\.\d{5}", system.arxiv)
    if system.wing != "planning":
        assert f"arXiv {system.arxiv}" in " ".join(module.__doc__.split()).replace("arXiv:", "arXiv ")


def test_every_claim_file_belongs_to_one_system() -> None:
    slugs = [slug for system in SYSTEMS for slug in system.claims]
    assert sorted(slugs) == sorted(find_claims(ROOT / "benchmarks"))


@pytest.mark.parametrize("system", IN_WINGS, ids=lambda system: system.name)
def test_a_wing_imports_no_other_wing(system) -> None:
    """In a fresh interpreter: of the wings only its own is loaded, and of this library's command line nothing."""
    wings = {other.wing for other in IN_WINGS} - {system.wing} | {"cli"}
    others = tuple(f"retensor.{wing}" for wing in wings)
    code = f"import {system.module}, sys; print([m for m in sys.modules if m.startswith({others})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("system", IN_WINGS, ids=lambda system: system.name)
def test_every_public_name_has_a_docstring(system) -> None:
    module = importlib.import_module(system.module)
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name).__doc__ or not callable(getattr(module, name)), name


def test_the_wing_offers_its_systems_and_no_other_name() -> None:
    for system in IN_WINGS:
        if system.wing == "compression":
            name = system.module.rpartition(".")[2]
            assert getattr(rt.compression, name) is importlib.import_module(system.module)
            assert name in dir(rt.compression)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        rt.compression.nothing  # noqa: B018


def test_the_status_counts_verdicts(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    verdicts = ("held", "not held", "held", "partly held")
    result = {"schema": SCHEMA, "slug": "cosma", "claims": [{"verdict": verdict} for verdict in verdicts]}
    (tmp_path / "results" / "of-others.json").write_text('{"a": 1}')
    (tmp_path / "results" / "cosma.json").write_text(json.dumps(result))
    assert statuses(tmp_path)[SYSTEMS[0].name] == "2 held, 1 partly held, 1 not held"
    assert statuses(tmp_path)[SYSTEMS[1].name] == "not measured"


def test_the_readme_lists_every_system() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.partition(SYSTEMS_BLOCK[0])[2].partition(SYSTEMS_BLOCK[1])[0]
    assert [line.split("|")[2].strip(" `") for line in table.splitlines()[3:]] == [s.module for s in SYSTEMS]
