"""Five formats of a convolution kernel, and the chain of cheap convolutions that each stands for.

A format says which factors there are, which dense kernel they make, and with which convolutions along one axis at a
time that kernel is applied without being built. With ``K[o, c, x_1 .. x_d]`` for the kernel:

========== ==================================================== ==============================================
format     kernel                                               parameters, at equal ranks and one group
========== ==================================================== ==============================================
cp         ``sum_r A_o[o,r] A_c[c,r] u_1[r,x_1] .. u_d[r,x_d]`` ``R (C_out + C_in + d k)``
separable  ``sum_r u_1[o,c,r,x_1] .. u_d[o,c,r,x_d]``           ``d k R C_in C_out``
vh         ``sum_r V[r,c,x_1] .. H[o,r,x_d]``                   ``k R (C_in + C_out) + (d - 2) k R^2``
tt         ``vh`` between two matrices on the channels          ``R (C_in + C_out) + d k R^2``
tucker     ``core`` times a matrix on every axis                ``R (C_in + C_out) + R^2 s^d + d k s``
========== ==================================================== ==============================================

With groups each group has factors of its own, and a rank is that of one group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from retensor.files import described

Factors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """The shape of a convolution's kernel.

    Attributes
    ----------
    inputs, outputs : int
        Channels.
    kernel : tuple of int
    groups : int
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    groups: int = 1

    @property
    def dims(self) -> int:
        """Axes of the kernel."""
        return len(self.kernel)

    @property
    def group_inputs(self) -> int:
        """Input channels of a group."""
        return self.inputs // self.groups

    @property
    def group_outputs(self) -> int:
        """Output channels of a group."""
        return self.outputs // self.groups

    @property
    def fan_in(self) -> int:
        """Products that make one output."""
        return self.group_inputs * math.prod(self.kernel)

    @property
    def fan_out(self) -> int:
        """Outputs that one input reaches at stride 1."""
        return self.group_outputs * math.prod(self.kernel)

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense kernel."""
        return self.outputs * self.fan_in


@dataclass(frozen=True)
class Stage:
    """One convolution of a chain.

    Attributes
    ----------
    weight : torch.Tensor
        Of shape (outputs, inputs / groups, *sizes), where sizes are 1 except along ``axes``.
    groups : int
    axes : tuple of int
        Axes that it filters along; none for one that only mixes channels.
    order : (tuple of int, tuple of int), optional
        How channels are seen and permuted before it.
    """

    weight: torch.Tensor
    groups: int
    axes: tuple[int, ...] = ()
    order: tuple[tuple[int, ...], tuple[int, ...]] | None = None


class Format(ABC):
    """A way to write a kernel as factors. Factors are named, and their first axis is the group."""

    name: str
    least_dims = 1
    component_axes: ClassVar[Mapping[str, int] | None] = None
    """Where the factors are columns of a sum of products: the axis of the component, by name without its number."""

    @abstractmethod
    def ranks(self, shape: Shape, rank: Any) -> tuple[int, ...]:
        """The ranks that ``rank`` means: one int for all, or one for each bond.

        Raises
        ------
        TypeError, ValueError
            Where it is no rank, or there are more or fewer than the format has.
        """

    @abstractmethod
    def factors(self, shape: Shape, ranks: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors by name."""

    @abstractmethod
    def kernel(self, shape: Shape, factors: Factors) -> torch.Tensor:
        """The dense kernel, of shape (outputs, inputs / groups, *kernel)."""

    @abstractmethod
    def stages(self, shape: Shape, factors: Factors) -> list[Stage]:
        """The chain of convolutions that applies the kernel without building it."""

    @abstractmethod
    def variances(self, shape: Shape, ranks: tuple[int, ...]) -> dict[str, float]:
        """Variances of independent factors that keep a signal's variance through every stage.

        Their product, summed over the ranks, is ``1 / fan_in``.
        """

    def fused(self, shape: Shape, factors: Factors) -> list[Stage]:
        """The chain with one filter of all axes in the place of one an axis, where the format has it."""
        raise NotImplementedError(self.name)

    def parameters(self, shape: Shape, ranks: tuple[int, ...]) -> int:
        """Parameters of all factors."""
        return sum(math.prod(sizes) for sizes in self.factors(shape, ranks).values())

    def unit(self, shape: Shape, rank: int) -> Any:
        """What an int means as an argument, kept as it is; formats with several ranks clip what can bring nothing."""
        return rank


def axis_names(shape: Shape) -> list[str]:
    """Names of the one-way filters, in the order of the axes."""
    return [f"axis{i}" for i in range(shape.dims)]


