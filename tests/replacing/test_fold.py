"""``fold`` gives plain layers back."""

from __future__ import annotations

import pytest
import torch
from tests.replacing.layers import Doubled, Keeper, SameLinear, Tied, same
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import retensor as rt


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))


def test_folding_undoes_replacing_and_leaves_the_given_model() -> None:
    model, x = net(), torch.randn(3, 4)
    done = rt.replace(model, {nn.Linear: same})
    plain = rt.fold(done)
    assert str(plain) == str(model)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert torch.equal(plain(x), model(x))
    assert isinstance(done[0], SameLinear)


def test_what_has_no_plain_equivalent_stays() -> None:
    done = rt.fold(rt.replace(net(), {"0": Keeper, "2": same}))
    assert isinstance(done[0], Keeper)
    assert type(done[2]) is nn.Linear


def test_the_model_itself_and_shared_and_nested_replacements_fold() -> None:
    assert type(rt.fold(same(nn.Linear(2, 3)))) is nn.Linear
    layer = nn.Linear(4, 4)
    done = rt.fold(rt.replace(nn.Sequential(layer, layer), {nn.Linear: same}))
    assert done[0] is done[1]

    class Outer(SameLinear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.extra = same(nn.Linear(4, 4))

    assert str(rt.fold(nn.Sequential(Outer()))) == str(nn.Sequential(nn.Linear(4, 4)))


def test_what_comes_out_of_a_replacement_is_folded_too_with_its_hooks() -> None:
    class Holder(SameLinear):
        def to_dense(self) -> nn.Module:
            return nn.Sequential(self.part)

    holder, calls = Holder(4, 4), []
    holder.part = same(nn.Linear(4, 4))
    holder.part.register_forward_hook(lambda m, a, o: calls.append(1))
    done = rt.fold(nn.Sequential(holder))
    done(torch.ones(1, 4))
    assert type(done[0][0]) is nn.Linear
    assert calls == [1]


def test_hooks_type_and_mode_stay() -> None:
    calls: list[int] = []
    done = rt.replace(net().double().eval(), {"3": same})
    done[3].register_forward_hook(lambda m, a, o: calls.append(1))
    plain = rt.fold(done)
    plain(torch.randn(1, 4, dtype=torch.float64))
    assert calls == [1]
    assert not plain[3].training


def test_parametrizations_are_baked_and_foreign_ones_stay() -> None:
    model, x = net(), torch.randn(2, 4)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    weight_norm(model[2])
    plain = rt.fold(model)
    assert not parametrize.is_parametrized(plain[0])
    assert parametrize.is_parametrized(plain[2])
    assert parametrize.is_parametrized(model[0])
    assert torch.equal(plain(x), model(x))
    assert list(plain[0].state_dict()) == ["weight", "bias"]


def test_a_recurrent_layer_that_has_run_with_gradients_folds() -> None:
    model = nn.LSTM(4, 8)
    for label in ("weight_ih_l0", "weight_hh_l0"):
        parametrize.register_parametrization(model, label, Doubled())
    x = torch.randn(3, 2, 4)
    expected = model(x)[0]
    plain = rt.fold(model)
    assert torch.equal(plain(x)[0], expected)
    assert list(plain.state_dict()) == list(nn.LSTM(4, 8).state_dict())


def test_tied_parametrized_tensors_are_tied_when_baked() -> None:
    model = Tied()
    for layer in (model.embed, model.head):
        parametrize.register_parametrization(layer, "weight", Doubled())
    model.head.parametrizations.weight.original = model.embed.parametrizations.weight.original
    plain = rt.fold(model)
    assert plain.head.weight is plain.embed.weight
    assert torch.equal(plain(torch.tensor([3])), model(torch.tensor([3])))


def test_parametrizations_on_top_of_foreign_ones_are_refused_by_name() -> None:
    model = net()
    weight_norm(model[0])
    parametrize.register_parametrization(model[0], "weight", Doubled())
    with pytest.raises(ValueError, match=r"'0\.weight' has parametrizations of this library and others"):
        rt.fold(model)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"an nn\.Module is folded, not 3"):
        rt.fold(3)  # type: ignore[arg-type]
