"""The wave solvers against closed forms, against each other, and against what they must keep."""

from __future__ import annotations

import builtins
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import eigh

from retensor.compression import apriori as ap
from retensor.errors import MissingExtraError

skfem = pytest.importorskip("skfem")


def mode(mesh: ap.Mesh) -> np.ndarray:
    y, x = mesh.points
    return np.sin(np.pi * x) * np.sin(np.pi * y)


def apart(solve: Any, n: int, dt: float, time: float = 0.5, c: float = 1.3) -> float:
    """The largest distance from the standing mode at the end."""
    mesh = ap.Mesh(n)
    found = solve(mesh, mode(mesh), dt=dt, steps=round(time / dt), c=c)
    return float(np.abs(found.u[0, -1] - mode(mesh) * math.cos(math.sqrt(2) * math.pi * c * time)).max())


def test_finite_elements_converge_at_order_two_in_h() -> None:
    errors = [apart(ap.newmark, n, dt=1 / 1024) for n in (15, 31, 63)]
    assert np.log2(np.array(errors[:-1]) / errors[1:]) == pytest.approx([2, 2], abs=0.1)


def test_newmark_converges_at_order_two_in_dt() -> None:
    mesh = ap.Mesh(15)
    # Exact in time on this mesh: each eigenvector of stiffness and mass moves as a cosine.
    mass, stiffness = (matrix.toarray() for matrix in mesh.matrices)
    squares, vectors = eigh(stiffness, mass)
    exact = vectors @ (np.cos(np.sqrt(squares) * 0.5) * (vectors.T @ mass @ mode(mesh).ravel()))
    ends = [ap.newmark(mesh, mode(mesh), dt=0.5 / steps, steps=steps).u[0, -1] for steps in (16, 32, 64, 128)]
    distances = [np.abs(end.ravel() - exact).max() for end in ends]
    assert np.log2(np.array(distances[:-1]) / distances[1:]) == pytest.approx([2, 2, 2], abs=0.1)


@pytest.mark.parametrize("solve", [ap.newmark, ap.leapfrog])
def test_both_solvers_converge_at_order_two_along_the_diagonal(solve: Any) -> None:
    errors = [apart(solve, n, dt=0.25 / (n + 1)) for n in (7, 15, 31)]
    assert np.log2(np.array(errors[:-1]) / errors[1:]) == pytest.approx([2, 2], abs=0.15)


def test_leapfrog_moves_the_mode_with_the_frequency_of_its_own_dispersion() -> None:
    mesh, dt, c = ap.Mesh(20), 0.02, 1.2
    found = ap.leapfrog(mesh, mode(mesh), dt=dt, steps=300, c=c).u[0]
    omega = 2 / dt * math.asin(c * dt / mesh.h * math.sqrt(2) * math.sin(math.pi * mesh.h / 2))
    expected = mode(mesh) * np.cos(omega * dt * np.arange(301))[:, None, None]
    assert np.abs(found - expected).max() < 1e-11


def test_newmark_keeps_the_energy_over_a_thousand_steps() -> None:
    mesh = ap.Mesh(16)
    rng = np.random.default_rng(0)
    start = rng.standard_normal((2, 3, 16, 16))
    found = ap.newmark(mesh, start[0], start[1], dt=0.05, steps=1000, c=0.7, velocity=True)
    total = ap.energy(mesh, found, c=0.7)
    assert total.shape == (3, 1001)
    assert (np.abs(total / total[:, :1] - 1) < 1e-10).all()


def test_the_stiffness_of_linear_triangles_is_the_five_point_laplacian() -> None:
    mass, stiffness = ap.Mesh(9).matrices
    row = stiffness.toarray()[4 * 9 + 4].reshape(9, 9)[3:6, 3:6]
    assert np.abs(row - [[0, -1, 0], [-1, 4, -1], [0, -1, 0]]).max() < 1e-12
    # All that is inside weighs h^2 a node, the edge's share apart.
    assert mass.toarray()[4 * 9 + 4].sum() == pytest.approx(ap.Mesh(9).h ** 2)


def test_the_two_solvers_come_nearer_as_the_grid_gets_finer() -> None:
    distances = []
    for n in (15, 31, 63):
        mesh = ap.Mesh(n)
        y, x = mesh.points
        start = np.exp(-((x - 0.4) ** 2 + (y - 0.55) ** 2) / (2 * 0.15**2)) * mode(mesh)
        push = 5 * mode(mesh)

        def force(time: float, push: np.ndarray = push) -> np.ndarray:
            return push * math.sin(9 * time)

        steps = 2 * (n + 1)
        both = [solve(mesh, start, dt=0.5 / steps, steps=steps, force=force).u[0, -1] for solve in SOLVERS]
        distances.append(np.abs(both[0] - both[1]).max())
    assert np.log2(np.array(distances[:-1]) / distances[1:]) == pytest.approx([2, 2], abs=0.1)
    assert distances[-1] < 0.005


