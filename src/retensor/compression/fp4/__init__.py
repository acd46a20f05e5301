r"""FP4 training: every quantiser of the three products of a layer, its full gradient, and a simulator that sweeps them.

A layer :math:`Y = X W^\top` trains by three products, :math:`Y`, :math:`dX = dY\,W` and :math:`dW = dY^\top X`. Each
reads two operands of 4 bits, so that there are six quantisers, each in blocks along its own reduction axis
(:class:`Recipe`). :func:`convert` puts them in a model, :func:`overhead` counts what they cost, and :func:`sweep` runs
a grid of recipes and finds the frontier of performance over overhead.

Source: R. Hu, C. Luschi, P. Balanca, "Elucidating the Design Space of FP4 Training", 2025, arXiv 2509.17791. With a
block of B numbers, its largest :math:`a = \arg\max |x|`, the largest element 6, a rounding :math:`Q` of elements and
one :math:`Q_s` of scales,

.. math::
    s = |x_a| / 6, \quad s_q = s_T Q_s(s / s_T), \quad u = x / s_q, \quad \hat x = s_q Q(u), \quad
    s_T = \max |X| / (6 s_{\max}),

and, with slopes :math:`Q'` and :math:`Q_s'` that stand for those of the staircases, the gradient is

.. math::
    \frac{\partial L}{\partial x_j} = g_j Q'(u_j) + 1_{j = a} \frac{\operatorname{sign} x_a}{6} Q_s'\, R, \qquad
    R = \sum_i g_i \big(Q(u_i) - u_i Q'(u_i)\big),

and at the tensor's largest number :math:`\operatorname{sign}(x) / (6 s_{\max})` times the sum over blocks of
:math:`(Q_s(v) - v Q_s'(v)) R`, :math:`v = s / s_T`, more. Products are simulated: the numbers are those of 4 bits, in
float32, and so are the sums.
"""

from retensor.compression.fp4.counting import OperationCounter
from retensor.compression.fp4.format import MXFP4, NVFP4, UE5M3, Format
from retensor.compression.fp4.gradient import ESTIMATORS, SCALE_GRADIENTS, pullback, slope_of
from retensor.compression.fp4.hadamard import rotate, unrotate
from retensor.compression.fp4.layers import FP4Conv1D, FP4Conv2d, FP4Linear, convert, matmul
from retensor.compression.fp4.overhead import SLOPE_OPERATIONS, OperandCost, Overhead, overhead, product_overhead
from retensor.compression.fp4.quantize import encode, quantize
from retensor.compression.fp4.recipe import GEMMS, OPERANDS, Recipe
from retensor.compression.fp4.sweep import Run, Sweep, configurations, sweep
from retensor.compression.fp4.training import SpikeAwareAdamW, train_step

__all__ = [
    "ESTIMATORS",
    "GEMMS",
    "MXFP4",
    "NVFP4",
    "OPERANDS",
    "SCALE_GRADIENTS",
    "SLOPE_OPERATIONS",
    "UE5M3",
    "FP4Conv1D",
    "FP4Conv2d",
    "FP4Linear",
    "Format",
    "OperandCost",
    "OperationCounter",
    "Overhead",
    "Recipe",
    "Run",
    "SpikeAwareAdamW",
    "Sweep",
    "configurations",
    "convert",
    "encode",
    "matmul",
    "overhead",
    "product_overhead",
    "pullback",
    "quantize",
    "rotate",
    "slope_of",
    "sweep",
    "train_step",
    "unrotate",
]
