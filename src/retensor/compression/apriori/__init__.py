"""Convolutions of wave simulators, compressed before training: one-way filters in the place of 2-way and 3-way kernels.

A dense kernel ``K[o,c,y,x]`` never exists; the layer holds factors of it and runs one convolution for each, along one
axis at a time. In the canonical format, with ``R`` components,

    ``K[o,c,y,x] = sum_r A_o[o,r] A_c[c,r] u[r,y] w[r,x]``

with ``R (C_out + C_in + 2 k)`` parameters for ``k^2 C_in C_out``, and one more filter of ``R k`` for a third axis.
Four more formats, first values of the right variance, a finite-element solver of the wave equation that makes the
data, models that step it forward, and films of what they predict come with it.

Source: S. Boukraichi, N. Akkari, F. Casenave, D. Ryckelynck, "A priori compression of convolutional neural networks
for wave simulators", 2023, arXiv 2304.04964.
"""

from retensor.compression.apriori.compress import Choice, choices, compress, factored
from retensor.compression.apriori.film import film
from retensor.compression.apriori.formats import FORMATS
from retensor.compression.apriori.init import balance_, balancer, initialise_
from retensor.compression.apriori.layers import (
    CPConv1d,
    CPConv2d,
    CPConv3d,
    CPConvTranspose1d,
    CPConvTranspose2d,
    CPConvTranspose3d,
    FactoredConv1d,
    FactoredConv2d,
    FactoredConv3d,
    FactoredConvTranspose1d,
    FactoredConvTranspose2d,
    FactoredConvTranspose3d,
)
from retensor.compression.apriori.simulator import FieldDecoder, WaveStepper, pairs, relative_l2, rollout, step_loss
from retensor.compression.apriori.summary import Row, Summary, summary
from retensor.compression.apriori.waves import Mesh, Trajectory, energy, leapfrog, newmark, wave2d

__all__ = [
    "FORMATS",
    "CPConv1d",
    "CPConv2d",
    "CPConv3d",
    "CPConvTranspose1d",
    "CPConvTranspose2d",
    "CPConvTranspose3d",
    "Choice",
    "FactoredConv1d",
    "FactoredConv2d",
    "FactoredConv3d",
    "FactoredConvTranspose1d",
    "FactoredConvTranspose2d",
    "FactoredConvTranspose3d",
    "FieldDecoder",
    "Mesh",
    "Row",
    "Summary",
    "Trajectory",
    "WaveStepper",
    "balance_",
    "balancer",
    "choices",
    "compress",
    "energy",
    "factored",
    "film",
    "initialise_",
    "leapfrog",
    "newmark",
    "pairs",
    "relative_l2",
    "rollout",
    "step_loss",
    "summary",
    "wave2d",
]
