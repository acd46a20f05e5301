r"""ShiftAddViT: a pretrained vision transformer re-parametrised with additions, shifts and a mixture of both.

Attention multiplies with queries and keys of 0 and 1, which is adding, and in the linear order Q(KV)
(:class:`AddAttention`). Linear layers have weights of powers of two, which is shifting (:class:`ShiftLinear`); where
that costs accuracy, each token chooses between a layer that multiplies and one that shifts (:class:`MoELinear`), and a
loss that knows their latencies balances the load (:func:`ll_loss`).

Source: H. You, H. Shi, Y. Guo, Y. Lin, "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision
Transformer", NeurIPS 2023, arXiv 2306.06446. With :math:`b` for codes of 0 and 1 and a router's probabilities p

.. math::
    \mathrm{Attn}(q, k, v) = \tfrac12 v + \tfrac1\pi\, b(q)\,(b(k)^\top v), \qquad
    w = \mathrm{sign} \cdot 2^P, \qquad
    y = p_i E_i(x), \; i = \arg\max p, \qquad
    L = L_{cls} + \lambda \sum \big[\mathrm{SCV}(\alpha \odot I) + \mathrm{SCV}(\alpha \odot Q)\big].

:func:`convert` makes such a model, which is then trained as any other; :func:`freeze` packs it for use, with kernels
that add and shift whole numbers (:func:`mat_add`, :func:`mat_shift`); :func:`energy` says what it saves on an
accelerator whose multiplications cost more than its additions. On a CPU they cost the same.
"""

from retensor.compression.shiftadd.attention import AddAttention, binarized, fit_hashes
from retensor.compression.shiftadd.convert import (
    INCLUDE,
    Latency,
    convert,
    measure_latency,
)
from retensor.compression.shiftadd.energy import PICOJOULES, Energy, energy
from retensor.compression.shiftadd.hashing import KernelHash
from retensor.compression.shiftadd.kernels import (
    mat_add,
    mat_shift,
    pack_rows,
    packed_mat_add,
    shift_linear,
)
from retensor.compression.shiftadd.moe import (
    ALPHA,
    MoELinear,
    RouterReport,
    ll_loss,
    router_report,
    saturations,
)
from retensor.compression.shiftadd.packed import (
    PackedAddAttention,
    PackedMoELinear,
    PackedShiftLinear,
    freeze,
    packed_size,
)
from retensor.compression.shiftadd.shift import ShiftLinear, fixed_point, shift_weight
from retensor.compression.shiftadd.sources import Source, register_attention

__all__ = [
    "ALPHA",
    "INCLUDE",
    "PICOJOULES",
    "AddAttention",
    "Energy",
    "KernelHash",
    "Latency",
    "MoELinear",
    "PackedAddAttention",
    "PackedMoELinear",
    "PackedShiftLinear",
    "RouterReport",
    "ShiftLinear",
    "Source",
    "binarized",
    "convert",
    "energy",
    "fit_hashes",
    "fixed_point",
    "freeze",
    "ll_loss",
    "mat_add",
    "mat_shift",
    "measure_latency",
    "pack_rows",
    "packed_mat_add",
    "packed_size",
    "register_attention",
    "router_report",
    "saturations",
    "shift_linear",
    "shift_weight",
]
