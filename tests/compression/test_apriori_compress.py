"""Whole models: a budget, a rank or an error decides what each convolution becomes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import retensor as rt
from retensor.compression import apriori as ap

pytestmark = pytest.mark.filterwarnings("ignore:rank .* takes:UserWarning", "ignore:kept dense:UserWarning")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1), nn.Conv2d(8, 1, 1),
    )  # fmt: skip


@pytest.mark.parametrize("name", list(ap.FORMATS))
def test_each_kernel_keeps_within_its_budget_and_uses_it(name: str) -> None:
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ratio = 1.5 if name == "separable" else 3
    found = ap.choices(model, ratio=ratio, format=name)
    small = ap.compress(model, ratio=ratio, format=name)
    for choice in found:
        layer = small.get_submodule(choice.name)
        if choice.rank is None:
            assert type(layer) in (nn.Conv2d, nn.ConvTranspose2d)
            assert choice.kept
            continue
        assert layer.rank == choice.rank
        assert sum(f.numel() for f in layer.factors.values()) == choice.parameters <= choice.dense_parameters / ratio
        more = type(layer.form).parameters(layer.form, layer.shape, tuple(r + 1 for r in layer.rank))
        assert more > choice.dense_parameters / ratio
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert small(torch.zeros(1, 2, 8, 8)).shape == model(torch.zeros(1, 2, 8, 8)).shape


def test_what_stays_dense_is_told() -> None:
    model = net()
    reasons = {choice.name: choice.kept for choice in ap.choices(model, ratio=4, exclude=("2",))}
    assert reasons["2"] == "excluded"
    assert "min_kernel" in reasons["5"]
    assert not reasons["0"]
    with pytest.warns(UserWarning, match=r"kept dense: '5': no rank reaches ratio 4: rank 1 takes 11 parameters of 8"):
        small = ap.compress(model, ratio=4, min_kernel=1)
    assert type(small[5]) is nn.Conv2d
    nested = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3))
    assert [choice.kept for choice in ap.choices(nested, rank=2, exclude=("0",))] == ["excluded", ""]
    assert [choice.kept for choice in ap.choices(nested, rank=2, exclude=(nn.Conv2d,))] == ["excluded"] * 2


def test_classes_derived_from_convolutions_are_listed_and_left() -> None:
    class Padded(nn.Conv2d):
        pass

    model = nn.Sequential(Padded(4, 4, 3), nn.Conv2d(4, 4, 3))
    first, second = ap.choices(model, rank=2)
    assert (first.name, first.rank, first.kept) == ("0", None, "Padded may compute otherwise")
    assert not first.missed
    assert second.rank == (2,)
    assert type(ap.compress(model, rank=2)[0]) is Padded
    with pytest.raises(ValueError, match="'0' has no shape yet"):
        ap.choices(nn.Sequential(nn.LazyConv2d(4, 3)), rank=2)


def test_what_is_excluded_must_be_there() -> None:
    with pytest.raises(TypeError, match=r"exclude is 'head'; a sequence of patterns, such as \('head',\)"):
        ap.compress(net(), rank=2, exclude="head")
    with pytest.raises(ValueError, match="exclude names 'head', which no layer is; names here are such as '0'"):
        ap.compress(net(), rank=2, exclude=("0", "head"))
    # A layer that is there and no convolution does no harm.
    assert ap.choices(net(), rank=2, exclude=("1",))[0].rank == (2,)


def test_biases_types_modes_and_frozen_weights_are_kept() -> None:
    model = net().double().eval()
    model[0].weight.requires_grad_(False)
    small = ap.compress(model, rank=3)
    assert torch.equal(small[0].bias, model[0].bias)
    assert small[2].bias is None
    assert not small.training
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float64}
    assert not any(factor.requires_grad for factor in small[0].factors.values())
    assert small[0].bias.requires_grad
    assert torch.equal(small[0].factors["inputs"], ap.compress(model, rank=3)[0].factors["inputs"])
    assert not torch.equal(small[0].factors["inputs"], ap.compress(model, rank=3, seed=1)[0].factors["inputs"])


@pytest.mark.parametrize("name", list(ap.FORMATS))
def test_fitted_ranks_keep_to_the_tolerance_with_the_least_rank(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(10, 12, 5, padding=2)
    with torch.no_grad():
        low = ap.FactoredConv2d(10, 12, 5, rank=2, format=name, generator=generator)
        conv.weight.copy_(low.kernel())
    (choice,) = ap.choices(nn.Sequential(conv), rank="fit", format=name, tol=1e-3)
    assert choice.rank == low.rank
    assert choice.error is not None
    assert choice.error <= 1e-3
    small = ap.compress(nn.Sequential(conv), rank="fit", format=name, from_weights=True, tol=1e-3)
    x = torch.randn(2, 10, 9, 9, generator=generator)
    assert (small(x) - conv(x)).norm() <= 2e-3 * conv(x).norm()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        full = nn.Conv2d(10, 12, 5)
    (kept,) = ap.choices(nn.Sequential(full), rank="fit", format=name, tol=1e-3)
    assert kept.missed
    assert "no rank below the dense size is within tol=0.001" in kept.kept


@pytest.mark.parametrize("groups", [1, 2])
def test_fitted_ranks_of_tucker_are_those_of_each_mode(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(10 * groups, 12 * groups, 5, groups=groups)
    with torch.no_grad():
        low = ap.FactoredConv2d(
            10 * groups, 12 * groups, 5, groups=groups, rank=(4, 3, 5, 1), format="tucker", generator=generator
        )
        conv.weight.copy_(low.kernel())
    # Filters of full size along an axis are among them.
    (choice,) = ap.choices(nn.Sequential(conv), rank="fit", format="tucker", tol=1e-4)
    assert choice.rank == (4, 3, 5, 1)
    noisy = conv.weight.detach() + 0.05 * conv.weight.std() * torch.randn(conv.weight.shape, generator=generator)
    with torch.no_grad():
        conv.weight.copy_(noisy)
    for tol in (0.1, 0.2, 0.5):
        (choice,) = ap.choices(nn.Sequential(conv), rank="fit", format="tucker", tol=tol)
        assert choice.error is not None
        assert choice.error <= tol


def test_trained_weights_at_a_given_rank_are_the_best_of_that_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    conv = nn.ConvTranspose2d(6, 4, 3, groups=2)
    small: Any = ap.compress(nn.Sequential(conv), rank=4, from_weights=True, format="vh")
    kernel = conv.weight.detach().unflatten(0, (2, 3)).transpose(1, 2)
    for group in range(2):
        matrix = kernel[group].permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
        mine = small[0].kernel().detach().unflatten(0, (2, 3)).transpose(1, 2)[group].permute(1, 2, 0, 3)
        best = torch.linalg.svdvals(matrix)[4:].norm()
        assert (matrix - mine.flatten(2).flatten(0, 1)).norm().item() == pytest.approx(best.item(), rel=1e-4)
    assert torch.isfinite(small(torch.randn(1, 6, 5, 5, generator=generator))).all()


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_timm_models_are_compressed_saved_exported_and_folded(name: str, tmp_path: Any) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10).eval()
    small = ap.compress(model, ratio=1.5)
    x = torch.randn(1, 3, 64, 64)
    expected = small(x)
    assert rt.cost(small, x, time_limit=0.1).parameters < sum(p.numel() for p in model.parameters())
    rt.save(small, tmp_path / "small.safetensors")
    assert torch.equal(rt.load(tmp_path / "small.safetensors", model)(x), expected)
    folded = rt.fold(small)
    assert not any(isinstance(layer, rt.replacing.Replacement) for layer in folded.modules())
    assert (folded(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    exported = torch.export.export(small, (x,)).module()
    assert (exported(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_transformers_model_is_compressed() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config).eval()
    small = ap.compress(model, ratio=4, exclude=("classifier", "**.embedder.**"))
    assert small(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 3)
    assert sum(isinstance(layer, ap.CPConv2d) for layer in small.modules()) >= 3
    assert type(small.resnet.embedder.embedder.convolution) is nn.Conv2d


def test_the_summary_adds_up_with_the_model_and_the_cost_sheet() -> None:
    small = ap.compress(net(), ratio=3).eval()
    told = ap.summary(small, (2, 2, 8, 8))
    dense = ap.summary(net().eval(), (2, 2, 8, 8))
    assert [row.name for row in told.rows] == ["0", "2", "4", "5"]
    assert told.parameters == sum(parameter.numel() for parameter in small.parameters())
    assert [row.dense_macs for row in told.rows] == [row.macs for row in dense.rows]
    assert [row.dense_parameters for row in told.rows] == [row.parameters for row in dense.rows]
    for model, sheet in ((small, told), (net().eval(), dense)):
        convolutions = rt.cost(model, (2, 2, 8, 8), fuse=False, time_limit=1).macs_by_kind
        assert sheet.total.macs == sum(v for kind, v in convolutions.items() if "conv" in kind.lower())
    (row,) = ap.summary(ap.CPConv2d(3, 8, 3, rank=2), torch.zeros(1, 3, 6, 6)).rows
    assert row.activation_bytes == 4 * (2 * 36 + 2 * 24 + 2 * 16 + 8 * 16)
    assert "total" in str(told)
    with pytest.raises(TypeError, match="its shape, such as"):
        ap.summary(small, "1x2x8x8")  # type: ignore[arg-type]


def test_a_summary_leaves_the_mode_of_every_module() -> None:
    small = ap.compress(net(), rank=3)
    small[3].eval()
    ap.summary(small, (1, 2, 8, 8))
    assert [part.training for part in small] == [True, True, True, False, True, True]
    with pytest.raises(RuntimeError):
        ap.summary(small, (1, 3, 8, 8))
    assert [part.training for part in small] == [True, True, True, False, True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give a ratio"),
        ({"ratio": 2, "rank": 2}, "and not both"),
        ({"ratio": 1}, "ratio is 1"),
        ({"ratio": "8"}, "ratio is '8'"),
        ({"rank": "best"}, "rank is 'best'"),
        ({"rank": 0}, "ranks are at least 1"),
        ({"rank": "fit"}, "from_weights=True"),
        ({"rank": "fit", "from_weights": True, "tol": 0}, "tol is 0"),
        ({"rank": 2, "min_kernel": 0}, "min_kernel is 0"),
        ({"rank": 2, "init": "ones"}, "init is 'ones'"),
        ({"rank": 2, "format": "svd"}, "format is 'svd'"),
        ({"rank": "fit", "from_weights": True, "tol": 1.5}, r"tol is 1\.5"),
        ({"rank": 2, "exclude": ("**",)}, "none of 4 convolutions"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ap.compress(net(), **arguments)


def test_bad_kinds_are_named() -> None:
    with pytest.raises(TypeError, match=r"convolutions of an nn\.Module"):
        ap.compress("resnet18", rank=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tol is 'x'"):
        ap.compress(net(), rank="fit", from_weights=True, tol="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Linear is no plain convolution"):
        ap.factored(nn.Linear(2, 2), 2)
