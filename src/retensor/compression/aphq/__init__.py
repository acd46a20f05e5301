r"""APHQ-ViT: vision transformers with weights and activations in few bits, fitted where predictions turn on it.

Every linear layer, convolution and product of attention is rounded uniformly, with one step for each output channel of
a weight, for each activation, and for each head of attention, by some hundred unlabelled images (:func:`quantize`).

Source: Z. Wu, J. Zhang, J. Chen, J. Guo, D. Huang, Y. Wang, "APHQ-ViT: Post-Training Quantization with Average
Perturbation Hessian Based Reconstruction for Vision Transformers", CVPR 2025, arXiv 2504.02508. What a block gives,
:math:`z`, is held to what it gave, :math:`z^*`, by

.. math::
    L = \frac{1}{|z|} \sum_i h_i \, (z_i - z^*_i)^2, \qquad
    h = \mathbb{E}\, \big| \nabla_z \mathrm{KL}(z^* + \varepsilon v) - \nabla_z \mathrm{KL}(z^* - \varepsilon v) \big|,

where :math:`\mathrm{KL}` is the divergence of the model's predictions, at a temperature :math:`T`, from those of
:math:`z^*`, and the mean is over images (:func:`perturbation_hessian`). Three stages follow each other:

- :func:`reconstruct_mlp`: activations of MLPs become ReLUs with bounded outputs, which a uniform quantiser from 0 fits.
- :func:`calibrate`: steps are searched, and channels behind normalisations made alike (RepQ-ViT).
- :func:`reconstruct_blocks`: AdaRound and learned steps of activations, with QDrop.

The direction :math:`v` has random signs here. The published one, all ones, is not seen by a pre-norm transformer.
"""

from retensor.compression.aphq.calibrate import Calibrated, Steps, calibrate, reparametrize_
from retensor.compression.aphq.config import Config
from retensor.compression.aphq.hessian import perturbation_hessian
from retensor.compression.aphq.layers import Attention, Product, ReLU, Rounder, exposed
from retensor.compression.aphq.mlp import reconstruct_mlp
from retensor.compression.aphq.model import Quantized, quantize, reconstruct_blocks
from retensor.compression.aphq.spec import Spec, find_spec

__all__ = [
    "Attention",
    "Calibrated",
    "Config",
    "Product",
    "Quantized",
    "ReLU",
    "Rounder",
    "Spec",
    "Steps",
    "calibrate",
    "exposed",
    "find_spec",
    "perturbation_hessian",
    "quantize",
    "reconstruct_blocks",
    "reconstruct_mlp",
    "reparametrize_",
]
