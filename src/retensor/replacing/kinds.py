"""What a system puts in a model: modules that stand for a layer, and parametrizations that make a tensor.

A system derives from one of the two, and :func:`retensor.fold`, :func:`retensor.save` and :func:`retensor.load` then
know it. Nothing else has to be registered.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import nn

from retensor.errors import RetensorError
from retensor.files import described


class _Kind(nn.Module):
    """What both have in common: a name in files, and a configuration that rebuilds the module without its values."""

    _known: ClassVar[dict[str, type[_Kind]]] = {}

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        _Kind._known[cls.kind()] = cls

    @classmethod
    def kind(cls) -> str:
        """The name of this class in files."""
        return f"{cls.__module__}.{cls.__qualname__}"

    def config(self) -> dict[str, Any]:
        """Arguments for :meth:`from_config`, as JSON has them: shapes and settings, no values of tensors."""
        raise NotImplementedError(f"{type(self).__name__} cannot be saved: it has no config()")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A module of the same shapes, whose values are loaded afterwards.

        By default the configuration is the arguments of the class. It is called on the meta device first, to compare
        names and shapes with a file's before any memory is taken.
        """
        return cls(**config)


class Replacement(_Kind):
    """A module that stands in a layer's place.

    One that has a plain equivalent overrides :meth:`to_dense`.
    """

    def to_dense(self) -> nn.Module | None:
        """A plain layer with the same outputs within rounding; None where there is none. ``self`` stays as it is."""
        return None

    def loaded(self, model: nn.Module) -> None:
        """Called by :func:`retensor.load` once all of a model is read, for what replacements hold in common."""


class Reparametrization(_Kind):
    """A parametrization (:mod:`torch.nn.utils.parametrize`) of a tensor that can be baked into plain values."""


def kind_named(kind: Any) -> type[_Kind]:
    """The class of that name in a file.

    Of this library only :mod:`retensor.quantizing` and modules of :data:`retensor.systems.SYSTEMS` are imported for it;
    other classes must have been defined already, so that a file cannot make anything run.

    Raises
    ------
    RetensorError
        Where there is none.
    """
    from retensor.systems import SYSTEMS

    if not isinstance(kind, str):
        raise RetensorError(f"{described(kind)} names no replacement; a class's full name is needed")
    modules = [system.module for system in SYSTEMS if system.wing != "planning"]
    for module in ("retensor.quantizing", *modules):
        if kind.startswith(f"{module}."):
            importlib.import_module(module)
    if kind not in _Kind._known:
        raise RetensorError(
            f"no replacement is called {described(kind)}; where it is your own class, import its module before loading"
        )
    return _Kind._known[kind]
