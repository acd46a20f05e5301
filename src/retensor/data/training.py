"""One small training loop for reference models, examples, tests and claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from retensor.files import described
from retensor.graph.modes import evaluating
from retensor.units import whole

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
Schedule = Literal["onecycle", "cosine", "constant"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let what is drawn inside depend on ``seed`` alone; the caller's random numbers go on where they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def fit(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    steps: int,
    batch: int = 64,
    lr: float = 3e-3,
    weight_decay: float = 1e-2,
    schedule: Schedule = "onecycle",
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
    label_smoothing: float = 0.0,
    clip: float | None = None,
    seed: int = 0,
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train a model in place, and leave it in training mode.

    Parameters
    ----------
    model : nn.Module
    x, y : torch.Tensor
        Inputs of shape (samples, ...), and targets of shape (samples, ...).
    steps : int
        Batches; each pass over the samples is in another order, and its last batch may be smaller.
    batch : int
    lr, weight_decay : float
        Of AdamW, where no optimizer is given; ``lr`` is the highest of the schedule, and each of an optimizer's groups
        keeps its own.
    schedule : {"onecycle", "cosine", "constant"}
        ``onecycle``: up over the first three tenths, then down to nothing, both along a cosine.
    optimizer : torch.optim.Optimizer, optional
    loss : function of (model, x, y), optional
        Cross-entropy of ``model(x)`` by default.
    label_smoothing : float
        Of the cross-entropy.
    clip : float, optional
        The largest norm of all gradients.
    seed : int
        Of the order, and of what the model draws.
    after_step : function, optional
        Called with the number of each step that was taken, 0 first.

    Returns
    -------
    list of float
        The loss of each step.

    Raises
    ------
    TypeError, ValueError
        Where steps or batch are no whole numbers, the tensors do not fit, or ``clip`` is not above 0.
    FloatingPointError
        Where the loss is no finite number.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"an nn.Module is trained, not {described(model)}")
    steps, batch = whole(steps, "steps"), whole(batch, "batch")
    if clip is not None and not clip > 0:
        # A norm below 0 would turn every step around.
        raise ValueError(f"clip is the largest norm of all gradients, above 0, not {described(clip)}")
    if steps < 0 or batch < 1 or len(x) != len(y) or not len(x):
        raise ValueError(
            f"{steps} steps in batches of {batch} over {len(x)} inputs and {len(y)} targets cannot be taken"
        )
    optimizer = optimizer or torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=weight_decay
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(schedule, step, steps))
    losses: list[float] = []
    model.train()
    with seeded(seed):
        order = _batches(len(x), batch)
        for step in range(steps):
            chosen = next(order)
            optimizer.zero_grad(set_to_none=True)
            value = (
                functional.cross_entropy(model(x[chosen]), y[chosen], label_smoothing=label_smoothing)
                if loss is None
                else loss(model, x[chosen], y[chosen])
            )
            if not math.isfinite(value.item()):
                raise FloatingPointError(f"the loss is {value.item()} at step {step}; take a lower learning rate")
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            rates.step()
            losses.append(value.item())
            if after_step is not None:
                after_step(step)
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, batch: int = 512) -> float:
    """The share of samples whose class a model tells, in eval mode; every module's mode is as before afterwards.

    Raises
    ------
    TypeError, ValueError
        Where there is not one class for each input, a whole number, the model does not give one row of scores, at least
        two, for each, or ``batch`` is none.
    """
    if whole(batch, "batch") < 1:
        raise ValueError(f"a batch has at least one sample, not {batch}")
    if not all(isinstance(value, torch.Tensor) for value in (x, y)) or y.is_floating_point():
        raise TypeError("inputs and classes are tensors, and classes whole numbers")
    if y.ndim != 1 or len(x) != len(y) or not len(x):
        raise ValueError(f"{len(x)} inputs need one class each, a tensor of shape [{len(x)}], not {list(y.shape)}")
    right = 0
    with evaluating(model):
        for a, b in zip(x.split(batch), y.split(batch), strict=True):
            scores = model(a)
            if not isinstance(scores, torch.Tensor) or not scores.ndim or scores.shape[-1] < 2:
                what = list(scores.shape) if isinstance(scores, torch.Tensor) else described(scores)
                raise ValueError(f"the model gives {what}; a row of at least two scores for each input is needed")
            told = scores.argmax(-1)
            if told.shape != b.shape:
                raise ValueError(
                    f"the model gives classes of shape {list(told.shape)} for {len(b)} inputs; one each is needed"
                )
            right += int((told == b).sum())
    return right / len(x)


def _batches(samples: int, batch: int) -> Iterator[torch.Tensor]:
    while True:
        yield from torch.randperm(samples).split(batch)


def _rate(schedule: Schedule, step: int, steps: int) -> float:
    """Of the highest rate, the part that a step takes."""
    done = step / max(1, steps)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, done))
    if schedule != "onecycle":
        raise ValueError(f"'{schedule}' is no schedule; they are 'onecycle', 'cosine' and 'constant'")
    rise = 0.3
    if done < rise:
        return 0.04 + 0.96 * (0.5 - 0.5 * math.cos(math.pi * done / rise))
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (done - rise) / (1 - rise)))
