r"""A mixture of primitives: every token of a layer takes a linear layer of multiplications or one of shifts.

With logits :math:`W_g x` and :math:`p = \mathrm{softmax}`, the winner :math:`i = \arg\max p` alone is computed, and the
output is :math:`p_i E_i(x)`. In training Gaussian noise of deviation 1/E is added to the logits of E experts. The
latency-aware loss makes the loads of the experts proportional to the inverse of their latencies: with
:math:`\alpha_i = \mathrm{Lat}_i / \sum_j \mathrm{Lat}_j`,

.. math::
    I_i = \sum_x p_i(x), \quad
    Q_i = \sum_x \Phi\big((h_i(x) - \max_{j \ne i} \tilde h_j(x)) / \sigma\big), \quad
    L = \mathrm{SCV}(\alpha \odot I) + \mathrm{SCV}(\alpha \odot Q),

with clean logits h, noisy ones :math:`\tilde h`, and :math:`\mathrm{SCV}(v) = \mathrm{var}(v) / \mathrm{mean}(v)^2`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import nn

from retensor.compression.shiftadd.shift import ShiftLinear, unset
from retensor.files import described
from retensor.graph.modes import evaluating
from retensor.replacing import Replacement

Gate = Literal["paper", "straight"]
EXPERTS = ("multiply", "shift")
"""Names of the experts, in the order of every figure about them."""
ALPHA = (0.6, 0.4)
"""Shares of the latency that the authors' code gives multiplications and shifts."""


