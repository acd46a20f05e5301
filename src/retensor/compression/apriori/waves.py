"""The wave equation ``u_tt = c^2 Laplace(u) + f`` on the unit square, held fixed at its edge, by two solvers.

:func:`newmark` is a finite-element solver: linear triangles, and the method of N. Newmark ("A method of computation
for structural dynamics", 1959) with ``beta = 1/4``, ``gamma = 1/2``, which is stable for any step and keeps the energy.
:func:`leapfrog` is the explicit finite-difference scheme of second order with the five-point Laplacian, which is
stable up to ``c dt = h / sqrt(2)`` (R. Courant, K. Friedrichs, H. Lewy, 1928). They share nothing but the grid, so that
one checks the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from retensor.errors import MissingExtraError
from retensor.files import described

Array = Any
"""A numpy array of float64."""
Force = Callable[[float], Array]
"""The force at a time, of shape (samples, n, n) or (n, n)."""


@dataclass(frozen=True)
class Mesh:
    """The unit square with ``n`` by ``n`` nodes inside, and its edge held fixed.

    Attributes
    ----------
    n : int
        Nodes inside, each way; at least 1.

    Raises
    ------
    ValueError
        Where it is no such number.
    """

    n: int

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"n is {described(self.n)}; the nodes inside the square each way, at least 1, are needed")

    @property
    def h(self) -> float:
        """The distance of neighbours."""
        return 1 / (self.n + 1)

    @property
    def points(self) -> tuple[Array, Array]:
        """``y`` and ``x`` of the nodes, each of shape (n, n)."""
        line = np.arange(1, self.n + 1) * self.h
        y, x = np.meshgrid(line, line, indexing="ij")
        return y, x

    @cached_property
    def matrices(self) -> tuple[Any, Any]:
        """Mass and stiffness of linear triangles on the inner nodes, as sparse matrices.

        Raises
        ------
        MissingExtraError
            Where scikit-fem or scipy is not installed.
        """
        try:
            import skfem
            from skfem.models.poisson import laplace, mass
        except ImportError as error:
            raise MissingExtraError("the finite-element solver", "compression") from error
        line = np.linspace(0, 1, self.n + 2)
        basis = skfem.Basis(skfem.MeshTri.init_tensor(line, line), skfem.ElementTriP1())
        x, y = np.rint(basis.doflocs / self.h).astype(int)
        inside = np.flatnonzero((x > 0) & (x <= self.n) & (y > 0) & (y <= self.n))
        order = inside[np.lexsort((x[inside], y[inside]))]
        return tuple(form.assemble(basis)[order][:, order].tocsc() for form in (mass, laplace))


@dataclass(frozen=True)
class Trajectory:
    """What a solver found.

    Attributes
    ----------
    u : numpy array
        Displacements of shape (samples, times, n, n), those given first.
    v : numpy array or None
        Velocities alike, where they were asked for.
    dt : float
        From one to the next.
    """

    u: Array
    v: Array | None
    dt: float


def newmark(
    mesh: Mesh,
    u0: Array,
    v0: Array | None = None,
    *,
    dt: float,
    steps: int,
    c: float = 1.0,
    force: Force | None = None,
    every: int = 1,
    velocity: bool = False,
) -> Trajectory:
    """Waves by finite elements in space and Newmark's method in time.

    ``(M + beta dt^2 c^2 K) a' = F' - c^2 K (u + dt v + (1/2 - beta) dt^2 a)`` gives the next acceleration; the matrix
    is factorised once.

    Parameters
    ----------
    mesh : Mesh
    u0, v0 : array
        Displacements and velocities at the start, of shape (samples, n, n) or (n, n); velocities are 0 by default.
    dt : float
        Any step is stable; the error is of order ``dt^2``.
    steps : int
    c : float
        The speed of waves.
    force : function of the time, optional
        Nodal values of ``f``.
    every : int
        Steps from one state that is kept to the next.
    velocity : bool
        Keep velocities too.

    Returns
    -------
    Trajectory

    Raises
    ------
    ValueError
        Where shapes, steps or sizes do not fit.
    MissingExtraError
        Where scikit-fem or scipy is not installed.

    Examples
    --------
    >>> mesh = Mesh(15)
    >>> y, x = mesh.points
    >>> found = newmark(mesh, np.sin(np.pi * x) * np.sin(np.pi * y), dt=0.01, steps=100, velocity=True)
    >>> found.u.shape, bool(np.ptp(energy(mesh, found)) < 1e-11)
    ((1, 101, 15, 15), True)
    """
    _check(dt, steps, c, every)
    u, v = _start(mesh, u0, v0)
    mass, stiffness = mesh.matrices
    from scipy.sparse.linalg import splu

    def load(time: float) -> Array:
        return 0.0 if force is None else mass @ _columns(mesh, force(time), u.shape[1])

    stiffness = c**2 * stiffness
    a = splu(mass).solve(load(0.0) - stiffness @ u)
    system = splu((mass + dt**2 / 4 * stiffness).tocsc())
    keep = _Keeper(mesh, u, v if velocity else None, steps, every)
    for step in range(1, steps + 1):
        predicted = u + dt * v + dt**2 / 4 * a
        after = system.solve(load(step * dt) - stiffness @ predicted)
        u = predicted + dt**2 / 4 * after
        v = v + dt / 2 * (a + after)
        a = after
        keep(step, u, v)
    return Trajectory(keep.u, keep.v, dt * every)


def leapfrog(
    mesh: Mesh,
    u0: Array,
    v0: Array | None = None,
    *,
    dt: float,
    steps: int,
    c: float = 1.0,
    force: Force | None = None,
    every: int = 1,
) -> Trajectory:
    """Waves by central differences in space and time.

    Parameters
    ----------
    mesh, u0, v0, dt, steps, c, force, every
        As of :func:`newmark`; ``dt`` has a limit.

    Returns
    -------
    Trajectory
        Without velocities.

    Raises
    ------
    ValueError
        Where shapes, steps or sizes do not fit, or ``dt`` is above ``h / (sqrt(2) c)``, beyond which the scheme is
        unstable.

    Examples
    --------
    >>> leapfrog(Mesh(15), np.zeros((15, 15)), dt=0.1, steps=1)
    Traceback (most recent call last):
    ...
    ValueError: dt is 0.1; leapfrog is stable up to h / (sqrt(2) c) = 0.0441942 here: take a smaller step, ...
    """
    _check(dt, steps, c, every)
    start, speed = _start(mesh, u0, v0)
    limit = mesh.h / (math.sqrt(2) * c)
    if dt > limit * (1 + 1e-12):
        raise ValueError(
            f"dt is {dt:g}; leapfrog is stable up to h / (sqrt(2) c) = {limit:g} here: take a smaller step, more "
            "substeps, or the finite-element solver"
        )
    n = mesh.n
    samples = start.shape[1]
    u, v = (part.T.reshape(samples, n, n) for part in (start, speed))

    def acceleration(u: Array, time: float) -> Array:
        padded = np.pad(u, ((0, 0), (1, 1), (1, 1)))
        neighbours = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
        found = (c / mesh.h) ** 2 * (neighbours - 4 * u)
        return found if force is None else found + _columns(mesh, force(time), samples).T.reshape(samples, n, n)

    keep = _Keeper(mesh, start, None, steps, every)
    before, u = u, u + dt * v + dt**2 / 2 * acceleration(u, 0.0)
    for step in range(1, steps + 1):
        keep(step, u.reshape(samples, -1).T, None)
        before, u = u, 2 * u - before + dt**2 * acceleration(u, step * dt)
    return Trajectory(keep.u, None, dt * every)


def energy(mesh: Mesh, trajectory: Trajectory, c: float = 1.0) -> Array:
    """``(v, M v) / 2 + c^2 (u, K u) / 2`` at each time, of shape (samples, times).

    Parameters
    ----------
    mesh : Mesh
    trajectory : Trajectory
        Of :func:`newmark` with ``velocity=True``, on that mesh.
    c : float
        The speed of waves that it was made with.

    Raises
    ------
    ValueError
        Where the trajectory has no velocities.
    """
    if trajectory.v is None:
        raise ValueError("the energy needs velocities; pass velocity=True to newmark")
    mass, stiffness = mesh.matrices
    u, v = (part.reshape(-1, mesh.n**2).T for part in (trajectory.u, trajectory.v))
    total = (v * (mass @ v)).sum(0) / 2 + c**2 * (u * (stiffness @ u)).sum(0) / 2
    return total.reshape(trajectory.u.shape[:2])


def wave2d(
    n: int = 64,
    steps: int = 60,
    sources: int = 200,
    solver: Literal["fem", "leapfrog"] = "fem",
    *,
    c: float = 1.0,
    courant: float = 1.0,
    substeps: int = 2,
    source: Literal["pulse", "ricker"] = "pulse",
    width: float = 0.06,
    frequency: float = 4.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Waves on the unit square from sources in many places: data for a simulator.

    Parameters
    ----------
    n : int
        Nodes inside the square, each way; the edge is held fixed.
    steps : int
        States of a trajectory, the first included.
    sources : int
        Trajectories, each with a source in a place of its own, at least 0.15 from the edge.
    solver : {"fem", "leapfrog"}
        :func:`newmark` or :func:`leapfrog`.
    c : float
    courant : float
        ``c dt / h`` from one state to the next.
    substeps : int
        Steps of the solver from one state to the next. Leapfrog needs ``courant / substeps <= 1 / sqrt(2)``.
    source : {"pulse", "ricker"}
        A Gaussian displacement at the start; or rest at the start, and a force of Ricker's shape in time and a
        Gaussian in space (N. Ricker, 1953).
    width : float
        Deviation of the Gaussian.
    frequency : float
        Peak frequency of Ricker's force.
    seed : int
        Of the places.

    Returns
    -------
    dict
        ``u``, float32 of shape (sources, steps, n, n); ``dt``; ``c``; ``mesh``, a :class:`Mesh`; ``positions``, ``y``
        and ``x`` of the sources, float32 of shape (sources, 2).

    Raises
    ------
    ValueError
        Where an argument is no such size, or leapfrog would be unstable.
    MissingExtraError
        Where the finite-element solver is not installed.

    Examples
    --------
    >>> found = wave2d(n=16, steps=5, sources=3, solver="leapfrog")
    >>> tuple(found["u"].shape), tuple(found["positions"].shape)
    ((3, 5, 16, 16), (3, 2))
    """
    for name, value in (("steps", steps), ("sources", sources), ("substeps", substeps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {described(value)}; an int of at least 1 is needed")
    for name, size in (("courant", courant), ("width", width), ("frequency", frequency), ("c", c)):
        if not (isinstance(size, int | float) and 0 < size < math.inf):
            raise ValueError(f"{name} is {described(size)}; a finite number above 0 is needed")
    if solver not in ("fem", "leapfrog"):
        raise ValueError(f"solver is {described(solver)}; it is 'fem' or 'leapfrog'")
    if source not in ("pulse", "ricker"):
        raise ValueError(f"source is {described(source)}; it is 'pulse' or 'ricker'")
    mesh = Mesh(n)
    positions = np.random.default_rng(seed).uniform(0.15, 0.85, (sources, 2))
    y, x = mesh.points
    squared = (y - positions[:, :1, None]) ** 2 + (x - positions[:, 1:, None]) ** 2
    bump = np.exp(-squared / (2 * width**2))
    dt = courant * mesh.h / (c * substeps)

    def ricker(time: float) -> Array:
        # From rest: the peak comes one and a half periods later.
        angle = (math.pi * frequency * (time - 1.5 / frequency)) ** 2
        return (1 - 2 * angle) * math.exp(-angle) * bump

    solve = newmark if solver == "fem" else leapfrog
    u0, force = (bump, None) if source == "pulse" else (np.zeros_like(bump), ricker)
    found = solve(mesh, u0, dt=dt, steps=(steps - 1) * substeps, c=c, force=force, every=substeps)
    return {
        "u": torch.from_numpy(found.u.astype(np.float32)),
        "dt": found.dt,
        "c": c,
        "mesh": mesh,
        "positions": torch.from_numpy(positions.astype(np.float32)),
    }


class _Keeper:
    """States of a run, every so many steps."""

    def __init__(self, mesh: Mesh, u: Array, v: Array | None, steps: int, every: int) -> None:
        self.every = every
        shape = (u.shape[1], steps // every + 1, mesh.n, mesh.n)
        self.u = np.empty(shape)
        self.v = None if v is None else np.empty(shape)
        self(0, u, v)

    def __call__(self, step: int, u: Array, v: Array | None) -> None:
        if step % self.every == 0:
            at = step // self.every
            self.u[:, at] = u.T.reshape(self.u[:, at].shape)
            if self.v is not None and v is not None:
                self.v[:, at] = v.T.reshape(self.v[:, at].shape)


def _start(mesh: Mesh, u0: Array, v0: Array | None) -> tuple[Array, Array]:
    """Both at the start as columns, one a sample."""
    u0 = np.asarray(u0, dtype=np.float64)
    samples = len(u0) if u0.ndim == 3 else 1
    u = _columns(mesh, u0, samples)
    return u, np.zeros_like(u) if v0 is None else _columns(mesh, v0, samples)


def _columns(mesh: Mesh, field: Array, samples: int) -> Array:
    given = np.asarray(field, dtype=np.float64)
    shape = (mesh.n, mesh.n)
    if given.shape not in (shape, (samples, *shape)):
        raise ValueError(
            f"a field of shape {given.shape} does not fit; ({samples}, {mesh.n}, {mesh.n}) or {shape} is needed"
        )
    return np.ascontiguousarray(np.broadcast_to(given, (samples, *shape)).reshape(samples, -1).T)


def _check(dt: float, steps: int, c: float, every: int) -> None:
    if not (0 < dt < math.inf and 0 < c < math.inf):
        raise ValueError(f"dt is {dt} and c is {c}; finite numbers above 0 are needed")
    if steps < 0 or every < 1:
        raise ValueError(f"steps is {steps} and every is {every}; at least 0 and 1 are needed")
