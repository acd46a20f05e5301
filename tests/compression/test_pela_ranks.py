"""What PELA plans: the rank rule, exact totals of the paper's networks, and every refusal by name."""

from __future__ import annotations

import pickle
from fractions import Fraction
from itertools import pairwise

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from retensor.compression import pela

SWIN = (*pela.OMIT, "attn.proj")


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 4)))


def test_deit_base_has_the_papers_layers_and_ranks() -> None:
    found = pela.plan(on_meta("deit_base_patch16_224"), ratio=2.0)
    assert found.before == 86_567_656
    assert len(found.layers) == 48
    ranks = {layer.name.split(".", 2)[2]: layer.rank for layer in found.layers}
    assert ranks == {"attn.qkv": 288, "attn.proj": 192, "mlp.fc1": 307, "mlp.fc2": 307}
    assert found.left == {"head": "omit 'head'"}


@pytest.mark.parametrize("ratio", [1.5, 2, 3])
@pytest.mark.parametrize(
    ("name", "omit", "layers"),
    [
        ("deit_base_patch16_224", pela.OMIT[:3], 48),
        ("deit3_large_patch16_224", pela.OMIT[:3], 96),
        ("swin_base_patch4_window7_224", SWIN, 72),
    ],
)
def test_totals_are_the_closed_form(name: str, omit: tuple[str, ...], layers: int, ratio: float) -> None:
    model = on_meta(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    expected, count = before, 0
    for label, module in model.named_modules():
        if isinstance(module, nn.Linear) and not any(part in label for part in omit):
            o, i = module.weight.shape
            rank = Fraction(o * i) / (Fraction(ratio) * (o + i)) // 1
            expected += rank * (o + i) - o * i
            count += 1
    found = pela.plan(model, ratio, omit)
    assert (len(found.layers), count) == (layers, layers)
    assert (found.before, found.after) == (before, expected)
    student = pela.compress(model, found)
    assert sum(parameter.numel() for parameter in student.parameters()) == expected
    if "swin" in name:
        assert found.after / before > 1 / ratio + 0.03


@given(i=st.integers(1, 500), o=st.integers(1, 500), ratio=st.sampled_from([1, 1.5, 2, 3, 8]))
def test_the_rank_is_the_largest_that_keeps_to_the_ratio(i: int, o: int, ratio: float) -> None:
    rank = pela.rank_of(i, o, ratio)
    assert rank * (i + o) * ratio <= i * o < (rank + 1) * (i + o) * ratio


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(10, 90), min_size=2, max_size=5), ratio=st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_the_plan_counts_what_compressing_leaves(sizes: list[int], ratio: float) -> None:
    model = nn.Sequential(*(nn.Linear(i, o, bias=bool(i % 2)) for i, o in pairwise(sizes)))
    found = pela.plan(model, ratio)
    student = pela.compress(model, found)
    for state, total in ((model, found.before), (student, found.after)):
        assert sum(parameter.numel() for parameter in state.parameters()) == total
    for layer in found.layers:
        assert layer.before == sum(p.numel() for p in model.get_submodule(layer.name).parameters())
        assert layer.after == sum(p.numel() for p in student.get_submodule(layer.name).parameters())


def test_the_table_has_the_energy_of_the_singular_values() -> None:
    model = net()
    found = pela.plan(model, 2.0)
    s = torch.linalg.svdvals(model[0].weight.detach().double()) ** 2
    assert found.layers[0].rank == 10
    assert found.energies["0"] == pytest.approx(float(s[:10].sum() / s.sum()), rel=1e-6)
    lines = found.table().splitlines()
    assert lines[0].split() == ["layer", "in", "out", "rank", "before", "after", "energy"]
    assert lines[1].split() == ["0", "64", "32", "10", "2,080", "992", f"{found.energies['0']:.4f}"]
    assert lines[-1] == "left: 2.1 (under 10 outputs)"
    assert lines[-2].split()[:2] == ["the", "model"]
    with torch.no_grad():
        model[0].weight.zero_()
    assert pela.plan(model, 2.0).energies["0"] == 1.0


def test_a_plan_is_data_that_holds_none_of_the_model() -> None:
    model = net()
    found, without = pela.plan(model), pela.plan(model, energies=False)
    assert found == without == pickle.loads(pickle.dumps(found))
    assert hash(found) == hash(without)
    assert len(pickle.dumps(found)) < 2000
    assert all(energy != energy for energy in without.energies.values())
    assert "nan" in without.table()
    kept = found.table()
    with torch.no_grad():
        model[0].weight.zero_()
    assert found.table() == kept


