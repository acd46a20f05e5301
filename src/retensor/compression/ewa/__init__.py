r"""Experts Weights Averaging (EWA): feed-forward layers trained as averaged experts, and folded into one.

Some feed-forward networks (FFNs) of a vision transformer are trained as N experts each. Every pass shares the tokens of
the batch out among them at random and evenly, with no router: what it computes costs as much as the one FFN. After
every step of the optimizer the experts are drawn together, and after training each mixture becomes one FFN, the mean of
its experts: the deployed model is the original architecture, at the original cost. What a mixture takes before it is
folded (N times the parameters) is the price of training, so compare the folded model.

Source: Y. Huang, P. Ye, X. Huang, S. Li, T. Chen, T. He, W. Ouyang, "Experts Weights Averaging: A New General Training
Scheme for Vision Transformers", 2023, arXiv 2308.06093. With experts :math:`E_1, \dots, E_N`, their mean
:math:`\bar E = \frac1N \sum_j E_j` and share rate :math:`\beta`, after the step t of T

.. math:: E_i \leftarrow (1 - \beta)\, E_i + \beta\, \bar E, \qquad \beta = r\, t / T,

which keeps :math:`\bar E` and shrinks the deviations :math:`D_i = E_i - \bar E` by :math:`1 - \beta`. With updates
:math:`u_i(s)` of the optimizer they are a decayed history of how the experts were told apart,
:math:`D_i(t) = \sum_{s \le t} \prod_{s \le v \le t} (1 - \beta_v)\, (u_i(s) - \bar u(s))`, beside what is left of the
deviations they began with.

:func:`convert` puts the experts in, :func:`attach` averages them after the optimizer's steps, :func:`fold` makes one
FFN of them. :func:`route` and ``attach(..., until=...)`` are what the authors call Early EWA: a routed mixture, which
stays for inference, whose experts are averaged in the early part of training only.

Under distributed training every rank applies the same average to the same weights; ``use_generator(model, seed)`` lets
each draw partitions of its own, where all ranks have set torch's seed alike. Drop-path stays where it was, outside the
experts.
"""

from retensor.compression.ewa.assignment import Assignment
from retensor.compression.ewa.averaging import Averaging, LayerStats, attach, average_, stats
from retensor.compression.ewa.conversion import convert, fold, route
from retensor.compression.ewa.experts import ExpertLinear, ExpertNorm, balance_loss, set_eval_mode, use_generator
from retensor.compression.ewa.feed_forward import FeedForward, feed_forwards

__all__ = [
    "Assignment",
    "Averaging",
    "ExpertLinear",
    "ExpertNorm",
    "FeedForward",
    "LayerStats",
    "attach",
    "average_",
    "balance_loss",
    "convert",
    "feed_forwards",
    "fold",
    "route",
    "set_eval_mode",
    "stats",
    "use_generator",
]