class MoELinear(Replacement):
    """A linear layer of two experts, one that multiplies and one that shifts, and a router.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
        Of both experts.
    gate : {"paper", "straight"}
        What the winner's output is multiplied by: its probability, as in the paper; or 1, with the gradient that the
        probability would have, so that a model begins with outputs as large as before.
    seed : int
        Of the router's initial values.
    shift : mapping
        Settings of the :class:`ShiftLinear`.

    Examples
    --------
    >>> layer = MoELinear.from_linear(nn.Linear(8, 4))
    >>> y = layer(torch.randn(2, 5, 8))
    >>> y.shape, int(layer.tokens.sum())
    (torch.Size([2, 5, 4]), 10)
    """

    tokens: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gate: Gate = "paper",
        seed: int = 0,
        shift: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_gate(gate)
        self.in_features, self.out_features, self.gate = in_features, out_features, gate
        self.multiply: nn.Module = nn.Linear(in_features, out_features, bias)
        self.shift: nn.Module = ShiftLinear(in_features, out_features, bias, **(shift or {}))
        self.router = nn.Linear(in_features, len(EXPERTS), bias=False)
        if not self.router.weight.is_meta:
            draw(self.router.weight, seed)
        self._count()

    @classmethod
    def from_linear(cls, layer: nn.Linear, *, gate: Gate = "paper", seed: int = 0, **shift: Any) -> Self:
        """Both experts begin at the layer, which stays as it is; ``shift`` as of :meth:`ShiftLinear.from_linear`."""
        shifting = ShiftLinear.from_linear(layer, **shift)
        check_gate(gate)
        with torch.device("meta"):
            made = cls(layer.in_features, layer.out_features, layer.bias is not None, gate=gate)
        made.shift = shifting
        multiply: Any = made.multiply
        multiply.weight = _copied(layer.weight)
        if layer.bias is not None:
            multiply.bias = _copied(layer.bias)
        router = torch.empty(len(EXPERTS), layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
        made.router.weight = nn.Parameter(router, requires_grad=layer.weight.requires_grad)
        if not router.is_meta:
            draw(made.router.weight, seed)
        made._count(layer.weight.device)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of shape (..., outputs); each token is computed by one expert."""
        rows = x.reshape(-1, self.in_features)
        clean = self.router(rows)
        noisy = clean + torch.randn_like(clean) / len(EXPERTS) if self.training else clean
        probability = torch.softmax(noisy, -1)
        best, winner = probability.max(-1)
        if self.training:
            self._routing.keep(clean, noisy)
        if self.gate == "straight":
            best = best / best.detach()
        if torch.compiler.is_compiling():
            # How many tokens an expert gets is known when they come; a graph computes both experts for all.
            out = torch.where(winner[:, None] == 0, self.multiply(rows), self.shift(rows))
        else:
            self.tokens = torch.bincount(winner, minlength=len(EXPERTS))
            out = rows.new_zeros(len(rows), self.out_features)
            for i, expert in enumerate((self.multiply, self.shift)):
                mine = (winner == i).nonzero()[:, 0]
                found = expert(rows.index_select(0, mine))
                out = out.to(found.dtype).index_copy(0, mine, found)
        return (out * best[:, None].to(out.dtype)).reshape(*x.shape[:-1], self.out_features)

    def losses(self, alpha: torch.Tensor) -> torch.Tensor:
        """The latency-aware loss of the last pass in training."""
        routing = self._routing
        if routing.clean is None or routing.noisy is None:
            raise ValueError(
                "a mixture has no routing of a pass in training; call model.train() and the model, then ll_loss, once "
                "each step"
            )
        clean, noisy = routing.clean.to(torch.float32), routing.noisy.to(torch.float32)
        alpha = alpha.to(clean)
        importance = torch.softmax(clean, -1).sum(0)
        # The best of the others: the highest, or the second for the one that is the highest.
        top = noisy.topk(2, -1)
        others = torch.where(top.indices[:, :1] == torch.arange(len(EXPERTS), device=clean.device),
                             top.values[:, 1:], top.values[:, :1])  # fmt: skip
        load = torch.special.ndtr((clean - others) * len(EXPERTS)).sum(0)
        return scv(alpha * importance) + scv(alpha * load)

    def config(self) -> dict[str, Any]:
        """Arguments of the class."""
        shift: Any = self.shift
        settings = shift.config()
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": settings.pop("bias"),
            "gate": self.gate,
            "shift": {name: settings[name] for name in settings if name not in ("in_features", "out_features")},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A layer whose values are not numbers until some are loaded."""
        with torch.device("meta"):
            made = cls(**config)
        return unset(made)

    def loaded(self, model: nn.Module) -> None:
        """Give the model its report back."""
        attach_report(model)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, gate={self.gate}"

    def _count(self, device: torch.device | None = None) -> None:
        counts = torch.zeros(len(EXPERTS), dtype=torch.int64, device=device)
        self.register_buffer("tokens", counts, persistent=False)
        self._routing = _Routing()


def ll_loss(model: nn.Module, alpha: Sequence[float] | torch.Tensor = ALPHA) -> torch.Tensor:
    """The latency-aware load-balancing loss, summed over all mixtures of a model.

    Parameters
    ----------
    model : nn.Module
        Run in training mode before, on the batch that is trained on.
    alpha : sequence of float
        Latency of each expert, multiplying first, in any unit: :attr:`Latency.alpha`, or 0.6 and 0.4 as in the
        authors' code. Equal ones balance the tokens whatever the latencies are.

    Returns
    -------
    torch.Tensor
        A scalar with a graph; add 0.01 of it to the task's loss.

    Raises
    ------
    ValueError
        Where there is not one positive latency for each expert, the model holds no mixture, or has not run in training
        mode.

    Examples
    --------
    >>> layer = MoELinear.from_linear(nn.Linear(8, 4))
    >>> y = layer(torch.randn(5, 8))
    >>> bool(ll_loss(layer) >= 0)
    True
    """
    shares = torch.as_tensor(alpha, dtype=torch.float32)
    if shares.shape != (len(EXPERTS),) or not bool((torch.isfinite(shares) & (shares > 0)).all()):
        raise ValueError(
            f"alpha is {described(alpha)}; it has one positive latency for each of the {len(EXPERTS)} experts "
            f"({', '.join(EXPERTS)}), such as (0.6, 0.4)"
        )
    layers = [layer for layer in model.modules() if isinstance(layer, MoELinear)]
    if not layers:
        raise ValueError("the model holds no mixture; convert it with linears='moe'")
    total = layers[0].losses(shares / shares.sum())
    for layer in layers[1:]:
        total = total + layer.losses(shares / shares.sum())
    return total


def scv(values: torch.Tensor) -> torch.Tensor:
    """The squared coefficient of variation, with the unbiased variance.

    >>> scv(torch.tensor([1.0, 3.0]))
    tensor(0.5000)
    """
    return values.var() / (values.mean() ** 2 + 1e-10)


@dataclass(frozen=True)
class LayerRouting:
    """Where the tokens of a layer went.

    Attributes
    ----------
    name : str
    tokens : tuple of int
        That multiplied and that shifted in the layer's last pass.
    saturated : int
        Inputs beyond the fixed-point range since the layer was made.
    """

    name: str
    tokens: tuple[int, int]
    saturated: int

    @property
    def shares(self) -> tuple[float, float]:
        """Of all tokens, those of each expert."""
        total = max(1, sum(self.tokens))
        return self.tokens[0] / total, self.tokens[1] / total


class RouterReport(tuple[LayerRouting, ...]):
    """Layers in the model's order, printed as a table."""

    @property
    def shares(self) -> tuple[float, float]:
        """Of the tokens of all layers, those of each expert."""
        return LayerRouting("", (sum(r.tokens[0] for r in self), sum(r.tokens[1] for r in self)), 0).shares

    def __str__(self) -> str:
        width = max([len(row.name) for row in self] + [5])
        lines = [f"{'layer':<{width}}  {'multiply':>8}  {'shift':>8}  {'saturated':>9}"]
        lines += [
            f"{row.name:<{width}}  {row.shares[0]:>8.1%}  {row.shares[1]:>8.1%}  {row.saturated:>9,}" for row in self
        ]
        lines.append(f"{'all':<{width}}  {self.shares[0]:>8.1%}  {self.shares[1]:>8.1%}")
        return "\n".join(lines)


def router_report(model: nn.Module, x: Any = None) -> RouterReport:
    """Shares of the tokens that each expert of each mixture got.

    Parameters
    ----------
    model : nn.Module
    x : torch.Tensor, optional
        Inputs that the model is run on in eval mode; by default what it was run on last.

    Returns
    -------
    RouterReport

    Raises
    ------
    ValueError
        Where the model holds no mixture.
    """
    if x is not None:
        with evaluating(model), torch.no_grad():
            model(x)
    found = []
    for name, layer in mixtures(model):
        saturated = getattr(layer.shift, "saturated", None)
        counts = layer.tokens.tolist()
        found.append(LayerRouting(name, (counts[0], counts[1]), 0 if saturated is None else int(saturated)))
    if not found:
        raise ValueError("the model holds no mixture; convert it with linears='moe'")
    return RouterReport(found)


def saturations(model: nn.Module) -> dict[str, int]:
    """Inputs beyond the fixed-point range, by the name of every shift layer that had some."""
    return {
        name: int(count)
        for name, layer in model.named_modules()
        if isinstance(count := getattr(layer, "saturated", None), torch.Tensor) and int(count)
    }


def mixtures(model: nn.Module) -> Iterator[tuple[str, MoELinear]]:
    """Mixtures of a model by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, MoELinear):
            yield name, layer


def attach_report(model: nn.Module) -> None:
    """Let ``model.router_report()`` be the report; a partial is copied and pickled with the model, not so a method."""
    if any(True for _ in mixtures(model)):
        model.router_report = partial(router_report, model)


def check_gate(gate: object) -> None:
    """Refuse what is no gate."""
    if gate not in ("paper", "straight"):
        raise ValueError(f"gate is {described(gate)}; it is 'paper' (times the probability) or 'straight' (times 1)")


def draw(weight: torch.Tensor, seed: int) -> None:
    """Initial values of ``nn.Linear``, from a seed."""
    limit = weight[0].numel() ** -0.5
    drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weight.copy_((2 * drawn - 1) * limit)


def _copied(parameter: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


class _Routing:
    """Logits of the last pass in training, with their graph, which neither a copy nor a file takes along."""

    def __init__(self) -> None:
        self.clean: torch.Tensor | None = None
        self.noisy: torch.Tensor | None = None

    def keep(self, clean: torch.Tensor, noisy: torch.Tensor) -> None:
        self.clean, self.noisy = clean, noisy

    def __deepcopy__(self, memo: Any) -> _Routing:
        return _Routing()

    def __reduce__(self) -> tuple[type[_Routing], tuple[()]]:
        return _Routing, ()
