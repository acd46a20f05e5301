"""``fold``: plain layers in the places of replacements that have a plain equivalent, in a copy of the model."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from retensor.files import described
from retensor.replacing.kinds import Reparametrization, Replacement
from retensor.replacing.replace import copied, equal, put, settle, tie


def fold(model: nn.Module) -> nn.Module:
    """Fold every replacement that has a plain equivalent back into a plain layer.

    Parameters
    ----------
    model : nn.Module
        Left as it is; the result is a copy, with outputs equal within rounding. What has no plain equivalent stays,
        and so does every other module and parametrization.

    Raises
    ------
    TypeError
        Where it is no module.
    ValueError
        Where a tensor has parametrizations of this library and others on top of each other.

    Examples
    --------
    >>> from torch import nn
    >>> fold(nn.Sequential(nn.Linear(2, 2)))
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"an nn.Module is folded, not {described(model)}")
    model, asked = copied(model), dict[int, nn.Module]()
    # What a replacement turns into may hold further ones.
    while True:
        model, changed = _folded(model, asked)
        if not changed:
            break
    _bake(model)
    return model


def _folded(model: nn.Module, asked: dict[int, nn.Module]) -> tuple[nn.Module, bool]:
    """The model with its outermost replacements folded, none of which was asked before; whether there was one."""
    dense: dict[int, nn.Module] = {}
    places: list[tuple[str, int]] = []
    owners: dict[int, nn.Module] = {}
    tied: dict[tuple[int, int], tuple[nn.Module, nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(f"{outer}." if outer else "") for outer, _ in places):
            # It goes with the replacement it lies in, or comes up again in what that turns into.
            continue
        if not isinstance(module, Replacement) or (id(module) in asked and id(module) not in dense):
            continue
        if id(module) not in dense:
            asked[id(module)] = module
            plain = module.to_dense()
            if plain is None:
                continue
            settle(module, plain)
            dense[id(module)] = plain
            for parameter in module.parameters():
                first = owners.setdefault(id(parameter), module)
                if first is not module:
                    tied[id(first), id(module)] = first, module
        places.append((name, id(module)))
    # What is made of the same tensors is one again, where it came out equal.
    for first, other in tied.values():
        tie(dense[id(first)], dense[id(other)], first, other)
    for name, key in places:
        if name:
            put(model, name, dense[key])
        else:
            model = dense[key]
    return model, bool(dense)


def _bake(model: nn.Module) -> None:
    """Put plain values in the places of this library's parametrizations; what is one tensor stays one."""
    made: list[tuple[nn.Module, str, torch.Tensor, torch.Tensor | None]] = []
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for label, steps in module.parametrizations.items():
            ours = [isinstance(step, Reparametrization) for step in steps]
            if any(ours) and not all(ours):
                raise ValueError(
                    f"'{name}.{label}' has parametrizations of this library and others on top of each other, which "
                    "cannot be folded apart; remove the others before"
                )
            if any(ours):
                value = getattr(module, label).detach().clone()
                made.append((module, label, value, steps.original if steps.is_tensor else None))
    # All values are known before any is put in place: torch would write them over what is trained, which may be shared.
    plain: dict[int, nn.Parameter] = {}
    for module, label, value, trained in made:
        parametrize.remove_parametrizations(module, label, leave_parametrized=trained is None)
        if label in module._buffers:
            module._buffers[label] = value
        elif trained is not None:
            shared = plain.get(id(trained))
            if shared is None or not equal(shared, value):
                shared = nn.Parameter(value, requires_grad=trained.requires_grad)
                plain.setdefault(id(trained), shared)
            module._parameters[label] = shared
    # torch adds at the end what it gives back; layers list what was parametrized, their weights, before the rest.
    for module, label, _, _ in reversed(made):
        if label in module._parameters:
            module._parameters = {label: module._parameters[label], **module._parameters}
