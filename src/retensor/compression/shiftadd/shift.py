r"""Linear layers whose weights are powers of two (DeepShift): trained as floats, kept as packed codes.

M. Elhoushi, Z. Chen, F. Shafiq, Y. Tian, J. Li, "DeepShift: Towards Multiplication-Less Neural Networks", 2019,
arXiv 1905.13298. With ``b`` bits a weight is

.. math::
    w = \mathrm{sign}(\lfloor s \rceil)\; 2^{P}, \qquad P = \lfloor p \rceil \in [-(2^{b-1} - 2),\, 0],

and the gradients to what is learned are :math:`\partial L/\partial p = G\, w \ln 2` and
:math:`\partial L/\partial s = G`, where G is the gradient to w: rounding and clamping let it through, and that to the
sign leaves the factor :math:`2^P` out on purpose (DeepShift-PS). In DeepShift-Q the float weight itself is learned and
rounded to the nearest power, with its gradient as it comes. Inputs and biases are fixed-point numbers, rounded down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn import functional

from retensor.errors import RetensorError
from retensor.files import described
from retensor.replacing import Replacement
from retensor.units import check_flags

Variant = Literal["ps", "q"]
BITS = range(2, 7)
"""A weight of six bits shifts by up to 30 places; a number of 32 bits has no more."""
FRAC_BITS = range(1, 31)


def fixed_point(x: torch.Tensor, frac_bits: int = 16) -> torch.Tensor:
    """Numbers rounded down to multiples of ``2**-frac_bits`` and saturated as 32 bits do, with gradients as they come.

    Parameters
    ----------
    x : torch.Tensor
        Floating point; it stays as it is.
    frac_bits : int
        Of the 32 bits those behind the point.

    Returns
    -------
    torch.Tensor
        Within ``[-2**(31 - frac_bits), 2**(31 - frac_bits) - 1]``.

    Examples
    --------
    >>> fixed_point(torch.tensor([0.3, -0.3, 1e10]), 2)
    tensor([ 2.5000e-01, -5.0000e-01,  5.3687e+08])
    """
    out: torch.Tensor = _FixedPoint.apply(x, frac_bits)
    return out


def shift_weight(shift: torch.Tensor, sign: torch.Tensor, bits: int = 5) -> torch.Tensor:
    """The weights of a shift and a sign that are learned (DeepShift-PS), with the gradients that its authors give them.

    Parameters
    ----------
    shift, sign : torch.Tensor
        Floating point, of one shape.
    bits : int

    Returns
    -------
    torch.Tensor
        ``sign(round(sign)) * 2**P`` with P rounded and held within ``[-(2**(bits - 1) - 2), 0]``.

    Examples
    --------
    >>> shift_weight(torch.tensor([-1.2, -3.0, -40.0]), torch.tensor([0.7, -1.0, 0.2]))
    tensor([ 0.5000, -0.1250,  0.0000])
    """
    out: torch.Tensor = _ShiftWeight.apply(shift, sign, lowest(bits))
    return out


def lowest(bits: int) -> int:
    """The least P of weights of so many bits.

    >>> lowest(5)
    -14
    """
    return -(2 ** (bits - 1) - 2)


class ShiftLinear(Replacement):
    """A linear layer of power-of-two weights in training; :func:`freeze` makes it one of packed codes.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    weight_bits : int
        2 to 6; 5 in the paper.
    act_frac_bits : int
        Bits behind the point of inputs and biases, of 32.
    variant : {"ps", "q"}
        Learn shifts and signs (``shift`` and ``sign``), or the weight that is rounded (``weight``).
    exponent : int
        All weights are ``2**exponent`` times as large. The paper has 0, so that a weight of more than 1.41 becomes 1.
    strict : bool
        Refuse inputs beyond the fixed-point range, which saturate and are counted in ``saturated`` otherwise.

    Raises
    ------
    ValueError, TypeError
        Where a setting is out of range, named.

    Examples
    --------
    >>> layer = ShiftLinear.from_linear(nn.Linear(8, 4))
    >>> bool(torch.isin(layer.effective_weight().abs().log2(), -torch.arange(15.0)).all())
    True
    """

    saturated: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_bits: int = 5,
        act_frac_bits: int = 16,
        variant: Variant = "ps",
        exponent: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__()
        check_flags(bias=bias, strict=strict)
        check_bits(weight_bits, act_frac_bits)
        if variant not in ("ps", "q"):
            raise ValueError(f"variant is {described(variant)}; it is 'ps' (shift and sign are learned) or 'q'")
        if isinstance(exponent, bool) or not isinstance(exponent, int) or not -60 <= exponent <= 60:
            raise ValueError(f"exponent is a whole number from -60 to 60, not {described(exponent)}")
        self.in_features, self.out_features = in_features, out_features
        self.weight_bits, self.act_frac_bits = weight_bits, act_frac_bits
        self.variant, self.exponent, self.strict = variant, exponent, strict
        start = nn.Linear(in_features, out_features, bias)
        self.bias = start.bias
        self._take(start.weight.detach())
        self.register_buffer("saturated", torch.zeros((), dtype=torch.int64), persistent=False)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        *,
        weight_bits: int = 5,
        act_frac_bits: int = 16,
        variant: Variant = "ps",
        scale: bool = False,
        strict: bool = False,
    ) -> Self:
        """A layer that begins at the weights of another, rounded: ``P = log2 |w|``, and its bias.

        Parameters
        ----------
        layer : nn.Linear
            Left as it is.
        scale : bool
            Give the layer the exponent of its largest weight, so that none saturates and fewer bits suffice.

        Raises
        ------
        TypeError
            Where it is no ``nn.Linear``.
        ValueError
            As the class, or where a weight is not finite.
        """
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"a shift layer begins at an nn.Linear, not at {described(layer)}")
        check_flags(scale=scale)
        weight = layer.weight.detach()
        exponent = 0
        if not weight.is_meta:
            if not bool(torch.isfinite(weight).all()):
                raise ValueError("a weight of the layer is not finite, which no power of two stands for")
            if scale and bool((weight != 0).any()):
                exponent = round(math.log2(float(weight.abs().max())))
        made = cls._empty(
            layer.in_features, layer.out_features, layer.bias is not None, weight_bits=weight_bits,
            act_frac_bits=act_frac_bits, variant=variant, exponent=exponent, strict=strict,
        )  # fmt: skip
        if weight.is_meta:
            return made
        made.to_empty(device=weight.device).to(weight.dtype)
        made._take(weight)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().clone())
        made.saturated = torch.zeros((), dtype=torch.int64, device=weight.device)
        for parameter in made.parameters():
            parameter.requires_grad_(layer.weight.requires_grad)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of shape (..., outputs).

        Raises
        ------
        RetensorError
            Where an input lies beyond the fixed-point range, and the layer is strict.
        """
        if not torch.compiler.is_compiling():
            self.saturated += saturating(x, self.act_frac_bits, self.strict)
        bias = None if self.bias is None else fixed_point(self.bias, self.act_frac_bits)
        return functional.linear(fixed_point(x, self.act_frac_bits), self.effective_weight(), bias)

    def effective_weight(self) -> torch.Tensor:
        """The weights that are multiplied with, of shape (outputs, inputs); gradients flow to what is learned."""
        if self.variant == "q":
            weight: torch.Tensor = _Rounded.apply(self.weight, lowest(self.weight_bits), self.exponent)
            return weight
        return shift_weight(self.shift, self.sign, self.weight_bits) * 2.0**self.exponent

    def config(self) -> dict[str, Any]:
        """Arguments of the class."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "weight_bits": self.weight_bits,
            "act_frac_bits": self.act_frac_bits,
            "variant": self.variant,
            "exponent": self.exponent,
            "strict": self.strict,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A layer whose values are not numbers until some are loaded."""
        return unset(cls._empty(**config))

    def loaded(self, model: nn.Module) -> None:
        """Give the model its report back."""
        from retensor.compression.shiftadd.moe import attach_report

        self.saturated.zero_()
        attach_report(model)

    def to_dense(self) -> nn.Linear:
        """A plain layer of the same weights; its inputs are not rounded."""
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        plain.weight = nn.Parameter(self.effective_weight().detach())
        if self.bias is not None:
            plain.bias = nn.Parameter(fixed_point(self.bias.detach(), self.act_frac_bits))
        return plain

    def extra_repr(self) -> str:
        """Sizes and bits."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight_bits={self.weight_bits}"
        )

    def _take(self, weight: torch.Tensor) -> None:
        """Begin at a weight."""
        if self.variant == "q":
            self.weight = nn.Parameter(weight.clone())
            return
        # The logarithm of nothing is no number; a sign of 0 says what is meant.
        shift = torch.log2(weight.abs()).sub(self.exponent).clamp(min=lowest(self.weight_bits))
        self.shift, self.sign = nn.Parameter(shift), nn.Parameter(torch.sign(weight))

    @classmethod
    def _empty(cls, *arguments: Any, **settings: Any) -> Self:
        """On the meta device: nothing is drawn that would be overwritten."""
        with torch.device("meta"):
            return cls(*arguments, **settings)


def check_bits(weight_bits: object, act_frac_bits: object = 16) -> None:
    """Refuse bits that no shift layer has."""
    for name, value, allowed in (
        ("weight_bits", weight_bits, BITS),
        ("act_frac_bits", act_frac_bits, FRAC_BITS),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
            raise ValueError(
                f"{name} is {described(value)}; it is a whole number from {allowed[0]} to {allowed[-1]}"
                + (", of which one bit is the sign's" if name == "weight_bits" else "")
            )


def saturating(x: torch.Tensor, frac_bits: int, strict: bool) -> torch.Tensor:
    """How many numbers lie beyond the fixed-point range; refused where strict."""
    limit = 2.0 ** (31 - frac_bits)
    x = x.detach()
    if not x.numel() or x.is_meta:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    # One pass over the numbers where all of them fit, which is nearly always.
    low, high = x.aminmax()
    if low >= -limit and high <= limit - 1:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    beyond = ((x < -limit) | (x > limit - 1)).sum()
    if strict and bool(beyond):
        raise RetensorError(
            f"{int(beyond)} inputs of a shift layer lie beyond the fixed-point range of {-limit:g} to {limit - 1:g}; "
            "take fewer act_frac_bits, or strict=False to let them saturate"
        )
    return beyond


def unset(module: Any) -> Any:
    """A module of the meta device with memory, where the default device has some, and with values that are no numbers.

    A file is compared with a model on the meta device before anything is allocated.
    """
    device = torch.get_default_device()
    module.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            else:
                tensor.zero_()
    return module


class _FixedPoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, frac_bits: int) -> torch.Tensor:
        unit, limit = 2.0**frac_bits, 2.0 ** (31 - frac_bits)
        return torch.floor(x * unit).div_(unit).clamp_(-limit, limit - 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _ShiftWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shift: torch.Tensor, sign: torch.Tensor, low: int) -> torch.Tensor:
        weight = torch.exp2(torch.round(shift).clamp_(low, 0)).mul_(torch.sign(torch.round(sign)))
        ctx.save_for_backward(weight)
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient * weight * math.log(2), gradient, None


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, low: int, exponent: int) -> torch.Tensor:
        power = torch.round(torch.log2(weight.abs()).sub_(exponent)).clamp_(low, 0)
        return torch.exp2(power + exponent).mul_(torch.sign(weight))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None