def swapped(kernel: torch.Tensor, groups: int) -> torch.Tensor:
    """A kernel as the weight of a transposed convolution, or that weight as a kernel."""
    return kernel.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def along(axis: int, dims: int, length: int) -> tuple[int, ...]:
    """Sizes of a filter of that length along one axis."""
    return tuple(length if i == axis else 1 for i in range(dims))


class _CP(Format):
    """The canonical format: a sum of ``R`` products of one vector an axis."""

    name = "cp"
    component_axes: ClassVar[Mapping[str, int] | None] = {"inputs": 1, "axis": 1, "outputs": 2}

    def ranks(self, shape: Shape, rank: Any) -> tuple[int, ...]:
        return _ranks(self.name, rank, 1)

    def factors(self, shape: Shape, ranks: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        g, (r,) = shape.groups, ranks
        return {
            "inputs": (g, r, shape.group_inputs),
            **{name: (g, r, k) for name, k in zip(axis_names(shape), shape.kernel, strict=True)},
            "outputs": (g, shape.group_outputs, r),
        }

    def kernel(self, shape: Shape, factors: Factors) -> torch.Tensor:
        axes = "xyz"[: shape.dims]
        filters = ",".join(f"gr{axis}" for axis in axes)
        # The sum over components comes last: every pair of channels for each of them would not fit.
        inner = torch.einsum(
            f"gri,{filters}->gri{axes}", factors["inputs"], *(factors[name] for name in axis_names(shape))
        )
        kernel = factors["outputs"] @ inner.flatten(2)
        return kernel.flatten(0, 1).unflatten(1, (-1, *shape.kernel))

    def stages(self, shape: Shape, factors: Factors) -> list[Stage]:
        g, r = factors["inputs"].shape[:2]
        stages = [_pointwise(factors["inputs"], shape)]
        for i, name in enumerate(axis_names(shape)):
            stages.append(Stage(factors[name].reshape(g * r, 1, *along(i, shape.dims, shape.kernel[i])), g * r, (i,)))
        return [*stages, _pointwise(factors["outputs"], shape)]

    def fused(self, shape: Shape, factors: Factors) -> list[Stage]:
        """The chain with one filter of all axes a component, ``u_1[r] x .. x u_d[r]``, in the place of ``d``."""
        g, r = factors["inputs"].shape[:2]
        axes = "xyz"[: shape.dims]
        filters = torch.einsum(
            ",".join(f"gr{axis}" for axis in axes) + f"->gr{axes}", *(factors[name] for name in axis_names(shape))
        )
        return [
            _pointwise(factors["inputs"], shape),
            Stage(filters.reshape(g * r, 1, *shape.kernel), g * r, tuple(range(shape.dims))),
            _pointwise(factors["outputs"], shape),
        ]

    def variances(self, shape: Shape, ranks: tuple[int, ...]) -> dict[str, float]:
        filters = {name: 1 / k for name, k in zip(axis_names(shape), shape.kernel, strict=True)}
        return {"inputs": 1 / shape.group_inputs, **filters, "outputs": 1 / ranks[0]}


class _Separable(Format):
    """Every filter of one input and one output is a sum of ``R`` products of one-way filters."""

    name = "separable"
    least_dims = 2
    component_axes: ClassVar[Mapping[str, int] | None] = {"axis": 3}

    def ranks(self, shape: Shape, rank: Any) -> tuple[int, ...]:
        return _ranks(self.name, rank, 1)

    def factors(self, shape: Shape, ranks: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        whole = (shape.groups, shape.group_outputs, shape.group_inputs, ranks[0])
        return {name: (*whole, k) for name, k in zip(axis_names(shape), shape.kernel, strict=True)}

    def kernel(self, shape: Shape, factors: Factors) -> torch.Tensor:
        axes = "xyz"[: shape.dims]
        filters = ",".join(f"goir{axis}" for axis in axes)
        return torch.einsum(f"{filters}->goi{axes}", *(factors[name] for name in axis_names(shape))).flatten(0, 1)

    def stages(self, shape: Shape, factors: Factors) -> list[Stage]:
        g, o, i, r = factors["axis0"].shape[:4]
        # Every input goes to all outputs of its group; then each output gathers what is its own.
        first = factors["axis0"].permute(0, 2, 1, 3, 4).reshape(-1, 1, *along(0, shape.dims, shape.kernel[0]))
        stages = [Stage(first, shape.inputs, (0,))]
        order: tuple[tuple[int, ...], tuple[int, ...]] | None = ((g, i, o, r), (0, 2, 1, 3))
        for axis in range(1, shape.dims - 1):
            weight = factors[f"axis{axis}"].reshape(-1, 1, *along(axis, shape.dims, shape.kernel[axis]))
            stages.append(Stage(weight, len(weight), (axis,), order))
            order = None
        axis = shape.dims - 1
        last = factors[f"axis{axis}"].reshape(g * o, i * r, *along(axis, shape.dims, shape.kernel[axis]))
        return [*stages, Stage(last, shape.outputs, (axis,), order)]

    def variances(self, shape: Shape, ranks: tuple[int, ...]) -> dict[str, float]:
        *first, last = axis_names(shape)
        found = {name: 1 / shape.kernel[i] for i, name in enumerate(first)}
        return found | {last: 1 / (shape.group_inputs * ranks[0] * shape.kernel[-1])}


class _VH(Format):
    """One full convolution an axis: down the first axis into ``R`` channels, along the last out of them."""

    name = "vh"
    least_dims = 2

    def ranks(self, shape: Shape, rank: Any) -> tuple[int, ...]:
        return _ranks(self.name, rank, shape.dims - 1)

    def factors(self, shape: Shape, ranks: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        bonds = (shape.group_inputs, *ranks, shape.group_outputs)
        return {
            name: (shape.groups, bonds[i + 1], bonds[i], shape.kernel[i]) for i, name in enumerate(axis_names(shape))
        }

    def kernel(self, shape: Shape, factors: Factors) -> torch.Tensor:
        return _train(shape, factors, [])

    def stages(self, shape: Shape, factors: Factors) -> list[Stage]:
        return _full_filters(shape, factors)

    def variances(self, shape: Shape, ranks: tuple[int, ...]) -> dict[str, float]:
        bonds = (shape.group_inputs, *ranks)
        return {name: 1 / (bonds[i] * shape.kernel[i]) for i, name in enumerate(axis_names(shape))}

    def unit(self, shape: Shape, rank: int) -> Any:
        first, *middle, last = shape.kernel
        return _clipped(shape.group_inputs * first, middle, shape.group_outputs * last, rank)


class _TT(Format):
    """A tensor train in the order inputs, axes, outputs."""

    name = "tt"

    def ranks(self, shape: Shape, rank: Any) -> tuple[int, ...]:
        return _ranks(self.name, rank, shape.dims + 1)

    def factors(self, shape: Shape, ranks: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        g = shape.groups
        return {
            "inputs": (g, ranks[0], shape.group_inputs),
            **{name: (g, ranks[i + 1], ranks[i], shape.kernel[i]) for i, name in enumerate(axis_names(shape))},
            "outputs": (g, shape.group_outputs, ranks[-1]),
        }

    def kernel(self, shape: Shape, factors: Factors) -> torch.Tensor:
        return _train(shape, factors, ["inputs", "outputs"])

    def stages(self, shape: Shape, factors: Factors) -> list[Stage]:
        inputs, outputs = (_pointwise(factors[name], shape) for name in ("inputs", "outputs"))
        return [inputs, *_full_filters(shape, factors), outputs]

    def variances(self, shape: Shape, ranks: tuple[int, ...]) -> dict[str, float]:
        filters = {name: 1 / (ranks[i] * shape.kernel[i]) for i, name in enumerate(axis_names(shape))}
        return {"inputs": 1 / shape.group_inputs, **filters, "outputs": 1 / ranks[-1]}

    def unit(self, shape: Shape, rank: int) -> Any:
        return _clipped(shape.group_inputs, shape.kernel, shape.group_outputs, rank)


class _Tucker(Format):
    """A core with a matrix on every axis; ranks are those of outputs, inputs and the axes.

    The filters of an axis are one-way and serve all channels.
    """

    name = "tucker"

    def ranks(self, shape: Shape, rank: Any) -> tuple[int, ...]:
        return _ranks(self.name, rank, shape.dims + 2)

    def factors(self, shape: Shape, ranks: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        g = shape.groups
        return {
            "inputs": (g, ranks[1], shape.group_inputs),
            **{name: (g, ranks[i + 2], shape.kernel[i]) for i, name in enumerate(axis_names(shape))},
            "core": (g, *ranks),
            "outputs": (g, shape.group_outputs, ranks[0]),
        }

    def kernel(self, shape: Shape, factors: Factors) -> torch.Tensor:
        axes, bonds = "xyz"[: shape.dims], "uvw"[: shape.dims]
        filters = ",".join(f"g{bond}{axis}" for bond, axis in zip(bonds, axes, strict=True))
        # In the order of sizes: the core with its axes, then inputs, then outputs.
        kernel = torch.einsum(
            f"gpq{bonds},{filters},gqi,gop->goi{axes}",
            factors["core"],
            *(factors[name] for name in axis_names(shape)),
            factors["inputs"],
            factors["outputs"],
        )
        return kernel.flatten(0, 1)

    def stages(self, shape: Shape, factors: Factors) -> list[Stage]:
        stages = [_pointwise(factors["inputs"], shape)]
        g, channels = factors["inputs"].shape[:2]
        for i, name in enumerate(axis_names(shape)):
            filters = factors[name]
            # Every channel of a group meets all filters of the axis.
            weight = filters.unsqueeze(1).expand(g, channels, *filters.shape[1:])
            weight = weight.reshape(-1, 1, *along(i, shape.dims, shape.kernel[i]))
            stages.append(Stage(weight, g * channels, (i,)))
            channels *= filters.shape[1]
        core = factors["core"].flatten(2)
        return [*stages, _pointwise(core, shape), _pointwise(factors["outputs"], shape)]

    def variances(self, shape: Shape, ranks: tuple[int, ...]) -> dict[str, float]:
        filters = {name: 1 / shape.kernel[i] for i, name in enumerate(axis_names(shape))}
        return {
            "inputs": 1 / shape.group_inputs,
            **filters,
            "core": 1 / math.prod(ranks[1:]),
            "outputs": 1 / ranks[0],
        }

    def unit(self, shape: Shape, rank: int) -> Any:
        spatial = ((k + 1) // 2 for k in shape.kernel)
        return (min(rank, shape.group_outputs), min(rank, shape.group_inputs), *spatial)


FORMATS: dict[str, Format] = {form.name: form for form in (_CP(), _Separable(), _VH(), _Tucker(), _TT())}
"""Formats by name."""


def format_named(name: Any, dims: int) -> Format:
    """The format of that name.

    Raises
    ------
    ValueError
        Where there is none, or it needs more axes.
    """
    if name not in FORMATS:
        raise ValueError(f"format is {described(name)}; it is one of {', '.join(map(repr, FORMATS))}")
    form = FORMATS[name]
    if dims < form.least_dims:
        raise ValueError(
            f"format '{name}' takes the axes of a kernel apart, and a 1-D one has a single axis; take 'cp', 'tucker' "
            "or 'tt'"
        )
    return form


def resolved(form: Format, shape: Shape, rank: Any) -> tuple[int, ...]:
    """The ranks of a format that an int or a tuple means."""
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        rank = form.unit(shape, rank)
    return form.ranks(shape, rank)


def _ranks(name: str, rank: Any, count: int) -> tuple[int, ...]:
    given: Sequence[Any] = [rank] * count if isinstance(rank, int) else rank
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError(f"rank is {described(rank)}; an int is needed, or {count} of them for format '{name}'")
    if any(isinstance(r, bool) or not isinstance(r, int) for r in given):
        raise TypeError(f"rank is {described(rank)}; ranks are ints of at least 1")
    if any(r < 1 for r in given):
        raise ValueError(f"rank is {described(rank)}; ranks are at least 1")
    if len(given) != count:
        raise ValueError(
            f"rank has {len(given)} numbers; format '{name}' has {count} here: give that many, or one int for all"
        )
    return tuple(given)


def _pointwise(factor: torch.Tensor, shape: Shape) -> Stage:
    """A stage that mixes the channels of each group, by a factor of shape (groups, outputs, inputs)."""
    weight = factor.flatten(0, 1)
    return Stage(weight.reshape(*weight.shape, *(1,) * shape.dims), shape.groups)


def _full_filters(shape: Shape, factors: Factors) -> list[Stage]:
    """Stages along one axis each that mix channels as they filter."""
    stages = []
    for i, name in enumerate(axis_names(shape)):
        weight = factors[name].flatten(0, 1)
        sizes = along(i, shape.dims, shape.kernel[i])
        stages.append(Stage(weight.reshape(*weight.shape[:2], *sizes), shape.groups, (i,)))
    return stages


def _train(shape: Shape, factors: Factors, ends: Sequence[str]) -> torch.Tensor:
    """The kernel of a train of one-way filters, with or without matrices at its ends."""
    axes, bonds = "xyz"[: shape.dims], "abcd"[: shape.dims + 1]
    terms = [f"g{bonds[i + 1]}{bonds[i]}{axes[i]}" for i in range(shape.dims)]
    tensors = [factors[name] for name in axis_names(shape)]
    first, last = bonds[0], bonds[-1]
    if ends:
        terms += [f"g{first}i", f"go{last}"]
        tensors += [factors[name] for name in ends]
        first, last = "i", "o"
    return torch.einsum(f"{','.join(terms)}->g{last}{first}{axes}", *tensors).flatten(0, 1)


def _clipped(left: int, middle: Sequence[int], right: int, rank: int) -> tuple[int, ...]:
    """Ranks of a train's bonds, none above what the modes on either side of it can use."""
    bonds = [min(left, rank)]
    for k in middle:
        bonds.append(min(bonds[-1] * k, rank))
    limit = right
    for i in range(len(middle), -1, -1):
        bonds[i] = min(bonds[i], limit)
        limit *= middle[i - 1] if i else 1
    return tuple(bonds)
