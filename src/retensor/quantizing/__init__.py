"""Numbers of few bits: grids of values, rounding onto them, blocks with a scale, and codes packed bit for bit.

What every system of few-bit tensors stands on. A :class:`~retensor.quantizing.grids.Grid` is the list of the numbers
that its codes stand for; everything else follows from it.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    from retensor.errors import MissingExtraError

    raise MissingExtraError("tensors of few bits", "torch") from error

from retensor.quantizing.affine import Affine, AffineTensor
from retensor.quantizing.block_layers import BlockLayer, block_layer
from retensor.quantizing.blocks import Blocks, BlockTensor
from retensor.quantizing.export import to_onnx
from retensor.quantizing.grids import (
    GRIDS,
    UNROUNDED,
    Grid,
    Unrounded,
    codebook,
    floating,
    integers,
    logarithmic,
    powers_of_two,
)
from retensor.quantizing.layers import ActivationQuantizer, Learning, QuantizedLayer, fake_quantized, quantized_layer
from retensor.quantizing.learners import AdaRound, RoundToNearest, WeightLearner
from retensor.quantizing.onnx_file import WeightReport, quantize_onnx
from retensor.quantizing.packing import pack, packed_bytes, unpack
from retensor.quantizing.reconstruct import Fitting, Method, Reconstruction, UnitReport, reconstruct
from retensor.quantizing.rounding import ESTIMATORS, rounded
from retensor.quantizing.samples import Samples, Storage
from retensor.quantizing.torchao_tensors import to_torchao
from retensor.quantizing.units import Unit, find_units

__all__ = [
    "ESTIMATORS",
    "GRIDS",
    "UNROUNDED",
    "ActivationQuantizer",
    "AdaRound",
    "Affine",
    "AffineTensor",
    "BlockLayer",
    "BlockTensor",
    "Blocks",
    "Fitting",
    "Grid",
    "Learning",
    "Method",
    "QuantizedLayer",
    "Reconstruction",
    "RoundToNearest",
    "Samples",
    "Storage",
    "Unit",
    "UnitReport",
    "Unrounded",
    "WeightLearner",
    "WeightReport",
    "block_layer",
    "codebook",
    "fake_quantized",
    "find_units",
    "floating",
    "integers",
    "logarithmic",
    "pack",
    "packed_bytes",
    "powers_of_two",
    "quantize_onnx",
    "quantized_layer",
    "reconstruct",
    "rounded",
    "to_onnx",
    "to_torchao",
    "unpack",
]
