"""Files that would load into something else than was saved, or not at all, are refused when it can be told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.replacing.layers import Doubled, Keeper, SameLinear, same
from torch import nn
from torch.nn.utils import parametrize

import retensor as rt
from retensor.errors import RetensorError
from retensor.replacing import Replacement


class Holding(nn.Module):
    """One buffer."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", value)


class Pair(nn.Module):
    """Two layers that may share their weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        if tied:
            self.second.weight = self.first.weight


class Shifted(nn.Module):
    """A parametrization that is not of this library."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value + 1


def test_two_tensors_do_not_become_one_of_the_base(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    rt.save(Pair(tied=False), path)
    with pytest.raises(RetensorError, match=r"'first\.weight' and 'second\.weight' differ .* one tensor in the model"):
        rt.load(path, Pair(tied=True))
    # Equal ones may be one, not-a-numbers among them.
    equal = Pair(tied=False)
    for layer in (equal.first, equal.second):
        layer.weight.data.fill_(torch.nan)
    rt.save(equal, path)
    assert bool(rt.load(path, Pair(tied=True)).first.weight.isnan().all())


@pytest.mark.parametrize(
    ("saved", "kind"),
    [
        (torch.tensor([300, -1]), torch.uint8),
        (torch.tensor([3, 0]), torch.bool),
        (torch.tensor([1e30, 1.0]), torch.float16),
        (torch.tensor([1000.0, 1.0]), torch.float8_e4m3fn),
        (torch.tensor([1e30 + 0j]), torch.complex32),
    ],
)
def test_numbers_that_the_base_cannot_hold_are_refused(tmp_path: Path, saved: torch.Tensor, kind: torch.dtype) -> None:
    rt.save(Holding(saved), tmp_path / "m.safetensors")
    with pytest.raises(RetensorError, match="holds numbers beyond"):
        rt.load(tmp_path / "m.safetensors", Holding(torch.zeros(saved.shape).to(kind)))


@pytest.mark.parametrize(
    ("saved", "kind"),
    [
        (torch.tensor([200, 1]), torch.uint8),
        (torch.tensor([torch.inf, torch.nan, 0.1]), torch.float16),
        (torch.tensor([0.1, 0.2]), torch.float64),
    ],
)
def test_numbers_that_the_base_holds_within_rounding_are_taken(
    tmp_path: Path, saved: torch.Tensor, kind: torch.dtype
) -> None:
    rt.save(Holding(saved), tmp_path / "m.safetensors")
    found = rt.load(tmp_path / "m.safetensors", Holding(torch.zeros(saved.shape, dtype=kind))).kept
    assert found.dtype == kind
    assert torch.equal(found.nan_to_num(7), saved.to(kind).nan_to_num(7))


def test_a_parametrization_below_another_one_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    for step in (Doubled(), Shifted()):
        parametrize.register_parametrization(model[0], "weight", step)
    with pytest.raises(RetensorError, match=r"'0\.weight' has a parametrization of this library below another one"):
        rt.save(model, tmp_path / "m.safetensors")
    # On top of it, it comes back there.
    base = nn.Sequential(nn.Linear(2, 2))
    parametrize.register_parametrization(base[0], "weight", Shifted())
    model = copy.deepcopy(base)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    rt.save(model, tmp_path / "m.safetensors")
    assert torch.equal(rt.load(tmp_path / "m.safetensors", base)[0].weight, model[0].weight)


def test_what_was_put_inside_a_replacement_is_told_when_it_is_saved(tmp_path: Path) -> None:
    inside = nn.Sequential(same(nn.Linear(2, 2)))
    parametrize.register_parametrization(inside[0].inner, "weight", Doubled())
    nested = rt.replace(nn.Sequential(same(nn.Linear(2, 2))), {"0.inner": same})
    for model, told in ((inside, "this SameLinear holds '.*', other than"), (nested, "of SameLinear fails")):
        with pytest.raises(RetensorError, match=f"'0': .*{told}"):
            rt.save(model, tmp_path / "m.safetensors")
        rt.save(rt.fold(model), tmp_path / "m.safetensors")


def test_a_configuration_that_makes_nothing_is_told_when_it_is_saved(tmp_path: Path) -> None:
    class Odd(Keeper):
        def config(self) -> dict[str, Any]:
            return {"strange": 1}

    with pytest.raises(RetensorError, match=r"Odd cannot be made again of its config\(\)"):
        rt.save(nn.Sequential(Odd(nn.Linear(2, 2))), tmp_path / "m.safetensors")


def test_tensors_that_no_file_keeps_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for value in (torch.zeros(2, dtype=torch.complex32), torch.empty(2, dtype=torch.int4)):
        with pytest.raises(RetensorError, match=f"the type {value.dtype}.*, which safetensors does not keep"):
            rt.save(Holding(value), path)
    with pytest.raises(RetensorError, match="'kept' of the model's state is a nested tensor"):
        rt.save(Holding(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])), path)
    with pytest.raises(RetensorError, match="'weight' of the model's state has no shape yet"):
        rt.save(nn.LazyLinear(3), path)
    rt.save(nn.Linear(3, 3), path)
    with pytest.raises(RetensorError, match=r"'.*' of the model has no shape yet"):
        rt.load(path, nn.LazyLinear(3))


@pytest.mark.parametrize("path", [3, None, b"m.safetensors"])
def test_a_path_that_is_none_is_told(path: Any) -> None:
    with pytest.raises(TypeError, match="the path of a saved state is text or a path, not"):
        rt.save(nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match="the path of a saved state is text or a path, not"):
        rt.load(path, nn.Linear(2, 2))


def test_a_name_too_long_is_told(tmp_path: Path) -> None:
    with pytest.raises(RetensorError, match="cannot be read: File name too long"):
        rt.load(tmp_path / ("n" * 300), nn.Linear(2, 2))


class Scaled(Replacement):
    """A weight of its own, of the type it is saved in."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    def config(self) -> dict[str, Any]:
        return {"size": len(self.weight)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_whole_model_comes_back_in_its_own_type(tmp_path: Path, dtype: torch.dtype) -> None:
    rt.save(Scaled(3).to(dtype), tmp_path / "m.safetensors")
    assert rt.load(tmp_path / "m.safetensors").weight.dtype == dtype


def test_complex_replacements_come_back(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64))
    model = rt.replace(base, {"0": lambda layer: SameLinear(2, 2).to(torch.complex64)})
    rt.save(model, tmp_path / "m.safetensors")
    found = rt.load(tmp_path / "m.safetensors", base)
    assert torch.equal(found[0].inner.weight, model[0].inner.weight)
    with pytest.raises(RetensorError, match=r"is of type torch\.complex64"):
        rt.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(2, 2)))
