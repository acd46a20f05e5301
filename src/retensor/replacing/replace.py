"""``replace``: other modules in the places of layers, in a copy of the model."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.utils import parametrize

from retensor.files import described
from retensor.replacing.match import Exactly, Pattern, meaning, shown, suggestions

Maker: TypeAlias = "nn.Module | Callable[[nn.Module], nn.Module | None]"
"""A module, which is copied into every place, or a function (or class) of the layer that makes what to put there."""

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def replace(
    model: nn.Module,
    replacements: Mapping[Any, Maker],
    *,
    tied: Literal["refuse", "both"] = "refuse",
    unmatched: Literal["raise", "warn", "ignore"] = "raise",
) -> nn.Module:
    """Put other modules in the places of layers.

    Parameters
    ----------
    model : nn.Module
        Left as it is; the result is a copy.
    replacements : mapping of pattern to module or function
        A pattern is a glob of names, a class of layers, or a function of name and module
        (:func:`retensor.replacing.matching`). The first pattern that means a layer takes it, and outer layers go before
        what is inside them. A function is given the layer (of the copy) and returns what stands in its place, the
        layer itself to leave it, or None to leave it and go on inside it; a module is copied into every place.
    tied : {"refuse", "both"}
        What to do where a layer shares a parameter with another one and the replacement does not keep it: refuse, or
        replace all its owners by the same function. What comes out equal then is tied again.
    unmatched : {"raise", "warn", "ignore"}
        What to do with patterns that mean no layer.

    Returns
    -------
    nn.Module
        In every place the hooks, device, training mode and, where it is one for the whole layer, floating-point type
        of the layer that stood there. A layer used in several places is replaced in all, by one module.

    Raises
    ------
    TypeError
        Where an argument or what a function returned is of another kind.
    ValueError
        Where a pattern means nothing, tied parameters would part, or the layer is one whose weights its parent reads
        without calling it (``out_proj`` of ``nn.MultiheadAttention``).

    Examples
    --------
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> replace(net, {"1": nn.GELU(), nn.Linear: lambda layer: None})
    Sequential(
      (0): Linear(in_features=4, out_features=8, bias=True)
      (1): GELU(approximate='none')
      (2): Linear(in_features=8, out_features=2, bias=True)
    )
    """
    _check(model, replacements, tied, unmatched)
    model = copied(model)
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    chosen, made = _choose(modules, names, replacements, unmatched)
    _keep_ties(model, modules, names, chosen, made, tied)
    for key, new in made.items():
        settle(modules[key], new)
    root = made.get(id(model), model)
    for key, new in made.items():
        if new is not modules[key] and modules[key] is not model:
            for name in names[key]:
                put(model, name, new)
    return root


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model, or a sentence that says why there is none."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and parametrize.is_parametrized(module):
            # It keeps the weights of its last run, which have a history and cannot be copied; it makes them anew.
            with torch.no_grad():
                module._init_flat_weights()
    try:
        found = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"the {type(model).__name__} cannot be copied: {error}; detach the tensors it holds besides its parameters"
        ) from error
    for module in found.modules():
        if parametrize.is_parametrized(module):
            # torch keeps parametrized tensors as properties of a class that a copy shares with its model: what is
            # removed from the one would be gone from the other.
            kind = type(module)
            own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, own)
    return found


def settle(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks, device, type and training mode of the one it stands for, which loses its hooks."""
    if new is old:
        return
    tensors = [*old.parameters(), *old.buffers()]
    types = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    devices = {tensor.device for tensor in tensors}
    mine = [*new.parameters(), *new.buffers()]
    if any(tensor.is_meta for tensor in mine) and devices and not any(device.type == "meta" for device in devices):
        raise ValueError(
            f"a {type(new).__name__} on the meta device, which has no values, cannot stand for a layer that has some; "
            "make it on a real one"
        )
    if len(devices) == 1 and any(tensor.device not in devices for tensor in mine):
        new.to(device=devices.pop())
    floats = {tensor.dtype for tensor in mine if tensor.is_floating_point()}
    # Complex parts would be cut off by a change to a real type.
    if len(types) == 1 and floats - types and not any(tensor.is_complex() for tensor in mine):
        new.to(dtype=types.pop())
    # The old module may go on inside the new one, with parts in a mode of their own.
    kept = {id(module) for module in old.modules()}
    for module in new.modules():
        if id(module) not in kept:
            module.training = old.training
    move_hooks(old, new)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks of another one, which loses them."""
    for label in _HOOKS:
        getattr(new, label).update(getattr(old, label))
        # The old module may go on inside the new one; its hooks would then run twice.
        getattr(old, label).clear()
    if new._backward_hooks and new._is_full_backward_hook is None:
        new._is_full_backward_hook = old._is_full_backward_hook


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of that name, and keep parents from reading the weights of the one that was there."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"'{name}' cannot be replaced: nn.MultiheadAttention reads its weight and never calls it; replace the "
            f"whole '{parent_name}' by an attention of plain layers"
        )
    if isinstance(parent, torch.jit.ScriptModule):
        raise ValueError(
            f"'{name}' lies in a scripted module, whose parts cannot be replaced; replace before scripting"
        )
    if leaf == "_orig_mod" and isinstance(parent, torch._dynamo.OptimizedModule):
        raise ValueError(
            f"'{name}' is what torch.compile compiled, which it goes on calling; replace before compiling, or parts of "
            "it"
        )
    parent._modules[leaf] = new
    for depth in range(name.count(".") + 1):
        above = model.get_submodule(".".join(name.split(".")[:depth]))
        if isinstance(above, nn.TransformerEncoderLayer):
            # Its fused path takes the weights of its layers; this flag sends it the plain way.
            above.activation_relu_or_gelu = 0
        elif isinstance(above, nn.TransformerEncoder):
            above.use_nested_tensor = False


def put_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in all places of a module, which may have several names; one it is afterwards too."""
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is old]:
        put(model, name, new)


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors have one shape and type and the same numbers, NaN being itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_meta or other.is_meta or one.device != other.device:
        return one.is_meta and other.is_meta
    a, b = (value.detach().contiguous().reshape(-1).view(torch.uint8) for value in (one, other))
    return torch.equal(a, b)


