"""The one way to put another module in a layer's place, to fold it back, and to keep the result in a file.

The folder is not called ``replace``: a module of that name would stand in the way of the function ``retensor.replace``.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    from retensor.errors import MissingExtraError

    raise MissingExtraError("replacing layers", "torch") from error

from retensor.replacing.fold import fold
from retensor.replacing.kinds import Reparametrization, Replacement
from retensor.replacing.match import matching
from retensor.replacing.norms import fold_norms
from retensor.replacing.replace import replace
from retensor.replacing.state import load, save

__all__ = ["Reparametrization", "Replacement", "fold", "fold_norms", "load", "matching", "replace", "save"]
