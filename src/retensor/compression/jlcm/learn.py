"""Codebooks and indices learned together, unit by unit, on calibration samples.

Each weight has k logits ``A``; forward it is the codeword of the largest, and backward

    dL/dC_m  = sum over {I = m} of dL/dW' (times s_g),      dL/ds_g = sum over the group's rows of dL/dW' C[I],
    dL/dA_m := dL/dW' sign(C_m - C_I) phi(|C_m - C_I| / D),   0 for m = I            (proximal),
    dL/dA_m := dL/dW' (C_m - C_I)                                                    (linear),
    dL/dA_m := dL/dW' p_m (C_m - sum p C), p = softmax(A)                            (softmax),

with D the mean gap of a codebook and ``phi`` falling: ``1/t`` or ``exp(-t)``. The two others grow with the distance of
the codewords, so that a weight would rather jump far than to a neighbour. Adam with a second moment for each logit
would divide phi out again: the logits are trained by momentum, or with one second moment for each weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from retensor.compression.jlcm.initial import Coded
from retensor.compression.jlcm.layer import Coding, codebook_layer
from retensor.files import described
from retensor.quantizing.layers import called
from retensor.quantizing.reconstruct import Fitting, Method

Gradient = Literal["proximal", "softmax", "linear"]
Phi = Literal["inverse", "exponential"]
GRADIENTS = ("proximal", "softmax", "linear")
PHIS = ("inverse", "exponential")
CLOSEST = 1e-3
"""The least distance of two codewords that phi is asked for, in mean gaps."""
COMMITTED = 0.8
"""The part of the steps after which indices stay, where they are committed."""


@dataclass(frozen=True)
class Rule:
    """How the gradient of a weight reaches its logits."""

    gradient: Gradient = "proximal"
    phi: Phi = "inverse"

    def __post_init__(self) -> None:
        if self.gradient not in GRADIENTS:
            raise ValueError(f"gradient is {described(self.gradient)}; it is one of {', '.join(map(repr, GRADIENTS))}")
        if self.phi not in PHIS:
            raise ValueError(f"phi is {described(self.phi)}; it is 'inverse' or 'exponential'")

    def of(self, logits: torch.Tensor, words: torch.Tensor, chosen: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
        """``dW'/dA``, as this rule has it.

        Parameters
        ----------
        logits : torch.Tensor
            Of shape (rows, columns, k).
        words : torch.Tensor
            The codewords of each row, (rows, 1, k).
        chosen : torch.Tensor
            The codeword of each weight, (rows, columns, 1).
        gap : torch.Tensor
            The mean gap of each row's codebook, (rows, 1, 1).
        """
        if self.gradient == "softmax":
            p = logits.softmax(-1)
            return p.mul_(words - (p @ words.transpose(1, 2)))
        apart = words - chosen
        if self.gradient == "linear":
            return apart
        # In place: these are the largest tensors there are.
        steps = apart.abs().div_(gap).clamp_(min=CLOSEST)
        if self.phi == "inverse":
            return apart.sign_().div_(steps)
        return apart.sign_().mul_(steps.neg_().exp_())


class CodebookLearner(nn.Module):
    """A weight while its codebook, its scales and its indices are learned.

    Parameters
    ----------
    weight : torch.Tensor
        Of shape (rows, ...).
    coded : Coded
        Where it starts.
    rule : Rule
    """

    gaps: torch.Tensor
    book: torch.Tensor
    labels: torch.Tensor

    def __init__(self, weight: torch.Tensor, coded: Coded, rule: Rule) -> None:
        super().__init__()
        self.shape, self.rule, kind = tuple(weight.shape), rule, {"dtype": torch.float32, "device": weight.device}
        rows = weight.detach().reshape(len(weight), -1).to(**kind)
        self.codebook = nn.Parameter(coded.codebook.to(**kind))
        self.scales = None if coded.scales is None else nn.Parameter(coded.scales.to(**kind))
        self.register_buffer("labels", coded.labels.to(weight.device))
        self.register_buffer("book", torch.zeros_like(self.labels) if len(coded.codebook) == 1 else self.labels)
        spread = self.codebook.detach().amax(1) - self.codebook.detach().amin(1)
        gaps = spread / (coded.codebook.shape[1] - 1)
        self.register_buffer("gaps", torch.where(gaps > 0, gaps, 1.0))
        scaled = rows if self.scales is None else rows / self.scales.detach()[self.labels][:, None]
        apart = scaled[..., None] - self.codebook.detach()[self.book][:, None, :]
        self.logits = nn.Parameter(apart.div_(self.gaps[self.book][:, None, None]).square_().neg_())

    def indices(self) -> torch.Tensor:
        """uint8 of shape (rows, columns)."""
        return self.logits.detach().argmax(-1).to(torch.uint8)

    def forward(self) -> torch.Tensor:
        """The weight, float32 of its shape."""
        found = _Select.apply(
            self.logits, self.codebook, self.scales, self.book, self.labels, self.gaps, self.rule
        )  # fmt: skip
        return found.reshape(self.shape)

    def coded(self) -> Coded:
        """What is learned so far."""
        scales = None if self.scales is None else self.scales.detach().double()
        return Coded(self.indices(), self.codebook.detach().double(), scales, self.labels)


class _Select(torch.autograd.Function):
    """The codeword of the largest logit."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, codebook: torch.Tensor, scales: torch.Tensor | None, book: torch.Tensor,
        labels: torch.Tensor, gaps: torch.Tensor, rule: Rule,
    ) -> torch.Tensor:  # fmt: skip
        indices = logits.argmax(-1)
        chosen = codebook[book].gather(1, indices)
        ctx.save_for_backward(logits, codebook, scales, book, labels, gaps, indices, chosen)
        ctx.rule = rule
        return chosen if scales is None else chosen * scales[labels][:, None]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        logits, codebook, scales, book, labels, gaps, indices, chosen = ctx.saved_tensors
        to_scales = None
        if scales is not None:
            to_scales = torch.zeros_like(scales).index_add_(0, labels, (grad * chosen).sum(1))
            scaled = grad * scales[labels][:, None]
        else:
            scaled = grad
        k = codebook.shape[1]
        flat = (book[:, None] * k + indices).reshape(-1)
        to_codebook = torch.zeros_like(codebook).reshape(-1).index_add_(0, flat, scaled.reshape(-1)).reshape(-1, k)
        to_logits = None
        if ctx.needs_input_grad[0]:
            words, gap = codebook[book][:, None, :], gaps[book][:, None, None]
            to_logits = ctx.rule.of(logits, words, chosen[..., None], gap).mul_(scaled[..., None])
        return to_logits, to_codebook, to_scales, None, None, None, None


