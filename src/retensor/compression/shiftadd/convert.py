"""Whole models: attention turned into additions, linear layers into shifts or mixtures, and their latencies."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from retensor.compression.shiftadd.attention import (
    AddAttention,
    Attention,
    Threshold,
    check_attention,
    fit_hashes,
)
from retensor.compression.shiftadd.moe import Gate, MoELinear, attach_report, check_gate, mixtures
from retensor.compression.shiftadd.packed import PackedShiftLinear
from retensor.compression.shiftadd.shift import ShiftLinear, Variant, check_bits
from retensor.compression.shiftadd.sources import READERS, source_of
from retensor.files import described
from retensor.graph.modes import evaluating
from retensor.replacing import replace
from retensor.replacing.match import Pattern, meaning

Linears = Literal["shift", "moe"]
INCLUDE = ("**.qkv", "**.q", "**.kv", "**.proj", "**.fc1", "**.fc2")
"""Names of the linear layers of attentions and perceptrons in timm's vision transformers."""


def convert(
    model: nn.Module,
    attention: Attention | None = "linear_add",
    linears: Linears | None = "moe",
    *,
    include: Pattern | Sequence[Pattern] = INCLUDE,
    exclude: Pattern | Sequence[Pattern] = (),
    weight_bits: int = 5,
    act_frac_bits: int = 16,
    variant: Variant = "ps",
    scale: bool = False,
    strict: bool = False,
    gate: Gate = "paper",
    threshold: Threshold = "batch",
    sparse: bool = False,
    hashing: Mapping[str, Any] | None = None,
    calibration: Any = None,
    seed: int = 0,
) -> nn.Module:
    """A vision transformer whose attention adds and whose linear layers shift, as a copy that can be trained.

    The authors do it in three steps of training: the pretrained model as it is; with ``linears=None``; and with
    ``attention=None`` on what came out, which leaves what has been converted.

    Parameters
    ----------
    model : nn.Module
        With attentions of timm's vision transformers (DeiT too) or pyramid vision transformers, or of a class that
        :func:`register_attention` was told. It stays as it is.
    attention : {"linear_add", "binary_softmax", "ksh", None}
        See :class:`AddAttention`; None leaves attentions. Spatial reduction of keys and values goes: an attention that
        is linear in the tokens needs none.
    linears : {"shift", "moe", None}
        A :class:`ShiftLinear` or a :class:`MoELinear` in the place of each; None leaves them.
    include, exclude : pattern or sequence of patterns
        Which ``nn.Linear`` are meant, and which attentions and layers are left: globs of names, classes or functions
        (:func:`retensor.replacing.matching`).
    weight_bits, act_frac_bits, variant, scale, strict
        See :meth:`ShiftLinear.from_linear`.
    gate
        See :class:`MoELinear`.
    threshold, sparse, hashing
        See :class:`AddAttention`.
    calibration : torch.Tensor, optional
        Inputs that hashes are learned from; see :func:`fit_hashes`.
    seed : int
        Of convolutions, routers and hashes.

    Returns
    -------
    nn.Module
        With mixtures it has a function ``router_report()`` (:func:`router_report`).

    Raises
    ------
    ValueError
        Where a setting is out of range, no attention is recognised, no linear layer is meant, or nothing is asked for.

    Examples
    --------
    >>> from timm.models.vision_transformer import VisionTransformer
    >>> vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3)
    >>> model = convert(vit).eval()
    >>> model(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 3])
    >>> [row.name for row in model.router_report()][:2]
    ['blocks.0.attn.qkv', 'blocks.0.attn.proj']
    """
    if attention is None and linears is None:
        raise ValueError("neither attention nor linears is asked for; there is nothing to convert")
    if linears not in ("shift", "moe", None):
        raise ValueError(f"linears is {described(linears)}; it is 'shift', 'moe' or None")
    check_bits(weight_bits, act_frac_bits)
    check_gate(gate)
    left = _any_of(exclude)
    if attention is not None:
        check_attention(attention, threshold)
        model = _with_attention(
            model, left, seed, attention=attention, threshold=threshold, sparse=sparse, hashing=hashing
        )
        if attention == "ksh" and calibration is not None:
            fit_hashes(model, calibration, seed=seed)
    if linears is not None:
        meant = _any_of(include)
        drawn = iter(range(seed, seed + 10**6))

        def made(layer: nn.Module) -> nn.Module:
            settings: dict[str, Any] = {
                "weight_bits": weight_bits, "act_frac_bits": act_frac_bits, "variant": variant, "scale": scale,
                "strict": strict,
            }  # fmt: skip
            if linears == "shift":
                return ShiftLinear.from_linear(layer, **settings)
            return MoELinear.from_linear(layer, gate=gate, seed=next(drawn), **settings)

        inside = {
            f"{name}.{inner}"
            for name, layer in model.named_modules()
            if isinstance(layer, ShiftLinear | MoELinear | PackedShiftLinear)
            for inner, _ in layer.named_modules()
        }
        names = [
            name for name, layer in model.named_modules(remove_duplicate=False)
            if type(layer) is nn.Linear and meant(name, layer) and not left(name, layer) and name not in inside
        ]  # fmt: skip
        if not names:
            raise ValueError(
                f"include={described(include)} means no nn.Linear of the {type(model).__name__} that exclude leaves; "
                "name some, such as include='blocks.*.mlp.*'"
            )
        chosen = set(names)
        model = replace(model, {lambda name, _: name in chosen: made})
    attach_report(model)
    return model


