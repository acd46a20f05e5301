"""Fit the implicit functions: a warm start from the full network, then the task at widths drawn at random."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from retensor.bars import watched
from retensor.compression.neumeta.hyper import NeuMeta, skeleton
from retensor.compression.neumeta.space import check_amounts, check_width
from retensor.errors import RetensorError
from retensor.files import described

TaskLoss: TypeAlias = Callable[[Any, Any], torch.Tensor]
"""A function of outputs and targets."""

# A part of the inner channels that never fire, from which on the rest cannot carry a function.
_DEAD = 0.9
# Losses that are no further apart than this part of one are the same.
_ALIKE = 0.03


@dataclass(frozen=True)
class FitReport:
    """What :func:`fit` did, and whether the generated layers take part in what the networks compute.

    Attributes
    ----------
    losses : list of float
        Of each step: task, norms and reconstruction.
    dead : mapping of int to float
        For the least, a middle and the largest width: the part of inner channels whose values, before the activation,
        are never above 0 on samples of the loader.
    loss : mapping of int to float
        The task's loss at these widths, on the same samples.
    accuracy : mapping of int to float
        Where targets are classes; else empty.
    bypass_loss : float
        The task's loss with zeros in the generated layers.
    full_loss : float
        The task's loss of the network that the family was made of.
    bypass_accuracy : float or None
    """

    losses: list[float]
    dead: dict[int, float]
    loss: dict[int, float]
    bypass_loss: float
    full_loss: float
    accuracy: dict[int, float] = field(default_factory=dict)
    bypass_accuracy: float | None = None

    @property
    def trapped(self) -> bool:
        """Whether the network goes on around the generated layers.

        Either nine of ten inner channels never fire at one of the widths; or at all of them the loss is within 3 % of
        what it is without the layers, although they do something in the full network.
        """
        return max(self.dead.values()) >= _DEAD or (
            all(self._bypassed(loss) for loss in self.loss.values()) and not self._bypassed(self.full_loss)
        )

    def _bypassed(self, loss: float) -> bool:
        return abs(loss - self.bypass_loss) <= _ALIKE * abs(self.bypass_loss)


class BypassTrapError(RetensorError):
    """A fit whose generated layers do nothing, so that the network computes the same at all widths.

    Attributes
    ----------
    report : FitReport
    """

    def __init__(self, report: FitReport) -> None:
        self.report = report
        super().__init__(_told(report))


def warm_start(
    hyper: NeuMeta,
    *,
    steps: int = 400,
    widths: Iterable[int],
    noise: float = 1.0,
    lr: float = 2e-3,
    seed: int = 0,
) -> list[float]:
    """Fit a family, in place, to the full network's own weights, resampled at widths drawn at random.

    An extension of the paper's method: without it, or at the full width alone, large gradients of the first steps of
    :func:`fit` can kill the inner channels for good.

    Parameters
    ----------
    hyper : NeuMeta
    steps : int
        Of Adam.
    widths : iterable of int
        To draw from; a step each. ``W_h[i] = W[floor((i+.5) H/h)]`` is what each is fitted to, and columns of layers
        that read the channels are that times H/h.
    noise : float
        nu, of the coordinates.
    lr : float
    seed : int
        Of widths and noise.

    Returns
    -------
    list of float
        Each step's mean over tensors of ``mean((W - T)^2) / mean(T^2)``.

    Raises
    ------
    ValueError
        Where there are no widths, or one is below 1, steps are below 0, or the noise is below 0 or not finite.

    Examples
    --------
    >>> from retensor.compression.neumeta import WidthSpace
    >>> net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    >>> hyper = NeuMeta(WidthSpace(net, "*", example=torch.zeros(1, 4)), hidden=16, depth=2, freqs=3)
    >>> losses = warm_start(hyper, steps=60, widths=range(4, 13), noise=0.5)
    >>> len(losses), losses[-1] < losses[0]
    (60, True)
    """
    drawn = _widths(widths)
    _check_steps(steps)
    check_amounts(noise=noise)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(hyper.fields(), lr=lr, fused=_fused(hyper))
    losses: list[float] = []
    for _ in watched(range(steps), "warm start", steps):
        width = _draw(drawn, generator)
        targets = hyper.resampled(width)
        found = hyper.weights(width, noise=noise, generator=generator)
        loss = torch.stack([_relative(found[name], targets[name]) for name in found]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    _note(hyper, drawn, losses)
    return losses


def fit(
    hyper: NeuMeta,
    loader: Iterable[Any],
    task_loss: TaskLoss = functional.cross_entropy,
    *,
    widths: Iterable[int],
    noise: float = 1.0,
    reg: float = 1e-4,
    recon: float = 1.0,
    epochs: int = 200,
    steps: int | None = None,
    lr: float = 1e-3,
    weight_decay: float = 1e-2,
    milestones: Sequence[float] = (0.5, 0.75),
    clip: float = 10.0,
    ema: float = 0.995,
    seed: int = 0,
    on_trap: Literal["raise", "warn", "ignore"] = "raise",
) -> FitReport:
    """Train a family, in place, on a task: ``L = task + reg sum_t ||W_t||_2 + recon L_rec`` at a width a step.

    ``L_rec = mean_t mean((W - W*)^2 (|W*| + 1e-6) / max(|W*| + 1e-6))``, at the full width only. Source: Yang and Wang
    2024; ``lr``, ``weight_decay``, ``clip``, ``ema`` and the milestones are of the authors' 200 epochs of CIFAR-10.

    Parameters
    ----------
    hyper : NeuMeta
        Afterwards its implicit functions have the running mean of their parameters. All other layers stay.
    loader : iterable of (inputs, targets)
        Gone through once an epoch, such as a :class:`torch.utils.data.DataLoader`; inputs are what the network takes.
    task_loss : function of (outputs, targets)
    widths : iterable of int
        To draw from, each equally likely.
    noise : float
        nu, of the coordinates.
    reg, recon : float
        Weights of the norms and of the reconstruction.
    epochs : int
    steps : int, optional
        Batches in all, instead of epochs.
    lr, weight_decay : float
        Of AdamW.
    milestones : sequence of float
        Parts of the steps, between 0 and 1, after which ``lr`` is a tenth of before. A fit of a few hundred steps does
        better without (``()``).
    clip : float
        The largest value of a gradient; 0 for any.
    ema : float
        Decay of the running mean, below 1; 0 for none. It looks back over some ``1 / (1 - ema)`` steps, so a fit that
        is not much longer keeps a part of where it began: take 0.98 or less for a few hundred.
    seed : int
        Of widths and noise.
    on_trap : {"raise", "warn", "ignore"}
        What to do where the generated layers do nothing (:attr:`FitReport.trapped`).

    Returns
    -------
    FitReport

    Raises
    ------
    BypassTrapError
        Where the network goes on around the generated layers (:attr:`FitReport.trapped`): see :func:`warm_start`.
    ValueError
        Where widths, steps, epochs or the loader are empty, or a number is outside of what is allowed.
    FloatingPointError
        Where the loss is no finite number.

    Examples
    --------
    >>> from retensor.compression.neumeta import WidthSpace
    >>> net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    >>> x, y = torch.rand(32, 4), torch.arange(32) % 3
    >>> hyper = NeuMeta(WidthSpace(net, "*", example=x), hidden=16, depth=2, freqs=3)
    >>> report = fit(hyper, [(x, y)], widths=range(4, 13), steps=5, on_trap="ignore")
    >>> len(report.losses), sorted(report.loss)
    (5, [4, 8, 12])
    """
    drawn = _widths(widths)
    _check_steps(epochs if steps is None else steps)
    check_amounts(noise=noise, reg=reg, recon=recon, clip=clip, ema=ema)
    if ema >= 1:
        raise ValueError(f"ema is below 1, not {described(ema)}: a mean that never moves")
    for part in milestones:
        if not 0 < part < 1:
            raise ValueError(f"a milestone is a part of the steps, between 0 and 1, not {described(part)}")
    if on_trap not in ("raise", "warn", "ignore"):
        raise ValueError(f"on_trap is {described(on_trap)}; it is 'raise', 'warn' or 'ignore'")
    total = _total(loader, epochs) if steps is None else steps
    generator = torch.Generator().manual_seed(seed)
    net, targets = skeleton(hyper), hyper.targets()
    device = next(iter(targets.values())).device
    optimizer = torch.optim.AdamW(hyper.fields(), lr=lr, weight_decay=weight_decay, fused=_fused(hyper))
    at = [math.ceil(part * total) for part in milestones]
    rates = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=at, gamma=0.1)
    mine = _Fields(hyper)
    mean = AveragedModel(mine, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
    losses: list[float] = []
    for inputs, wanted in watched(_batches(loader, total), "fit", total):
        inputs, wanted = _moved(inputs, device), _moved(wanted, device)
        width = _draw(drawn, generator)
        found = hyper.weights(width, noise=noise, generator=generator)
        loss = task_loss(_called(net, found, inputs), wanted)
        if reg:
            loss = loss + reg * torch.stack([value.norm() for value in found.values()]).sum()
        if recon and width == hyper.full_width:
            loss = loss + recon * torch.stack([_reconstruction(found[name], targets[name]) for name in found]).mean()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {len(losses)}; take a lower learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip:
            nn.utils.clip_grad_value_(hyper.fields(), clip)
        optimizer.step()
        rates.step()
        if mean is not None:
            mean.update_parameters(mine)
        losses.append(loss.item())
    if mean is not None and losses:
        with torch.no_grad():
            for parameter, averaged in zip(mine.parameters(), mean.module.parameters(), strict=True):
                parameter.copy_(averaged)
    _note(hyper, drawn, losses)
    report = _report(hyper, net, loader, task_loss, drawn, losses, device)
    if report.trapped and on_trap == "raise":
        raise BypassTrapError(report)
    if report.trapped and on_trap == "warn":
        warnings.warn(_told(report), stacklevel=2)
    return report


def dead_share(hyper: NeuMeta, width: int, inputs: Any) -> float:
    """The part of inner channels that never fire at a width: what their layers put out is nowhere above 0.

    Parameters
    ----------
    hyper : NeuMeta
    width : int
    inputs
        What the network takes, such as a batch of samples.

    Returns
    -------
    float
        From 0 to 1.

    Raises
    ------
    ValueError
        Where the width is below 1.

    Examples
    --------
    >>> from retensor.compression.neumeta import WidthSpace
    >>> net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    >>> hyper = NeuMeta(WidthSpace(net, "*", example=torch.zeros(1, 4)), hidden=8, depth=2, freqs=2)
    >>> 0 <= dead_share(hyper, 6, torch.rand(20, 4)) <= 1
    True
    """
    with torch.no_grad():
        return _run_counting(hyper, skeleton(hyper), width, inputs)[1]


class _Fields(nn.Module):
    """The implicit functions alone, so that the running mean does not copy the rest."""

    def __init__(self, hyper: NeuMeta) -> None:
        super().__init__()
        self.parts = nn.ModuleList(layer.fields for layer in hyper.layers.values())


def _widths(widths: Iterable[int]) -> list[int]:
    found = list(widths)
    if not found:
        raise ValueError("there are no widths to draw from; give a range such as range(32, 65)")
    for width in found:
        check_width(width)
    return found


def _check_steps(steps: int) -> None:
    if steps < 0:
        raise ValueError(f"{steps} steps or epochs cannot be taken")


def _fused(hyper: NeuMeta) -> bool:
    """Whether torch has an optimizer's step in one loop here; a step has many small tensors."""
    return all(parameter.device.type in ("cpu", "cuda") for parameter in hyper.fields())


