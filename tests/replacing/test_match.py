"""Patterns mean the names they say."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from retensor.replacing import matching
from retensor.replacing.match import meaning


def net() -> nn.Module:
    block = lambda: nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(1, 1), "fc2": nn.Linear(1, 1)})})  # noqa: E731
    return nn.ModuleDict({"blocks": nn.ModuleList([block() for _ in range(11)]), "head": nn.Linear(1, 1)})


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("head", ["head"]),
        ("*", ["blocks", "head"]),
        ("blocks.?", [f"blocks.{i}" for i in range(10)]),
        ("blocks.[0-2]", ["blocks.0", "blocks.1", "blocks.2"]),
        ("blocks.[!0-8].mlp.fc1", ["blocks.9.mlp.fc1"]),
        ("blocks.1*", ["blocks.1", "blocks.10"]),
        ("blocks.*.mlp.fc1", [f"blocks.{i}.mlp.fc1" for i in range(11)]),
        ("**.fc2", [f"blocks.{i}.mlp.fc2" for i in range(11)]),
        ("blocks.10.**", ["blocks.10.mlp", "blocks.10.mlp.fc1", "blocks.10.mlp.fc2"]),
        ("**.blocks.3", ["blocks.3"]),
        ("block", []),
        ("blocks.*.fc1", []),
        ("", [""]),
    ],
)
def test_globs_mean_parts_of_names(glob: str, found: list[str]) -> None:
    assert matching(net(), glob) == found


def test_classes_and_functions_are_patterns_too() -> None:
    linear = [name for name, module in net().named_modules() if isinstance(module, nn.Linear)]
    assert matching(net(), nn.Linear) == linear
    assert matching(net(), lambda name, module: name.endswith("fc1") and isinstance(module, nn.Linear)) == linear[:-1:2]


@pytest.mark.parametrize("pattern", [3, None, int, nn.ReLU(), ["head"]])
def test_what_is_no_pattern_is_refused(pattern: object) -> None:
    with pytest.raises(TypeError, match=r"pattern|class of modules"):
        matching(net(), pattern)  # type: ignore[arg-type]


@pytest.mark.parametrize("glob", ["[z-a]", "[!]", "[", "[]", "[!a", "]"])
def test_odd_brackets_mean_what_the_shells_mean(glob: str) -> None:
    for name in ("a", "z", "[", "]", "[!]", "[]", "[!a"):
        assert meaning(glob)(name, nn.Module()) == fnmatch.fnmatchcase(name, glob)


letters = st.text(alphabet="ab1[]!^\\*?.-", max_size=8)


@given(letters, letters)
def test_within_one_part_a_glob_means_what_the_shells_mean(glob: str, name: str) -> None:
    """Python's own matcher, whose star also crosses dots and whose names may be anything."""
    if "." in glob or "**" in glob:
        return
    expected = fnmatch.fnmatchcase(name, glob) and "." not in name and (name != "" or glob == "")
    try:
        found = meaning(glob)(name, nn.Module())
    except Exception as error:
        raise AssertionError(f"{glob!r} is refused") from error
    assert found == expected
