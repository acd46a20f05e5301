r"""JLCM: every weight a short index into a small codebook, and both learned together.

A model is planned for a number of bytes (:func:`plan`) or with the same codebooks everywhere (:func:`uniform`), its
output neurons are put in the order of groups with similar weights where what reads them can follow (:func:`reorder`),
and codebooks and indices are learned on calibration samples, unit by unit (:func:`compress`). What is kept are indices,
packed bit for bit, and codebooks (:class:`CodebookLayer`).

Source: E. Yvinec, A. Dapogny, K. Bailly, "Network Memory Footprint Compression Through Jointly Learnable Codebooks and
Mappings", ICLR 2024, arXiv 2309.17361. With codebooks :math:`C`, the map :math:`I` of weights to codewords, and the
group :math:`g(i)` of row i,

.. math::
    W'_{ij} = C_{g(i)}[I_{ij}] \quad\text{or}\quad W'_{ij} = s_{g(i)}\, C[I_{ij}], \qquad
    \min_{C, I, s} \; \lVert f(X) - f'(X') \rVert^2 .

The steps that the published text leaves open are set here: how rows are grouped (:mod:`.grouping`), which orders can be
absorbed (:mod:`.trace`), where codes start (:mod:`.initial`), and the proximal gradient's fall with the distance of two
codewords (:mod:`.learn`). :func:`lut_linear` multiplies without the weights.
"""

from retensor.compression.jlcm.budget import knapsack
from retensor.compression.jlcm.compress import Compressed, LayerReport, compress, load, resident_bytes
from retensor.compression.jlcm.grouping import Layout, group_rows, row_features
from retensor.compression.jlcm.initial import Coded, nearest_codes
from retensor.compression.jlcm.kmeans import kmeans_1d, nearest
from retensor.compression.jlcm.layer import CodebookLayer, Coding, codebook_layer
from retensor.compression.jlcm.learn import CodebookLearner, JointLearning, LogitOptimizer, Rule, jumps
from retensor.compression.jlcm.lut import lut_linear
from retensor.compression.jlcm.movable import Movable, Place, Trace
from retensor.compression.jlcm.plan import LayerPlan, Plan, plan, uniform
from retensor.compression.jlcm.reorder import Reordering, reorder
from retensor.compression.jlcm.trace import trace

__all__ = [
    "CodebookLayer",
    "CodebookLearner",
    "Coded",
    "Coding",
    "Compressed",
    "JointLearning",
    "LayerPlan",
    "LayerReport",
    "Layout",
    "LogitOptimizer",
    "Movable",
    "Place",
    "Plan",
    "Reordering",
    "Rule",
    "Trace",
    "codebook_layer",
    "compress",
    "group_rows",
    "jumps",
    "kmeans_1d",
    "knapsack",
    "load",
    "lut_linear",
    "nearest",
    "nearest_codes",
    "plan",
    "reorder",
    "resident_bytes",
    "row_features",
    "trace",
    "uniform",
]