def test_small_omitted_and_foreign_layers_stay() -> None:
    class Other(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    class Same(nn.Linear):
        pass

    model = nn.ModuleDict({
        "head": nn.Linear(16, 16), "tiny": nn.Linear(16, 9), "other": Other(16, 16), "same": Same(16, 16),
        "normed": weight_norm(nn.Linear(16, 16)), "complex": nn.Linear(16, 16, dtype=torch.complex64),
        "conv": nn.Conv2d(16, 16, 1), "embed": nn.Embedding(16, 16), "plain": nn.Linear(16, 16),
    })  # fmt: skip
    found = pela.plan(model, omit=("head",))
    assert [layer.name for layer in found.layers] == ["same", "plain"]
    assert found.left == {
        "head": "omit 'head'", "tiny": "under 10 outputs", "other": "a Other", "normed": "parametrized",
        "complex": "a weight of complex64",
    }  # fmt: skip
    assert [layer.name for layer in pela.plan(model, omit=("head",), min_out=9).layers] == ["tiny", "same", "plain"]


def test_a_student_is_not_compressed_twice() -> None:
    student = pela.compress(net(), 2.0)
    with pytest.raises(ValueError, match="no layer of the Sequential would be replaced"):
        pela.plan(student)


def test_ranks_of_some_layers_can_be_set() -> None:
    found = pela.plan(net(), 2.0, min_out=1, on_tiny="skip", ranks={"2.*": 3, nn.Linear: 32})
    assert [layer.rank for layer in found.layers] == [32, 3, 3]
    with pytest.raises(ValueError, match=r"'2.0' of 32 inputs and 48 outputs would get a rank of 33; omit it"):
        pela.plan(net(), ranks={"2.0": 33})
    with pytest.raises(ValueError, match="rank of 0"):
        pela.plan(net(), ranks={"2.0": 0})
    with pytest.raises(ValueError, match="no replaced layer is meant by '9' of ranks; names here are such as '0'"):
        pela.plan(net(), ranks={"9": 3})
    with pytest.raises(TypeError, match=r"the rank of '0' is a whole number, not 1.5"):
        pela.plan(net(), ranks={"0": 1.5})  # type: ignore[dict-item]


@pytest.mark.parametrize("ratio", [0.99, 0, -2, float("nan"), float("inf")])
def test_a_ratio_under_one_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"a ratio of .* saves nothing; it is 1 or more"):
        pela.plan(net(), ratio)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        (("net",), {}, TypeError, "layers of an nn.Module are replaced, not of 'net'"),
        ((net(), "2"), {}, TypeError, "the ratio is a number such as 2.0, not '2'"),
        ((net(), True), {}, TypeError, "the ratio is a number"),
        ((net(), 2.0, "head"), {}, TypeError, r"a sequence of parts of names, such as \('head',\), not 'head'"),
        ((net(), 2.0, ("",)), {}, TypeError, "a sequence of parts of names"),
        ((net(),), {"min_out": 1.5}, TypeError, "min_out is a whole number"),
        ((net(),), {"on_tiny": "no"}, ValueError, "on_tiny is 'no'; it is 'raise' or 'skip'"),
        (
            (net(),),
            {"min_out": 99},
            ValueError,
            r"no layer of the Sequential would be replaced \('0': under 99 outputs",
        ),
        ((nn.ReLU(),), {}, ValueError, r"would be replaced \(it has no linear layers\)"),
        ((nn.Sequential(nn.LazyLinear(20)),), {}, ValueError, "'0' has no shape yet; run the model once"),
    ],
)
def test_mistakes_are_named(arguments: tuple, options: dict, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        pela.plan(*arguments, **options)


def test_a_layer_too_small_for_any_rank_is_refused_or_skipped() -> None:
    model = nn.Sequential(nn.Linear(2, 16), nn.Linear(16, 64))
    with pytest.raises(
        ValueError, match=r"'0' of 2 inputs and 16 outputs would get a rank of 0; omit it, pass on_tiny"
    ):
        pela.plan(model, 2.0)
    found = pela.plan(model, 2.0, on_tiny="skip")
    assert [layer.name for layer in found.layers] == ["1"]
    assert found.left == {"0": "too small"}


def test_an_omitted_name_that_is_nowhere_is_warned_of_and_the_default_is_not(recwarn: pytest.WarningsRecorder) -> None:
    pela.plan(net())
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"'2.2' of omit is in no name of the model; names here are such as '2.1'"):
        pela.plan(net(), omit=("2.2",))


def test_tied_weights_are_refused_by_both_names_unless_omitted() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 32)
            self.middle = nn.Linear(32, 32)
            self.out = nn.Linear(32, 40, bias=False)
            self.out.weight = self.embed.weight

    with pytest.raises(ValueError, match=r"'embed.weight' and 'out.weight' are one tensor.*add 'out' to omit"):
        pela.plan(Tied())
    assert [layer.name for layer in pela.plan(Tied(), omit=("out",)).layers] == ["middle"]
    model = net()
    model[2][0].bias = nn.Parameter(torch.zeros(48))
    model.append(nn.Linear(48, 48))
    model[3].bias = model[2][0].bias
    with pytest.raises(ValueError, match=r"'2.0.bias' and '3.bias' are one tensor"):
        pela.plan(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_its_layer(value: float) -> None:
    model = net()
    found = pela.plan(model)
    with torch.no_grad():
        model[2][0].weight[3, 4] = value
    for refused in (lambda: pela.plan(model), lambda: pela.compress(model, found)):
        with pytest.raises(ValueError, match=r"the weight of '2.0' has values that are not finite"):
            refused()


def test_the_projection_of_torchs_attention_is_refused_by_name() -> None:
    model = nn.TransformerEncoderLayer(32, 2, 64)
    with pytest.raises(ValueError, match=r"'self_attn.out_proj' cannot be replaced: nn.MultiheadAttention reads"):
        pela.plan(model)
    found = pela.plan(model, omit=("out_proj",))
    assert [layer.name for layer in found.layers] == ["linear1", "linear2"]


def test_a_plan_of_another_model_is_refused() -> None:
    found = pela.plan(net())
    with pytest.raises(ValueError, match=r"the plan replaces '2.0', which the model lacks; plan for this model"):
        pela.compress(net()[:1], found)
    with pytest.raises(ValueError, match="'0' has 65 inputs and 32 outputs, and 64 and 32 in the plan"):
        pela.compress(nn.Sequential(nn.Linear(65, 32), *net()[1:]), found)
    with pytest.raises(ValueError, match="'0' of the plan is no linear layer but a Conv2d"):
        pela.skeleton(nn.Sequential(nn.Conv2d(1, 1, 1), *net()[1:]), found)
    with pytest.raises(ValueError, match="init is 'zeros'; it is 'svd' or 'random'"):
        pela.compress(net(), found, init="zeros")  # type: ignore[arg-type]