def _check(model: Any, replacements: Any, tied: Any, unmatched: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"layers of an nn.Module are replaced, not of {described(model)}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("layers of a scripted model cannot be replaced; replace them before scripting")
    if not isinstance(replacements, Mapping) or not replacements:
        raise TypeError(
            f"replacements are a mapping such as {{'blocks.*.mlp': make}} with at least one pattern, "
            f"not {described(replacements)}"
        )
    for pattern, maker in replacements.items():
        meaning(pattern)
        if not isinstance(maker, nn.Module) and not callable(maker):
            raise TypeError(
                f"the replacement for {shown(pattern)} is {described(maker)}; a module or a function of the layer is "
                "needed"
            )
        # Torch's own classes would take the layer for a setting: ReLU(layer) works in place.
        if isinstance(maker, type) and maker.__module__.startswith("torch.nn"):
            raise TypeError(
                f"the replacement for {shown(pattern)} is the class {maker.__name__}; give a module, or a function of "
                f"the layer such as lambda layer: {maker.__name__}(...)"
            )
    if tied not in ("refuse", "both"):
        raise ValueError(f"tied is {described(tied)}; it is 'refuse' or 'both'")
    if unmatched not in ("raise", "warn", "ignore"):
        raise ValueError(f"unmatched is {described(unmatched)}; it is 'raise', 'warn' or 'ignore'")


def _choose(
    modules: dict[int, nn.Module],
    names: dict[int, list[str]],
    replacements: Mapping[Any, Maker],
    unmatched: str,
) -> tuple[dict[int, Maker], dict[int, nn.Module]]:
    """The maker of every layer that is to be replaced and what it made, by the layer's identity.

    Nothing inside a replaced layer is asked for; inside one that a maker leaves by None everything is.
    """
    patterns: list[tuple[Pattern, Callable[[str, nn.Module], bool], Maker]] = [
        (pattern, meaning(pattern), maker) for pattern, maker in replacements.items()
    ]
    # Thousands of layers may be named one by one: those patterns are looked up, not tried.
    exact: dict[str, list[int]] = {}
    tried: list[tuple[int, Callable[[str, nn.Module], bool]]] = []
    for i, (pattern, meant, _) in enumerate(patterns):
        if isinstance(pattern, Exactly):
            exact.setdefault(pattern.name, []).append(i)
        else:
            tried.append((i, meant))
    used: set[int] = set()
    chosen: dict[int, Maker] = {}
    made: dict[int, nn.Module] = {}
    inside: dict[int, str] = {}
    # Names come outermost first.
    for key, module in modules.items():
        matched = sorted(
            {i for name in names[key] for i in exact.get(name, ())}
            | {i for i, meant in tried if any(meant(name, module) for name in names[key])}
        )
        if key in inside:
            continue
        used.update(matched)
        if not matched:
            continue
        maker = patterns[matched[0]][2]
        new = _made(module, maker, names[key][0])
        if new is not None:
            chosen[key], made[key] = maker, new
            for child in module.modules():
                if child is not module:
                    inside[id(child)] = names[key][0]
    idle = [pattern for i, (pattern, _, _) in enumerate(patterns) if i not in used]
    if idle and unmatched != "ignore":
        within = {name: inside[key] for key in inside for name in names[key]}
        told = "; ".join(_idle(pattern, modules, names, within) for pattern in idle)
        if unmatched == "raise":
            raise ValueError(told)
        warnings.warn(told, stacklevel=3)
    return chosen, made


def _idle(pattern: Any, modules: dict[int, nn.Module], names: dict[int, list[str]], within: Mapping[str, str]) -> str:
    """What to say of a pattern that took no layer."""
    meant = meaning(pattern)
    for key, module in modules.items():
        for name in names[key]:
            if name in within and meant(name, module):
                outer = within[name]
                return (
                    f"pattern {shown(pattern)} means only what lies in replaced layers, such as '{name}' in '{outer}'"
                )
    return f"pattern {shown(pattern)} means no layer; {suggestions(pattern, itertools.chain(*names.values()))}"


def _made(layer: nn.Module, maker: Maker, name: str) -> nn.Module | None:
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in layer.parameters()):
        raise ValueError(f"'{name}' has no shape yet; run the model once before its layers are replaced")
    new = copy.deepcopy(maker) if isinstance(maker, nn.Module) else maker(layer)
    if new is not None and not isinstance(new, nn.Module):
        raise TypeError(f"the replacement for '{name}' came out as {described(new)}; a module is needed")
    return new


