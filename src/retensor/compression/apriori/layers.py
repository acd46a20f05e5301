"""Convolutions that hold the factors of their kernel and never the kernel, in the places of torch's ``Conv`` layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from retensor.compression.apriori.factored import Factored, Implementation, Init


class _Plain(Factored):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        rank: int | Sequence[int],
        format: str = "cp",
        init: Init = "match",
        implementation: Implementation = "factorized",
        recompute: bool = False,
        channels_last: bool = True,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, 0, dilation, groups, bias, padding_mode,
            rank=rank, format=format, init=init, implementation=implementation, recompute=recompute,
            channels_last=channels_last, generator=generator, device=device, dtype=dtype,
        )  # fmt: skip


class _Transposed(Factored):
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        *,
        rank: int | Sequence[int],
        format: str = "cp",
        init: Init = "match",
        implementation: Implementation = "factorized",
        recompute: bool = False,
        channels_last: bool = True,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation, groups, bias,
            padding_mode, rank=rank, format=format, init=init, implementation=implementation, recompute=recompute,
            channels_last=channels_last, generator=generator, device=device, dtype=dtype,
        )  # fmt: skip

    def forward(self, x: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        """The transposed convolution of ``x``, of shape (batch, in_channels, ...) or (in_channels, ...)."""
        return self._run(x, output_size)


class FactoredConv1d(_Plain):
    """:class:`FactoredConv2d` for one axis; formats ``cp``, ``tucker`` and ``tt``."""

    dims = 1


class FactoredConv2d(_Plain):
    """A convolution whose kernel exists as factors only, in any of the formats.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As of :class:`torch.nn.Conv2d`.
    rank : int or sequence of int
        One number, or one for each bond of the format: (outputs, inputs, axes...) for ``tucker``, one between
        neighbours of the train for ``tt`` and ``vh``. An int is clipped where more can bring nothing, and means
        half the kernel's size, rounded up, on the axes of ``tucker``. With groups, of each group.
    format : {"cp", "separable", "vh", "tucker", "tt"}
    init : {"match", "xavier", "decompose", "default"}
        See :func:`initialise_`.
    implementation : {"factorized", "fused", "reconstructed"}
        ``factorized`` runs the chain of one-way filters. ``fused`` runs the filters of all axes of a component as one
        depthwise convolution: more multiply-accumulates, one pass over memory less; ``cp`` only. ``reconstructed``
        builds the kernel in each run and applies it as a dense one.
    recompute : bool
        Keep the input alone for the backward pass and run the chain again there, an eighth of the batch at a time:
        less memory than a dense layer from batch 4 on, and more time. Under autocast both runs have its precision;
        gradients of gradients are refused. Within ``torch.func`` it changes nothing.
    channels_last : bool
        Run the chain in that memory format, where it is several times faster; an input in plain format gives an output
        in plain format, and one in ``channels_last`` spares both conversions.
    generator : torch.Generator, optional
        What the factors are drawn from; torch's own by default.
    device, dtype
        Of the factors.

    Raises
    ------
    TypeError, ValueError
        Where an argument is no size, a rank is below 1, ``groups`` does not divide the channels, or
        ``padding="same"`` meets a stride above 1.

    Warns
    -----
    UserWarning
        Where the factors have more parameters than the dense kernel.

    Examples
    --------
    >>> conv = FactoredConv2d(32, 64, 5, padding=2, rank=24, format="vh")
    >>> conv(torch.zeros(1, 32, 9, 9)).shape, sum(p.numel() for p in conv.factors.values())
    (torch.Size([1, 64, 9, 9]), 11520)
    """

    dims = 2


class FactoredConv3d(_Plain):
    """:class:`FactoredConv2d` for three axes: fields in space, or in a plane and time."""

    dims = 3


class FactoredConvTranspose1d(_Transposed):
    """:class:`FactoredConvTranspose2d` for one axis."""

    dims = 1


class FactoredConvTranspose2d(_Transposed):
    """A transposed convolution whose kernel exists as factors only: transposed one-way filters.

    Arguments are those of :class:`torch.nn.ConvTranspose2d`, and those that :class:`FactoredConv2d` adds.

    Examples
    --------
    >>> up = FactoredConvTranspose2d(8, 4, 4, stride=2, padding=1, rank=3)
    >>> up(torch.zeros(1, 8, 5, 5)).shape
    torch.Size([1, 4, 10, 10])
    """

    dims = 2


class FactoredConvTranspose3d(_Transposed):
    """:class:`FactoredConvTranspose2d` for three axes."""

    dims = 3


class CPConv1d(FactoredConv1d):
    """:class:`CPConv2d` for one axis."""

    only_cp = True


class CPConv2d(FactoredConv2d):
    """A convolution in the canonical format: ``K[o,c,y,x] = sum_r A_o[o,r] A_c[c,r] u[r,y] w[r,x]``.

    Four convolutions in a row, of which none has more than one axis: ``in_channels`` to ``rank`` channels, ``u`` down,
    ``w`` along, and ``rank`` to ``out_channels`` with the bias. Arguments are those of :class:`FactoredConv2d` but
    ``format``.

    Examples
    --------
    >>> conv = CPConv2d(32, 64, 5, rank=24, stride=2, padding=2)
    >>> conv(torch.zeros(1, 32, 16, 16)).shape
    torch.Size([1, 64, 8, 8])
    >>> sum(p.numel() for p in conv.factors.values()) == 24 * (32 + 64 + 2 * 5)
    True
    >>> conv.to_dense()
    Conv2d(32, 64, kernel_size=(5, 5), stride=(2, 2), padding=(2, 2))
    """

    only_cp = True


class CPConv3d(FactoredConv3d):
    """:class:`CPConv2d` for three axes: ``R (C_in + C_out + 3 k)`` parameters for ``k^3 C_in C_out``."""

    only_cp = True


class CPConvTranspose1d(FactoredConvTranspose1d):
    """:class:`CPConvTranspose2d` for one axis."""

    only_cp = True


class CPConvTranspose2d(FactoredConvTranspose2d):
    """A transposed convolution in the canonical format, with transposed one-way filters.

    Arguments are those of :class:`FactoredConvTranspose2d` but ``format``.

    Examples
    --------
    >>> CPConvTranspose2d(8, 4, 2, stride=2, rank=3)(torch.zeros(1, 8, 5, 5)).shape
    torch.Size([1, 4, 10, 10])
    """

    only_cp = True


class CPConvTranspose3d(FactoredConvTranspose3d):
    """:class:`CPConvTranspose2d` for three axes."""

    only_cp = True
