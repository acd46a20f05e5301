"""Factored convolutions in the places of a model's dense ones, by a parameter budget, a rank, or an error."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from retensor.compression.apriori import layers
from retensor.compression.apriori.decompose import decompose, error, ranks_within
from retensor.compression.apriori.factored import Factored, Implementation, Init
from retensor.compression.apriori.formats import Format, Shape, format_named, resolved, swapped
from retensor.compression.apriori.init import INITS, initialise_
from retensor.files import described
from retensor.replacing import replace
from retensor.replacing.match import Pattern, exactly, matching, meaning, shown, suggestions

KINDS: dict[type[nn.Module], type[Factored]] = {
    nn.Conv1d: layers.FactoredConv1d,
    nn.Conv2d: layers.FactoredConv2d,
    nn.Conv3d: layers.FactoredConv3d,
    nn.ConvTranspose1d: layers.FactoredConvTranspose1d,
    nn.ConvTranspose2d: layers.FactoredConvTranspose2d,
    nn.ConvTranspose3d: layers.FactoredConvTranspose3d,
}
"""What stands for which layer of torch. Classes derived from these may compute otherwise and are left alone."""
_CP = {factored: getattr(layers, factored.__name__.replace("Factored", "CP")) for factored in KINDS.values()}


@dataclass(frozen=True)
class Choice:
    """What becomes of one convolution.

    Attributes
    ----------
    name : str
    rank : tuple of int or None
        None where it stays dense.
    dense_parameters, parameters : int
        Of the kernel, before and after; the bias stays.
    kept : str
        Why it stays dense; empty where it does not.
    missed : bool
        Whether it stays dense because no rank reaches the ratio or the tolerance.
    error : float or None
        Relative distance of the kernels, where weights are decomposed to a tolerance.
    """

    name: str
    rank: tuple[int, ...] | None
    dense_parameters: int
    parameters: int
    kept: str = ""
    missed: bool = False
    error: float | None = None


def choices(
    model: nn.Module,
    *,
    ratio: float | None = None,
    rank: int | Sequence[int] | Literal["fit"] | None = None,
    format: str = "cp",
    min_kernel: int = 3,
    exclude: Sequence[Pattern] = (),
    tol: float = 1e-2,
    seed: int = 0,
) -> list[Choice]:
    """What :func:`compress` does with each convolution of a model, and why it keeps some.

    Parameters
    ----------
    model, ratio, rank, format, min_kernel, exclude, tol, seed
        As of :func:`compress`; with ``rank="fit"`` the weights that the model has are fitted.

    Returns
    -------
    list of Choice
        One for each convolution, those of derived classes too, in the model's order.

    Raises
    ------
    TypeError, ValueError
        Where an argument is none of these, or a pattern means no layer.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(2, 24, 5), nn.ReLU(), nn.Conv2d(24, 24, 5), nn.Conv2d(24, 1, 1))
    >>> for choice in choices(net, ratio=8):
    ...     print(choice.name, choice.rank, choice.dense_parameters, choice.parameters, choice.kept)
    0 (4,) 1200 144
    2 (31,) 14400 1798
    3 None 24 24 no axis of its kernel reaches min_kernel=3
    """
    _check(model, ratio, rank, min_kernel, tol)
    excluded = _meanings(model, exclude)
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, tuple(KINDS)):
            continue
        if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
            raise ValueError(f"'{name}' has no shape yet; run the model once, then compress it")
        shape = shape_of(layer)
        dense = shape.dense_parameters
        if type(layer) not in KINDS:
            found.append(Choice(name, None, dense, dense, f"{type(layer).__name__} may compute otherwise"))
        elif any(meant(part, model.get_submodule(part)) for meant in excluded for part in _with_parents(name)):
            found.append(Choice(name, None, dense, dense, "excluded"))
        elif max(shape.kernel) < min_kernel:
            found.append(Choice(name, None, dense, dense, f"no axis of its kernel reaches min_kernel={min_kernel}"))
        elif rank == "fit":
            found.append(_fitted(name, layer, format_named(format, shape.dims), shape, tol, seed))
        elif rank is not None:
            form = format_named(format, shape.dims)
            ranks = resolved(form, shape, rank)
            found.append(Choice(name, ranks, dense, form.parameters(shape, ranks)))
        else:
            assert ratio is not None
            found.append(_within(name, format_named(format, shape.dims), shape, ratio))
    return found


def compress(
    model: nn.Module,
    *,
    ratio: float | None = None,
    rank: int | Sequence[int] | Literal["fit"] | None = None,
    format: str = "cp",
    init: Init = "match",
    from_weights: bool = False,
    min_kernel: int = 3,
    exclude: Sequence[Pattern] = (),
    tol: float = 1e-2,
    implementation: Implementation = "factorized",
    recompute: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Put factored convolutions in the places of dense ones, before training or from trained weights.

    Parameters
    ----------
    model : nn.Module
        Left as it is; the result is a copy. Its biases are kept.
    ratio : float, optional
        Each kernel gets the highest rank with at most that part of its parameters: 8 for an eighth. Or give ``rank``.
    rank : int, sequence of int or "fit", optional
        The same for all layers; ``"fit"`` is the least rank whose kernel is within ``tol`` of the weights, of
        ``tucker`` one for each mode.
    format : {"cp", "separable", "vh", "tucker", "tt"}
    init : {"match", "xavier", "decompose", "default"}
        First values; see :func:`initialise_`.
    from_weights : bool
        Decompose the weights that the model has instead. ``rank="fit"`` needs it.
    min_kernel : int
        Layers whose kernel is smaller along every axis stay dense.
    exclude : sequence of pattern
        Globs, classes, or functions of name and module; what lies inside is excluded with it. Each has to mean some
        layer.
    tol : float
        Relative error of a kernel, in Frobenius norm.
    implementation, recompute
        See :class:`FactoredConv2d`.
    seed : int
        Of the factors, or of the starts of the decomposition.

    Returns
    -------
    nn.Module
        The copy.

    Raises
    ------
    TypeError, ValueError
        Where an argument is none of these, a pattern means no layer, or nothing is left to compress.

    Warns
    -----
    UserWarning
        Where a layer cannot reach the ratio or the tolerance, and stays dense; :func:`choices` tells all.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(2, 24, 5), nn.ReLU(), nn.Conv2d(24, 24, 5), nn.Conv2d(24, 1, 1))
    >>> compress(net, ratio=8)
    Sequential(
      (0): CPConv2d(
        2, 24, kernel_size=(5, 5), format='cp', rank=4, stride=(1, 1), padding=(0, 0)
        (factors): inputs (1, 4, 2), axis0 (1, 4, 5), axis1 (1, 4, 5), outputs (1, 24, 4)
      )
      (1): ReLU()
      (2): CPConv2d(
        24, 24, kernel_size=(5, 5), format='cp', rank=31, stride=(1, 1), padding=(0, 0)
        (factors): inputs (1, 31, 24), axis0 (1, 31, 5), axis1 (1, 31, 5), outputs (1, 24, 31)
      )
      (3): Conv2d(24, 1, kernel_size=(1, 1), stride=(1, 1))
    )
    """
    if init not in INITS:
        raise ValueError(f"init is {described(init)}; it is one of {', '.join(map(repr, INITS))}")
    if rank == "fit" and not from_weights:
        raise ValueError("rank='fit' fits the weights that the model has; pass from_weights=True")
    found = choices(
        model, ratio=ratio, rank=rank, format=format, min_kernel=min_kernel, exclude=exclude, tol=tol, seed=seed
    )
    missed = [choice for choice in found if choice.missed]
    if missed:
        told = "; ".join(f"'{choice.name}': {choice.kept}" for choice in missed[:3])
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        warnings.warn(f"kept dense: {told}{more}", stacklevel=2)
    chosen = [choice for choice in found if choice.rank is not None]
    if not chosen:
        raise ValueError(
            f"none of {len(found)} convolutions is compressed; apriori.choices(model, ...) tells why each is kept"
        )
    generator = torch.Generator().manual_seed(seed)

    def maker(choice: Choice) -> Callable[[nn.Module], nn.Module]:
        def make(layer: nn.Module) -> nn.Module:
            return factored(
                layer, choice.rank, format=format, init=init, from_weights=from_weights, generator=generator,
                implementation=implementation, recompute=recompute, seed=seed,
            )  # fmt: skip

        return make

    return replace(model, {exactly(choice.name): maker(choice) for choice in chosen})


