"""Which tensors of a model are companded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from retensor.compression.weight_compander.function import DTYPES
from retensor.compression.weight_compander.parametrization import WeightCompander
from retensor.files import described
from retensor.replacing.match import matching, suggestions

TYPES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.MultiheadAttention,
)
"""Layers whose weights are companded by default: everything linear. Biases and normalisation are left alone."""


@dataclass(frozen=True)
class Owner:
    """A module that holds a weight tensor."""

    name: str
    module: nn.Module
    label: str

    @property
    def tensor(self) -> torch.Tensor:
        """The weight."""
        return self.module._parameters[self.label]

    @property
    def channels(self) -> int:
        """The axis of output channels."""
        transposed = isinstance(self.module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        return 1 if transposed else 0


def checked(model: Any) -> nn.Module:
    """A module, or a sentence that says what was given."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"weights of an nn.Module are companded, not of {described(model)}")
    return model


def owned_weights(model: nn.Module, types: Any, exclude: Any) -> list[list[Owner]]:
    """The tensors to compand, each by all its owners, those of the types asked for first."""
    outside = _excluded(model, exclude)
    owners: dict[int, list[Owner]] = {}
    wanted: dict[int, Owner] = {}
    left: set[int] = set()
    for name, module in model.named_modules():
        excluded = id(module) in outside
        taken = not excluded and isinstance(module, types)
        if not excluded and _is_quantised(module, types):
            raise TypeError(f"'{name}' is quantised; compand the model before it is, or exclude the layer")
        if taken:
            _check_layer(name, module)
        for label, tensor in module._parameters.items():
            if tensor is None:
                continue
            owner = Owner(f"{name}.{label}".lstrip("."), module, label)
            owners.setdefault(id(tensor), []).append(owner)
            if excluded:
                left.add(id(tensor))
            elif taken and "weight" in label and tensor.ndim >= 2:
                _check_tensor(owner)
                wanted.setdefault(id(tensor), owner)
    if not wanted:
        kinds = ", ".join(kind.__name__ for kind in (types if isinstance(types, tuple) else (types,)))
        raise ValueError(f"the model has no weights to compand in layers of {kinds}; name other types, or exclude less")
    groups = [
        [first, *(owner for owner in owners[key] if owner is not first)]
        for key, first in wanted.items()
        if key not in left
    ]
    for owner in (owner for group in groups for owner in group):
        if isinstance(owner.module, parametrize.ParametrizationList):
            raise ValueError(f"'{owner.name}' is a tensor of another parametrization; remove it, or exclude its owners")
    return groups


def _excluded(model: nn.Module, exclude: Any) -> set[int]:
    """Identities of the modules that are left alone, those inside others too."""
    if isinstance(exclude, str | type) or callable(exclude):
        patterns: tuple[Any, ...] = (exclude,)
    elif isinstance(exclude, Iterable):
        patterns = tuple(exclude)
    else:
        raise TypeError(f"exclude is {described(exclude)}, which is no pattern of layers, nor a sequence of them")
    found: set[int] = set()
    for pattern in patterns:
        names = matching(model, pattern)
        if not names:
            raise ValueError(
                f"exclude has {described(pattern)}, which means no layer; "
                f"{suggestions(pattern, (name for name, _ in model.named_modules()))}"
            )
        found.update(id(inner) for name in names for inner in model.get_submodule(name).modules())
    return found


def _is_quantised(module: nn.Module, types: Any) -> bool:
    """Whether it is torch's quantised counterpart of a type, which has the type's name."""
    return any(
        kind.__module__.startswith("torch.")
        and "quantized" in kind.__module__.split(".")
        and issubclass(getattr(nn, kind.__name__, object), types)
        for kind in type(module).__mro__
    )


def _check_layer(name: str, module: nn.Module) -> None:
    """Refuse a layer whose weights have no shape yet, or are made by something else."""
    for label, tensor in module._parameters.items():
        if tensor is not None and is_lazy(tensor):
            raise TypeError(
                f"'{name}.{label}' has no shape yet; run the model once on an input before its weights are companded"
            )
    if parametrize.is_parametrized(module):
        for label, steps in module.parametrizations.items():
            if any(isinstance(step, WeightCompander) for step in steps):
                raise RuntimeError(f"'{name}.{label}' is companded already; exclude the layer, or bake the model first")
            if "weight" in label:
                raise ValueError(
                    f"'{name}.{label}' is made by {type(steps[0]).__name__}; remove that parametrization, or exclude "
                    "the layer"
                )
    for label, value in vars(module).items():
        # Hooks of torch.nn.utils.weight_norm and prune leave a plain tensor where the parameter was.
        if "weight" in label and isinstance(value, torch.Tensor):
            raise ValueError(f"'{name}.{label}' is made by a hook; remove it, or exclude the layer")


def _check_tensor(owner: Owner) -> None:
    tensor = owner.tensor
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"'{owner.name}' is a {type(tensor.data).__name__}; compand before tensors are quantised or distributed, "
            "or exclude the layer"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"'{owner.name}' is of {tensor.dtype}; weights of float16, bfloat16, float32 and float64 are companded: "
            "exclude the layer"
        )
