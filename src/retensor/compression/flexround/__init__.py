r"""FlexRound: weights in few bits, rounded after a division that is learned for each of them.

A trained model is put in 2 to 8 bits with some hundred unlabelled samples and no training of the whole
(:func:`quantize`): its blocks are fitted one after another to what they gave before, by what their weights are divided
by before they are rounded.

Source: J. H. Lee, J. Kim, S. J. Kwon, D. Lee, "FlexRound: Learnable Rounding based on Element-wise Division for
Post-Training Quantization", ICML 2023, arXiv 2306.00317. For a weight :math:`W`, :math:`b` bits and a zero point
:math:`z`

.. math::
    \hat W = s_1 \, \mathrm{clip}\big(\lfloor W / S \rceil, -z, 2^b - 1 - z\big), \qquad
    S = s_1 \odot S_2 \odot s_3 \odot s_4,

where :math:`s_1` is the common step, :math:`S_2` has the weight's shape, :math:`s_3` a number for each output and
:math:`s_4`, in convolutions, one for each input. All are learned; at the start the last three are 1, which rounds to
nearest. The rounding lets gradients through, the clipping within its range:

.. math::
    \frac{\partial L}{\partial \log S'_{ij}} = - \frac{W_{ij}}{S'_{ij}} \frac{\partial L}{\partial \hat W_{ij}},
    \qquad S' = S_2 \odot s_3 \odot s_4,

so that large weights move more, and may move by several steps, and a weight of 0 stays. The sequel, LRQ (J. H. Lee and
others 2024, arXiv 2407.11534), makes :math:`\log S'` of low rank. The rivals stand in the same loop: rounding to
nearest, AdaRound, which learns up or down, and AdaQuant, which learns what is added.
"""

from retensor.compression.flexround.learners import LRQ, AdaQuant, FlexRound
from retensor.compression.flexround.methods import Rounding, moved
from retensor.compression.flexround.model import Quantized, quantize

__all__ = ["LRQ", "AdaQuant", "FlexRound", "Quantized", "Rounding", "moved", "quantize"]
