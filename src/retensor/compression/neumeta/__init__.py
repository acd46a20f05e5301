"""Neural Metamorphosis: one small implicit function that holds the weights of a network at every width.

Of a trained network, some layers are generated: the value of entry (o, c) of tensor l is a small perceptron's value at
that entry's coordinates and the tensor's sizes, so that any width can be asked for, one never trained too, and working
weights come out at once (:meth:`NeuMeta.sample`). Two things make weights a function smooth enough: channels are
reordered along a shortest Hamiltonian path, which changes nothing that the network computes (:func:`fuse_and_smooth`),
and coordinates are noisy while the function is trained (:func:`fit`). All other layers keep their values.

Source: Xingyi Yang, Xinchao Wang, "Neural Metamorphosis", ECCV 2024, arXiv 2410.11878. In its symbols,
``W_i(l, o, c) = F(v; theta)``, ``v = [l/L, o/C_out, c/C_in, L/N, C_out/N, C_in/N]``, with
``min_theta E_i [ L_task(F(v_i + eps; theta)) + L_recon + L_reg ]`` over widths i and ``eps ~ U(-nu/2, nu/2)``.
:func:`warm_start` is an addition. Each tensor's perceptron is chosen by the tensor's number; the authors' code takes
the number from the noisy coordinate, which sends about half of the entries to the perceptron of the tensor before.
"""

from retensor.compression.neumeta.field import WeightField, coordinates, features
from retensor.compression.neumeta.generated import Generated
from retensor.compression.neumeta.groups import ChannelGroup, Member, channel_groups
from retensor.compression.neumeta.hyper import NeuMeta, load
from retensor.compression.neumeta.smoothing import path_length, shortest_path, total_variation
from retensor.compression.neumeta.space import Axis, WidthSpace, fuse_and_smooth
from retensor.compression.neumeta.training import BypassTrapError, FitReport, dead_share, fit, warm_start
from retensor.replacing import fold_norms as fuse

__all__ = [
    "Axis",
    "BypassTrapError",
    "ChannelGroup",
    "FitReport",
    "Generated",
    "Member",
    "NeuMeta",
    "WeightField",
    "WidthSpace",
    "channel_groups",
    "coordinates",
    "dead_share",
    "features",
    "fit",
    "fuse",
    "fuse_and_smooth",
    "load",
    "path_length",
    "shortest_path",
    "total_variation",
    "warm_start",
]
