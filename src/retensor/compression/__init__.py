"""What tensors are made of: the same layer with a smaller or cheaper tensor in its place. One module a system.

Each is loaded when it is first used and needs the compression extra: ``pip install "retensor[compression]"``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from retensor.systems import SYSTEMS

_SYSTEMS = tuple(system.module.rpartition(".")[2] for system in SYSTEMS if system.wing == "compression")

__all__ = list(_SYSTEMS)


def __getattr__(name: str) -> ModuleType:
    """Load a system when it is first used."""
    if name in _SYSTEMS:
        try:
            return importlib.import_module(f"retensor.compression.{name}")
        except ModuleNotFoundError as error:
            if error.name is not None and error.name.split(".")[0] == "torch":
                from retensor.errors import MissingExtraError

                raise MissingExtraError(f"retensor.compression.{name}", "compression") from error
            raise
    raise AttributeError(f"module 'retensor.compression' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
