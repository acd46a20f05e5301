"""``quantize``: a vision transformer with weights and activations in few bits, all stages one after another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from retensor.compression.aphq.blocks import BlockRounding
from retensor.compression.aphq.calibrate import Calibrated, calibrate
from retensor.compression.aphq.config import Config
from retensor.compression.aphq.layers import products
from retensor.compression.aphq.mlp import fitted_mlps
from retensor.compression.aphq.spec import Spec, check_images, find_spec
from retensor.errors import RetensorError
from retensor.quantizing import AffineTensor, Learning, QuantizedLayer, Reconstruction, UnitReport, reconstruct, to_onnx


@dataclass(frozen=True)
class Quantized(Reconstruction):
    """A model in few bits, which is called as the given one.

    Attributes
    ----------
    model : nn.Module
        In eval mode, with :class:`retensor.quantizing.QuantizedLayer` in the places of its layers.
    report : tuple of UnitReport
        For each unit, the relative mean square of its error when the fitting began and at the end, and in ``found``:
        ``moved``, for each layer the part of its weights that is not rounded to nearest; ``products``, those of
        attention whose operands are rounded.
    mlps : tuple of UnitReport
        The same of the MLPs whose activation became a ReLU, with the bound of their hidden numbers; empty without.
    """

    mlps: tuple[UnitReport, ...] = ()

    def __call__(self, images: torch.Tensor) -> Any:
        """What the model gives, with its weights and activations in few bits."""
        return self.model(images)

    def integers(self) -> dict[str, AffineTensor]:
        """Codes, steps and zero points of each layer's weight, by name."""
        return {name: layer.kept() for name, layer in self.model.named_modules() if isinstance(layer, QuantizedLayer)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a file (:func:`retensor.save`); :func:`retensor.load` reads it, given the original.

        Raises
        ------
        RetensorError
            Where weights are of more than 8 bits.
        """
        self._check_codes()
        super().save(path)

    def to_onnx(self, example: torch.Tensor, path: str | os.PathLike[str]) -> None:
        """Write an ONNX file with the codes (:func:`retensor.quantizing.to_onnx`), for inputs like ``example``.

        Raises
        ------
        RetensorError
            Where weights are of more than 8 bits, or torch cannot export the model.
        """
        self._check_codes()
        to_onnx(self.model, example, path)

    def _check_codes(self) -> None:
        if any(isinstance(module, Learning) for module in self.model.modules()):
            raise RetensorError("weights of more than 8 bits have no codes to write; take w_bits from 2 to 8")


def quantize(
    model: nn.Module, images: torch.Tensor, config: Config | None = None, *, spec: Spec | None = None
) -> Quantized:
    """Put weights and activations of a vision transformer in few bits: all linear layers, convolutions and products.

    MLPs get ReLUs (:func:`reconstruct_mlp`), steps are searched (:func:`calibrate`), and blocks are fitted
    (:func:`reconstruct_blocks`).

    Parameters
    ----------
    model : nn.Module
        A classifier: timm's ViT, DeiT or Swin, or another with ``spec``. Left as it is.
    images : torch.Tensor
        Some hundred, without labels, prepared as for the model.
    config : Config, optional
    spec : Spec, optional

    Returns
    -------
    Quantized

    Raises
    ------
    TypeError, ValueError
        Where the model has no known blocks and no spec is given, its attention is of another kind, or images are fewer
        than ``config.batch``.
    RuntimeError
        Where importance is 0 or not finite, named by the module.

    Examples
    --------
    >>> from retensor.data import reference
    >>> model, digits = reference("digits-vit")
    >>> few = quantize(model, digits.x[:64], Config(iters=4, calib=32, rounds=1))
    >>> few(digits.x_test[:5]).shape, few.integers()["head"].codes.dtype
    (torch.Size([5, 10]), torch.uint8)
    """
    config, spec = config or Config(), spec or find_spec(model)
    check_images(model, images, config.batch)
    mlps: tuple[UnitReport, ...] = ()
    if config.mlp and spec.mlp:
        fitted = fitted_mlps(model, images, config, spec)
        model = fitted.model
        mlps = tuple(unit for unit in fitted.report if unit.name in spec.mlp)
    done = reconstruct_blocks(calibrate(model, images, config, spec=spec), images)
    return Quantized(done.model, done.report, mlps)


def reconstruct_blocks(ready: Calibrated, images: torch.Tensor, config: Config | None = None) -> Quantized:
    """Fit a calibrated model's blocks, in few bits, to what they gave.

    Weights are rounded by AdaRound, with steps that stay; steps of activations are learned. Part of the inputs of a
    block comes from behind the blocks that are done, and part of the activations inside stays as it is meanwhile
    (QDrop). The last layer is fitted to the model's predictions.

    Parameters
    ----------
    ready : Calibrated
    images : torch.Tensor
        The first ``config.recon`` are used.
    config : Config, optional
        Other settings than those it was calibrated with, of the same bits.

    Returns
    -------
    Quantized

    Examples
    --------
    >>> from retensor.data import reference
    >>> model, digits = reference("digits-vit")
    >>> ready = calibrate(model, digits.x[:64], Config(calib=32, rounds=1))
    >>> [unit.name for unit in reconstruct_blocks(ready, digits.x[:64], Config(iters=0)).report]
    ['patch_embed', 'blocks.0', 'blocks.1', 'blocks.2', 'head']
    """
    config = config or ready.config
    check_images(ready.model, images, config.batch)
    if (config.w_bits, config.a_bits) != (ready.config.w_bits, ready.config.a_bits):
        raise ValueError(
            f"the model was calibrated for W{ready.config.w_bits}A{ready.config.a_bits}, and "
            f"W{config.w_bits}A{config.a_bits} is asked for; calibrate it anew"
        )
    ready = Calibrated(ready.model, ready.steps, ready.spec, config)
    images = images[: config.recon]
    done = reconstruct(
        ready.model, images, BlockRounding(ready, images), blocks=list(ready.spec.blocks), steps=config.iters,
        batch=config.batch, input_mix=config.mixed, seed=config.seed,
    )  # fmt: skip
    shown = {name for unit in done.report for name in unit.found["products"]}
    for name in products(done.model):
        if name not in shown:
            raise ValueError(f"the product '{name}' lies outside of all blocks; name one that holds it in spec")
    return Quantized(done.model, done.report)