@dataclass(frozen=True)
class Latency:
    """What the experts of every mixture take.

    Attributes
    ----------
    seconds : mapping of str to (float, float)
        By layer, seconds a token of the expert that multiplies and of the one that shifts.
    """

    seconds: Mapping[str, tuple[float, float]]

    @property
    def alpha(self) -> tuple[float, float]:
        """Shares of the experts in the latencies of all layers."""
        totals = [sum(each[i] for each in self.seconds.values()) for i in range(2)]
        return totals[0] / sum(totals), totals[1] / sum(totals)


def measure_latency(model: nn.Module, x: Any, *, rounds: int = 5, frozen: bool = True) -> Latency:
    """Time both experts of every mixture on all the tokens that the layer gets.

    Parameters
    ----------
    model : nn.Module
    x : torch.Tensor
        Inputs of the model; it is run in eval mode.
    rounds : int
        The median of so many, both experts in turn.
    frozen : bool
        Time the packed shifts on whole numbers, as in :func:`freeze`, and not the float ones of training.

    Raises
    ------
    ValueError
        Where the model holds no mixture.
    """
    layers = dict(mixtures(model))
    if not layers:
        raise ValueError("the model holds no mixture; convert it with linears='moe'")
    given: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            given[name] = inputs[0].detach().flatten(0, -2)

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    with torch.no_grad():
        for name, layer in layers.items():
            if name not in given:
                continue
            shift: Any = layer.shift
            if frozen and isinstance(shift, ShiftLinear):
                shift = PackedShiftLinear.from_shift(shift).eval()
            tokens = given[name]
            times: tuple[list[float], list[float]] = ([], [])
            for turn in range(-1, rounds):
                for i, expert in enumerate((layer.multiply, shift)):
                    start = time.perf_counter()
                    expert(tokens)
                    if turn >= 0:
                        times[i].append(time.perf_counter() - start)
            multiply, shifted = (sorted(each)[len(each) // 2] / len(tokens) for each in times)
            found[name] = (multiply, shifted)
    return Latency(found)


def _with_attention(model: nn.Module, left: Callable[[str, nn.Module], bool], seed: int, **settings: Any) -> nn.Module:
    drawn = iter(range(seed, seed + 10**6))
    names: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if not left(name, module) and source_of(module) is not None:
            names.add(name)
    if not names:
        known = ", ".join(sorted(READERS))
        raise ValueError(
            f"no attention of the {type(model).__name__} is recognised; known are {known}. Tell of another class by "
            "register_attention(cls, lambda module: Source(heads, head_dim, qkv, proj)), or pass attention=None"
        )

    def made(module: nn.Module) -> nn.Module:
        source = source_of(module)
        assert source is not None
        return AddAttention.from_source(source, seed=next(drawn), **settings)

    return replace(model, {lambda name, _: name in names: made})


def _any_of(patterns: Any) -> Callable[[str, nn.Module], bool]:
    listed = patterns if isinstance(patterns, list | tuple) else [patterns]
    meant = [meaning(pattern) for pattern in listed]
    return lambda name, module: any(one(name, module) for one in meant)
