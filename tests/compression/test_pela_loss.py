"""The loss of the repair against numpy, by finite differences, and where the paper's code differs from the obvious."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from retensor.compression import pela
from retensor.compression.pela.layer import LowRankLinear


class Block(nn.Module):
    """A residual perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(torch.tanh(self.fc1(x)))


class Net(nn.Module):
    """Two blocks and a classifier."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x))


def couple(dtype: torch.dtype = torch.float64) -> tuple[Net, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    teacher = Net().to(dtype).eval()
    return teacher, pela.compress(teacher, 2.0), torch.randn(5, 12, dtype=dtype)


def in_numpy(teacher: nn.Module, student: nn.Module, x: torch.Tensor, eps: float) -> tuple[float, float]:
    t, s = ({n: p.detach().numpy() for n, p in m.named_parameters()} for m in (teacher, student))
    ft = fs = x.numpy()
    fd, wp = [], []
    for k in ("blocks.0", "blocks.1"):
        for fc in (f"{k}.fc1", f"{k}.fc2"):
            d = s[f"{fc}.1.weight"] @ s[f"{fc}.0.weight"] - t[f"{fc}.weight"]
            wp.append((np.abs(d).max() - eps) ** 2)
        ft = (
            ft + np.tanh(ft @ t[f"{k}.fc1.weight"].T + t[f"{k}.fc1.bias"]) @ t[f"{k}.fc2.weight"].T + t[f"{k}.fc2.bias"]
        )
        h = np.tanh(fs @ s[f"{k}.fc1.0.weight"].T @ s[f"{k}.fc1.1.weight"].T + s[f"{k}.fc1.1.bias"])
        fs = fs + h @ s[f"{k}.fc2.0.weight"].T @ s[f"{k}.fc2.1.weight"].T + s[f"{k}.fc2.1.bias"]
        fd.append(((fs - ft) ** 2).mean())
    return float(np.mean(fd)), float(np.mean(wp))


def test_values_are_those_of_numpy() -> None:
    teacher, student, x = couple()
    loss = pela.PELALoss(teacher, student, alpha=0.7, gamma=3.0, eps=0.01, beta=0.2)
    total, parts = loss(x, lambda out: (out**2).mean())
    fd, wp = in_numpy(teacher, student, x, 0.01)
    logit = ((student(x) - teacher(x)) ** 2).mean().item()
    task = (student(x) ** 2).mean().item()
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(
        {"task": task, "fd": fd, "wp": wp, "logit": logit}, rel=1e-12
    )
    assert float(total.detach()) == pytest.approx(task + 0.7 * fd + 3 * wp + 0.2 * logit, rel=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    teacher, student, x = couple()
    loss = pela.PELALoss(teacher, student, alpha=0.7, gamma=3.0, eps=0.01, beta=0.2)
    loss(x, lambda out: (out**2).mean())[0].backward()
    checked = 0
    for name, parameter in student.named_parameters():
        gradient = parameter.grad.reshape(-1)
        # The largest entry of each tensor, and one more.
        for at in {int(gradient.abs().argmax()), 0}:
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter.reshape(-1)[at] += step
                fd, wp = in_numpy(teacher, student, x, 0.01)
                out = student(x)
                rest = (out**2).mean() + 0.2 * ((out - teacher(x)) ** 2).mean()
                values.append(0.7 * fd + 3 * wp + rest.item())
                with torch.no_grad():
                    parameter.reshape(-1)[at] -= step
            assert float(gradient[at]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-8), name
            checked += 1
    assert checked > 20
    assert all(parameter.grad is None for parameter in teacher.parameters())


def layer_at(difference: torch.Tensor) -> tuple[LowRankLinear, torch.Tensor]:
    """A layer and a weight whose difference is the given one."""
    made = LowRankLinear(difference.shape[1], difference.shape[0], min(difference.shape)).double()
    return made, made.product().detach() - difference


def test_the_distance_of_weights_is_the_largest_entry_and_no_other_norm() -> None:
    difference = torch.tensor([[0.3, -0.3, 0.3], [0.0, 0.5, 0.0], [0.0, 0.0, -0.1]], dtype=torch.float64)
    norms = {
        "largest entry": 0.5,
        "induced": float(torch.linalg.matrix_norm(difference, float("inf"))),
        "frobenius": float(torch.linalg.matrix_norm(difference)),
        "spectral": float(torch.linalg.matrix_norm(difference, 2)),
    }
    found = float(pela.weight_loss([layer_at(difference)], eps=0.1).detach())
    assert found == pytest.approx((norms["largest entry"] - 0.1) ** 2)
    assert norms["induced"] == pytest.approx(0.9)
    for name, norm in norms.items():
        assert (found == pytest.approx((norm - 0.1) ** 2)) == (name == "largest entry")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_only_the_row_and_the_column_of_the_largest_entry_get_a_gradient(sign: float) -> None:
    difference = torch.zeros(4, 5, dtype=torch.float64)
    difference[2, 3] = 0.4 * sign
    layer, weight = layer_at(difference)
    pela.weight_loss([(layer, weight)], eps=0.1).backward()
    a, b = layer[0].weight, layer[1].weight
    assert [bool(row.any()) for row in b.grad] == [False, False, True, False]
    assert [bool(column.any()) for column in a.grad.T] == [False, False, False, True, False]
    # The same as torch finds through the whole product.
    dense = (torch.linalg.vector_norm(b @ a - weight, float("inf")) - 0.1) ** 2
    for ours, theirs in zip((a.grad, b.grad), torch.autograd.grad(dense, (a, b)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_below_its_target_the_distance_is_pushed_up(sign: float) -> None:
    difference = torch.zeros(4, 5, dtype=torch.float64)
    difference[1, 1] = 0.02 * sign
    layer, weight = layer_at(difference)
    loss = pela.weight_loss([(layer, weight)], eps=0.1)
    assert float(loss.detach()) == pytest.approx(0.08**2)
    loss.backward()
    with torch.no_grad():
        for parameter in (layer[0].weight, layer[1].weight):
            parameter -= 1e-2 * parameter.grad
    assert float((layer.product().detach() - weight).abs()[1, 1]) > 0.02
    one_sided = pela.weight_loss([(layer, weight)], eps=0.1, one_sided=True)
    assert float(one_sided.detach()) == 0
    above = pela.weight_loss([(layer, weight - 1)], eps=0.1, one_sided=True)
    assert torch.equal(above, pela.weight_loss([(layer, weight - 1)], eps=0.1))


def test_half_weights_are_compared_in_float32() -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(64, 64, 8).bfloat16()
    weight = layer.product().detach().bfloat16()
    exact = (layer[1].weight.float() @ layer[0].weight.float() - weight.float()).abs().max().detach()
    loss = pela.weight_loss([(layer, weight)], eps=0.0)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact) ** 2, rel=1e-5)
    assert pela.feature_loss([torch.ones(2).bfloat16()], [torch.zeros(2).bfloat16()]).dtype == torch.float32


def test_under_autocast_weights_are_compared_in_float32() -> None:
    torch.manual_seed(0)
    teacher = Net(64).eval()
    student = pela.compress(teacher, 2.0)
    x = torch.randn(5, 64)
    loss = pela.PELALoss(teacher, student, eps=0.0)

    def figures() -> tuple[list[torch.Tensor], dict[str, float]]:
        part = pela.weight_loss([(student.blocks[0].fc1, teacher.blocks[0].fc1.weight)], eps=0.0)
        return [part, loss(x)[1]["wp"], student.blocks[0].fc1.product()], pela.deviations(teacher, student)

    exact = figures()
    with torch.autocast("cpu", torch.bfloat16):
        assert student(x).dtype == torch.bfloat16
        found = figures()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], exact[0], strict=True))
    assert found[1] == exact[1]
    factor = student.blocks[0].fc1[0].weight
    ours, theirs = (torch.autograd.grad(figure[0][0], factor)[0] for figure in (found, exact))
    assert torch.equal(ours, theirs)


def test_wrapped_students_are_called_as_they_are_and_told_by_their_own_names() -> None:
    teacher, student, x = couple(torch.float32)
    expected = pela.PELALoss(teacher, student)(x)[0]
    assert torch.equal(pela.PELALoss(teacher, nn.DataParallel(student))(x)[0], expected)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(student)
        calls: list[str] = []
        wrapped.register_forward_hook(lambda *_: calls.append("wrapper"))
        total = pela.PELALoss(teacher, wrapped)(x)[0]
        total.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(total, expected)
    assert calls == ["wrapper"]
    compiled = pela.PELALoss(torch.compile(teacher, backend="eager"), torch.compile(student, backend="eager"))
    for again in (x, x + 1):
        assert torch.allclose(compiled(again)[0], pela.PELALoss(teacher, student)(again)[0])


def test_only_the_student_trains_and_nothing_stays_on_the_models() -> None:
    teacher, student, x = couple(torch.float32)
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    loss = pela.PELALoss(teacher, student)
    assert not any(module.training for module in teacher.modules())
    teacher.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    start = {name: value.clone() for name, value in student.state_dict().items()}
    for _ in range(3):
        total, _ = loss(x, lambda out: functional.cross_entropy(out, torch.tensor([0, 1, 2, 0, 1])))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(torch.equal(value, start[name]) for name, value in student.state_dict().items())
    assert not any(module._forward_hooks for model in (teacher, student) for module in model.modules())


def test_parts_of_no_weight_are_not_worked_out() -> None:
    teacher, student, x = couple()
    calls: list[str] = []
    teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    student.register_forward_hook(lambda *_: calls.append("student"))
    task = lambda out: out.sum()  # noqa: E731
    for options, parts, ran in (
        ({"alpha": 0.0, "gamma": 0.0}, {"task"}, ["student"]),
        ({"alpha": 0.0}, {"task", "wp"}, ["student"]),
        ({"gamma": 0.0}, {"task", "fd"}, ["student", "teacher"]),
        ({"alpha": 0.0, "gamma": 0.0, "beta": 1.0}, {"task", "logit"}, ["student", "teacher"]),
    ):
        calls.clear()
        found = pela.PELALoss(teacher, student, **options)(x, task)[1]  # type: ignore[arg-type]
        assert list(found) == ["task", "fd", "wp", "logit"]
        assert {name for name, part in found.items() if not part.isnan()} == parts
        assert calls == ran
    assert {name for name, part in pela.PELALoss(teacher, student)(x)[1].items() if part.isnan()} == {"task", "logit"}
    with pytest.raises(ValueError, match="there is no loss: alpha, beta and gamma are 0"):
        pela.PELALoss(teacher, student, alpha=0, gamma=0)(x)


def test_a_step_never_decomposes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student, x = couple()
    loss = pela.PELALoss(teacher, student)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a decomposition in a step")

    for name in ("svd", "eigh", "svdvals", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    loss(x)[0].backward()


def test_features_can_be_named_or_made_by_a_function() -> None:
    teacher, student, x = couple()
    by_name = pela.PELALoss(teacher, student, gamma=0, features=["blocks.0", "blocks.1"])
    by_blocks = pela.PELALoss(teacher, student, gamma=0)
    assert torch.equal(by_name(x)[0], by_blocks(x)[0])
    last = pela.PELALoss(teacher, student, gamma=0, features=["blocks.1"])

    def run(model: nn.Module, x: Any) -> tuple[Any, list[torch.Tensor]]:
        features = model.blocks[1](model.blocks[0](x))
        return model.head(model.drop(features)), [features]

    by_function = pela.PELALoss(teacher, student, gamma=0, features=run)
    assert torch.equal(last(x)[0], by_function(x)[0])
    assert not torch.equal(last(x)[0], by_blocks(x)[0])


def test_models_are_given_one_several_or_named_arguments() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": self.net(a + b)}

    torch.manual_seed(0)
    teacher = Pair().eval()
    student = pela.compress(teacher)
    loss = pela.PELALoss(teacher, student, beta=1.0)
    a, b = torch.randn(2, 3, 12)
    named, parts = loss({"a": a, "b": b}, lambda out: out["out"].sum())
    assert torch.equal(loss((a, b), lambda out: out["out"].sum())[0], named)
    assert not any(part.isnan() for part in parts.values())


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"alpha": -1.0}, ValueError, "alpha is -1.0; it is 0 or more"),
        ({"gamma": float("nan")}, ValueError, "gamma is nan"),
        ({"eps": "1"}, TypeError, "eps is a number, not '1'"),
        ({"features": "stages"}, TypeError, "features are 'blocks', names of modules, or a function, not 'stages'"),
        ({"features": []}, ValueError, "features name no module; pass alpha=0"),
        ({"features": "stages", "alpha": 0}, TypeError, "features are 'blocks', names of modules, or a function"),
        ({"features": ["blocks.2"], "alpha": 0}, ValueError, "the student has no module 'blocks.2'"),
        (
            {"features": ["blocks.2"]},
            ValueError,
            "the student has no module 'blocks.2'; names here are such as 'blocks",
        ),
    ],
)
def test_mistakes_of_settings_are_named(options: dict[str, Any], error: type, said: str) -> None:
    teacher, student, _ = couple()
    with pytest.raises(error, match=said):
        pela.PELALoss(teacher, student, **options)


def test_models_that_do_not_fit_are_named() -> None:
    teacher, student, _ = couple()
    with pytest.raises(TypeError, match=r"teacher and student are nn.Modules; one is 3"):
        pela.PELALoss(3, student)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the Net has no layers of low rank; compress a model"):
        pela.PELALoss(teacher, teacher)
    with pytest.raises(ValueError, match=r"the teacher has no linear layer 'blocks.0.fc1'"):
        pela.PELALoss(student, copy.deepcopy(student))
    with pytest.raises(ValueError, match=r"'blocks.0.fc1' has a weight of shape \[26, 13\] in the teacher"):
        pela.PELALoss(Net(13), student)
    plain = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match="no blocks are found in the Sequential; name the modules"):
        pela.PELALoss(plain, pela.compress(plain))
    student.head = teacher.head
    with pytest.raises(ValueError, match=r"'head.weight' of the student is 'head.weight' of the teacher, which would"):
        pela.PELALoss(teacher, student)


def test_features_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="1 features of the student and 2 of the teacher"):
        pela.feature_loss([torch.zeros(2)], [torch.zeros(2)] * 2)
    with pytest.raises(ValueError, match=r"feature 0 has shape \[2\] in the student and \[3\] in the teacher"):
        pela.feature_loss([torch.zeros(2)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="there are no layers of low rank"):
        pela.weight_loss([])
    teacher, student, x = couple()
    for model in (teacher, student):
        model.spare = nn.Linear(2, 2)
    loss = pela.PELALoss(teacher, student, features=["blocks.0", "spare"])
    with pytest.raises(ValueError, match="'spare' has not run and gave no feature"):
        loss(x)
