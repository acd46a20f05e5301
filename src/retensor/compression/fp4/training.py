"""What keeps a training in few bits going: loss scaling, clipping, and an optimizer that mistrusts spikes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from retensor.files import described


def train_step(
    model: nn.Module,
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    loss_scale: float = 1.0,
    clip: float | None = None,
) -> float:
    """One step: the loss backward, scaled up so that small gradients reach their format's range, and the optimizer.

    Parameters
    ----------
    model : nn.Module
    loss : torch.Tensor
        Of no dimension.
    optimizer : torch.optim.Optimizer
    loss_scale : float
        The loss is multiplied with it before it goes backward, and every gradient divided by it afterwards. A power of
        two is exact.
    clip : float, optional
        The largest norm of all gradients together.

    Returns
    -------
    float
        The norm of all gradients, before clipping. Where it is not finite, no step is taken.

    Raises
    ------
    ValueError
        Where a number is not above 0.

    Examples
    --------
    >>> net = nn.Linear(2, 1)
    >>> step = train_step(net, net(torch.ones(4, 2)).mean(), torch.optim.SGD(net.parameters(), 0.1), loss_scale=1024)
    >>> round(step, 3)  # of two weights and a bias
    1.732
    """
    for name, value in (("loss_scale", loss_scale), ("clip", clip)):
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{name} is a number above 0, not {described(value)}")
    optimizer.zero_grad(set_to_none=True)
    (loss * loss_scale).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if loss_scale != 1.0:
        for gradient in gradients:
            gradient.div_(loss_scale)
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip))
    if math.isfinite(norm):
        optimizer.step()
    return norm


class SpikeAwareAdamW(torch.optim.AdamW):
    r"""AdamW that cuts spikes of the gradient down and forgets its moments now and then.

    T. Huang and others, SPAM: Spike-Aware Adam with Momentum Reset, 2025, arXiv 2501.06842: where
    :math:`g_i^2 > \theta v_i` with Adam's second moment :math:`v`, :math:`g_i` becomes
    :math:`\operatorname{sign}(g_i) \sqrt{\theta v_i}`; and every ``reset`` steps both moments start anew, after which
    the rate rises again over ``warmup`` steps. In the first ``accumulate`` steps, and as many after each reset, nothing
    is cut: a moment that has seen a few gradients alone is far below their squares.

    Parameters
    ----------
    params
        As of any optimizer of torch's.
    threshold : float
        :math:`\theta`.
    reset, warmup : int
        Steps; 0 leaves either out.
    accumulate : int
        Steps.
    **options
        Of ``torch.optim.AdamW``.

    Raises
    ------
    ValueError
        Where a number is out of range.

    Examples
    --------
    >>> weight = nn.Parameter(torch.ones(1))
    >>> optimizer = SpikeAwareAdamW([weight], lr=0.1, threshold=9.0, accumulate=0, weight_decay=0.0)
    >>> for size in (1.0, 1.0, 1000.0):
    ...     weight.grad = torch.full((1,), size)
    ...     _ = optimizer.step()
    >>> weight.grad.item() < 1  # the third gradient was cut to three times the root of the second moment
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        threshold: float = 5000.0,
        reset: int = 500,
        warmup: int = 150,
        accumulate: int = 20,
        **options: Any,
    ) -> None:
        if not (isinstance(threshold, int | float) and threshold > 0):
            raise ValueError(f"threshold is a number above 0, not {described(threshold)}")
        for name, steps in (("reset", reset), ("warmup", warmup), ("accumulate", accumulate)):
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
                raise ValueError(f"{name} is a number of steps, 0 or more, not {described(steps)}")
        super().__init__(params, **options)
        self.threshold, self.reset, self.warmup, self.accumulate = float(threshold), reset, warmup, accumulate
        self.steps = 0

    @property
    def steps(self) -> int:
        """Steps that were taken; kept with the options of the first parameters, and so in ``state_dict()``."""
        return int(self.param_groups[0].get("spike_aware_steps", 0))

    @steps.setter
    def steps(self, value: int) -> None:
        self.param_groups[0]["spike_aware_steps"] = value

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of AdamW on what is left of the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        since = self.steps % self.reset if self.reset else self.steps
        for group in self.param_groups if since >= self.accumulate else ():
            for parameter in group["params"]:
                if parameter.grad is not None and "exp_avg_sq" in self.state[parameter]:
                    limit = (self.state[parameter]["exp_avg_sq"] * self.threshold).sqrt_()
                    # Where nothing was seen yet, everything would be a spike.
                    limit = torch.where(limit > 0, limit, torch.full_like(limit, math.inf))
                    parameter.grad.copy_(torch.maximum(torch.minimum(parameter.grad, limit), -limit))
        rising = self.reset and self.steps >= self.reset and since < self.warmup
        share = 0.5 - 0.5 * math.cos(math.pi * (since + 1) / self.warmup) if rising else 1.0
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate * share
        super().step()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        self.steps += 1
        if self.reset and self.steps % self.reset == 0:
            self.state.clear()
        return loss