def _draw(widths: Sequence[int], generator: torch.Generator) -> int:
    return widths[int(torch.randint(len(widths), (1,), generator=generator))]


def _relative(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (found - target).square().mean() / target.square().mean().clamp_min(1e-12)


def _reconstruction(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    weight = target.abs() + 1e-6
    return ((found - target).square() * (weight / weight.max())).mean()


def _note(hyper: NeuMeta, widths: Sequence[int], losses: Sequence[float]) -> None:
    if losses:
        hyper.trained.copy_(torch.tensor([min(widths), max(widths)]))


def _total(loader: Any, epochs: int) -> int:
    try:
        count = len(loader)
    except TypeError:
        raise ValueError("the loader does not tell how many batches it has; give steps instead of epochs") from None
    if not count and epochs:
        raise ValueError("the loader has no batches")
    return int(count * epochs)


def _batches(loader: Iterable[Any], total: int) -> Iterator[Any]:
    left = total
    while left:
        before = left
        for batch in itertools.islice(loader, left):
            left -= 1
            yield batch
        if left == before:
            raise ValueError("the loader has no batches")


def _moved(value: Any, device: Any) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)


def _called(net: nn.Module, tensors: dict[str, torch.Tensor], inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return functional_call(net, tensors, (), inputs)
    return functional_call(net, tensors, inputs if isinstance(inputs, tuple) else (inputs,))


def _report(
    hyper: NeuMeta,
    net: nn.Module,
    loader: Iterable[Any],
    task_loss: TaskLoss,
    widths: Sequence[int],
    losses: list[float],
    device: Any,
) -> FitReport:
    """The state of a family on the loader's first samples."""
    inputs, targets = next(iter(loader))
    inputs, targets = _moved(inputs, device), _moved(targets, device)
    classes = isinstance(targets, torch.Tensor) and not targets.is_floating_point() and targets.dim() == 1
    dead: dict[int, float] = {}
    loss: dict[int, float] = {}
    right: dict[int, float] = {}
    ordered = sorted(set(widths))
    with torch.no_grad():
        for width in sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]}):
            outputs, dead[width] = _run_counting(hyper, net, width, inputs)
            loss[width] = float(task_loss(outputs, targets))
            if classes:
                right[width] = _right(outputs, targets)
        full = float(task_loss(_called(net, {}, inputs), targets))
        outputs = _called(hyper.bypassed(), {}, inputs)
        bypass = float(task_loss(outputs, targets))
    return FitReport(losses, dead, loss, bypass, full, right, _right(outputs, targets) if classes else None)