SOLVERS = (ap.newmark, ap.leapfrog)


@pytest.mark.parametrize("solve", SOLVERS)
def test_a_start_with_velocity_follows_its_closed_form(solve: Any) -> None:
    mesh = ap.Mesh(31)
    omega = math.sqrt(2) * math.pi
    found = solve(mesh, 0 * mode(mesh), omega * mode(mesh), dt=1 / 256, steps=64).u[0, -1]
    assert np.abs(found - mode(mesh) * math.sin(omega * 0.25)).max() < 0.01


def test_data_are_those_of_their_seed_and_of_the_solver_at_every_snapshot() -> None:
    first = ap.wave2d(n=12, steps=6, sources=3, seed=1)
    assert torch.equal(first["u"], ap.wave2d(n=12, steps=6, sources=3, seed=1)["u"])
    assert not torch.equal(first["u"], ap.wave2d(n=12, steps=6, sources=3, seed=2)["u"])
    assert first["u"].dtype is torch.float32
    assert first["dt"] == pytest.approx(1 / 13)
    # The largest start of each trajectory lies at its source.
    at = first["u"][:, 0].flatten(1).argmax(1)
    nearest = torch.stack([at // 12 + 1, at % 12 + 1], 1) / 13
    assert (nearest - first["positions"]).abs().max() <= 0.5 / 13 + 1e-6
    finer = ap.wave2d(n=12, steps=6, sources=3, seed=1, substeps=50, solver="leapfrog")["u"]
    coarse = ap.wave2d(n=12, steps=6, sources=3, seed=1, substeps=2, solver="leapfrog")["u"]
    assert 0 < (finer - coarse).abs().max() < 0.2


@pytest.mark.parametrize("solver", ["fem", "leapfrog"])
def test_rickers_source_starts_from_rest_and_both_solvers_agree(solver: Any) -> None:
    found = ap.wave2d(n=47, steps=45, sources=2, solver=solver, source="ricker", width=0.1, frequency=2)["u"]
    assert found[:, 0].abs().max() == 0
    other = ap.wave2d(n=47, steps=45, sources=2, solver="fem", source="ricker", width=0.1, frequency=2)["u"]
    assert found.abs().max() > 1e-3
    assert (found - other).norm() < 0.1 * other.norm()


def test_bad_arguments_are_named() -> None:
    mesh = ap.Mesh(15)
    zero = np.zeros((15, 15))
    with pytest.raises(ValueError, match=r"dt is 0\.1; leapfrog is stable up to .* = 0\.0441942"):
        ap.leapfrog(mesh, zero, dt=0.1, steps=1)
    ap.leapfrog(mesh, zero, dt=1 / 16 / math.sqrt(2), steps=1)
    with pytest.raises(ValueError, match="leapfrog is stable"):
        ap.wave2d(n=8, steps=2, sources=1, solver="leapfrog", substeps=1)
    for arguments, message in [
        ({"n": 0}, "n is 0"),
        ({"n": 8.5}, r"n is 8\.5"),
        ({"steps": 0}, "steps is 0"),
        ({"sources": "two"}, "sources is 'two'"),
        ({"substeps": 0}, "substeps is 0"),
        ({"courant": 0}, "courant is 0"),
        ({"width": -1}, "width is -1"),
        ({"c": 0}, "c is 0"),
        ({"solver": "spectral"}, "solver is 'spectral'"),
        ({"source": "plane"}, "source is 'plane'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ap.wave2d(**arguments)
    for solve in SOLVERS:
        with pytest.raises(ValueError, match=r"shape \(3, 3\) does not fit"):
            solve(mesh, np.zeros((3, 3)), dt=0.01, steps=1)
        with pytest.raises(ValueError, match=r"shape \(3, 3\) does not fit"):
            solve(mesh, zero, dt=0.01, steps=2, force=lambda _: np.zeros((3, 3)))
        for dt, c in [(math.inf, 1), (math.nan, 1), (0.01, math.inf)]:
            with pytest.raises(ValueError, match="finite numbers above 0"):
                solve(mesh, zero, dt=dt, steps=1, c=c)
        with pytest.raises(ValueError, match="dt is 0"):
            solve(mesh, zero, dt=0, steps=1)
        with pytest.raises(ValueError, match="steps is -1"):
            solve(mesh, zero, dt=0.01, steps=-1)
    with pytest.raises(ValueError, match="velocity=True"):
        ap.energy(mesh, ap.newmark(mesh, zero, dt=0.1, steps=1))


def test_without_scikit_fem_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] == "skfem":
            raise ImportError(name)
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match="compression"):
        ap.wave2d(n=4, steps=2, sources=1)
    assert ap.wave2d(n=4, steps=2, sources=1, solver="leapfrog")["u"].shape == (1, 2, 4, 4)
