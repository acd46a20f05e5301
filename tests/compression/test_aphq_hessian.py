"""The perturbation Hessian: what it measures, beside the exact curvature, and what it costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from retensor.compression import aphq
from retensor.compression.aphq.hessian import gradients
from retensor.compression.aphq.runs import Behind, Traced
from retensor.data import reference
from retensor.data.reference import digits_vit

BATCH = 32


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, torch.Tensor]:
    model, data = reference("digits-vit")
    return model, data.x[:64]


def curvature(model: nn.Module, images: torch.Tensor, name: str, temp: float = 20.0) -> torch.Tensor:
    """The diagonal of the Gauss-Newton matrix of the divergence by what a module gives, averaged over images."""
    inner = model.get_submodule(name)
    shift = torch.zeros_like(output(model, images, name)).requires_grad_()
    handle = inner.register_forward_hook(lambda _, __, out: out + shift)
    try:
        logits = model(images) / temp
    finally:
        handle.remove()
    p = functional.softmax(logits.detach(), -1)
    rows = [torch.autograd.grad(logits[:, k].sum(), shift, retain_graph=True)[0].flatten(1) for k in range(10)]
    jacobian = torch.stack(rows, 1)
    mean = (p[..., None] * jacobian).sum(1, keepdim=True)
    diagonal = (p[..., None] * (jacobian - mean).square()).sum(1) / BATCH
    return diagonal.reshape(shift.shape).mean(0, keepdim=True)


def output(model: nn.Module, images: torch.Tensor, name: str) -> torch.Tensor:
    return Traced(model, images, [], [name], len(images)).kept[name]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1])


@pytest.mark.parametrize("name", ["blocks.0", "blocks.1", "blocks.1.mlp"])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_the_default_direction_follows_the_exact_curvature(
    digits: tuple[nn.Module, torch.Tensor], name: str, kind: torch.dtype
) -> None:
    model, images = digits
    wide = copy.deepcopy(model).double()
    exact = curvature(wide, images.double(), name)
    h = aphq.perturbation_hessian(copy.deepcopy(model).to(kind), images.to(kind), name, batch=BATCH)
    assert correlation(h, exact) >= 0.85
    more = aphq.perturbation_hessian(copy.deepcopy(model).to(kind), images.to(kind), name, batch=BATCH, draws=8)
    assert correlation(more, exact) >= 0.9


def test_a_shift_of_all_ones_is_not_seen_behind_a_normalisation(digits: tuple[nn.Module, torch.Tensor]) -> None:
    model, images = digits
    wide, x = copy.deepcopy(model).double(), images.double()
    common: Any = {"batch": BATCH, "eps": 1e-3}
    ones = aphq.perturbation_hessian(wide, x, "blocks.1", direction="ones", **common)
    signs = aphq.perturbation_hessian(wide, x, "blocks.1", **common)
    # What is left of it is rounding, of float64.
    assert float(ones.max()) < 1e-7 * float(signs.max())


def test_the_published_recipe_measures_rounding_errors(digits: tuple[nn.Module, torch.Tensor]) -> None:
    model, images = digits
    common: Any = {"batch": BATCH, "eps": 1e-6, "direction": "ones"}
    single = aphq.perturbation_hessian(model, images, "blocks.1", **common)
    double = aphq.perturbation_hessian(copy.deepcopy(model).double(), images.double(), "blocks.1", **common)
    # The same quantity in a wider type is many times smaller: what float32 shows is none of it.
    assert float(single.mean()) > 100 * float(double.mean())


def test_it_is_twice_the_step_times_a_product_with_the_hessian() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, eps = torch.randn(8, 4, dtype=torch.float64), 1e-4
    h = aphq.perturbation_hessian(net, x, "0", direction="ones", eps=eps, batch=8, average=False, temp=2.0)
    z = net[0](x).detach()
    wanted = functional.softmax(net(x).detach() / 2.0, -1)

    def slope(z: torch.Tensor) -> torch.Tensor:
        told = functional.log_softmax(net[2](net[1](z)) / 2.0, -1)
        return torch.autograd.grad(
            functional.kl_div(told, wanted, reduction="batchmean"), z, create_graph=True
        )[0]  # fmt: skip

    z.requires_grad_()
    product = torch.autograd.grad(slope(z), z, torch.ones_like(z))[0]
    torch.testing.assert_close(h, 2 * eps * product.abs(), rtol=1e-5, atol=1e-12)


def test_averaged_importance_is_the_mean_and_takes_one_image_of_memory(digits: tuple[nn.Module, torch.Tensor]) -> None:
    model, images = digits
    each = aphq.perturbation_hessian(model, images, "blocks.1", average=False)
    mean = aphq.perturbation_hessian(model, images, "blocks.1")
    assert each.shape == (64, 17, 48)
    assert mean.shape == (1, 17, 48)
    assert each.nbytes == 64 * mean.nbytes
    torch.testing.assert_close(mean, each.mean(0, keepdim=True), rtol=1e-5, atol=0)


def test_a_last_batch_that_is_smaller_counts_as_the_others(digits: tuple[nn.Module, torch.Tensor]) -> None:
    model, images = copy.deepcopy(digits[0]).double(), digits[1][:40].double()
    common: Any = {"direction": "ones", "average": False, "batch": 32, "eps": 1e-2}
    both = aphq.perturbation_hessian(model, images, "blocks.0.mlp", **common)
    torch.testing.assert_close(
        both[:32], aphq.perturbation_hessian(model, images[:32], "blocks.0.mlp", **common), rtol=1e-6, atol=1e-14
    )
    turned = aphq.perturbation_hessian(model, images.flip(0), "blocks.0.mlp", **common).flip(0)
    torch.testing.assert_close(both[36:], turned[36:], rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("name", ["patch_embed", "blocks.0", "blocks.1", "blocks.1.mlp", "blocks.2.attn.proj"])
def test_running_what_lies_behind_gives_what_running_all_gives(
    digits: tuple[nn.Module, torch.Tensor], name: str
) -> None:
    model, images = digits
    behind = aphq.perturbation_hessian(model, images, [name, "blocks.1"])[name]
    assert torch.equal(behind, aphq.perturbation_hessian(model, images, name))
    assert torch.equal(behind, aphq.perturbation_hessian(model, images, name, rerun=True))


def test_blocks_before_do_not_run_and_the_rest_runs_once() -> None:
    calls: dict[str, int] = {}
    model = digits_vit(16, 4).eval()
    images = torch.zeros(4, 1, 8, 8)
    traced = Traced(model, images, aphq.find_spec(model).blocks, ["blocks.2"], 4)
    behind = Behind(traced, "blocks.2", traced.kept["blocks.2"])
    assert not behind.rerun
    for name, module in model.named_modules():
        if name.startswith("blocks.") and name.endswith("attn.qkv"):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    # Hooks stay with the modules themselves, which the shell shares where nothing lies below them.
    shown = Behind(Traced(model, images, traced.order, ["blocks.2"], 4), "blocks.2", traced.kept["blocks.2"])
    calls.clear()
    shown(0, torch.zeros(4, 17, 16))
    assert calls == {"blocks.3.attn.qkv": 1}


def test_a_model_that_uses_what_comes_before_is_run_whole() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = torch.tanh(self.a(x))
            out: torch.Tensor = self.head(torch.tanh(self.b(first)) + first)
            return out

    torch.manual_seed(0)
    net, x = Skipping(), torch.randn(6, 4)
    traced = Traced(net, x, ["a", "b"], ["b"], 6)
    assert Behind(traced, "b", traced.kept["b"]).rerun
    spec = aphq.Spec(["a", "b"])
    with_spec = aphq.perturbation_hessian(net, x, "b", spec=spec)
    assert torch.equal(with_spec, aphq.perturbation_hessian(net, x, "b", spec=spec, rerun=True))


def test_squared_gradients_of_the_model_in_few_bits_are_autograds(digits: tuple[nn.Module, torch.Tensor]) -> None:
    model, images = digits
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.mul_(1.1)
    logits = model(images).detach()
    found = gradients(other, "blocks.1", images, logits, aphq.Config(batch=64))
    z: list[torch.Tensor] = []
    other.blocks[1].register_forward_hook(lambda _, __, out: z.append(out))
    told = functional.log_softmax(other(images) / 20, -1)
    loss = functional.kl_div(told, functional.softmax(logits / 20, -1), reduction="batchmean")
    wanted = torch.autograd.grad(loss, z[0])[0].square()
    assert float((found - wanted).abs().max()) <= 1e-3 * float(wanted.max())


def test_what_gives_nothing_to_go_by_is_refused(digits: tuple[nn.Module, torch.Tensor]) -> None:
    model, images = digits
    common: Any = {"batch": BATCH}
    with pytest.raises(RuntimeError, match=r"'blocks\.1' gives is 0 everywhere: eps is too small"):
        aphq.perturbation_hessian(model, images, "blocks.1", eps=1e-30, **common)
    with pytest.raises(RuntimeError, match=r"take direction='rademacher'"):
        aphq.perturbation_hessian(model, images, "blocks.1", eps=1e-30, direction="ones", **common)
    with pytest.raises(RuntimeError, match=r"'blocks\.1' gives is not finite"):
        aphq.perturbation_hessian(model, images, "blocks.1", eps=1e38, **common)
    with pytest.raises(TypeError, match=r"run the model in float32"):
        aphq.perturbation_hessian(copy.deepcopy(model).bfloat16(), images.bfloat16(), "blocks.1", **common)
    with pytest.raises(ValueError, match=r"no module 'blocks\.7'"):
        aphq.perturbation_hessian(model, images, "blocks.7", **common)
    with pytest.raises(TypeError, match=r"images are a floating-point tensor"):
        aphq.perturbation_hessian(model, [images], "blocks.1")  # type: ignore[arg-type]
