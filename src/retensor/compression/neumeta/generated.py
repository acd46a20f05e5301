"""A layer whose weights are values of implicit functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from retensor.compression.neumeta.field import WeightField, coordinates, shaped, values
from retensor.compression.neumeta.space import Axis, Geometry, check_width
from retensor.replacing import Replacement

_KINDS: dict[str, Any] = {
    "Linear": (nn.Linear, functional.linear),
    "Conv1d": (nn.Conv1d, functional.conv1d),
    "Conv2d": (nn.Conv2d, functional.conv2d),
    "Conv3d": (nn.Conv3d, functional.conv3d),
}


class Generated(Replacement):
    """A linear layer or convolution at any width, without weights of its own; :class:`NeuMeta` makes these.

    Parameters
    ----------
    layer : {"Linear", "Conv1d", "Conv2d", "Conv3d"}
    rows, columns : mapping
        Arguments of :class:`Axis`.
    reference, width : int
        The full width, and the present one.
    kernel : sequence of int
    numbers : sequence of int
        l of the weight, and of the bias where there is one.
    of : int
        L.
    field : mapping
        Arguments of :class:`WeightField`.
    settings : mapping
        Stride, padding, dilation and padding mode of a convolution.

    Attributes
    ----------
    fields : nn.ModuleDict
        The implicit functions of ``weight`` and ``bias``.
    full_weight, full_bias : torch.Tensor
        The values that they are fitted to at the full width.

    Raises
    ------
    TypeError, ValueError
        Where the layer is of another kind, or the width is none.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    >>> from retensor.compression.neumeta import NeuMeta, WidthSpace
    >>> NeuMeta(WidthSpace(net, "*", example=torch.zeros(1, 4)), hidden=8).layers["0"].extra_repr()
    'Linear, 4 -> 12, kernel=(), width=12 of 12'
    """

    def __init__(
        self,
        *,
        layer: str,
        rows: dict[str, int],
        columns: dict[str, int],
        reference: int,
        width: int,
        kernel: Sequence[int],
        numbers: Sequence[int],
        of: int,
        field: dict[str, Any],
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if layer not in _KINDS:
            raise ValueError(f"a {layer!r} cannot be generated; {', '.join(_KINDS)} can")
        check_width(width)
        self.layer = layer
        self.geometry = Geometry(Axis(**rows), Axis(**columns), reference, tuple(kernel), len(numbers) > 1)
        self.width = width
        self.numbers, self.of = tuple(numbers), of
        self.field, self.settings = dict(field), dict(settings or {})
        self.fields = nn.ModuleDict({label: WeightField(**field) for label in ("weight", "bias")[: len(self.numbers)]})
        shapes = self.geometry.shapes(reference)
        self.register_buffer("full_weight", torch.zeros(shapes["weight"]))
        self.register_buffer("full_bias", torch.zeros(shapes["bias"]) if "bias" in shapes else None)

    def config(self) -> dict[str, Any]:
        """Arguments of the class, as JSON has them."""
        return {
            "layer": self.layer,
            "rows": vars(self.geometry.rows).copy(),
            "columns": vars(self.geometry.columns).copy(),
            "reference": self.geometry.reference,
            "width": self.width,
            "kernel": list(self.geometry.kernel),
            "numbers": list(self.numbers),
            "of": self.of,
            "field": self.field,
            "settings": self.settings,
        }

    def coordinates(self, width: int) -> dict[str, torch.Tensor]:
        """Raw coordinates of the entries of the weight and the bias at a width."""
        like = self.full_weight
        # Half precision would not tell one channel from the next.
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        return {
            label: coordinates(
                number, self.of, shape[0], shape[1] if len(shape) > 1 else None, dtype=dtype, device=like.device
            )
            for number, (label, shape) in zip(self.numbers, self.geometry.shapes(width).items(), strict=True)
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weight and the bias at the present width, without noise."""
        raws, shapes = self.coordinates(self.width), self.geometry.shapes(self.width)
        found = values([self.fields[label] for label in raws], list(raws.values()))
        return {label: shaped(value, shapes[label]) for label, value in zip(raws, found, strict=True)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The plain layer's output, by weights that are generated for it."""
        tensors = self.tensors()
        weight, bias = tensors["weight"], tensors.get("bias")
        if self.layer == "Linear":
            return functional.linear(x, weight, bias)
        stride, padding, dilation = (self.settings[key] for key in ("stride", "padding", "dilation"))
        if self.settings["padding_mode"] != "zeros":
            x, padding = functional.pad(x, self.settings["pad"], mode=self.settings["padding_mode"]), 0
        return _KINDS[self.layer][1](x, weight, bias, stride, padding, dilation)

    def plain(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        """An ordinary layer with these values."""
        kind = _KINDS[self.layer][0]
        settings: dict[str, Any] = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
        if self.layer != "Linear":
            settings |= {key: _tuples(self.settings[key]) for key in ("stride", "padding", "dilation", "padding_mode")}
            settings["kernel_size"] = self.geometry.kernel
        # Its own initial values are not needed, and must not draw from the caller's random numbers.
        layer: nn.Module = nn.utils.skip_init(kind, weight.shape[1], weight.shape[0], **settings)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
        return layer

    def to_dense(self) -> nn.Module:
        """The ordinary layer of the present width, of one sample without noise."""
        with torch.no_grad():
            tensors = self.tensors()
        return self.plain(tensors["weight"], tensors.get("bias"))

    def extra_repr(self) -> str:
        """The layer it stands for."""
        rows, columns, *kernel = self.geometry.shapes(self.width)["weight"]
        full = self.geometry.reference
        return f"{self.layer}, {columns} -> {rows}, kernel={tuple(kernel)}, width={self.width} of {full}"


def generated(layer: nn.Module, geometry: Geometry, **arguments: Any) -> Generated:
    """A generated layer for a plain one, at the full width, which gives it its full values."""
    settings: dict[str, Any] = {}
    if not isinstance(layer, nn.Linear):
        settings = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "padding_mode")}
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        settings["pad"] = list(layer._reversed_padding_repeated_twice)
    kind = next(name for name, (kind, _) in _KINDS.items() if isinstance(layer, kind))
    made = Generated(
        layer=kind, rows=vars(geometry.rows), columns=vars(geometry.columns), reference=geometry.reference,
        width=geometry.reference, kernel=geometry.kernel, settings=settings, **arguments,
    )  # fmt: skip
    made.to(device=layer.weight.device, dtype=layer.weight.dtype)
    made.full_weight.copy_(layer.weight.detach())
    if layer.bias is not None:
        made.full_bias.copy_(layer.bias.detach())
    return made


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
