"""The errors of retensor: each message says what was given, what is allowed and what to do next."""

from __future__ import annotations


class RetensorError(Exception):
    """Base of every error about a model, a plan or a file."""


class GraphError(RetensorError):
    """A model or a graph file that cannot be read as operators and tensors of known size."""


class PlanError(RetensorError):
    """A plan that is malformed, belongs to another graph, or breaks a rule when replayed."""


class InfeasibleError(RetensorError):
    """A scratchpad too small for one operator.

    Attributes
    ----------
    required_bytes : int
        Bytes that the operator's inputs and outputs need together.
    available_bytes : int
        Bytes of the scratchpad asked for.
    operator : str
        Name of the operator that needs them.
    """

    def __init__(self, operator: str, required_bytes: int, available_bytes: int) -> None:
        self.operator = operator
        self.required_bytes = required_bytes
        self.available_bytes = available_bytes
        missing = required_bytes - available_bytes
        super().__init__(
            f"operator '{operator}' needs {required_bytes:,} bytes for its inputs and outputs, "
            f"the scratchpad has {available_bytes:,}: {missing:,} bytes are missing; "
            f"give at least {required_bytes:,} bytes (M_R)"
        )


class MissingExtraError(RetensorError):
    """An optional dependency that is not installed.

    Parameters
    ----------
    feature : str
        What was asked for, as the start of a sentence.
    extra : str
        The extra that brings it, as in ``pip install "retensor[extra]"``.
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f'{feature} needs the {extra} extra: pip install "retensor[{extra}]"')
