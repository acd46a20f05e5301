"""Codes of a few bits as bytes, without a bit between them, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from retensor.files import described


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take: all their bits, rounded up once.

    >>> packed_bytes(5, 3)
    2
    """
    return -(-count * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes as one run of bits, the lowest first.

    Parameters
    ----------
    codes : torch.Tensor
        uint8, of any shape, each below ``2**bits``.
    bits : int
        1 to 8.

    Returns
    -------
    torch.Tensor
        uint8, of :func:`packed_bytes` elements; bits left over in the last are 0.

    Raises
    ------
    TypeError
        Where codes are not uint8.
    ValueError
        Where a code has more bits, or ``bits`` is out of range.

    Examples
    --------
    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4)
    tensor([33,  3], dtype=torch.uint8)
    """
    _check(codes, bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code is {int(codes.max())}, which has more than {bits} bits")
    flat = codes.detach().cpu().contiguous().numpy().reshape(-1, 1)
    single = np.unpackbits(flat, axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(single.reshape(-1), bitorder="little")).to(codes.device)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The ``count`` codes that :func:`pack` packed, as a vector.

    Raises
    ------
    TypeError
        Where the bytes are not uint8.
    ValueError
        Where there are more or fewer bytes than the codes take, they are no vector, ``count`` is none, or a bit left
        over is set.

    Examples
    --------
    >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), 4, 3)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    _check(packed, bits)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"count is a whole number from 0, not {described(count)}")
    if packed.ndim != 1:
        raise ValueError(f"packed bytes are a vector, not a tensor of shape {list(packed.shape)}")
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, and there are {packed.numel()}"
        )
    over = count * bits % 8
    if over and int(packed[-1]) >> over:
        raise ValueError(f"the last byte holds bits beyond {count} codes of {bits} bits")
    return unpacked(packed, bits, count)


def unpacked(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """:func:`unpack` without its checks, of operations that a graph of torch's can hold."""
    if bits == 8:
        return packed
    if 8 % bits == 0:
        places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[:, None] >> places) & (2**bits - 1)).reshape(-1)[:count]
    # Eight codes take as many bytes as a code has bits: each code lies in one byte of them or in two.
    rows = functional.pad(packed, (0, -len(packed) % bits)).reshape(-1, bits)
    columns = []
    for start in range(0, 8 * bits, bits):
        byte, place = divmod(start, 8)
        code = rows[:, byte] >> place
        if place + bits > 8:
            code = code | (rows[:, byte + 1] << (8 - place))
        columns.append(code & (2**bits - 1))
    return torch.stack(columns, 1).reshape(-1)[:count]


def _check(codes: torch.Tensor, bits: int) -> None:
    if not isinstance(codes, torch.Tensor) or codes.dtype != torch.uint8:
        what = codes.dtype if isinstance(codes, torch.Tensor) else described(codes)
        raise TypeError(f"codes and bytes are tensors of type torch.uint8, not {what}")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits is a number from 1 to 8, not {described(bits)}")
