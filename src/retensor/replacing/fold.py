"""``fold``: plain layers in the places of replacements that have a plain equivalent, in a copy of the model."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from retensor.files import described
from retensor.replacing.kinds import Reparametrization, Replacement
from retensor.replacing.replace import copied, put, settle


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
    model = copied(model)
    dense: dict[int, nn.Module] = {}
    places: list[tuple[str, int]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Replacement):
            continue
        if id(module) not in dense:
            plain = module.to_dense()
            if plain is None:
                continue
            settle(module, plain)
            dense[id(module)] = plain
        places.append((name, id(module)))
    folded: list[str] = []
    for name, key in places:
        if any(name.startswith(f"{outer}." if outer else "") for outer in folded):
            # Gone with the replacement it lay in.
            continue
        folded.append(name)
        if name:
            put(model, name, dense[key])
        else:
            model = dense[key]
    _bake(model)
    return model


def _bake(model: nn.Module) -> None:
    """Put plain values in the places of this library's parametrizations; what was tied is tied afterwards."""
    # The tensor is kept beside its first owner, so that its identity is not given to another.
    first: dict[int, tuple[nn.Module, str, object]] = {}
    for name, module in list(model.named_modules()):
        if not parametrize.is_parametrized(module):
            continue
        for label, steps in list(module.parametrizations.items()):
            ours = [isinstance(step, Reparametrization) for step in steps]
            if not any(ours):
                continue
            if not all(ours):
                raise ValueError(
                    f"'{name}.{label}' has parametrizations of this library and others on top of each other, which "
                    "cannot be folded apart; remove the others before"
                )
            source = getattr(steps, "original", steps)
            parametrize.remove_parametrizations(module, label, leave_parametrized=True)
            if id(source) in first:
                owner, its_label, _ = first[id(source)]
                module._parameters[label] = owner._parameters[its_label]
            first.setdefault(id(source), (module, label, source))
