"""``quantize``: a model in few bits, with weights rounded as FlexRound or a rival learns."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from retensor.compression.flexround.methods import RATES, Name, Rounding
from retensor.files import described
from retensor.quantizing import ActivationQuantizer, Affine, Reconstruction, Storage, reconstruct
from retensor.quantizing.samples import call_of
from retensor.replacing import fold
from retensor.units import check_flags


@dataclass(frozen=True)
class Quantized(Reconstruction):
    """A model in few bits.

    Attributes
    ----------
    model : nn.Module
        In eval mode, with :class:`retensor.quantizing.QuantizedLayer` in the places of its layers.
    report : tuple of UnitReport
        For each unit, the relative mean square of its error when the method began and at the end, and in ``found``:
        ``layers``, for each layer what :func:`moved` says; ``left``, layers whose weight is another module's too, which
        stay as they are; ``learned``, how many values were.
    """

    def to_fake_quant(self) -> nn.Module:
        """Plain layers with the weights that codes stand for, where inputs are not rounded (:func:`retensor.fold`)."""
        return fold(self.model)

    def export(self, example: Any) -> torch.export.ExportedProgram:
        """The model as torch exports it, for arguments of the shapes of ``example``."""
        arguments, named = call_of(example)
        return torch.export.export(self.model, arguments, named)


def quantize(
    model: nn.Module,
    calibration: Any,
    *,
    weight: Affine | None = None,
    act: ActivationQuantizer | None = None,
    method: Name = "flexround",
    blocks: Literal["auto"] | Sequence[str] = "auto",
    ends: int | None = None,
    steps: int = 500,
    lr: float | None = None,
    step_lr: float | None = None,
    act_lr: float = 2e-3,
    batch: int = 32,
    input_mix: float = 0.5,
    held_out: float = 0.1,
    learn_step: bool = True,
    rows: bool = True,
    columns: bool = True,
    rank: int | None = None,
    regularisation: float = 0.01,
    storage: Storage | None = None,
    seed: int = 0,
) -> Quantized:
    """Put the weights of a model in few bits, unit by unit, each fitted to what it gave before.

    Parameters
    ----------
    model : nn.Module
        Left as it is. Batch normalisation is to be folded before (:func:`retensor.replacing.fold_norms`).
    calibration
        Samples of its arguments, without labels: a tensor, a tuple or mapping of tensors, or a list of such batches.
    weight : retensor.quantizing.Affine
        The quantiser of weights; 4 bits and one step for each by default.
    act : retensor.quantizing.ActivationQuantizer, optional
        What rounds the inputs of layers, one like it for each: by the range of each row (``mode="token"``), or by one
        step, which is learned too (``mode="tensor"``).
    method : {"flexround", "lrq", "adaquant", "adaround", "rtn"}
    blocks : "auto" or sequence of str
        What is fitted at once: see :func:`retensor.quantizing.find_units`.
    ends : int, optional
        Least bits of the first layer of the model and of the last, as is usual for convolutional networks: 8.
    steps, batch : int
        Steps for each unit, and samples of each.
    lr : float, optional
        Of Adam, at its highest; it falls to nothing along a cosine. The best depends on the model and on the bits, so
        try several. By default 3e-3 (FlexRound, LRQ), 1e-3 (AdaQuant) or 1e-2 (AdaRound).
    step_lr : float, optional
        That of the logarithm of ``s1``; ``lr`` by default.
    act_lr : float
        That of the steps of inputs, relative to each.
    input_mix, held_out
        See :func:`retensor.quantizing.reconstruct`.
    learn_step, rows, columns : bool
        False leaves out what is learned of ``s1``, ``s3`` and ``s4``.
    rank : int, optional
        Of LRQ; see :class:`LRQ`.
    regularisation : float
        Of AdaRound: how much its regulariser counts.
    storage : retensor.quantizing.Storage, optional
        Where what reaches units is kept, which takes the most memory: in half precision, or on disk.
    seed : int

    Returns
    -------
    Quantized

    Raises
    ------
    TypeError, ValueError
        Where an argument is out of range or does not fit the model.
    RuntimeError
        Where numbers are not finite, named by the unit, or weights hold no values (meta device).

    Examples
    --------
    >>> from retensor.data import reference
    >>> model, digits = reference("digits-mlp")
    >>> few = quantize(model, digits.x[:128], weight=Affine(4), steps=20)
    >>> [unit.name for unit in few.report], few.nbytes
    (['1', '3', '5'], 12943)
    """
    weight = Affine(4) if weight is None else weight
    _check(weight, act, method, ends, lr=lr, step_lr=step_lr, act_lr=act_lr, regularisation=regularisation)
    check_flags(learn_step=learn_step, rows=rows, columns=columns)
    if isinstance(model, nn.Module) and any(isinstance(module, _BatchNorm) for module in model.modules()):
        warnings.warn(
            "the model has batch normalisations, which are not put in few bits; fold them into the layers before them "
            "with retensor.replacing.fold_norms first",
            stacklevel=2,
        )
    highest = RATES[method] if lr is None else lr
    rounding = Rounding(
        weight,
        act,
        method,
        lr=highest,
        step_lr=highest if step_lr is None else step_lr,
        act_lr=act_lr,
        ends=ends,
        learn_step=learn_step,
        rows=rows,
        columns=columns,
        rank=rank,
        regularisation=regularisation,
        seed=seed,
    )
    done = reconstruct(
        model,
        calibration,
        rounding,
        blocks=blocks,
        steps=steps,
        batch=batch,
        input_mix=input_mix,
        held_out=held_out,
        storage=storage,
        seed=seed,
    )
    return Quantized(done.model, done.report)


def _check(weight: Any, act: Any, method: Any, ends: Any, **rates: Any) -> None:
    if not isinstance(weight, Affine):
        raise TypeError(f"weight is a retensor.quantizing.Affine, not {described(weight)}")
    if act is not None and not isinstance(act, ActivationQuantizer):
        raise TypeError(f"act is a retensor.quantizing.ActivationQuantizer or None, not {described(act)}")
    if not isinstance(method, str) or method not in RATES:
        raise ValueError(f"method is {described(method)}; it is one of {', '.join(RATES)}")
    if ends is not None and (isinstance(ends, bool) or not isinstance(ends, int) or not 2 <= ends <= 8):
        raise ValueError(f"ends is a number of bits from 2 to 8, not {described(ends)}")
    for name, value in rates.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value < math.inf):
            raise ValueError(f"{name} is a number from 0, not {described(value)}")
