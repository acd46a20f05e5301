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
        The extra that brings it. The message names where this library was installed from: a folder, or its name.
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f'{feature} needs the {extra} extra: pip install "{_installed_from()}[{extra}]"')


def _installed_from() -> str:
    """The folder that pip installed this library from, or its name where that was an index."""
    import json
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    # A name would be looked up on an index, where it may be somebody else's or none.
    try:
        record = distribution("retensor").read_text("direct_url.json")
        parts = urlsplit(json.loads(record)["url"]) if record else None
    except (PackageNotFoundError, ValueError, KeyError, TypeError, OSError):
        return "retensor"
    return url2pathname(parts.path) if parts is not None and parts.scheme == "file" else "retensor"
