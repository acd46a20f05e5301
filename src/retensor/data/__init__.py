"""Real data that need no network, and small models trained on them once.

Every loader takes no argument that is needed, returns tensors, and names the source and the licence of its data. They
need the data extra: ``pip install "retensor[data]"``.
"""

try:
    import sklearn as _sklearn  # noqa: F401
    import torch as _torch  # noqa: F401
except ImportError as error:
    from retensor.errors import MissingExtraError

    raise MissingExtraError("data sets and reference models", "data") from error

from retensor.data.reference import REFERENCES, reference
from retensor.data.sets import Split, breast_cancer, digits, mnist5k, photographs, wine
from retensor.data.text import minilm, sentences
from retensor.data.training import accuracy, fit, seeded

__all__ = [
    "REFERENCES",
    "Split",
    "accuracy",
    "breast_cancer",
    "digits",
    "fit",
    "minilm",
    "mnist5k",
    "photographs",
    "reference",
    "seeded",
    "sentences",
    "wine",
]