Owner = tuple[int, str]
"""A module's identity and the name of a parameter it holds itself."""


def _keep_ties(
    model: nn.Module,
    modules: dict[int, nn.Module],
    names: dict[int, list[str]],
    chosen: dict[int, Maker],
    made: dict[int, nn.Module],
    tied: str,
) -> None:
    """See that no parameter of several owners is kept by some of them and lost by others."""
    owners: dict[int, list[Owner]] = {}
    for key, module in modules.items():
        for label, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((key, label))
    for parameter, group in owners.items():
        if len(group) < 2:
            continue
        places = {key: _place(modules, key, made) for key, _ in group}
        lost = [
            owner for owner in group
            if (place := places[owner[0]]) is not None
            and all(id(p) != parameter for p in made[place].parameters())
        ]  # fmt: skip
        if not lost or (len(set(places.values())) == 1 and None not in places.values()):
            # Kept by all, or all owners lie in one replaced layer, whose replacement is one module.
            continue
        told = [f"{names[key][0]}.{label}".lstrip(".") for key, label in group]
        if tied == "refuse":
            raise ValueError(
                f"{' and '.join(repr(name) for name in told)} are one tensor, which replacing would part; leave the "
                "layer out, or pass tied='both' to replace all its owners"
            )
        maker = chosen[places[lost[0][0]] or lost[0][0]]
        for key, _ in group:
            if places[key] is None:
                places[key] = key
                chosen[key] = maker
                made[key] = _made(modules[key], maker, names[key][0]) or modules[key]
        first, *rest = dict.fromkeys(place for place in places.values() if place is not None)
        for other in rest:
            if not tie(made[first], made[other], modules[first], modules[other]):
                raise ValueError(
                    f"{' and '.join(repr(name) for name in told)} are one tensor, but their replacements have no equal "
                    "parameter of one name; return modules that can share one"
                )


def _place(modules: dict[int, nn.Module], key: int, made: dict[int, nn.Module]) -> int | None:
    """The replaced layer that a module is or lies in."""
    if key in made:
        return key
    return next((place for place in made if any(id(child) == key for child in modules[place].modules())), None)


def tie(first: nn.Module, other: nn.Module, was: nn.Module, beside: nn.Module) -> bool:
    """Let ``other`` use the parameters of ``first`` that are equal to its own in name, shape and value.

    Not those that ``was`` and ``beside``, in whose places they stand, have apart, such as biases that are still zero.
    """
    mine = dict(first.named_parameters())
    one, two = dict(was.named_parameters()), dict(beside.named_parameters())
    shared = {id(p) for p in one.values()} & {id(p) for p in two.values()}
    leaves: dict[bool, set[str]] = {True: set(), False: set()}
    for name, parameter in (*one.items(), *two.items()):
        leaves[id(parameter) in shared].add(name.rpartition(".")[2])
    apart = leaves[False] - leaves[True]
    done = False
    for name, parameter in list(other.named_parameters()):
        same = mine.get(name)
        path, _, leaf = name.rpartition(".")
        if same is None:
            continue
        if same is parameter:
            done = True
        elif leaf not in apart and equal(same, parameter):
            other.get_submodule(path)._parameters[leaf] = same
            done = True
    return done