def factored(
    layer: nn.Module,
    rank: Any,
    *,
    format: str = "cp",
    init: Init = "match",
    from_weights: bool = False,
    implementation: Implementation = "factorized",
    recompute: bool = False,
    generator: torch.Generator | None = None,
    seed: int = 0,
) -> Factored:
    """The factored layer that stands for one of torch's convolutions; also a maker for :func:`retensor.replace`.

    Parameters
    ----------
    layer : nn.Conv1d, nn.Conv2d, nn.Conv3d or one of their transposed kin
        Left as it is; the new layer has its device, its type, its bias, and is trained where it was.
    rank, format, init, implementation, recompute, generator
        As of :class:`FactoredConv2d`.
    from_weights : bool
        Decompose the layer's weights rather than draw factors.
    seed : int
        Of the starts of the decomposition.

    Returns
    -------
    FactoredConv1d, FactoredConv2d, ...
        Of ``cp``, the class of that name.

    Raises
    ------
    TypeError
        Where the layer is no plain convolution.

    Examples
    --------
    >>> import retensor as rt
    >>> net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten())
    >>> type(rt.replace(net, {nn.Conv2d: lambda layer: factored(layer, 4)})[0]).__name__
    'CPConv2d'
    """
    if type(layer) not in KINDS:
        raise TypeError(
            f"{type(layer).__name__} is no plain convolution; one of {', '.join(kind.__name__ for kind in KINDS)} is "
            "replaced"
        )
    source: Any = layer
    kind = KINDS[type(layer)]
    arguments: dict[str, Any] = {
        "stride": source.stride, "padding": source.padding, "dilation": source.dilation, "groups": source.groups,
        "bias": source.bias is not None, "padding_mode": source.padding_mode, "rank": rank, "init": "default",
        "implementation": implementation, "recompute": recompute, "device": source.weight.device,
        "dtype": source.weight.dtype, "generator": torch.Generator(source.weight.device),
    }  # fmt: skip
    if kind.transposed:
        arguments["output_padding"] = source.output_padding
    if format == "cp":
        kind = _CP[kind]
    else:
        arguments["format"] = format
    new: Factored = kind(source.in_channels, source.out_channels, source.kernel_size, **arguments)
    with torch.no_grad():
        if from_weights:
            factors = decompose(kernel_of(layer).cpu(), new.form, new.shape, new.rank, seed=seed)
            for name, factor in new.factors.items():
                factor.copy_(factors[name])
        else:
            initialise_(new, init, generator=generator)
        if new.bias is not None:
            new.bias.copy_(source.bias)
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(source.bias.requires_grad if name == "bias" else source.weight.requires_grad)
    return new


