"""``replace`` changes what was asked for, in a copy, and nothing else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tests.replacing.layers import Keeper, SameLinear, Tied, same
from torch import nn

import retensor as rt


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), nn.Linear(8, 2))


def test_the_given_model_is_left_untouched() -> None:
    model = net()
    before, state, layers = str(model), copy.deepcopy(model.state_dict()), [id(m) for m in model.modules()]
    pickled = pickle.dumps(model)
    done = rt.replace(model, {nn.Linear: same})
    assert sum(isinstance(m, SameLinear) for m in done.modules()) == 3
    for parameter in done.parameters():
        parameter.data.zero_()
    assert str(model) == before
    assert [id(m) for m in model.modules()] == layers
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert pickle.dumps(model) == pickled


def test_the_first_pattern_and_the_outermost_layer_win() -> None:
    done = rt.replace(net(), {"2": nn.Identity(), "0": nn.Tanh(), nn.Linear: same}, unmatched="ignore")
    assert [type(m) for m in done] == [nn.Tanh, nn.ReLU, nn.Identity, SameLinear]


def test_a_module_is_copied_into_every_place() -> None:
    done = rt.replace(net(), {nn.Linear: nn.PReLU()})
    found = [m for m in done.modules() if isinstance(m, nn.PReLU)]
    assert len({id(m) for m in found}) == 3
    assert len({id(m.weight) for m in found}) == 3


def test_a_function_may_leave_a_layer_by_none_or_by_itself() -> None:
    model = net()
    done = rt.replace(model, {"0": lambda layer: None, "3": lambda layer: layer})
    x = torch.randn(3, 4)
    assert str(done) == str(model)
    assert torch.equal(done.eval()(x), model.eval()(x))


def test_a_function_that_leaves_a_container_is_asked_for_what_is_inside() -> None:
    for pattern in ("**", nn.Module):
        done = rt.replace(net(), {pattern: lambda layer: same(layer) if isinstance(layer, nn.Linear) else None})
        assert sum(isinstance(m, SameLinear) for m in done.modules()) == 3


def test_what_goes_on_inside_a_replacement_keeps_its_mode() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    model[0][1].eval()
    done = rt.replace(model, {"0": Keeper})
    assert done[0].training
    assert done[0].layer[0].training
    assert not done[0].layer[1].training


def test_layers_without_a_shape_and_scripted_models_are_refused() -> None:
    with pytest.raises(ValueError, match="'0' has no shape yet; run the model once"):
        rt.replace(nn.Sequential(nn.LazyLinear(3)), {"0": nn.Identity()})
    with pytest.raises(TypeError, match="before scripting"):
        rt.replace(torch.jit.script(net()), {"0": nn.Identity()})


def test_the_model_itself_can_be_replaced() -> None:
    layer = nn.Linear(3, 2)
    done = rt.replace(layer, {nn.Linear: same})
    assert isinstance(done, SameLinear)
    assert torch.equal(done(torch.ones(1, 3)), layer(torch.ones(1, 3)))


def test_a_layer_used_twice_is_replaced_by_one_module_in_both_places() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    done = rt.replace(model, {"2": same})
    assert done[0] is done[2]
    assert isinstance(done[0], SameLinear)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_type_device_and_mode_are_those_of_the_layer(dtype: torch.dtype, training: bool) -> None:
    model = net().to(dtype).train(training)
    done = rt.replace(model, {"2.0": nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))})
    assert {p.dtype for p in done.parameters()} == {dtype}
    assert all(m.training is training for m in done.modules())
    meta = rt.replace(net().to("meta"), {"0": nn.Linear(4, 8)})
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_a_mixed_layer_and_a_complex_replacement_keep_their_types() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
            self.r = nn.Parameter(torch.zeros(2))

    done = rt.replace(net().double(), {"0": Complex()})
    assert done[0].c.dtype == torch.complex64
    mixed = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))
    assert rt.replace(mixed, {"0": nn.Linear(2, 2)})[0].weight.dtype == torch.float32


def test_hooks_run_once_in_their_order_with_their_arguments() -> None:
    model, calls = net(), []
    layer = model[3]
    layer.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    layer.register_forward_pre_hook(lambda m, a, k: calls.append("pre with kwargs"), with_kwargs=True)
    layer.register_forward_hook(lambda m, a, o: calls.append("after"))
    layer.register_forward_hook(lambda m, a, k, o: o + 1, with_kwargs=True)
    layer.register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    x = torch.randn(2, 4, requires_grad=True)
    expected = model.eval()(x)
    expected.sum().backward()
    plain, calls[:] = calls[:], []
    for make in (same, Keeper, lambda layer: nn.Sequential(layer)):
        done = rt.replace(model, {"3": make})
        assert torch.equal(done(x), expected)
        done(x).sum().backward()
        assert calls[len(calls) // 2 :][-4:] == plain
        calls.clear()
    model(x)
    assert calls[:3] == ["pre", "pre with kwargs", "after"]


@pytest.mark.parametrize("pattern", ["5", "2.0.weight", nn.Conv2d, lambda name, module: False])
def test_patterns_that_mean_nothing_are_named(pattern: object) -> None:
    with pytest.raises(ValueError, match="means no layer; names here are such as '"):
        rt.replace(net(), {"0": nn.Identity(), pattern: nn.Identity()})
    with pytest.warns(UserWarning, match="means no layer"):
        rt.replace(net(), {"0": nn.Identity(), pattern: nn.Identity()}, unmatched="warn")
    assert rt.replace(net(), {pattern: nn.Identity()}, unmatched="ignore")


def test_patterns_that_mean_only_what_is_gone_are_named() -> None:
    with pytest.raises(ValueError, match=r"'2\.0' in '2'"):
        rt.replace(net(), {"2": nn.Identity(), "2.0": nn.ReLU()})


def test_near_names_are_suggested() -> None:
    with pytest.raises(ValueError, match="such as 'embed'"):
        rt.replace(Tied(), {"embd": nn.Identity()})


def test_parting_tied_tensors_is_refused_by_their_names() -> None:
    model = Tied()
    with pytest.raises(ValueError, match=r"'embed\.weight' and 'head\.weight' are one tensor"):
        rt.replace(model, {"head": same})
    with pytest.raises(ValueError, match=r"'embed\.weight' and 'head\.weight' are one tensor"):
        rt.replace(model, {"embed": nn.Embedding(7, 4)})
    with pytest.raises(ValueError, match=r"'embed\.weight' and 'head\.weight' are one tensor"):
        rt.replace(model, {"embed": nn.Embedding(7, 4), "head": same})


def test_a_replacement_that_keeps_the_tensor_parts_nothing() -> None:
    done = rt.replace(Tied(), {"head": Keeper})
    assert done.head.layer.weight is done.embed.weight
    assert rt.replace(Tied(), {"middle": same}).head.weight is not None


class Halved(nn.Module):
    """An embedding or a classifier with a tensor of half the numbers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.factor = nn.Parameter(layer.weight.detach()[:, :2].clone())
        self.other = nn.Parameter(torch.ones(2, 4))
        self.look_up = isinstance(layer, nn.Embedding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.factor @ self.other
        return weight[x] if self.look_up else x @ weight.T


def test_both_owners_are_replaced_and_tied_again() -> None:
    done = rt.replace(Tied(), {"head": Halved}, tied="both")
    assert isinstance(done.embed, Halved)
    assert done.embed.look_up
    assert not done.head.look_up
    assert done.embed.factor is done.head.factor
    assert done.embed.other is done.head.other
    assert done(torch.tensor([1, 2])).shape == (2, 7)
    assert rt.replace(Tied(), {"head": Halved, "embed": Halved}, tied="both").embed.factor is not None


def test_replacements_that_cannot_be_tied_are_refused() -> None:
    with pytest.raises(ValueError, match="no equal parameter of one name"):
        rt.replace(Tied(), {"head": lambda layer: nn.Linear(4, 7)}, tied="both")


def test_an_attention_that_reads_weights_itself_is_refused_and_a_fast_path_is_left() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    model = nn.TransformerEncoder(layer, 2).eval()
    with pytest.raises(ValueError, match="reads its weight and never calls it"):
        rt.replace(model, {"**.out_proj": same})
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=mask)
        called: list[int] = []

        def counting(linear: nn.Linear) -> nn.Module:
            made = same(linear)
            made.register_forward_hook(lambda m, a, o: called.append(1))
            return made

        done = rt.replace(model, {"**.linear1": counting})
        found = done(x, src_key_padding_mask=mask)
    assert len(called) == 2
    assert torch.allclose(found[~mask], expected[~mask], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("net", {"0": same}), TypeError, "layers of an nn.Module are replaced, not of 'net'"),
        ((net(), {}), TypeError, "at least one pattern"),
        ((net(), [("0", same)]), TypeError, "a mapping such as"),
        ((net(), {"0": 3}), TypeError, "the replacement for '0' is 3"),
        ((net(), {"0": nn.Identity}), TypeError, "is the class Identity; give a module, or a function"),
        ((net(), {"0": lambda layer: 3}), TypeError, "for '0' came out as 3"),
        ((net(), {3: same}), TypeError, "3 is no pattern"),
    ],
)
def test_mistakes_are_named(arguments: tuple, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        rt.replace(*arguments)


def test_mistakes_of_settings_are_named() -> None:
    with pytest.raises(ValueError, match="tied is 'no'; it is 'refuse' or 'both'"):
        rt.replace(net(), {"0": same}, tied="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unmatched is 'no'"):
        rt.replace(net(), {"0": same}, unmatched="no")  # type: ignore[arg-type]
    model = net()
    model.held = model[0].weight * 2  # type: ignore[assignment]
    with pytest.raises(ValueError, match="the Sequential cannot be copied"):
        rt.replace(model, {"0": same})
