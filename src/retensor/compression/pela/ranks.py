"""Which layers are replaced, at what rank, and what it saves: decided before anything is changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from retensor.compression.pela.layer import Layout, LowRankLinear, is_conv1d, layout_of, matrix_of, shape_of
from retensor.compression.pela.svd import singular_values
from retensor.files import described
from retensor.replacing.match import Pattern, meaning, shown, suggestions

OMIT = ("norm", "head", "patch_embed", "downsample")
"""Parts of names whose layers are left by default: those the paper leaves in DeiT."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer that is replaced.

    Attributes
    ----------
    name : str
        In the model; of a layer used in several places, the first.
    in_features, out_features, rank : int
    bias : bool
    layout : {"linear", "conv1d"}
    energy : float
        Share of the weight's squared singular values that is kept; nan where it was not worked out, or there are none.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    bias: bool
    layout: Layout = "linear"
    energy: float = field(default=math.nan, compare=False)

    @property
    def before(self) -> int:
        """Parameters of the layer."""
        return self.in_features * self.out_features + self.bias * self.out_features

    @property
    def after(self) -> int:
        """Parameters of what replaces it."""
        return self.rank * (self.in_features + self.out_features) + self.bias * self.out_features


@dataclass(frozen=True)
class Plan:
    """Layers to replace, and what the model is before and after.

    Attributes
    ----------
    ratio : float
        Weights of a layer before to after; of the whole model it is less.
    layers : tuple of LayerPlan
    left : mapping of str to str
        Linear layers that stay, and why.
    before, after : int
        Parameters of the model.
    """

    ratio: float
    layers: tuple[LayerPlan, ...]
    left: Mapping[str, str] = field(hash=False)
    before: int
    after: int

    @property
    def energies(self) -> dict[str, float]:
        """Of each layer, by name, :attr:`LayerPlan.energy`."""
        return {layer.name: layer.energy for layer in self.layers}

    def table(self) -> str:
        """All layers with inputs, outputs, rank, parameters before and after, and the energy kept."""
        rows = [["layer", "in", "out", "rank", "before", "after", "energy"]]
        for layer in self.layers:
            sizes = (layer.in_features, layer.out_features, layer.rank, layer.before, layer.after)
            rows.append([layer.name, *(f"{size:,}" for size in sizes), f"{layer.energy:.4f}"])
        before, after = (sum(getattr(layer, what) for layer in self.layers) for what in ("before", "after"))
        rows.append([f"{len(self.layers)} layers", "", "", "", f"{before:,}", f"{after:,}", ""])
        rows.append(
            ["the model", "", "", "", f"{self.before:,}", f"{self.after:,}", f"x{self.after / self.before:.3f}"]
        )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(line))
            for line in ([*zip(row, widths, strict=True)] for row in rows)
        ]
        if self.left:
            lines.append("left: " + ", ".join(f"{name} ({why})" for name, why in self.left.items()))
        return "\n".join(line.rstrip() for line in lines)