def shape_of(layer: Any) -> Shape:
    """The shape of a convolution's kernel."""
    return Shape(layer.in_channels, layer.out_channels, tuple(layer.kernel_size), layer.groups)


def kernel_of(layer: Any) -> torch.Tensor:
    """The kernel of one of torch's convolutions, as (outputs, inputs / groups, ...) for transposed ones too."""
    return swapped(layer.weight, layer.groups) if KINDS[type(layer)].transposed else layer.weight


def largest(form: Format, shape: Shape, parameters: int) -> tuple[int, ...] | None:
    """The highest ranks, among what one int can mean, with no more parameters than those; None where there are none."""

    def size(rank: int) -> int:
        return form.parameters(shape, resolved(form, shape, rank))

    if size(1) > parameters:
        return None
    low, high = 1, 2
    # Clipped formats stop growing.
    while size(high) <= parameters and high <= shape.dense_parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= parameters else (low, middle)
    return resolved(form, shape, low)


def _check(model: Any, ratio: Any, rank: Any, min_kernel: Any, tol: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"convolutions of an nn.Module are compressed, not of {described(model)}")
    if (ratio is None) == (rank is None):
        raise ValueError("give a ratio, such as 8 for an eighth of the parameters, or a rank, and not both")
    if ratio is not None and not (isinstance(ratio, int | float) and ratio > 1):
        raise ValueError(f"ratio is {described(ratio)}; dense parameters over those left, above 1, are needed")
    if isinstance(rank, str) and rank != "fit":
        raise ValueError(f"rank is {described(rank)}; an int, one int a bond, or 'fit' is needed")
    if isinstance(min_kernel, bool) or not isinstance(min_kernel, int) or min_kernel < 1:
        raise ValueError(f"min_kernel is {described(min_kernel)}; an int of at least 1 is needed")
    if isinstance(tol, bool) or not isinstance(tol, int | float):
        raise TypeError(f"tol is {described(tol)}; a relative error, a number, is needed")
    if not 0 < tol < 1:
        raise ValueError(f"tol is {described(tol)}; a relative error between 0 and 1 is needed")


