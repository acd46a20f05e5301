"""Weight Compander: every weight becomes a bounded function of a free latent one, which regularises the training.

The optimiser holds the latent ``v``, the layer uses ``w = Psi(v)``, and after training ``w`` is folded into plain
weights at no cost. No weight can grow past a cap, weights near zero move further in a step than others, and
neither needs a term in the loss, so that it goes with weight decay, dropout and the rest.

Source: R. Cakaj, J. Mehnert, B. Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", 2023,
arXiv 2306.16993::

    w = Psi(v) = a arctan(v / b),      |w| <= a pi / 2,      Psi'(v) = (a / b) / (1 + (v / b)^2)

A step of gradient descent on ``v`` moves ``w``, to first order, as one on ``w`` with the learning rate times
``Psi'(v)^2 = (a / b)^2 cos(w / a)^4``: ``(a / b)^2`` at zero, nothing at the cap. Weight decay acts on ``v``, as on all
that an optimiser holds; in ``w`` it pulls ``a / b`` times as hard near zero, and brings back weights near the cap.
"""

from __future__ import annotations

from retensor.compression.weight_compander.function import psi, psi_inverse, psi_slope, recomputed
from retensor.compression.weight_compander.models import apply, bake, is_applied, param_groups
from retensor.compression.weight_compander.parametrization import WeightCompander
from retensor.compression.weight_compander.reports import CompanderReport, LayerReport, report
from retensor.compression.weight_compander.weights import TYPES

__all__ = [
    "TYPES",
    "CompanderReport",
    "LayerReport",
    "WeightCompander",
    "apply",
    "bake",
    "is_applied",
    "param_groups",
    "psi",
    "psi_inverse",
    "psi_slope",
    "recomputed",
    "report",
]
