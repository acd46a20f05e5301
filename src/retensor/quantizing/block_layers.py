"""Layers whose weight is codes in blocks that share a scale: MXFP4, NVFP4 and any other microscaling format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from retensor.files import described
from retensor.quantizing.blocks import Blocks, BlockTensor
from retensor.quantizing.grids import Unrounded
from retensor.quantizing.layers import CodedLayer, plain_layer, shell_of
from retensor.quantizing.packing import pack, packed_bytes, unpacked


class BlockLayer(CodedLayer):
    """A layer whose weight is codes in blocks along its inputs, packed bit for bit, with the codes of their scales.

    Parameters
    ----------
    layer : nn.Module
        For its shape and settings; it has no weight afterwards.
    format : Blocks
        Blocks lie along all of an output's inputs: of a convolution, channels and kernel.

    Notes
    -----
    ``out * ceil(in / B)`` blocks take ``B * bits + scale bits`` each, and a tensor's scale 4 bytes.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor | None

    def __init__(self, layer: nn.Module, format: Blocks) -> None:
        super().__init__()
        self.format, self.inputs = format, None
        weight = self._take(layer)
        device, outputs = weight.device, self.shape[0]
        self.inputs_each = math.prod(self.shape[1:])
        self.blocks = -(-self.inputs_each // format.size)
        count, element = outputs * self.blocks, format.element
        codes = torch.zeros(packed_bytes(count * format.size, element.bits), dtype=torch.uint8, device=device)
        self.register_buffer("packed", codes)
        if isinstance(format.scale, Unrounded):
            scales = torch.zeros(outputs, self.blocks, dtype=format.scale.dtype, device=device)
        else:
            scales = torch.zeros(packed_bytes(count, format.scale.bits), dtype=torch.uint8, device=device)
        self.register_buffer("scales", scales)
        self.register_buffer("tensor_scale", torch.ones((), device=device) if format.tensor_scale else None)

    def decoded(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What the codes stand for."""
        return self.kept().decode(dtype).reshape(self.shape)

    def kept(self) -> BlockTensor:
        """The weight, of shape (outputs, inputs), as codes."""
        count = self.shape[0] * self.blocks
        codes = unpacked(self.packed, self.format.element.bits, count * self.format.size).reshape(self.shape[0], -1)
        scales = self.scales
        if not isinstance(self.format.scale, Unrounded):
            scales = unpacked(scales, self.format.scale.bits, count).reshape(self.shape[0], -1)
        one = torch.ones((), device=codes.device) if self.tensor_scale is None else self.tensor_scale
        return BlockTensor(codes, scales, one, self.format, 1, self.inputs_each)

    def keep(self, kept: BlockTensor) -> None:
        """Take codes."""
        self.packed.copy_(pack(kept.codes, self.format.element.bits))
        whole = isinstance(self.format.scale, Unrounded)
        self.scales.copy_(kept.scales if whole else pack(kept.scales, self.format.scale.bits))
        if self.tensor_scale is not None:
            self.tensor_scale.copy_(kept.tensor_scale)

    def config(self) -> dict[str, Any]:
        """Shape, settings and format."""
        return {"layer": self.settings, "format": self.format.settings()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A layer of the same shapes."""
        return cls(plain_layer(config["layer"]), Blocks(**config["format"]))


def block_layer(layer: nn.Module, format: Blocks) -> BlockLayer:
    """A linear layer or a convolution with its weight rounded to a format of blocks, and kept as codes.

    Parameters
    ----------
    layer : nn.Module
        Left as it is.
    format : Blocks

    Raises
    ------
    TypeError
        Where it is another layer, or the format is none.
    ValueError
        Where its weight is not finite, or on the meta device.

    Examples
    --------
    >>> layer = nn.Linear(64, 8)
    >>> few = block_layer(layer, Blocks("e2m1", "e4m3", 16, tensor_scale=True))  # NVFP4
    >>> few.nbytes, few.weight.shape
    (292, torch.Size([8, 64]))
    """
    if not isinstance(format, Blocks):
        raise TypeError(f"format is a retensor.quantizing.Blocks, not {described(format)}")
    shell, weight = shell_of(layer), layer.weight.detach()
    if weight.is_meta or not bool(torch.isfinite(weight).all()):
        raise ValueError("a weight that is not finite, or holds no values (meta device), has no codes; load it first")
    made = BlockLayer(shell, format)
    made.keep(format.encode(weight.flatten(1)))
    return made.train(layer.training)
