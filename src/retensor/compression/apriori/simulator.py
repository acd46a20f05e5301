"""Networks that stand for the solver: one that steps a wave forward, and one that makes a field of its parameters."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from retensor.files import described
from retensor.graph.modes import evaluating


class WaveStepper(nn.Module):
    """The next state of a wave: ``u_{n+1} = 2 u_n - u_{n-1} + s CNN(u_n, u_{n-1})``.

    Without the network it is what a wave without any force would do; the network adds what ``dt^2 u_tt`` is.

    Parameters
    ----------
    width : int
        Channels.
    depth : int
        Convolutions with a ReLU behind each, before the 1x1 one that makes the answer and is called ``head``.
    kernel : int
        Their size, odd; zeros around the field are its fixed edge.

    Raises
    ------
    ValueError
        Where one is below 1, or the kernel even.

    Notes
    -----
    Trained on exact states, rollouts may diverge however small the error of one step is, of compressed networks
    sooner than of dense ones; train with noise on the inputs, as :func:`step_loss` does.

    Attributes
    ----------
    scale, step : torch.Tensor
        What inputs are divided by, and ``s``; see :meth:`normalise_`.

    Examples
    --------
    >>> WaveStepper()(torch.zeros(3, 2, 32, 32)).shape, sum(p.numel() for p in WaveStepper().parameters())
    (torch.Size([3, 1, 32, 32]), 30097)
    """

    scale: torch.Tensor
    step: torch.Tensor

    def __init__(self, width: int = 24, depth: int = 3, kernel: int = 5) -> None:
        super().__init__()
        if min(width, depth, kernel) < 1 or kernel % 2 == 0:
            raise ValueError(f"width {width}, depth {depth}, kernel {kernel} do not do; at least 1 each, kernel odd")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(depth):
            conv = nn.Conv2d(2 if i == 0 else width, width, kernel, padding=kernel // 2)
            nn.init.kaiming_normal_(conv.weight)
            nn.init.zeros_(conv.bias)
            layers[f"conv{i}"] = conv
            layers[f"relu{i}"] = nn.ReLU()
        self.body = nn.Sequential(layers)
        self.head = nn.Conv2d(width, 1, 1)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("step", torch.ones(()))

    @torch.no_grad()
    def normalise_(self, x: torch.Tensor, y: torch.Tensor) -> WaveStepper:
        """Take the scales from training data, as :func:`pairs` makes it; returns the model itself."""
        self.scale.copy_(x.square().mean().sqrt())
        self.step.copy_((y - 2 * x[:, :1] + x[:, 1:2]).square().mean().sqrt())
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``u_{n+1}`` of shape (samples, 1, n, n), of ``u_n`` and ``u_{n-1}`` of shape (samples, 2, n, n)."""
        # Convolutions, dense ones too, are faster with the channels of a pixel side by side.
        planes = (x / self.scale).contiguous(memory_format=torch.channels_last)
        change = self.head(self.body(planes))
        return 2 * x[:, :1] - x[:, 1:2] + self.step * change


class FieldDecoder(nn.Module):
    """Fields of some parameters, such as the place of a source: a matrix, then transposed convolutions that double it.

    Parameters
    ----------
    parameters : int
        Numbers that a field depends on.
    fields : int
        Fields of one sample: states at several times, say.
    n : int
        Nodes each way, ``4 * 2**k``.
    width : int
        Channels.

    Raises
    ------
    ValueError
        Where ``n`` is no such number.

    Examples
    --------
    >>> FieldDecoder(2, fields=3, n=32)(torch.zeros(5, 2)).shape
    torch.Size([5, 3, 32, 32])
    """

    def __init__(self, parameters: int = 2, fields: int = 1, n: int = 32, width: int = 24) -> None:
        super().__init__()
        doublings = round(math.log2(n / 4)) if n > 4 else 0
        if 4 * 2**doublings != n or doublings < 1:
            raise ValueError(f"n is {described(n)}; 4 is doubled to reach it: 8, 16, 32, ... are possible")
        self.width = width
        self.stem = nn.Linear(parameters, 16 * width)
        layers: OrderedDict[str, nn.Module] = OrderedDict(relu=nn.ReLU())
        for i in range(doublings):
            up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
            # At stride 2 an output gathers a quarter of the kernel.
            nn.init.normal_(up.weight, std=math.sqrt(2 / (4 * width)))
            conv = nn.Conv2d(width, width, 5, padding=2)
            nn.init.kaiming_normal_(conv.weight)
            for layer in (up, conv):
                nn.init.zeros_(layer.bias)
            layers |= {f"up{i}": up, f"relu{i}": nn.ReLU(), f"conv{i}": conv, f"relu{i}_": nn.ReLU()}
        self.body = nn.Sequential(layers)
        self.head = nn.Conv2d(width, fields, 1)

    def forward(self, parameters: torch.Tensor) -> torch.Tensor:
        """Fields of shape (samples, fields, n, n), of parameters of shape (samples, parameters)."""
        start = self.stem(parameters).unflatten(1, (self.width, 4, 4))
        fields: torch.Tensor = self.head(self.body(start))
        return fields


