"""What cannot be replaced is refused in a sentence, and what was apart stays apart."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.replacing.layers import SameLinear, same
from torch import nn

import retensor as rt


def test_what_torch_compile_goes_on_calling_is_not_replaced() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    with pytest.raises(ValueError, match=r"'_orig_mod' is what torch\.compile compiled"):
        rt.replace(model, {"_orig_mod": nn.Identity()})
    x = torch.randn(3, 2)
    assert torch.equal(rt.replace(model, {"_orig_mod.0": nn.Identity()})(x), x)


def test_parts_of_a_scripted_module_are_not_replaced() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match=r"'0\.0' lies in a scripted module"):
        rt.replace(model, {"0.0": nn.Identity()})
    assert isinstance(rt.replace(model, {"0": nn.Identity()})[0], nn.Identity)


def test_a_layer_without_values_does_not_stand_for_one_with_some() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a Linear on the meta device, which has no values"):
        rt.replace(model, {"0": lambda layer: nn.Linear(2, 2, device="meta")})
    assert rt.replace(model.to("meta"), {"0": lambda layer: nn.Linear(2, 2)})[0].weight.is_meta


def two(tied: bool) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for layer in model:
        nn.init.zeros_(layer.bias)
    if tied:
        model[1].weight = model[0].weight
    return model


def test_biases_that_happen_to_be_equal_are_not_tied() -> None:
    done = rt.replace(two(tied=True), {nn.Linear: same}, tied="both")
    assert done[0].inner.weight is done[1].inner.weight
    assert done[0].inner.bias is not done[1].inner.bias


def test_weights_that_are_no_numbers_are_tied_again() -> None:
    model = two(tied=True)
    model[0].weight.data[0, 0] = torch.nan
    done = rt.replace(model, {nn.Linear: copy.deepcopy}, tied="both")
    assert done[0].weight is done[1].weight


def test_folding_keeps_weights_tied_and_biases_apart() -> None:
    folded = rt.fold(rt.replace(two(tied=True), {nn.Linear: same}, tied="both"))
    assert folded[0].weight is folded[1].weight
    assert folded[0].bias is not folded[1].bias
    apart = rt.fold(nn.Sequential(*(SameLinear(3, 3, bias=False) for _ in range(2))))
    assert apart[0].weight is not apart[1].weight
