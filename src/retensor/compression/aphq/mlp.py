"""Stage A: MLPs whose activation becomes a ReLU, fitted to what they gave before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from retensor.compression.aphq.config import Config
from retensor.compression.aphq.hessian import before, importance
from retensor.compression.aphq.layers import ReLU
from retensor.compression.aphq.runs import Traced
from retensor.compression.aphq.spec import Spec, check_images, find_spec
from retensor.graph.modes import evaluating
from retensor.quantizing import Fitting, Method, Reconstruction, reconstruct
from retensor.replacing.replace import copied, put

CLAMPED, PART = 2.0, 10.0
"""How much the loss of clamped numbers counts, and what the sum of both is divided by."""
LARGE = 2**24
"""More numbers than these are not sorted; the first ones are."""


def reconstruct_mlp(
    model: nn.Module, images: torch.Tensor, config: Config | None = None, *, spec: Spec | None = None
) -> nn.Module:
    """A model whose MLPs have ReLUs with bounded outputs in the places of their activations.

    For each MLP its two layers are fitted, on what reaches it in the given model, to what it gave, with the average
    perturbation Hessian of its output as weights; and so are they with the hidden numbers cut at the bound that
    ``pct`` of the positive ones of the given model lie below. The normalisation before gets no gradient from either.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    images : torch.Tensor
        Without labels; the first ``config.recon`` are used.
    config : Config, optional
    spec : Spec, optional
        Needed for models that :func:`find_spec` does not know.

    Returns
    -------
    nn.Module
        In eval mode, in full precision.

    Raises
    ------
    TypeError, ValueError
        Where images are fewer than ``config.batch``, or the model has no known blocks and no spec is given.
    RuntimeError
        Where importance is 0 or not finite.

    Examples
    --------
    >>> from retensor.data import reference
    >>> model, digits = reference("digits-vit")
    >>> fitted = reconstruct_mlp(model, digits.x[:64], Config(mlp_iters=20, mlp_lr=1e-3))
    >>> fitted.blocks[0].mlp.act, model.blocks[0].mlp.act
    (ReLU(), GELU(approximate='none'))
    """
    return fitted_mlps(model, images, config or Config(), spec or find_spec(model)).model


def fitted_mlps(model: nn.Module, images: torch.Tensor, config: Config, spec: Spec) -> Reconstruction:
    """:func:`reconstruct_mlp` with its report."""
    spec.check(model)
    check_images(model, images, config.batch)
    images = images[: config.recon]
    with evaluating(model):
        method = _Smoothing(spec, config, images)
        steps = config.iters if config.mlp_iters is None else config.mlp_iters
        return reconstruct(
            model, images, method, blocks=list(spec.mlp), steps=steps, batch=config.batch, input_mix=0.0,
            seed=config.seed,
        )  # fmt: skip


def with_relus(model: nn.Module, spec: Spec) -> nn.Module:
    """A copy with ReLUs in the places of activations, and nothing fitted."""
    student = copied(model)
    for name, (_, act, _) in spec.mlp.items():
        put(student, f"{name}.{act}", ReLU())
    return student.eval()


def positive_quantile(values: torch.Tensor, part: float) -> torch.Tensor:
    """What a part of the positive numbers lie below, by those of the first chunk where there are too many to sort.

    >>> positive_quantile(torch.tensor([-5.0, 0.0, 1.0, 2.0, 3.0]), 0.5)
    tensor(2.)
    """
    positive = values.reshape(-1)[:LARGE]
    positive = positive[positive > 0]
    if not positive.numel():
        return values.new_tensor(torch.inf)
    return torch.quantile(positive.float(), part).to(values)


class _Keeping(nn.Module):
    """A ReLU that remembers what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.given: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given = torch.relu(x)
        return self.given


class _Smoothing(Method):
    """Fits the MLPs of a spec; other units stay as they are."""

    def __init__(self, spec: Spec, config: Config, images: torch.Tensor) -> None:
        self.spec, self.config, self.images = spec, config, images

    def begin(self, fitting: Fitting) -> Sequence[torch.optim.Optimizer]:
        if fitting.unit.name not in self.spec.mlp:
            return []
        first, act, last = (f"{fitting.unit.name}.{part}" for part in self.spec.mlp[fitting.unit.name])
        bound = positive_quantile(self._hidden(fitting, last), self.config.bound)
        blocks, batch = tuple(self.spec.blocks), self.config.batch
        # One run more for each MLP, instead of keeping what all blocks give.
        traced = Traced(fitting.teacher, self.images, blocks, before(blocks, fitting.unit.name), batch)
        h = importance(traced, fitting.unit.name, fitting.target.flatten(0, 1), self.config)
        h = h * (h.numel() / h.square().sum()).sqrt()
        keeping = _Keeping()
        put(fitting.model, act, keeping)
        learned = [*fitting.layer(first).parameters(), *fitting.layer(last).parameters()]
        for value in learned:
            value.requires_grad_(True)
        fitting.kept.update(bound=bound, h=h, keeping=keeping, last=fitting.layer(last), act=act, learned=learned)
        return [torch.optim.Adam(learned, lr=self.config.mlp_lr)]

    def loss(self, fitting: Fitting, found: torch.Tensor, wanted: torch.Tensor, done: float) -> torch.Tensor:
        kept = fitting.kept
        cut = kept["last"](kept["keeping"].given.clamp(max=kept["bound"]))
        parts = [((out - wanted).square() * kept["h"]).sum(1).mean() for out in (found, cut)]
        return (parts[0] + CLAMPED * parts[1]) / PART

    def end(self, fitting: Fitting) -> dict[str, Any]:
        kept = fitting.kept
        if not kept:
            return {}
        for value in kept["learned"]:
            value.requires_grad_(False)
        put(fitting.model, kept["act"], ReLU())
        return {"bound": float(kept["bound"])}

    @torch.no_grad()
    def _hidden(self, fitting: Fitting, last: str) -> torch.Tensor:
        """What goes into the second layer of the given model's MLP, as much of it as is sorted."""
        layer, seen = fitting.teacher.get_submodule(last), []
        out: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        try:
            for part in fitting.clean.chunks():
                arguments, named = fitting.clean.take(part)
                given = fitting.teacher.get_submodule(fitting.unit.name)(*arguments, **named)
                if not out:
                    out = [given, layer(seen[0])]
                    seen.pop()
                if sum(value.numel() for value in seen) >= LARGE:
                    break
        finally:
            handle.remove()
        if out[0].shape != out[1].shape or not torch.allclose(*out, rtol=1e-4, atol=1e-6):
            raise ValueError(
                f"'{fitting.unit.name}' does not end in '{last}'; name another second layer in spec, or leave it out"
            )
        return torch.cat([value.reshape(-1) for value in seen])