def pairs(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs ``(u_n, u_{n-1})`` and targets ``u_{n+1}`` of all trajectories.

    Parameters
    ----------
    u : torch.Tensor
        Of shape (trajectories, times, n, n), with at least three times.

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        Of shapes (pairs, 2, n, n) and (pairs, 1, n, n).

    Raises
    ------
    ValueError
        Where there are fewer times.

    Examples
    --------
    >>> x, y = pairs(torch.zeros(3, 10, 16, 16))
    >>> tuple(x.shape), tuple(y.shape)
    ((24, 2, 16, 16), (24, 1, 16, 16))
    """
    if u.dim() != 4 or u.shape[1] < 3:
        raise ValueError(f"trajectories of shape {tuple(u.shape)} hold no step; (trajectories, 3 or more, n, n) do")
    x = torch.stack([u[:, 1:-1], u[:, :-2]], 2)
    return x.flatten(0, 1), u[:, 2:].flatten(0, 1).unsqueeze(1)


def relative_l2(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """``|predicted - true| / |true|`` of each sample, averaged.

    Parameters
    ----------
    predicted, true : torch.Tensor
        Of shape (samples, ...), both alike.

    Returns
    -------
    torch.Tensor
        One number.

    Examples
    --------
    >>> relative_l2(torch.tensor([[3.0, 3.0]]), torch.tensor([[3.0, 4.0]])).item()
    0.2...
    """
    apart = (predicted - true).flatten(1).norm(dim=1)
    return (apart / true.flatten(1).norm(dim=1).clamp_min(1e-12)).mean()


def step_loss(noise: float = 0.01) -> Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A loss for :func:`retensor.data.fit`: the relative L2 error of a step from states that are not quite right.

    Rollouts step from predictions; a network that never saw an error lets it grow: without noise those of compressed
    :class:`WaveStepper` diverge within 20 steps where a dense one's need not. Noise on the inputs shows it some
    (A. Sanchez-Gonzalez, J. Godwin, T. Pfaff, R. Ying, J. Leskovec, P. Battaglia, "Learning to simulate complex physics
    with graph networks", 2020, arXiv 2002.09405).

    Parameters
    ----------
    noise : float
        Its deviation, as a part of the model's ``scale``; 0 for none.

    Returns
    -------
    function of (model, x, y)

    Raises
    ------
    ValueError
        Where it is below 0.

    Examples
    --------
    >>> x, y = pairs(torch.ones(1, 4, 8, 8))
    >>> step_loss()(WaveStepper(2), x, y).shape
    torch.Size([])
    """
    if not noise >= 0:
        raise ValueError(f"noise is {described(noise)}; a deviation of at least 0 is needed")

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return relative_l2(model(x + noise * model.scale * torch.randn_like(x)), y)

    return loss


@torch.no_grad()
def rollout(model: nn.Module, start: torch.Tensor, steps: int) -> torch.Tensor:
    """States that follow from two, each predicted from those predicted before.

    Parameters
    ----------
    model : nn.Module
        Such as :class:`WaveStepper`; run in eval mode, its own mode is back afterwards.
    start : torch.Tensor
        ``u_0`` and ``u_1`` in this order, of shape (trajectories, 2, n, n): ``u[:, :2]`` of a data set.
    steps : int
        None gives no states.

    Returns
    -------
    torch.Tensor
        ``u_2`` and those after it, of shape (trajectories, steps, n, n).

    Raises
    ------
    ValueError
        Where ``start`` has another shape, or there are fewer than 0 steps.

    Examples
    --------
    >>> rollout(WaveStepper(4), torch.zeros(2, 2, 16, 16), 20).shape
    torch.Size([2, 20, 16, 16])
    """
    if start.dim() != 4 or start.shape[1] != 2:
        raise ValueError(f"a start of shape {tuple(start.shape)} is none; (trajectories, 2, n, n) is")
    if steps < 0:
        raise ValueError(f"steps is {steps}; at least 0 are taken")
    before, now = start[:, :1], start[:, 1:]
    states = [start[:, :0]]
    with evaluating(model):
        for _ in range(steps):
            before, now = now, model(torch.cat([now, before], 1))
            states.append(now)
    return torch.cat(states, 1)
