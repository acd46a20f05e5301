"""Curves of several networks: one for each, whatever their sizes and names; what does not run is left out."""

import warnings
from dataclasses import dataclass
from xml.etree import ElementTree

import pytest

from retensor.planning import Accelerator, plot_sweep
from retensor.planning.curves import _curves


@dataclass(frozen=True)
class Point:
    model: str
    accelerator: Accelerator
    non_compulsory_bytes: int | None
    bound_bytes: int | None
    parameters: bool = False

    @property
    def scratchpad_bytes(self):
        return self.accelerator.scratchpad


def points(model, sizes, traffic, gap=0, alignment=1, parameters=False):
    return [
        Point(model, Accelerator(size, alignment), t, max(0, t - gap), parameters)
        for size, t in zip(sizes, traffic, strict=True)
    ]


def test_points_that_differ_in_model_parameters_or_alignment_are_different_curves():
    rows = points("a", (10, 20), (5, 0)) + points("b", (30,), (7,))
    assert list(_curves(rows)) == ["a", "b"]
    assert [point.scratchpad for point in _curves(rows[::-1])["a"]] == [10, 20]
    rows += points("a", (40,), (1,), parameters=True)
    assert list(_curves(rows)) == ["a", "b", "a, with parameters"]
    rows = points("a", (10,), (5,), alignment=16) + points("a", (10,), (5,))
    assert list(_curves(rows)) == ["a, alignment 16", "a, alignment 1"]
    # What all have in common is in no name.
    assert list(_curves(points("a", (10,), (5,), alignment=16, parameters=True))) == ["a"]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("scale", [1, 10**6])
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_several_networks_are_drawn_whatever_their_sizes(tmp_path, suffix, scale, dark):
    rows = points("small", (1000, 1200, 1500), (900, 300, 0))
    rows += points("_large $x^{$ & <b>", (1000 * scale, 2000 * scale), (800 * scale, 0), gap=100)
    rows += points("flat", (1100, 1300), (0, 0))
    rows += [Point("small", Accelerator(10), None, None)]
    path = tmp_path / f"curves.{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_sweep(path, rows, dark=dark)
    if suffix == "svg":
        shown = "".join(ElementTree.parse(path).getroot().itertext())
        assert all(name in shown for name in ("small", "large $x^{$ & <b> (shaded: not yet proved)", "flat"))
    else:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_many_networks_do_not_fill_the_picture_with_names(tmp_path):
    path = tmp_path / "many.svg"
    plot_sweep(path, [point for i in range(60) for point in points(f"net{i:02}", (10, 20), (i, 0))])
    shown = "".join(ElementTree.parse(path).getroot().itertext())
    assert "net19" in shown
    assert "net20" not in shown


def test_where_nothing_runs_nothing_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="at least one point"):
        plot_sweep(tmp_path / "none.svg", [Point("a", Accelerator(10), None, None)])
    assert list(tmp_path.iterdir()) == []
