"""Models for use: weights packed to few bits, products on whole numbers and packed bits, nothing that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn

from retensor.compression.shiftadd.attention import AddAttention
from retensor.compression.shiftadd.kernels import pack_rows, packed_mat_add, shift_linear
from retensor.compression.shiftadd.moe import Gate, MoELinear, attach_report
from retensor.compression.shiftadd.shift import ShiftLinear, check_bits, fixed_point, saturating
from retensor.errors import RetensorError
from retensor.quantizing import Grid, pack, packed_bytes, powers_of_two
from retensor.quantizing.packing import unpacked
from retensor.replacing import Replacement, replace
from retensor.units import check_flags


def freeze(model: nn.Module) -> nn.Module:
    """The model for use: packed weights of few bits, and attention and shifts on whole numbers and packed bits.

    Parameters
    ----------
    model : nn.Module
        Converted and trained; it stays as it is.

    Returns
    -------
    nn.Module
        In eval mode, nothing of which is trained. Its converted layers raise :class:`~retensor.errors.RetensorError`
        in training mode.

    Raises
    ------
    ValueError
        Where there is nothing to freeze.
    """
    asked = (AddAttention, MoELinear, ShiftLinear)
    packed = (PackedAddAttention, PackedMoELinear, PackedShiftLinear)
    if not any(isinstance(m, asked) and not isinstance(m, packed) for m in model.modules()):
        raise ValueError("the model holds no layer of shifts or additions that is not frozen; convert it first")
    # Attentions last: they go on around the layers that have been packed.
    found = model
    for kind, made in (
        (MoELinear, PackedMoELinear.from_moe),
        (ShiftLinear, PackedShiftLinear.from_shift),
        (AddAttention, PackedAddAttention.from_attention),
    ):
        found = replace(found, {kind: _unless(packed, made)}, unmatched="ignore")
    attach_report(found)
    return found.requires_grad_(False).eval()


def packed_size(model: nn.Module) -> int:
    """Bytes of tensors that a model takes in a file once it is frozen, by formula.

    ``ceil(bits * inputs * outputs / 8)`` for the weights of every shift layer, 4 for every other number, 8 for a count,
    1 for a flag. A file of :func:`retensor.save` has its header besides: 8 bytes that tell its length, and that many.

    Parameters
    ----------
    model : nn.Module
        Converted or frozen.

    Examples
    --------
    >>> layer = ShiftLinear.from_linear(nn.Linear(64, 32))
    >>> packed_size(layer), sum(4 * p.numel() for p in nn.Linear(64, 32).parameters())
    (1408, 8320)
    """
    shifts = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, ShiftLinear | PackedShiftLinear)
    }
    total = 0
    for layer in shifts.values():
        total += packed_bytes(layer.in_features * layer.out_features, layer.weight_bits)
        total += 4 * layer.out_features * (layer.bias is not None)
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(f"{prefix}." if prefix else "") for prefix in shifts):
            total += tensor.numel() * (tensor.element_size() if not tensor.is_floating_point() else 4)
    return total


class PackedShiftLinear(Replacement):
    """A linear layer of packed power-of-two weights that adds shifted whole numbers; in eval mode only.

    It holds ``packed_bytes(inputs * outputs, bits)`` bytes of weights and a float bias. Outputs differ from those of
    the :class:`ShiftLinear` it was made of by at most ``inputs * 2**-frac_bits`` times the layer's scale: each product
    is rounded down on its own.

    Parameters
    ----------
    in_features, out_features, bias, weight_bits, act_frac_bits, exponent, strict
        As of :class:`ShiftLinear`; inputs beyond the fixed-point range are counted in ``saturated`` here too.

    Examples
    --------
    >>> layer = ShiftLinear.from_linear(nn.Linear(8, 4))
    >>> packed = PackedShiftLinear.from_shift(layer).eval()
    >>> packed.codes.numel(), torch.equal(packed.weight, layer.effective_weight())
    (20, True)
    """

    codes: torch.Tensor
    saturated: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_bits: int = 5,
        act_frac_bits: int = 16,
        exponent: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__()
        check_flags(bias=bias, strict=strict)
        check_bits(weight_bits, act_frac_bits)
        self.in_features, self.out_features = in_features, out_features
        self.weight_bits, self.act_frac_bits, self.exponent = weight_bits, act_frac_bits, exponent
        self.strict = strict
        size = packed_bytes(in_features * out_features, weight_bits)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("saturated", torch.zeros((), dtype=torch.int64), persistent=False)

    @classmethod
    def from_shift(cls, layer: ShiftLinear) -> Self:
        """The packed form of a trained layer."""
        settings = layer.config()
        settings.pop("variant")
        made = cls(**settings).to(layer.effective_weight().device).train(layer.training)
        with torch.no_grad():
            made.codes.copy_(pack(made.grid().encode(layer.effective_weight() / 2.0**layer.exponent), made.weight_bits))
            if layer.bias is not None:
                made.bias = fixed_point(layer.bias.detach().to(torch.float32), layer.act_frac_bits)
        return made

    def grid(self) -> Grid:
        """What the codes stand for, before the exponent."""
        return powers_of_two(self.weight_bits)

    @property
    def weight(self) -> torch.Tensor:
        """The weights as float32, of shape (outputs, inputs), for parents that read one."""
        codes = unpacked(self.codes, self.weight_bits, self.in_features * self.out_features)
        return self.grid().decode(codes).reshape(self.out_features, self.in_features) * 2.0**self.exponent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of shape (..., outputs) and the type of ``x``.

        Raises
        ------
        RetensorError
            Where an input lies beyond the fixed-point range, and the layer is strict; or in training mode.
        ValueError
            Where an input is not a number.
        """
        refuse_training(self)
        if not torch.compiler.is_compiling():
            self.saturated += saturating(x, self.act_frac_bits, self.strict)
        return shift_linear(
            x, self.codes, self.bias, self.out_features, self.weight_bits, self.act_frac_bits, self.exponent
        )

    def config(self) -> dict[str, Any]:
        """Arguments of the class."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "weight_bits": self.weight_bits,
            "act_frac_bits": self.act_frac_bits,
            "exponent": self.exponent,
            "strict": self.strict,
        }

    def loaded(self, model: nn.Module) -> None:
        """A count that no file keeps begins anew."""
        self.saturated.zero_()

    def to_dense(self) -> nn.Linear:
        """A plain layer of the same weights."""
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        plain.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.clone())
        return plain

    def extra_repr(self) -> str:
        """Sizes and bits."""
        return f"in_features={self.in_features}, out_features={self.out_features}, weight_bits={self.weight_bits}"


class PackedMoELinear(MoELinear):
    """A mixture whose shifts are packed; in eval mode only."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, gate: Gate = "paper",
        shift: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, gate=gate)
        self.shift = PackedShiftLinear(in_features, out_features, bias, **(shift or {}))
        self.requires_grad_(False)

    @classmethod
    def from_moe(cls, layer: MoELinear) -> Self:
        """The packed form of a trained mixture."""
        shift: Any = layer.shift
        with torch.device("meta"):
            made = cls(layer.in_features, layer.out_features, shift.bias is not None, gate=layer.gate)
        made.shift = PackedShiftLinear.from_shift(shift)
        for name in ("multiply", "router"):
            source, target = getattr(layer, name), getattr(made, name)
            for label, parameter in source.named_parameters():
                setattr(target, label, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        made._count(layer.tokens.device)
        return made.train(layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of shape (..., outputs)."""
        refuse_training(self)
        return super().forward(x)


class PackedAddAttention(AddAttention):
    """An attention that adds by packed bits; in eval mode only."""

    @classmethod
    def from_attention(cls, layer: AddAttention) -> Self:
        """The packed form of a trained attention; its projections are those of ``layer`` themselves."""
        settings = layer.config()
        settings.pop("layers")
        with torch.device("meta"):
            made = cls(**settings)
        made.train(layer.training)
        for name, child in layer.named_children():
            setattr(made, name, child)
        for name, buffer in layer.named_buffers(recurse=False):
            made.register_buffer(name, buffer.detach().clone())
        return made.requires_grad_(False)

    def forward(self, x: torch.Tensor, *rest: Any, attn_mask: Any = None, is_causal: bool = False) -> torch.Tensor:
        """As :meth:`AddAttention.forward`."""
        refuse_training(self)
        return super().forward(x, *rest, attn_mask=attn_mask, is_causal=is_causal)

    def products(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``q (k^T v)`` by masked sums; codes of -1 and 1 are twice those of 0 and 1, less 1."""
        wide, kind = v.shape[-1], v.dtype
        v = v.to(torch.promote_types(kind, torch.float32))
        first = pack_rows(q > 0)
        second = first if k is q else pack_rows(k > 0)
        inner = packed_mat_add(second, v, k.shape[-1], True)
        if self.attention == "ksh":
            inner = 2 * inner - v.sum(-2, keepdim=True)
            return (2 * packed_mat_add(first, inner, q.shape[-1]) - inner.sum(-2, keepdim=True)).to(kind)
        return packed_mat_add(first, inner, q.shape[-1])[..., :wide].to(kind)


def refuse_training(module: nn.Module) -> None:
    """What is frozen has nothing to train."""
    if module.training:
        raise RetensorError(
            f"{type(module).__name__} is frozen and runs in eval mode only; call .eval(), or train the model it was "
            "made of and freeze it again"
        )


def _unless(kinds: tuple[type, ...], pack: Callable[[Any], nn.Module]) -> Callable[[Any], nn.Module]:
    return lambda layer: layer if isinstance(layer, kinds) else pack(layer)
