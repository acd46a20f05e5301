"""Layers that hold their weight as packed codes, and quantisers of what comes in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn import functional

from retensor.files import described
from retensor.quantizing.affine import Affine, AffineTensor
from retensor.quantizing.learners import WeightLearner
from retensor.quantizing.packing import pack, packed_bytes, unpacked
from retensor.quantizing.rounding import whole_numbers
from retensor.replacing import Replacement

Mode = Literal["tensor", "token"]


def fake_quantized(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Numbers rounded as an affine quantiser does, with gradients to them and to the step.

    ``s (clip(round(x / s) + z, low, high) - z)``: the rounding lets the gradient through as it is, the clipping only
    within the range, so that the step's gradient is ``round(x / s) - x / s`` inside and ``low - z`` or ``high - z``
    outside (S. K. Esser and others, Learned Step Size Quantization, ICLR 2020, arXiv 1902.08153).

    Parameters
    ----------
    x : torch.Tensor
    scale, zero_point : torch.Tensor
        Whatever broadcasts against it.
    low, high : int

    Returns
    -------
    torch.Tensor

    Examples
    --------
    >>> x = torch.tensor([0.4, 9.0], requires_grad=True)
    >>> y = fake_quantized(x, torch.tensor(1.0), torch.tensor(0.0), 0, 3)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.0, 3.0], [1.0, 0.0])
    """
    return scale * whole_numbers(x / scale, low - zero_point, high - zero_point)


class ActivationQuantizer(nn.Module):
    """Rounds what comes into a layer to few bits.

    Parameters
    ----------
    bits : int
        2 to 8.
    mode : {"tensor", "token"}
        ``tensor``: one step and zero point, of the samples it is calibrated with; the step can be learned. ``token``:
        those of the range of each row of the last axis, when it comes.
    symmetric : bool

    Raises
    ------
    ValueError
        Where a setting is out of range, named.

    Examples
    --------
    >>> eight = ActivationQuantizer(8).calibrate(torch.linspace(-1, 1, 256))
    >>> x = torch.linspace(-1, 1, 100)
    >>> bool((eight(x) - x).abs().max() <= eight.scale / 2 + 1e-6)
    True
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, bits: int = 8, mode: Mode = "tensor", symmetric: bool = False) -> None:
        super().__init__()
        if mode not in ("tensor", "token"):
            raise ValueError(f"mode is {described(mode)}; it is 'tensor' or 'token'")
        self.quantizer, self.mode = Affine(bits, symmetric), mode
        if mode == "tensor":
            self.scale = nn.Parameter(torch.ones(()))
            self.register_buffer("zero_point", torch.zeros(()))

    def calibrate(self, x: torch.Tensor, search: float | None = None) -> Self:
        """Take the step and zero point of a tensor: of its range, or of least mean ``|x - x'|**search``.

        Raises
        ------
        TypeError, ValueError
            As :meth:`retensor.quantizing.Affine.choose`.
        """
        if self.mode == "tensor":
            scale, zero = Affine(self.quantizer.bits, self.quantizer.symmetric, search=search).choose(x.detach())
            with torch.no_grad():
                self.scale.copy_(scale.reshape(()))
                self.zero_point.copy_(zero.reshape(()))
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the shape and type of ``x``.

        Raises
        ------
        TypeError
            Where that is not floating point.
        """
        if not x.is_floating_point():
            raise TypeError(f"activations of floating point are rounded, not of {x.dtype}")
        quantizer = self.quantizer
        if self.mode == "tensor":
            return fake_quantized(x, self.scale, self.zero_point, quantizer.low, quantizer.high).to(x.dtype)
        if x.ndim and not x.shape[-1]:
            return x
        # In half precision the least step would be 0, and the largest rows would span more than there is.
        rows = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        scale, zero = quantizer.of_range(
            rows.amin(-1, keepdim=True).clamp(max=0), rows.amax(-1, keepdim=True).clamp(min=0)
        )
        return fake_quantized(x, scale, zero, quantizer.low, quantizer.high).to(x.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        return super()._apply(_wide(fn), recurse)

    def settings(self) -> dict[str, Any]:
        """Arguments of the class, as JSON has them."""
        return {"bits": self.quantizer.bits, "mode": self.mode, "symmetric": self.quantizer.symmetric}

    def extra_repr(self) -> str:
        """Its settings."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


class Learning(nn.Module):
    """A layer while its weight and the quantiser of its inputs are learned; the layer itself stays as it is."""

    def __init__(self, layer: nn.Module, learner: WeightLearner, inputs: nn.Module | None = None) -> None:
        super().__init__()
        layer_settings(layer)
        self.layer, self.learner, self.inputs = layer, learner, inputs

    @property
    def weight(self) -> torch.Tensor:
        """The weight in few bits, for parents that look at it."""
        return self.learner(self.layer.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's."""
        return self.layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer gives with the weight and the inputs in few bits."""
        return called(self.layer, x if self.inputs is None else self.inputs(x), self.weight)

    def finished(self) -> QuantizedLayer:
        """The layer with its weight as codes."""
        return quantized_layer(self.layer, self.learner.quantized(self.layer.weight.detach()), self.inputs)


def _wide(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What moves tensors, but leaves steps as they are where a model goes to half precision, and those of half."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        found = fn(tensor)
        kinds = (found.dtype, tensor.dtype) if found.is_floating_point() else ()
        narrow = any(torch.finfo(kind).bits < 32 for kind in kinds)
        return tensor.to(found.device) if narrow else found

    return moved


def called(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a linear layer or a convolution gives with another weight."""
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, layer.bias)
    return layer._conv_forward(x, weight, layer.bias)


