r"""PELA: one smaller checkpoint of a pretrained model, repaired once and then fine-tuned as any other.

Every linear layer is replaced by two of low rank that start at its truncated singular value decomposition
(:func:`plan`, :func:`compress`). The student is then trained for a while with the original as its teacher
(:class:`PELALoss`), and from there on is an ordinary model: it needs neither the teacher nor a special loss, and
:func:`load` puts its checkpoint into the original architecture.

Source: Y. Guo, G. Wang, M. Kankanhalli, "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation",
CVPR 2024, arXiv 2310.10700. For a weight :math:`W` of shape (o, i) and compression ratio :math:`c`

.. math::
    r = \lfloor o\,i \,/\, c\,(o + i) \rfloor, \qquad W = U S V^\top, \qquad
    A = S_r^{1/2} V_r^\top, \qquad B = U_r S_r^{1/2},

and the loss of the repair is, over K blocks with outputs F and P replaced layers,

.. math::
    L = L_{task} + \frac{\alpha}{K} \sum_k \mathrm{MSE}(F_k^s, F_k^t)
      + \frac{\gamma}{P} \sum_p \big(\max_{jk} |B_p A_p - W_p|_{jk} - \epsilon\big)^2
      + \beta\, \mathrm{MSE}(y^s, y^t).
"""

from retensor.compression.pela.layer import LowRankLinear
from retensor.compression.pela.loss import PELALoss, blocks, feature_loss, weight_loss
from retensor.compression.pela.model import compress, deviations, load, merge, skeleton
from retensor.compression.pela.ranks import OMIT, LayerPlan, Plan, plan, rank_of
from retensor.compression.pela.svd import balanced_factors, singular_values

__all__ = [
    "OMIT",
    "LayerPlan",
    "LowRankLinear",
    "PELALoss",
    "Plan",
    "balanced_factors",
    "blocks",
    "compress",
    "deviations",
    "feature_loss",
    "load",
    "merge",
    "plan",
    "rank_of",
    "singular_values",
    "skeleton",
    "weight_loss",
]