def _run_counting(hyper: NeuMeta, net: nn.Module, width: int, inputs: Any) -> tuple[Any, float]:
    """Outputs at a width, and the part of inner channels that never fire."""
    quiet: list[torch.Tensor] = []

    def listen(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        axis = -1 if isinstance(layer, nn.Linear) else output.dim() - layer.weight.dim() + 1
        flat = output.movedim(axis, 0)
        quiet.append(flat.flatten(1).amax(dim=1) <= 0)

    makers = [name for name, layer in hyper.layers.items() if layer.geometry.rows.channels]
    hooks = [net.get_submodule(name).register_forward_hook(listen) for name in makers]
    try:
        outputs = _called(net, hyper.weights(width), inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs, float(torch.cat(quiet).double().mean())


def _right(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return float((outputs.argmax(-1) == targets).double().mean())


def _told(report: FitReport) -> str:
    width = max(report.dead, key=lambda w: (report.dead[w], w))
    accuracy = "" if report.bypass_accuracy is None else f" (accuracy {report.bypass_accuracy:.3f})"
    losses = ", ".join(f"{loss:.3g} at width {w}" for w, loss in report.loss.items())
    return (
        f"the generated layers do nothing: {report.dead[width]:.0%} of the inner channels never fire at width {width}; "
        f"the loss is {losses}, and {report.bypass_loss:.3g}{accuracy} with zeros in their place; make the family "
        "anew, as this fit changed it, and give it a longer warm_start at random widths and with noise, or a lower "
        "learning rate"
    )