class CodedLayer(Replacement):
    """A layer whose weight is codes: what is alike for every kind of them.

    Subclasses give :meth:`decoded` and keep codes in buffers.
    """

    inputs: nn.Module | None
    _type: torch.Tensor

    def _take(self, layer: nn.Module) -> torch.Tensor:
        """Take a layer for its shape, settings and bias; its weight, which it has no more afterwards."""
        weight: torch.Tensor = layer.weight
        self.shape, self.settings, self.layer = tuple(weight.shape), layer_settings(layer), layer
        # Says, without a number in it, what type the layer is of, where there is no bias to tell.
        self.register_buffer("_type", weight.new_empty(0).detach(), persistent=False)
        # The layer gives its forward; its weight is made from the codes.
        del layer._parameters["weight"]
        return weight

    def decoded(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What the codes stand for."""
        raise NotImplementedError

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's, which is not in few bits."""
        return self.layer.bias

    @property
    def weight(self) -> torch.Tensor:
        """What the codes stand for, in the type of the layer."""
        return self.decoded(self._type.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        if recurse:
            for module in self.children():
                module._apply(fn)
        kind = fn(self._type)
        super()._apply(_wide(fn), recurse=False)
        self._type = kind
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of codes and of what goes with them; not of the bias."""
        return sum(value.numel() * value.element_size() for value in self.buffers(recurse=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer gives with the weight that the codes stand for."""
        return called(self.layer, x if self.inputs is None else self.inputs(x), self.decoded(x.dtype))

    def to_dense(self) -> nn.Module | None:
        """A plain layer with the weight that the codes stand for; None where inputs are rounded too."""
        if self.inputs is not None:
            return None
        plain = plain_layer(self.settings).to(device=self._type.device, dtype=self._type.dtype)
        with torch.no_grad():
            plain.weight.copy_(self.weight)
            if self.bias is not None:
                plain.bias.copy_(self.bias)
        return plain


class QuantizedLayer(CodedLayer):
    """A layer whose weight is codes, packed bit for bit, with steps and zero points.

    Parameters
    ----------
    layer : nn.Module
        For its shape and settings; it has no weight afterwards.
    quantizer : Affine
    inputs : ActivationQuantizer, optional
        What rounds its inputs.

    Notes
    -----
    Steps are float32, or float64 of a float64 layer, and stay so where a model goes to half precision.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zeros: torch.Tensor | None

    def __init__(self, layer: nn.Module, quantizer: Affine, inputs: nn.Module | None = None) -> None:
        super().__init__()
        self.quantizer, self.inputs = quantizer, inputs
        weight = self._take(layer)
        device, steps = weight.device, quantizer.steps(self.shape)
        self.register_buffer(
            "packed", torch.zeros(packed_bytes(weight.numel(), quantizer.bits), dtype=torch.uint8, device=device)
        )
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("scale", torch.ones(steps, device=device, dtype=wide))
        count = self.scale.numel()
        zeros = torch.zeros(packed_bytes(count, quantizer.bits), dtype=torch.uint8, device=device)
        self.register_buffer("zeros", None if quantizer.symmetric else zeros)

    def decoded(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What the codes stand for."""
        return self.kept().decode(dtype)

    def kept(self) -> AffineTensor:
        """The weight as codes."""
        bits = self.quantizer.bits
        codes = unpacked(self.packed, bits, math.prod(self.shape)).reshape(self.shape)
        if self.zeros is None:
            zero = torch.zeros_like(self.scale)
        else:
            zero = unpacked(self.zeros, bits, self.scale.numel()).reshape(self.scale.shape).to(self.scale.dtype)
        return AffineTensor(codes, self.scale, zero, self.quantizer)

    def keep(self, kept: AffineTensor) -> None:
        """Take codes."""
        bits = self.quantizer.bits
        self.packed.copy_(pack(kept.codes, bits))
        self.scale.copy_(kept.scale)
        if self.zeros is not None:
            self.zeros.copy_(pack(kept.zero_point.to(torch.uint8), bits))

    def config(self) -> dict[str, Any]:
        """Shape, settings and quantisers."""
        if self.inputs is not None and not isinstance(self.inputs, ActivationQuantizer):
            raise NotImplementedError(
                f"a layer of codes whose inputs go through {type(self.inputs).__name__} cannot be saved; an "
                "ActivationQuantizer can"
            )
        inputs = self.inputs.settings() if isinstance(self.inputs, ActivationQuantizer) else None
        return {"layer": self.settings, "quantizer": self.quantizer.settings(), "inputs": inputs}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A layer of the same shapes."""
        inputs = config["inputs"]
        return cls(
            plain_layer(config["layer"]),
            Affine(**config["quantizer"]),
            None if inputs is None else ActivationQuantizer(**inputs),
        )


def quantized_layer(layer: nn.Module, kept: AffineTensor, inputs: nn.Module | None = None) -> QuantizedLayer:
    """A linear layer or a convolution with these codes for its weight, and its bias; the layer stays as it is."""
    made = QuantizedLayer(shell_of(layer), kept.quantizer, inputs)
    made.keep(kept)
    return made.train(layer.training)


def shell_of(layer: nn.Module) -> nn.Module:
    """A layer of the same shape, type and bias, on the same device, whose weight holds no values."""
    plain = plain_layer(layer_settings(layer)).to(device=layer.weight.device, dtype=layer.weight.dtype)
    if layer.bias is not None:
        with torch.no_grad():
            plain.bias.copy_(layer.bias)
    return plain


_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_SETTINGS = {"Linear": ("in_features", "out_features"), "Conv1d": _CONV, "Conv2d": _CONV, "Conv3d": _CONV}


def layer_settings(layer: nn.Module) -> dict[str, Any]:
    """The class and the arguments of a layer, as JSON has them."""
    for kind, names in _SETTINGS.items():
        if isinstance(layer, plain := getattr(nn, kind)):
            _check_plain(layer, plain)
            values = {name: getattr(layer, name) for name in names}
            listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
            return {"kind": kind, **listed, "bias": layer.bias is not None}
    raise TypeError(f"linear layers and convolutions are put in few bits, not {type(layer).__name__}")


_SAME = {("timm.layers.linear", "Linear")}
"""Classes whose ``forward`` is another one and gives the same."""


def _check_plain(layer: nn.Module, plain: type[nn.Module]) -> None:
    """Refuse a layer that makes something else of its weight and inputs than torch's own."""
    own = type(layer)
    if any((kind.__module__, kind.__qualname__) in _SAME for kind in own.__mro__):
        return
    if any(getattr(own, name, None) is not getattr(plain, name, None) for name in ("forward", "_conv_forward")):
        raise TypeError(
            f"a {own.__name__} computes otherwise than nn.{plain.__name__} does, so that codes of its weight would "
            f"give something else; put a plain nn.{plain.__name__} in its place before"
        )


def plain_layer(settings: Mapping[str, Any]) -> nn.Module:
    """A layer by what :func:`layer_settings` says of it, without values."""
    if settings["kind"] not in _SETTINGS:
        raise ValueError(f"{described(settings['kind'])} is no kind of layer; they are {', '.join(_SETTINGS)}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    kind = getattr(nn, str(given.pop("kind")))
    # Drawing values would move the caller's random numbers on.
    return nn.utils.skip_init(kind, **given, device=torch.get_default_device())