def _meanings(model: nn.Module, exclude: Any) -> list[Callable[[str, nn.Module], bool]]:
    """Patterns as functions; one that means nothing is likely a slip."""
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        raise TypeError(f"exclude is {described(exclude)}; a sequence of patterns, such as ('head',), is needed")
    found = []
    for pattern in exclude:
        meant = meaning(pattern)
        if not matching(model, pattern):
            names = [name for name, module in model.named_modules() if isinstance(module, tuple(KINDS))]
            raise ValueError(f"exclude names {shown(pattern)}, which no layer is; {suggestions(pattern, names)}")
        found.append(meant)
    return found


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)] if name else [""]


def _within(name: str, form: Format, shape: Shape, ratio: float) -> Choice:
    dense = shape.dense_parameters
    ranks = largest(form, shape, int(dense / ratio))
    if ranks is None:
        least = form.parameters(shape, resolved(form, shape, 1))
        reason = f"no rank reaches ratio {ratio:g}: rank 1 takes {least:,} parameters of {dense:,}"
        return Choice(name, None, dense, dense, reason, missed=True)
    return Choice(name, ranks, dense, form.parameters(shape, ranks))


def _fitted(name: str, layer: nn.Module, form: Format, shape: Shape, tol: float, seed: int) -> Choice:
    """The least rank within the tolerance, found by halving between 1 and where nothing is saved.

    Those of ``tucker`` are as many as its modes, and come from the singular values of each.
    """
    dense = shape.dense_parameters
    kernel = kernel_of(layer).detach().cpu()

    def reached(rank: Any) -> float:
        ranks = resolved(form, shape, rank)
        return error(kernel, form, shape, decompose(kernel, form, shape, ranks, seed=seed))

    def told(rank: Any, found: float) -> Choice:
        ranks = resolved(form, shape, rank)
        return Choice(name, ranks, dense, form.parameters(shape, ranks), error=found)

    if form.name == "tucker":
        ranks = ranks_within(kernel, shape, tol)
        size = form.parameters(shape, ranks)
        if size < dense:
            return told(ranks, reached(ranks))
        reason = (
            f"no rank below the dense size is within tol={tol:g}: ranks {ranks} take {size:,} parameters of {dense:,}"
        )
        return Choice(name, None, dense, dense, reason, missed=True)
    top = largest(form, shape, dense - 1)
    highest = max(top) if top is not None else 0
    best = reached(highest) if highest else 1.0
    if best > tol:
        reason = f"no rank below the dense size is within tol={tol:g}: {best:.3g} at rank {highest}"
        return Choice(name, None, dense, dense, reason, missed=True, error=best)
    low, high = 0, highest
    while high - low > 1:
        middle = (low + high) // 2
        at = reached(middle)
        low, high, best = (low, middle, at) if at <= tol else (middle, high, best)
    return told(high, best)
