"""Time, memory and growth of a-priori compressed convolutions, and the truth of the solver that makes their waves."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from benchmarks.apriori_conv_trainings import BATCH, GRID, count
from benchmarks.measuring import allocated, power, threads, times
from scipy.linalg import eigh
from torch import nn

import retensor as rt
from retensor.compression import apriori as ap


def plain_net(width: int, kernel: int) -> nn.Sequential:
    """The convolutions of a stepper, in a row."""
    model = ap.WaveStepper(width, kernel=kernel)
    return nn.Sequential(*model.body, model.head)


def tensorly_net(width: int, kernel: int, rank: int) -> nn.Sequential:
    """The same with tensorly-torch's factorised layers."""
    import tltorch

    def peer(conv: nn.Conv2d) -> nn.Module:
        layer = tltorch.FactorizedConv(
            conv.in_channels, width, kernel, order=2, padding=kernel // 2, bias=True, factorization="cp", rank=rank,
            implementation="factorized",
        )  # fmt: skip
        layer.reset_parameters()
        return layer

    return rt.replace(plain_net(width, kernel), {"[024]": peer})


@dataclass(frozen=True)
class Speed:
    """Seconds of a run and of a training step, by network."""

    width: int
    kernel: int
    forward: dict[str, float]
    training: dict[str, float]
    macs: float

    def of(self, name: str, base: str, training: bool = False) -> float:
        """A network's time over another's, each in the faster of the memory formats that there are of it."""
        found = self.training if training else self.forward

        def least(name: str) -> float:
            return min(seconds for key, seconds in found.items() if key.removesuffix(LAST) == name)

        return least(name) / least(base)


LAST = ", channels last"


def speed(width: int, kernel: int) -> Speed:
    dense = plain_net(width, kernel)
    nets: dict[str, nn.Module] = {
        "dense": dense,
        "dense" + LAST: plain_net(width, kernel).to(memory_format=torch.channels_last),
        "cp": ap.compress(dense, rank=width),
        "cp, fused": ap.compress(dense, rank=width, implementation="fused"),
        "cp, recomputed": ap.compress(dense, rank=width, recompute=True),
        "tensorly-torch": tensorly_net(width, kernel, width),
        "tensorly-torch" + LAST: tensorly_net(width, kernel, width),
    }
    x = torch.randn(BATCH, 2, GRID, GRID, generator=torch.Generator().manual_seed(0))
    last = x.contiguous(memory_format=torch.channels_last)
    given = {name: last if LAST in name or name.startswith("cp") else x for name in nets}

    def forward(name: str) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                nets[name](given[name])

        return run

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            nets[name].zero_grad(set_to_none=True)
            nets[name](given[name]).square().mean().backward()

        return run

    repetitions = 30 if width < 32 else 12
    taken = [times({name: make(name) for name in nets}, repetitions) for make in (forward, step)]
    told = ap.summary(nets["cp"], x).total
    return Speed(
        width, kernel, *({name: one[name] for name in nets} for one in taken),
        told.macs / told.dense_macs,
    )  # fmt: skip


def speed_in_space() -> tuple[int, float, float]:
    """Of one layer for fields in space: parameters that cp saves, its share of multiply-accumulates and of time."""
    dense = nn.Conv3d(24, 24, 5, padding=2)
    layer = ap.factored(dense, 24)
    x = torch.randn(2, 24, 16, 16, 16)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        seconds = times({"dense": lambda: dense(x), "last": lambda: dense(last), "cp": lambda: layer(last)}, 9)
    told = ap.summary(layer, x).total
    took = seconds["cp"] / min(seconds["dense"], seconds["last"])
    return told.dense_parameters - told.parameters, told.macs / told.dense_macs, took


