"""Multiply-accumulates of one operator, from its attributes and the shapes of what it reads and makes.

One is counted for each product that is added to a sum of products, as the kernel without tricks computes it:

- convolution, plain, grouped, dilated, deformable or quantised: batch x elements of the weight x positions of the
  output; transposed: positions of the input. Padding is computed with like data.
- matrix products of every kind, quantised ones too: rows x columns x the length of the sums; ``einsum``: its operands
  pair by pair from the left, each pair all indices of the two, where some index is summed.
- attention: ``q k'`` and the product with ``v``, every query with every key; nothing is taken off for a causal mask.
- LSTM, GRU and plain recurrent layers: the matrices of all gates, layers and directions at every step.
- of a training program also the backward passes of convolutions and attention.

Everything else counts zero: biases, elementwise operators, normalisation, softmax, pooling, interpolation, look-ups,
sums and norms, outer products. fvcore counts the same where it counts products; its estimates for normalisation,
pooling and interpolation have no counterpart here. What computes sums of products in ways that have no one count
(Fourier transforms, factorisations, control flow) and operators of unknown libraries come out as None, not as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from retensor.graph.structure import MOST_MACS

Shape = Sequence[int]


def torch_macs(target: str, arguments: Mapping[str, Any], results: Sequence[Any]) -> int | None:
    """Multiply-accumulates of one call of a PyTorch operator.

    Parameters
    ----------
    target : str
        As in ``"aten.conv2d.default"``.
    arguments : mapping of str to object
        By the names of the operator's schema; of tensors only ``shape`` is read.
    results : sequence
        What it returns, flat.

    Returns
    -------
    int or None
        None where no count is known.

    Examples
    --------
    >>> import numpy as np
    >>> torch_macs("aten.linear.default", {"input": np.zeros((2, 4)), "weight": np.zeros((8, 4))}, [np.zeros((2, 8))])
    64
    """
    library, _, name = target.partition(".")
    name = name.partition(".")[0]
    if library not in ("aten", "prims", "quantized_decomposed", "torchvision"):
        return None
    rule = _TORCH.get(name)
    if rule is not None:
        return _known(rule(arguments, results))
    return None if name.startswith(_UNCOUNTED) and name not in _REDUCTIONS else 0


def onnx_macs(
    kind: str, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None], attributes: Mapping[str, Any]
) -> int | None:
    """Multiply-accumulates of one ONNX node.

    Parameters
    ----------
    kind : str
        Its type, with the domain in front where that is not ONNX's own.
    inputs, outputs : sequence of shape or None
        None where one is left out.
    attributes : mapping of str to int, list of int or str

    Returns
    -------
    int or None
        None where no count is known.

    Examples
    --------
    >>> onnx_macs("Conv", [(1, 3, 8, 8), (16, 3, 3, 3)], [(1, 16, 6, 6)], {})
    15552
    """
    if "." in kind or kind in _ONNX_UNCOUNTED:
        return None
    rule = _ONNX.get(kind)
    if rule is None:
        return 0
    try:
        return _known(rule(inputs, outputs, attributes))
    except (IndexError, KeyError, TypeError, ValueError):
        # Shapes may be the file's word, which need not fit the operator; it can be planned all the same.
        return None


def _known(count: int) -> int | None:
    return count if count <= MOST_MACS else None


def _convolution(batch: int, weight: Shape, positions: Shape) -> int:
    return batch * prod(weight) * prod(positions)


def _product(a: Shape, b: Shape) -> int:
    """Of ``a @ b``, by the rules of ``matmul``: vectors, matrices, and stacks of matrices that broadcast.

    >>> _product((2, 3, 4), (4, 5)), _product((1, 3, 4), (7, 4, 5)), _product((4,), (4,))
    (120, 420, 4)
    """
    rows = a[-2] if len(a) > 1 else 1
    columns = b[-1] if len(b) > 1 else 1
    batch = 1
    for axis in range(3, max(len(a), len(b)) + 1):
        sizes = {shape[-axis] for shape in (a, b) if len(shape) >= axis}
        batch *= 0 if 0 in sizes else max(sizes)
    return batch * rows * a[-1] * columns


def _attention(query: Shape, key: Shape, value: Shape) -> int:
    """Of ``(..., L, E)``, ``(..., S, E)`` and ``(..., S, V)``; fewer heads of keys than of queries are shared."""
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(equation: str, shapes: Sequence[Shape]) -> int:
    """Pair by pair from the left; an index is summed as soon as nothing later has it.

    >>> _einsum("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]), _einsum("bi,bi->bi", [(2, 3), (2, 3)])
    (120, 0)
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [_indices(term, shape) for term, shape in zip(left.split(","), shapes, strict=True)]
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for index, size in zip(term, shape, strict=True):
            sizes[index] = size if sizes.get(index, 1) == 1 else sizes[index]
    every = [index for term in terms for index in term]
    if arrow:
        wanted = {index for index in every if index in right or (index.isdigit() and "..." in right)}
    else:
        wanted = {index for index in every if index.isdigit() or every.count(index) == 1}
    count = 0
    held = set(terms[0])
    for position, term in enumerate(terms[1:], 1):
        held |= set(term)
        kept = held & wanted.union(*terms[position + 1 :])
        if kept != held:
            count += prod(sizes[index] for index in held)
        held = kept
    return count


def _indices(term: str, shape: Shape) -> list[str]:
    """The index of each axis; those of an ellipsis are numbers, counted from its end."""
    before, dots, after = term.partition("...")
    hidden = len(shape) - len(before) - len(after) if dots else 0
    return [*before, *(str(hidden - 1 - axis) for axis in range(hidden)), *after]


# PyTorch: rules by name, on the arguments by name.

Arguments = Mapping[str, Any]


def _shape(arguments: Arguments, *names: str) -> tuple[int, ...]:
    """The shape of the first of ``names`` that is given: overloads call one thing differently."""
    return tuple(next(arguments[name] for name in names if name in arguments).shape)


def _torch_convolution(transposed: bool | None = None) -> Callable[[Arguments, Sequence[Any]], int]:
    def rule(arguments: Arguments, results: Sequence[Any]) -> int:
        data, weight = _shape(arguments, "input"), _shape(arguments, "weight")
        turned = arguments.get("transposed", False) if transposed is None else transposed
        # One sample may come without a batch.
        batch = data[0] if len(data) == len(weight) else 1
        moved = data if turned else tuple(results[0].shape)
        return _convolution(batch, weight, moved[-(len(weight) - 2) :])

    return rule


def _convolution_backward(arguments: Arguments, results: Sequence[Any]) -> int:
    data, weight = _shape(arguments, "input"), _shape(arguments, "weight")
    moved = data if arguments["transposed"] else _shape(arguments, "grad_output")
    # The gradients of the data and of the weight each cost what the convolution did.
    return sum(map(bool, arguments["output_mask"][:2])) * _convolution(data[0], weight, moved[2:])


def _torch_product(left: tuple[str, ...], right: tuple[str, ...]) -> Callable[[Arguments, Sequence[Any]], int]:
    return lambda arguments, results: _product(_shape(arguments, *left), _shape(arguments, *right))


def _torch_rows(arguments: Arguments, results: Sequence[Any]) -> int:
    """Of products whose weight is transposed or packed: every element of the input meets every output channel."""
    channels = _shape(arguments, "weight")[:-1] if "weight" in arguments else tuple(results[0].shape)[-1:]
    return prod(_shape(arguments, "input", "self")) * prod(channels)


def _torch_inner(arguments: Arguments, results: Sequence[Any]) -> int:
    one, other = _shape(arguments, "self", "x"), _shape(arguments, "other", "tensor", "y")
    return prod(one) * prod(other) // max(1, one[-1]) if one and other else 0


def _tensordot(arguments: Arguments, results: Sequence[Any]) -> int:
    summed = prod(_shape(arguments, "self")[axis] for axis in arguments["dims_self"])
    count: int = prod(_shape(arguments, "self")) * prod(_shape(arguments, "other")) // max(1, summed)
    return count


def _bilinear(arguments: Arguments, results: Sequence[Any]) -> int:
    """The weight ``(O, I, J)`` with the second input, then with the first."""
    outputs, first, second = _shape(arguments, "weight")
    return prod(_shape(arguments, "input1")[:-1]) * outputs * first * (second + 1)


def _torch_attention(arguments: Arguments, results: Sequence[Any]) -> int:
    return _attention(_shape(arguments, "query"), _shape(arguments, "key"), _shape(arguments, "value"))


def _attention_backward(arguments: Arguments, results: Sequence[Any]) -> int:
    """``q k'`` once more, then the gradients of the weights, of ``v``, of ``q`` and of ``k``."""
    query, key, value = (_shape(arguments, name) for name in ("query", "key", "value"))
    return prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _recurrent(arguments: Arguments, results: Sequence[Any]) -> int:
    matrices: int = sum(prod(weight.shape) for weight in arguments["params"] if len(weight.shape) == 2)
    return prod(_shape(arguments, "input", "data")[:-1]) * matrices


def _cell(arguments: Arguments, results: Sequence[Any]) -> int:
    matrices = prod(_shape(arguments, "w_ih")) + prod(_shape(arguments, "w_hh"))
    return prod(_shape(arguments, "input")[:-1]) * matrices


_PRODUCT = _torch_product(("self", "input"), ("mat2", "other", "vec", "tensor"))
_STACKED = _torch_product(("mat1", "batch1", "mat"), ("mat2", "batch2", "vec"))
_DOT = _torch_product(("self", "x"), ("tensor", "other", "y"))

_TORCH: Mapping[str, Callable[[Arguments, Sequence[Any]], int]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _torch_convolution(False)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _torch_convolution(True)),
    **dict.fromkeys(("convolution", "_convolution"), _torch_convolution()),
    "deform_conv2d": _torch_convolution(False),
    "convolution_backward": _convolution_backward,
    **dict.fromkeys(("mm", "bmm", "matmul", "linalg_matmul", "mv", "_int_mm", "_scaled_mm"), _PRODUCT),
    **dict.fromkeys(("addmm", "addbmm", "baddbmm", "addmv"), _STACKED),
    **dict.fromkeys(("dot", "vdot"), _DOT),
    "linear": _torch_rows,
    **dict.fromkeys(("_weight_int8pack_mm", "_weight_int4pack_mm", "_grouped_mm", "_scaled_grouped_mm"), _torch_rows),
    "inner": _torch_inner,
    "tensordot": _tensordot,
    "bilinear": _bilinear,
    "einsum": lambda arguments, results: _einsum(arguments["equation"], [t.shape for t in arguments["tensors"]]),
    **dict.fromkeys(
        (
            "scaled_dot_product_attention",
            "_scaled_dot_product_attention_math",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
        ),
        _torch_attention,
    ),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_backward",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
            "_scaled_dot_product_efficient_attention_backward",
            "_scaled_dot_product_cudnn_attention_backward",
        ),
        _attention_backward,
    ),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _cell),
}
_UNCOUNTED = (
    "fft_", "_fft_", "stft", "istft", "linalg_", "_linalg_", "chain_matmul", "cdist", "_cdist", "cholesky", "lu_", "qr",
    "svd", "ormqr", "triangular_solve", "matrix_exp", "conv_tbc", "_trilinear", "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd", "mkldnn_", "_flex_attention", "quantized_",
)  # fmt: skip
_REDUCTIONS = frozenset({"linalg_vector_norm", "linalg_norm", "linalg_matrix_norm", "linalg_cross", "linalg_diagonal"})