def rank_of(in_features: int, out_features: int, ratio: float) -> int:
    """The largest rank whose two factors hold at most ``in * out / ratio`` numbers: PELA's rule.

    Parameters
    ----------
    in_features, out_features : int
        Of the layer.
    ratio : float
        Weights before to after.

    Returns
    -------
    int
        0 where no rank is so small.

    Examples
    --------
    >>> rank_of(768, 2304, 2), rank_of(768, 768, 2), rank_of(768, 3072, 2)
    (288, 192, 307)
    """
    return int(in_features * out_features // (ratio * (in_features + out_features)))


def plan(
    model: nn.Module,
    ratio: float = 2.0,
    omit: Sequence[str] | None = None,
    *,
    min_out: int = 10,
    on_tiny: Literal["raise", "skip"] = "raise",
    ranks: Mapping[Pattern, int] | None = None,
    energies: bool = True,
) -> Plan:
    """Decide what is replaced in a model; nothing is changed.

    Parameters
    ----------
    model : nn.Module
        Its ``nn.Linear`` layers are replaced, and the ``Conv1D`` of transformers' GPT-2, which are linear layers too.
    ratio : float
        1 or more: weights of each layer before to after.
    omit : sequence of str, optional
        Layers whose name contains one of them stay; :data:`OMIT` by default. The paper takes that for DeiT,
        ``(*OMIT, "attn.proj")`` for Swin and ``("cls", "_proj")`` for ALBEF.
    min_out : int
        Layers of fewer outputs stay.
    on_tiny : {"raise", "skip"}
        What to do with a layer so small that its rank would be less than 1.
    ranks : mapping of pattern to int, optional
        Ranks of some layers that are not to follow the ratio: patterns as in :func:`retensor.replace`.
    energies : bool
        Whether to work out what share of each weight is kept, which takes about as long as compressing does. Of
        weights on the meta device nothing is.

    Returns
    -------
    Plan
        It holds no tensor of the model, whose weights may change between planning and compressing.

    Raises
    ------
    TypeError
        Where an argument is of another kind.
    ValueError
        Where the ratio is less than 1; a rank is less than 1 or more than the layer's smaller side; a weight is not
        finite; a weight is shared with another layer (both are named); a layer is the ``out_proj`` of an
        ``nn.MultiheadAttention``, which reads its weight and never calls it; or no layer is left to replace.

    Warns
    -----
    UserWarning
        Where a part of a name in ``omit`` is in no name of the model.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10, bias=False))
    >>> found = plan(net, ratio=2.0)
    >>> [(layer.name, layer.rank, layer.before, layer.after) for layer in found.layers]
    [('0', 21, 8320, 4160), ('2', 4, 1280, 552)]
    >>> print(plan(net.to("meta"), ratio=2.0).table())
    layer       in  out  rank  before  after  energy
    0           64  128    21   8,320  4,160     nan
    2          128   10     4   1,280    552     nan
    2 layers                    9,600  4,712
    the model                   9,600  4,712  x0.491
    """
    _check(model, ratio, omit, min_out, on_tiny)
    names = OMIT if omit is None else tuple(omit)
    if omit is not None:
        known = [name for name, _ in model.named_modules()]
        for part in names:
            if not any(part in name for name in known):
                warnings.warn(f"'{part}' of omit is in no name of the model; {suggestions(part, known)}", stacklevel=2)
    own_ranks = _OwnRanks(ranks or {})
    owners = _owners(model)
    heads = {
        id(module.out_proj): name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }
    within = {id(part) for done in model.modules() if isinstance(done, LowRankLinear) for part in done}
    layers: list[LayerPlan] = []
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or is_conv1d(module)) or id(module) in within:
            continue
        if (why := _why_left(name, module, names, min_out)) is not None:
            left[name] = why
            continue
        _check_layer(name, module, owners, heads)
        inputs, outputs = shape_of(module)
        rank = own_ranks(name, module)
        if rank is None:
            rank = rank_of(inputs, outputs, ratio)
        if rank < 1 and on_tiny == "skip":
            left[name] = "too small"
            continue
        if not 1 <= rank <= min(inputs, outputs):
            raise ValueError(
                f"'{name}' of {inputs} inputs and {outputs} outputs would get a rank of {rank}; omit it, "
                f"{'pass on_tiny=' + repr('skip') if rank < 1 else 'take a rank of its smaller side at most'}, "
                "or take a lower ratio"
            )
        energy = _energy(matrix_of(module), rank) if energies else math.nan
        layers.append(LayerPlan(name, inputs, outputs, rank, module.bias is not None, layout_of(module), energy))
    own_ranks.check(name for name, _ in model.named_modules())
    if not layers:
        why = "; ".join(f"'{name}': {why}" for name, why in list(left.items())[:3]) or "it has no linear layers"
        raise ValueError(f"no layer of the {type(model).__name__} would be replaced ({why}); change omit or min_out")
    before = sum(parameter.numel() for parameter in model.parameters())
    return Plan(float(ratio), tuple(layers), left, before, before - sum(la.before - la.after for la in layers))


