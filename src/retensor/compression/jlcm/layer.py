"""The layer that is kept: packed indices into small codebooks, and where the rows' groups come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn import functional

from retensor.compression.jlcm.grouping import Layout
from retensor.files import described
from retensor.quantizing.layers import CodedLayer, plain_layer, shell_of
from retensor.quantizing.packing import pack, packed_bytes, unpacked

Variant = Literal["codebooks", "scales"]
VARIANTS = ("codebooks", "scales")
SCALE_BITS = 16
_FLOATS = {16: (torch.float16, torch.int16), 32: (torch.float32, torch.int32)}


@dataclass(frozen=True)
class Coding:
    """How a layer's weights are kept.

    Parameters
    ----------
    k : int
        Codewords of a codebook, 2 to 256.
    layout : Layout
        Groups of rows.
    variant : {"codebooks", "scales"}
        A codebook for each group, or one codebook with a scale for each group.
    codebook_bits : {16, 32}
        Of a codeword.

    Raises
    ------
    ValueError
        Where one is out of range.
    """

    k: int
    layout: Layout
    variant: Variant = "codebooks"
    codebook_bits: int = 16

    def __post_init__(self) -> None:
        check_codewords(self.k)
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {described(self.variant)}; it is 'codebooks' or 'scales'")
        if self.codebook_bits not in _FLOATS:
            raise ValueError(f"codebook_bits is {described(self.codebook_bits)}; it is 16 or 32")

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return index_bits(self.k)

    @property
    def codebooks(self) -> int:
        """How many there are."""
        return self.layout.groups if self.variant == "codebooks" else 1

    @property
    def scales(self) -> int:
        """How many there are."""
        return self.layout.groups if self.variant == "scales" else 0

    def bytes_by_term(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Bytes of a weight of that shape: of its indices, codebooks, scales, bounds and labels.

            ceil(log2 k) |W| + G k codebook_bits + G scales of 16 + (G - 1) bounds + labels of ceil(log2 G) a row

        bits, each term in whole bytes; bounds are there where the order of rows is absorbed, labels where it is not.

        >>> Coding(4, Layout(1, 10)).bytes_by_term((10, 100))
        {'indices': 250, 'codebooks': 8, 'scales': 0, 'bounds': 0, 'labels': 0}
        """
        groups, labelled = self.layout.groups, self.layout.bounds is None
        return {
            "indices": packed_bytes(math.prod(shape), self.bits),
            "codebooks": self.codebooks * self.k * self.codebook_bits // 8,
            "scales": self.scales * SCALE_BITS // 8,
            "bounds": 0 if labelled else (groups - 1) * (2 if shape[0] < 2**15 else 4),
            "labels": packed_bytes(shape[0], label_bits(groups)) if labelled else 0,
        }

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight of that shape."""
        return sum(self.bytes_by_term(shape).values())


class CodebookLayer(CodedLayer):
    """A linear layer or a convolution whose weight is ``C_g[I]`` or ``s_g C[I]``.

    Codewords and scales are kept as the bits of float16 (or float32) numbers, so that a change of the model's type
    changes neither them nor the file.

    Parameters
    ----------
    layer : nn.Module
        For its shape and settings; it has no weight afterwards.
    coding : Coding

    Attributes
    ----------
    packed : torch.Tensor
        uint8, the indices.
    """

    packed: torch.Tensor
    codebook_as_bits: torch.Tensor
    scales_as_bits: torch.Tensor | None
    bounds: torch.Tensor | None
    labels: torch.Tensor | None

    def __init__(self, layer: nn.Module, coding: Coding) -> None:
        super().__init__()
        rows, groups = layer.weight.shape[0], coding.layout.groups
        if groups > rows:
            raise ValueError(f"{groups} groups of a layer with {rows} rows; there are at most as many groups as rows")
        self.coding, self.inputs = coding, None
        weight, kind = self._take(layer), _FLOATS[coding.codebook_bits][1]

        def made(count: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(count, dtype=dtype, device=weight.device)

        self.register_buffer("packed", made(packed_bytes(weight.numel(), coding.bits), torch.uint8))
        self.register_buffer("codebook_as_bits", made(coding.codebooks * coding.k, kind).reshape(-1, coding.k))
        self.register_buffer("scales_as_bits", made(coding.scales, torch.int16) if coding.scales else None)
        labelled = coding.layout.bounds is None
        places = torch.int16 if rows < 2**15 else torch.int32
        self.register_buffer("bounds", None if labelled or groups == 1 else made(groups - 1, places))
        self.register_buffer("labels", made(packed_bytes(rows, label_bits(groups)), torch.uint8) if labelled else None)

    @property
    def codebook(self) -> torch.Tensor:
        """Float32 of shape (codebooks, k)."""
        return self.codebook_as_bits.view(_FLOATS[self.coding.codebook_bits][0]).float()

    @property
    def scales(self) -> torch.Tensor | None:
        """Float32 of shape (groups,), where there are scales."""
        return None if self.scales_as_bits is None else self.scales_as_bits.view(torch.float16).float()

    def groups(self) -> torch.Tensor:
        """The group of each row, int32."""
        rows, groups = self.shape[0], self.coding.layout.groups
        if self.labels is not None:
            return unpacked(self.labels, label_bits(groups), rows).int()
        if self.bounds is None:
            return torch.zeros(rows, dtype=torch.int32, device=self.packed.device)
        place = torch.arange(rows, device=self.packed.device) % self.coding.layout.period
        return (place[:, None] >= self.bounds.int()[None, :]).sum(1, dtype=torch.int32)

    def indices(self) -> torch.Tensor:
        """The index of each weight, uint8 of the weight's shape."""
        return unpacked(self.packed, self.coding.bits, math.prod(self.shape)).reshape(self.shape)

    def decoded(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What the indices stand for, of the weight's shape; codewords and scales are multiplied in float32."""
        rows, bits, k = self.shape[0], self.coding.bits, self.coding.k
        groups = self.groups() if self.coding.layout.groups > 1 else None
        book = self.codebook
        if 8 % bits == 0 and math.prod(self.shape[1:]) * bits % 8 == 0:
            # A byte holds whole indices and a row whole bytes: all that a byte can stand for is looked up at once.
            places = torch.arange(0, 8, bits, device=book.device)
            held = (torch.arange(256, device=book.device)[:, None] >> places) & (2**bits - 1)
            # Bytes with indices that no codeword has do not occur.
            table, codes, step = book[:, held.clamp(max=k - 1)].flatten(0, 1), self.packed.reshape(rows, -1).int(), 256
        else:
            table, codes, step = book.reshape(-1, 1), self.indices().reshape(rows, -1).int(), k
        if self.coding.codebooks > 1 and groups is not None:
            codes = codes + step * groups[:, None]
        found = functional.embedding(codes, table).reshape(rows, -1)
        if self.scales is not None and groups is not None:
            found = found * self.scales[groups][:, None]
        return found.reshape(self.shape).to(dtype)

    def keep(
        self,
        indices: torch.Tensor,
        codebook: torch.Tensor,
        scales: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> None:
        """Take values: indices of the weight's shape, codebooks (codebooks, k), scales and labels where there are."""
        floats, whole = _FLOATS[self.coding.codebook_bits]
        self.packed.copy_(pack(indices.to(torch.uint8).reshape(-1), self.coding.bits))
        self.codebook_as_bits.copy_(codebook.reshape(-1, self.coding.k).to(floats).view(whole))
        if self.scales_as_bits is not None and scales is not None:
            self.scales_as_bits.copy_(scales.to(torch.float16).view(torch.int16))
        if self.bounds is not None and self.coding.layout.bounds is not None:
            self.bounds.copy_(torch.tensor(self.coding.layout.bounds))
        if self.labels is not None and labels is not None:
            self.labels.copy_(pack(labels.to(torch.uint8), label_bits(self.coding.layout.groups)))

    def config(self) -> dict[str, Any]:
        """Shape, settings and coding."""
        coding = self.coding
        return {
            "layer": self.settings,
            "k": coding.k,
            "groups": coding.layout.groups,
            "period": coding.layout.period,
            "labelled": coding.layout.bounds is None,
            "variant": coding.variant,
            "codebook_bits": coding.codebook_bits,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A layer of the same shapes; where groups begin is among its values."""
        groups = config["groups"]
        bounds = None if config["labelled"] else (0,) * (groups - 1)
        layout = Layout(groups, config["period"], bounds)
        coding = Coding(config["k"], layout, config["variant"], config["codebook_bits"])
        return cls(plain_layer(config["layer"]), coding)

    def extra_repr(self) -> str:
        """Codewords, groups and variant."""
        return f"k={self.coding.k}, groups={self.coding.layout.groups}, variant={self.coding.variant!r}"


def codebook_layer(
    layer: nn.Module,
    coding: Coding,
    indices: torch.Tensor,
    codebook: torch.Tensor,
    scales: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> CodebookLayer:
    """A layer with these indices for its weight, and the bias of the given one, which stays as it is."""
    made = CodebookLayer(shell_of(layer), coding)
    made.keep(indices, codebook, scales, labels)
    return made.train(layer.training)


def index_bits(k: int) -> int:
    """``ceil(log2 k)``.

    >>> index_bits(2), index_bits(5), index_bits(256)
    (1, 3, 8)
    """
    return (k - 1).bit_length()


def label_bits(groups: int) -> int:
    """Bits of a row's label, at least one."""
    return max(1, (groups - 1).bit_length())


def check_codewords(k: Any) -> None:
    """Refuse what is no number of codewords."""
    if isinstance(k, bool) or not isinstance(k, int) or not 2 <= k <= 256:
        raise ValueError(f"a codebook has 2 to 256 codewords, not {described(k)}")


def codebook_bits_of(weight: torch.Tensor) -> int:
    """16, where float16 holds the weights' size to its full precision, else 32."""
    most = float(weight.detach().abs().max()) if weight.numel() and not weight.is_meta else 1.0
    return 16 if 2.0**-10 <= most <= 2.0**15 else 32