class LogitOptimizer(torch.optim.Optimizer):
    """Momentum for logits, that keeps the ratios of the gradients of a weight's logits.

    ``momentum``: gradients are divided, for each tensor, by the root mean square of its first one that is not nothing,
    so that one rate serves all layers. ``shared``: by a running one for each weight, over its k logits (Adam's, with
    one second moment where it has k).

    Parameters
    ----------
    params : iterable
        Of tensors of shape (..., k).
    lr : float
        In logits.
    kind : {"momentum", "shared"}
    beta, beta2 : float
        Of the momentum and of the second moment.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, kind: str = "momentum", beta: float = 0.9, beta2: float = 0.999
    ) -> None:
        super().__init__(params, {"lr": lr, "kind": kind, "beta": beta, "beta2": beta2})
        self.frozen = False
        """Whether steps do nothing."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take one."""
        if self.frozen:
            return
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    self._move(value, value.grad, group)

    def _move(self, value: torch.Tensor, grad: torch.Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[value]
        if not state:
            state["step"], state["momentum"] = 0, torch.zeros_like(value)
            state["size"] = torch.zeros_like(value[..., :1]) if group["kind"] == "shared" else None
        beta = group["beta"]
        if group["kind"] == "shared":
            state["step"] += 1
            state["size"].lerp_(grad.square().mean(-1, keepdim=True), 1 - group["beta2"])
            size = (state["size"] / (1 - group["beta2"] ** state["step"])).sqrt().add_(1e-12)
            state["momentum"].lerp_(grad, 1 - beta)
            value.addcdiv_(state["momentum"], size, value=-group["lr"] / (1 - beta ** state["step"]))
            return
        if state["size"] is None:
            first = float(grad.norm()) / math.sqrt(grad.numel())
            if not first > 0:
                return
            state["size"] = first
        state["momentum"].mul_(beta).add_(grad, alpha=(1 - beta) / state["size"])
        value.add_(state["momentum"], alpha=-group["lr"])


class JointLearning(Method):
    """Codebooks, scales and indices of the layers that are named; others stay as they are.

    Parameters
    ----------
    start : mapping of str to (Coding, Coded)
        How each layer is kept and where it starts.
    rule : Rule
    lr_map : float
        Of the logits, as :class:`LogitOptimizer` has it.
    lr_codebook : float
        Of codebooks and scales, relative to their standard deviation and size.
    kind : {"momentum", "shared"}
    commit : bool
        Whether indices stay for the last fifth of the steps.
    """

    def __init__(
        self, start: Mapping[str, tuple[Coding, Coded]], rule: Rule, lr_map: float, lr_codebook: float,
        kind: str = "momentum", commit: bool = False,
    ) -> None:  # fmt: skip
        self.start, self.rule, self.lr_map, self.lr_codebook = start, rule, lr_map, lr_codebook
        self.kind, self.commit = kind, commit

    def begin(self, fitting: Fitting) -> Sequence[torch.optim.Optimizer]:
        """Logits and codebooks in the place of each layer's weight."""
        names = [name for name in fitting.unit.layers if name in self.start]
        logits, others = [], []
        for name in names:
            layer = fitting.layer(name)
            learner = CodebookLearner(layer.weight, self.start[name][1], self.rule)
            fitting.place(name, _Learning(layer, learner))
            logits.append(learner.logits)
            spread = float(learner.codebook.detach().std(1).mean())
            others.append({"params": [learner.codebook], "lr": self.lr_codebook * max(spread, 1e-12)})
            if learner.scales is not None:
                others.append({"params": [learner.scales], "lr": self.lr_codebook})
        fitting.kept["names"] = names
        if not names:
            return []
        optimizer = LogitOptimizer(logits, self.lr_map, self.kind)
        fitting.kept["logits"] = optimizer
        return [optimizer, torch.optim.Adam(others)]

    def after_step(self, fitting: Fitting, done: float) -> None:
        """Let indices stay once they are committed."""
        if self.commit and done >= COMMITTED:
            fitting.kept["logits"].frozen = True

    def end(self, fitting: Fitting) -> dict[str, Any]:
        """Packed layers; how many indices changed, and by how many places of the sorted codebook."""
        found: dict[str, Any] = {}
        for name in fitting.kept["names"]:
            held = fitting.layer(name)
            coding, before = self.start[name]
            after = held.learner.coded()
            found[name] = jumps(before, after)
            labels = after.labels if coding.layout.bounds is None else None
            made = codebook_layer(
                held.layer, coding, after.indices.reshape(coding_shape(held)), after.codebook, after.scales, labels
            )
            fitting.place(name, made)
        return found


class _Learning(nn.Module):
    """A layer while its weight is learned; parents may look at its weight and bias."""

    def __init__(self, layer: nn.Module, learner: CodebookLearner) -> None:
        super().__init__()
        self.layer, self.learner = layer, learner

    @property
    def weight(self) -> torch.Tensor:
        return self.learner().to(self.layer.weight.dtype)

    @property
    def bias(self) -> torch.Tensor | None:
        return self.layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return called(self.layer, x, self.weight)


def coding_shape(held: nn.Module) -> tuple[int, ...]:
    """The shape of the weight that is learned."""
    return tuple(held.layer.weight.shape)


def jumps(before: Coded, after: Coded) -> dict[str, float]:
    """The part of the indices that changed, and how far those went in places of the sorted codebook before.

    Returns
    -------
    dict
        ``flips``, ``mean_jump`` and ``longest_jump``; 0 where none changed.
    """
    # Codewords keep their number while they are learned; their place is that at the start.
    place = before.codebook.argsort(1).argsort(1)
    rows = place[torch.zeros_like(before.labels) if len(place) == 1 else before.labels.to(place.device)]
    apart = (
        rows.gather(1, after.indices.long().to(rows.device)) - rows.gather(1, before.indices.long().to(rows.device))
    ).abs()
    moved = apart[apart > 0].double()
    flips = len(moved) / max(1, apart.numel())
    if not len(moved):
        return {"flips": 0.0, "mean_jump": 0.0, "longest_jump": 0.0}
    return {"flips": flips, "mean_jump": float(moved.mean()), "longest_jump": float(moved.max())}