def peak(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[int, int]:
    """Bytes that a training step with Adam needs: what stays (weights and two moments), and the most that comes on top.

    The latter is what torch's profiler sees the allocator give and take.
    """
    optimizer, loss = torch.optim.Adam(model.parameters()), ap.step_loss()
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        loss(model, x, y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return 3 * 4 * count(model), allocated(lambda: loss(model, x, y).backward())


def growth() -> list[tuple[str, list[int], list[float], float]]:
    """Seconds of one layer on one thread as its rank, its pixels or its kernel grow; the exponent of each."""

    def run(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
        x = x.contiguous(memory_format=torch.channels_last)
        layer = layer.to(memory_format=torch.channels_last)

        def function() -> None:
            with torch.no_grad():
                layer(x)

        return function

    def medians(calls: Sequence[Callable[[], None]], rounds: int) -> list[float]:
        with threads(1):
            taken = times({str(i): call for i, call in enumerate(calls)}, rounds)
        return [taken[str(i)] for i in range(len(calls))]

    x = torch.randn(BATCH, 32, 64, 64)
    ranks, sides, kernels = [64, 128, 256, 512], [32, 64, 128, 256], [3, 7, 15, 31]
    rows = []
    by_rank = [run(ap.CPConv2d(32, 32, 15, padding=7, rank=rank), x) for rank in ranks]
    rows.append(("cp, rank", ranks, medians(by_rank, 7)))
    one = ap.CPConv2d(32, 32, 5, padding=2, rank=32)
    by_pixels = [run(one, torch.randn(2, 32, side, side)) for side in sides]
    rows.append(("cp, pixels", [side**2 for side in sides], medians(by_pixels, 15)))
    # Few channels and many components: the mixing of channels, which does not grow with the kernel, is little of it.
    x = torch.randn(2, 8, 64, 64)
    with warnings.catch_warnings():
        # At small kernels that is more than the dense layer has.
        warnings.simplefilter("ignore", UserWarning)
        by_kernel = [run(ap.CPConv2d(8, 8, k, padding=k // 2, rank=256), x) for k in kernels]
    rows.append(("cp, kernel size", kernels, medians(by_kernel, 15)))
    x = torch.randn(2, 32, 64, 64)
    dense = [run(nn.Conv2d(32, 32, k, padding=k // 2), x) for k in kernels]
    rows.append(("dense, kernel size", kernels, medians(dense, 7)))
    return [(name, sizes, seconds, power(sizes, seconds)) for name, sizes, seconds in rows]


def solver_truth() -> tuple[list[float], list[float], float]:
    """Orders in ``h`` by the standing mode, in ``dt`` by the semi-discrete solution, and the energy's relative change.

    The latter is exact in time on the same mesh: each eigenvector of stiffness and mass moves as a cosine.
    """
    end, by_h = 0.5, []
    for n in (15, 31, 63):
        mesh = ap.Mesh(n)
        found = ap.newmark(mesh, mode(mesh), dt=1 / 1024, steps=512).u[0, -1]
        by_h.append(np.abs(found - mode(mesh) * math.cos(math.sqrt(2) * math.pi * end)).max())
    mesh = ap.Mesh(15)
    mass, stiffness = (matrix.toarray() for matrix in mesh.matrices)
    squares, vectors = eigh(stiffness, mass)
    start = mode(mesh).ravel()
    exact = vectors @ (np.cos(np.sqrt(squares) * end) * (vectors.T @ mass @ start))
    ends = [ap.newmark(mesh, mode(mesh), dt=end / steps, steps=steps).u[0, -1] for steps in (16, 32, 64, 128)]
    by_dt = [np.abs(found.ravel() - exact).max() for found in ends]
    mesh = ap.Mesh(31)
    random = np.random.default_rng(0).standard_normal((2, 1, 31, 31))
    total = ap.energy(mesh, ap.newmark(mesh, random[0], random[1], dt=0.05, steps=1000, velocity=True))
    orders = [[float(np.log2(a / b)) for a, b in itertools.pairwise(errors)] for errors in (by_h, by_dt)]
    return orders[0], orders[1], float(np.abs(total / total[:, :1] - 1).max())


def mode(mesh: ap.Mesh) -> np.ndarray:
    y, x = mesh.points
    return np.sin(np.pi * x) * np.sin(np.pi * y)
