"""The layers of experts: a linear layer and a normalisation, N times over, in the places of an FFN's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn
from torch.nn import functional

from retensor.compression.ewa.assignment import EVAL_MODES, SETTINGS, Assignment, EvalMode, check_choice
from retensor.errors import RetensorError
from retensor.files import brief, described
from retensor.replacing import Replacement

Role = Literal["first", "entry", "inner", "exit"]
"""What a layer is in its FFN: ``first`` shares tokens out and takes them, ``entry`` takes them too (a gate beside it),
``exit`` gives them back."""

_ROLES = ("first", "entry", "inner", "exit")
_PART = ("role", "group", "member")


class Experts(Replacement):
    """What the layers have in common: their part in the FFN, and the assignment that they hold together."""

    bias: nn.Parameter | None
    _sizes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, assignment: Assignment, role: Role, group: str, member: int) -> None:
        super().__init__()
        check_choice("role", role, _ROLES)
        self.assignment = assignment
        self.role = role
        self.group = group
        self.member = member

    @property
    def num_experts(self) -> int:
        """N."""
        return self.assignment.num_experts

    def config(self) -> dict[str, Any]:
        """Shapes, the part in the FFN, and the assignment's settings."""
        own = {name: getattr(self, name) for name in (*self._sizes, *_PART)}
        return {**own, "bias": self.bias is not None, **self.assignment.settings()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A layer of the same shapes; once all are read, :meth:`loaded` gives those of one FFN one assignment."""
        assignment = Assignment(**{name: config[name] for name in SETTINGS})
        return cls(assignment=assignment, **{name: config[name] for name in (*cls._sizes, *_PART, "bias")})

    def loaded(self, model: nn.Module) -> None:
        """Let the layers of each FFN hold one assignment.

        Raises
        ------
        RetensorError
            Where layers of one FFN were kept with different settings.
        """
        layers = expert_layers(model)
        if layers[0][1] is not self:
            # All are joined at once.
            return
        joined: dict[str, tuple[Assignment, set[int]]] = {}
        for name, layer in layers:
            assignment, members = joined.get(layer.group, (layer.assignment, set()))
            if layer.member in members:
                # The FFN of another model inside this one, which bore the same name.
                assignment, members = layer.assignment, set()
            if assignment.settings() != layer.assignment.settings():
                raise RetensorError(
                    f"'{brief(name)}' and the layers before it in its FFN were kept with other settings"
                )
            layer.assignment = assignment
            joined[layer.group] = assignment, {*members, layer.member}

    def to_dense(self) -> nn.Module | None:
        """The plain layer of the mean weights; None of a routed mixture, which stays."""
        if self.assignment.top_k:
            return None
        weight = self.get_parameter("weight")
        dense = self._plain({"bias": self.bias is not None, "device": weight.device, "dtype": weight.dtype})
        with torch.no_grad():
            for name, tensor in self.experts():
                own = dense.get_parameter(name)
                own.copy_(tensor.mean(0))
                own.requires_grad_(tensor.requires_grad)
        return dense

    def _plain(self, arguments: dict[str, Any]) -> nn.Module:
        """A plain layer of one expert's shapes."""
        raise NotImplementedError

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.assignment
        if self.role == "first":
            shares.begin(x, training=self.training, router=getattr(self, "router", None))
        if shares.mode == "folded":
            return self._folded(x)
        y = self._each(shares.take(x) if self.role in ("first", "entry") else x)
        return shares.give(y) if self.role == "exit" else y

    def _folded(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _each(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def experts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The tensors that are the experts', stacked in their first dimension; a router's are not."""
        yield from self.named_parameters(recurse=False)

    def _scaled(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.assignment.grad_scale == "N" and self.training:
            scaled: torch.Tensor = _ScaledGradient.apply(tensor, float(self.num_experts))
            return scaled
        return tensor


class ExpertLinear(Experts):
    """N linear layers of one shape in the place of one, each for its own part of the tokens.

    Made by :func:`retensor.compression.ewa.convert`. Between the first and the last of an FFN the tokens lie as
    (N, tokens of a part, features), so that what stands between (activation, dropout, a gate's product) works as
    before.

    Parameters
    ----------
    in_features, out_features : int
    assignment : Assignment
        Held together with the other layers of the FFN.
    bias : bool
    role : {"first", "entry", "inner", "exit"}
    group : str
        Name of the FFN.
    member : int
        Place among the FFN's layers.

    Attributes
    ----------
    weight : nn.Parameter
        Of shape (N, ``out_features``, ``in_features``).
    bias : nn.Parameter or None
        Of shape (N, ``out_features``).
    router : nn.Linear
        In the first layer of a routed mixture.

    Examples
    --------
    >>> from timm.layers import Mlp
    >>> from retensor.compression import ewa
    >>> ewa.convert(nn.Sequential(Mlp(8, 16)), num_experts=4, layers="all")[0].fc1
    ExpertLinear(in_features=8, out_features=16, bias=True, num_experts=4, random uniform partition)
    """

    _sizes = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        assignment: Assignment,
        *,
        bias: bool = True,
        role: Role = "inner",
        group: str = "",
        member: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(assignment, role, group, member)
        self.in_features = in_features
        self.out_features = out_features
        place = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.zeros(self.num_experts, out_features, in_features, **place))
        self.bias = nn.Parameter(torch.zeros(self.num_experts, out_features, **place)) if bias else None
        if assignment.top_k and role == "first":
            self.router = nn.Linear(in_features, self.num_experts, bias=False, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs for tokens of shape (..., ``in_features``), each by its expert."""
        return self._run(x)

    def extra_repr(self) -> str:
        """Sizes."""
        how = f"top {self.assignment.top_k}" if self.assignment.top_k else "random uniform partition"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"num_experts={self.num_experts}, {how}"
        )

    def _plain(self, arguments: dict[str, Any]) -> nn.Module:
        return nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, **arguments)

    def _folded(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self._scaled(self.bias).mean(0)
        return functional.linear(x, self._scaled(self.weight).mean(0), bias)

    def _each(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._scaled(self.weight)
        bias = None if self.bias is None else self._scaled(self.bias)
        if self.assignment.mode == "routed":
            parts = x.split(self.assignment.sizes)
            done = [functional.linear(p, weight[i], None if bias is None else bias[i]) for i, p in enumerate(parts)]
            return torch.cat(done)
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias[:, None], x, weight.mT)


def norm_kinds() -> dict[str, type[nn.Module]]:
    """The classes of layer normalisation that experts are made of, by library."""
    from timm.layers import LayerNorm

    return {"torch": nn.LayerNorm, "timm": LayerNorm}


class ExpertNorm(Experts):
    """N layer normalisations over the last dimension, inside an FFN of experts.

    Parameters
    ----------
    features : int
    assignment : Assignment
    eps : float
    bias : bool
    library : {"torch", "timm"}
        Whose class it is folded to.
    role, group, member
        As of :class:`ExpertLinear`.

    Attributes
    ----------
    weight : nn.Parameter
        Of shape (N, ``features``).
    bias : nn.Parameter or None
        Of the same shape.

    Examples
    --------
    >>> from timm.layers import Mlp
    >>> from retensor.compression import ewa
    >>> ewa.convert(nn.Sequential(Mlp(8, 16, norm_layer=nn.LayerNorm)), num_experts=4, layers="all")[0].norm
    ExpertNorm(features=16, eps=1e-05, bias=True, num_experts=4)
    """

    _sizes = ("features", "eps", "library")

    def __init__(
        self,
        features: int,
        assignment: Assignment,
        *,
        eps: float = 1e-5,
        bias: bool = True,
        library: str = "torch",
        role: Role = "inner",
        group: str = "",
        member: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(assignment, role, group, member)
        if role == "first":
            raise ValueError("an FFN of experts begins with a linear layer; a norm's role is 'inner' or 'exit'")
        check_choice("library", library, norm_kinds())
        self.features = features
        self.eps = eps
        self.library = library
        self.weight = nn.Parameter(torch.ones(self.num_experts, features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros_like(self.weight)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised tokens, of the same shape."""
        return self._run(x)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"features={self.features}, eps={self.eps}, bias={self.bias is not None}, num_experts={self.num_experts}"

    def _plain(self, arguments: dict[str, Any]) -> nn.Module:
        return norm_kinds()[self.library](self.features, eps=self.eps, **arguments)

    def _folded(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self._scaled(self.bias).mean(0)
        return functional.layer_norm(x, (self.features,), self._scaled(self.weight).mean(0), bias, self.eps)

    def _each(self, x: torch.Tensor) -> torch.Tensor:
        normal = functional.layer_norm(x, (self.features,), None, None, self.eps)
        weight = self._scaled(self.weight)
        bias = None if self.bias is None else self._scaled(self.bias)
        if self.assignment.mode == "routed":
            counts = torch.tensor(self.assignment.sizes, device=x.device)
            weight = weight.repeat_interleave(counts, 0)
            bias = None if bias is None else bias.repeat_interleave(counts, 0)
        else:
            weight, bias = weight[:, None], None if bias is None else bias[:, None]
        return normal * weight if bias is None else torch.addcmul(bias, normal, weight)


def expert_layers(model: nn.Module) -> list[tuple[str, Experts]]:
    """The layers of experts in a model, by name; one that is used in several places once."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]


def set_eval_mode(model: nn.Module, mode: EvalMode) -> None:
    """Choose what evaluation computes, in every FFN of experts that has no router.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    mode : {"folded", "ensemble", "rup"}
        The FFN of the mean weights, which is what :func:`retensor.fold` deploys; the mean of all experts' outputs; or
        one random uniform partition as in training.

    Raises
    ------
    ValueError
        Where it is none of these, or the model has no experts.

    Examples
    --------
    >>> from timm.layers import Mlp
    >>> from retensor.compression import ewa
    >>> model = ewa.convert(nn.Sequential(Mlp(8, 16)), num_experts=4, layers="all").eval()
    >>> x = torch.ones(2, 4, 8)
    >>> bool((model(x) == ewa.fold(model)(x)).all())
    True
    >>> ewa.set_eval_mode(model, "ensemble")
    >>> bool((model(x) == ewa.fold(model)(x)).all())
    False
    """
    check_choice("eval_mode", mode, EVAL_MODES)
    for layer in _partitioned(model, "no mode of evaluation"):
        layer.assignment.eval_mode = mode


def use_generator(model: nn.Module, generator: torch.Generator | int | None, *, rank: int | None = None) -> None:
    """Let the partitions be drawn from one generator, from a seed, or from torch's own random numbers where None.

    A seed is that of all processes of a distributed training together: each rank draws partitions of its own from it.

    Under gradient checkpointing leave torch's own, which a recomputed pass draws from again; a generator would share
    tokens out anew, and gradients would be those of another pass.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    generator : torch.Generator, int or None
    rank : int, optional
        Of this process, for a seed; :mod:`torch.distributed` is asked by default.

    Raises
    ------
    TypeError
        Where it is neither generator nor seed, or a rank is given without a seed.
    ValueError
        Where the model has no experts, or all are routed, or the seed or the rank is negative.

    Examples
    --------
    >>> from timm.layers import Mlp
    >>> from retensor.compression import ewa
    >>> model = ewa.convert(nn.Sequential(Mlp(8, 16)), num_experts=4, layers="all")
    >>> outputs = []
    >>> for _ in range(2):
    ...     ewa.use_generator(model, torch.Generator().manual_seed(0))
    ...     outputs.append(model(torch.ones(2, 4, 8)))
    >>> bool((outputs[0] == outputs[1]).all())
    True
    """
    if isinstance(generator, int) and not isinstance(generator, bool):
        if rank is None:
            on = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if on else 0
        if generator < 0 or rank < 0:
            raise ValueError(f"the seed of partitions is {generator}, of rank {rank}; both are numbers from 0 on")
        # Hashed, so that neighbouring seeds and ranks share no partitions.
        digest = hashlib.sha256(f"{generator} {rank}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    elif rank is not None or not isinstance(generator, torch.Generator | None):
        raise TypeError(
            f"partitions are drawn from a torch.Generator, a seed or None, not from {described(generator)}; a rank "
            "belongs to a seed"
        )
    for layer in _partitioned(model, "nothing to draw"):
        layer.assignment.generator = generator


def balance_loss(model: nn.Module) -> torch.Tensor:
    """The load-balancing loss of the last pass, summed over routed mixtures: N times the sum over experts of the share
    of tokens times the mean probability.

    Each mixture adds 1 where all experts have equal shares and more where they have not; add 0.01 of it to a loss.
    Source: W. Fedus, B. Zoph, N. Shazeer, "Switch Transformers", 2021, arXiv 2101.03961, equation 4.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    torch.Tensor
        Of shape (), with gradients for the routers.

    Raises
    ------
    ValueError
        Where the model has no routed mixture, or none has run yet.

    Examples
    --------
    >>> from timm.layers import Mlp
    >>> from retensor.compression import ewa
    >>> model = ewa.route(nn.Sequential(Mlp(8, 16)), num_experts=4, layers="all")
    >>> y = model(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)))
    >>> 0.9 < float(ewa.balance_loss(model).detach()) < 4
    True
    """
    found = [layer.assignment.balance for _, layer in expert_layers(model) if layer.role == "first"]
    losses = [loss for loss in found if loss is not None]
    if not losses:
        raise ValueError("no routed mixture has run in this model; make one with ewa.route and call the model before")
    return torch.stack(losses).sum()


def needed_layers(model: nn.Module) -> list[tuple[str, Experts]]:
    """The layers of experts, of which there must be some."""
    layers = expert_layers(model)
    if not layers:
        raise ValueError(
            f"the {type(model).__name__} has no experts; ewa.convert leaves its argument as it is, so use the model "
            "that it returns"
        )
    return layers


def _partitioned(model: nn.Module, lacks: str) -> list[Experts]:
    """The layers that share tokens out at random."""
    layers = [layer for _, layer in needed_layers(model) if not layer.assignment.top_k]
    if not layers:
        raise ValueError(f"all experts of the {type(model).__name__} are routed; a router has {lacks}")
    return layers


class _ScaledGradient(torch.autograd.Function):
    """A tensor as it is, whose gradient is multiplied."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: torch.Tensor, factor: float) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None