def _check(model: Any, ratio: Any, omit: Any, min_out: Any, on_tiny: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"layers of an nn.Module are replaced, not of {described(model)}")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise TypeError(f"the ratio is a number such as 2.0, not {described(ratio)}")
    if not 1 <= ratio < math.inf:
        raise ValueError(f"a ratio of {ratio} saves nothing; it is 1 or more, such as 2.0 for half of the weights")
    if omit is not None and (isinstance(omit, str) or not all(isinstance(part, str) and part for part in omit)):
        raise TypeError(f"omit is a sequence of parts of names, such as ('head',), not {described(omit)}")
    if isinstance(min_out, bool) or not isinstance(min_out, int):
        raise TypeError(f"min_out is a whole number, not {described(min_out)}")
    if on_tiny not in ("raise", "skip"):
        raise ValueError(f"on_tiny is {described(on_tiny)}; it is 'raise' or 'skip'")


class _OwnRanks:
    """Ranks by pattern, and which patterns have been of use."""

    def __init__(self, ranks: Mapping[Pattern, int]) -> None:
        for pattern, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int):
                raise TypeError(f"the rank of {shown(pattern)} is a whole number, not {described(rank)}")
        self._patterns: list[tuple[Pattern, Callable[[str, nn.Module], bool], int]] = [
            (pattern, meaning(pattern), rank) for pattern, rank in ranks.items()
        ]
        self._used: set[int] = set()

    def __call__(self, name: str, module: nn.Module) -> int | None:
        meant = [i for i, (_, means, _) in enumerate(self._patterns) if means(name, module)]
        self._used.update(meant)
        return self._patterns[meant[0]][2] if meant else None

    def check(self, names: Any) -> None:
        """Raise where a pattern means no layer that is replaced."""
        idle = [pattern for i, (pattern, _, _) in enumerate(self._patterns) if i not in self._used]
        if idle:
            raise ValueError(f"no replaced layer is meant by {shown(idle[0])} of ranks; {suggestions(idle[0], names)}")


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of every parameter, by its identity, once for each module that holds it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for label, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{label}".lstrip("."))
    return owners


def _why_left(name: str, layer: nn.Module, omit: Sequence[str], min_out: int) -> str | None:
    """Why a linear layer stays; None where it goes."""
    if part := next((part for part in omit if part in name), None):
        return f"omit '{part}'"
    if parametrize.is_parametrized(layer):
        return "parametrized"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "no weight of its own"
    # Quantized and adapted layers derive from nn.Linear too, and do something else.
    if not is_conv1d(layer) and type(layer).forward is not nn.Linear.forward and not _of_timm(layer):
        return f"a {type(layer).__name__}"
    if not isinstance(weight, nn.parameter.UninitializedParameter):
        if not weight.is_floating_point() or weight.ndim != 2:
            return f"a weight of {str(weight.dtype).removeprefix('torch.')}"
        if shape_of(layer)[1] < min_out:
            return f"under {min_out} outputs"
    return None


def _of_timm(layer: nn.Module) -> bool:
    """Whether it is timm's own linear layer, which differs under TorchScript only."""
    return type(layer).__name__ == "Linear" and type(layer).__module__ == "timm.layers.linear"


def _check_layer(name: str, layer: nn.Module, owners: Mapping[int, list[str]], heads: Mapping[int, str]) -> None:
    if id(layer) in heads:
        raise ValueError(
            f"'{name}' cannot be replaced: nn.MultiheadAttention reads its weight and never calls it; add 'out_proj' "
            f"to omit, or replace '{heads[id(layer)]}' by an attention of plain layers"
        )
    if isinstance(layer.weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"'{name}' has no shape yet; run the model once before")
    for label in ("weight", "bias"):
        told = owners.get(id(layer._parameters.get(label)), [])
        if len(told) > 1:
            raise ValueError(
                f"{' and '.join(repr(owner) for owner in told)} are one tensor, which replacing would part; add "
                f"'{name}' to omit"
            )
    check_finite(name, layer)


def check_finite(name: str, layer: nn.Module) -> None:
    """Refuse a weight that cannot be decomposed."""
    if not layer.weight.is_meta and not bool(torch.isfinite(layer.weight).all()):
        raise ValueError(f"the weight of '{name}' has values that are not finite; a decomposition needs finite ones")


def _energy(weight: torch.Tensor, rank: int) -> float:
    if weight.is_meta:
        return math.nan
    squares = singular_values(weight) ** 2
    total = float(squares.sum())
    return float(squares[:rank].sum()) / total if total else 1.0