# ONNX: rules by type, on shapes by position.

Shapes = Sequence[Any]


def _onnx_convolution(weight: int, transposed: bool = False) -> Callable[[Shapes, Shapes, Mapping[str, Any]], int]:
    def rule(inputs: Shapes, outputs: Shapes, attributes: Mapping[str, Any]) -> int:
        moved = inputs[0] if transposed else outputs[0]
        return _convolution(inputs[0][0], inputs[weight], moved[2:])

    return rule


def _onnx_product(right: int) -> Callable[[Shapes, Shapes, Mapping[str, Any]], int]:
    return lambda inputs, outputs, attributes: _product(inputs[0], inputs[right])


def _gemm(inputs: Shapes, outputs: Shapes, attributes: Mapping[str, Any]) -> int:
    columns: int = inputs[1][0 if attributes.get("transB") else 1]
    return prod(inputs[0]) * columns


def _onnx_recurrent(inputs: Shapes, outputs: Shapes, attributes: Mapping[str, Any]) -> int:
    count: int = prod(inputs[0][:2]) * (prod(inputs[1]) + prod(inputs[2]))
    return count


def _onnx_attention(inputs: Shapes, outputs: Shapes, attributes: Mapping[str, Any]) -> int:
    query, key, value = inputs[:3]
    if len(query) == 3:  # the heads lie side by side: (batch, length, heads * size)
        heads, shared = attributes["q_num_heads"], attributes["kv_num_heads"]
        query = (query[0], heads, query[1], query[2] // heads)
        key, value = ((side[0], shared, side[1], side[2] // shared) for side in (key, value))
    past = inputs[4][2] if len(inputs) > 4 and inputs[4] is not None else 0
    return _attention(query, (*key[:2], key[2] + past, key[3]), value)


_ONNX: Mapping[str, Callable[[Shapes, Shapes, Mapping[str, Any]], int]] = {
    **dict.fromkeys(("Conv", "ConvInteger", "DeformConv"), _onnx_convolution(1)),
    "QLinearConv": _onnx_convolution(3),
    "ConvTranspose": _onnx_convolution(1, transposed=True),
    **dict.fromkeys(("MatMul", "MatMulInteger"), _onnx_product(1)),
    "QLinearMatMul": _onnx_product(3),
    "Gemm": _gemm,
    "Einsum": lambda inputs, outputs, attributes: _einsum(attributes["equation"], inputs),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _onnx_recurrent),
    "Attention": _onnx_attention,
}
_ONNX_UNCOUNTED = frozenset(
    {"DFT", "STFT", "Det", "If", "Loop", "Scan", "SequenceMap", "LinearAttention", "CausalConvWithState"}
)
