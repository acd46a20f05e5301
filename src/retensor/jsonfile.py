"""The one way to read a JSON file that somebody else wrote: bounded, strict, and refused with a sentence."""

from __future__ import annotations

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from retensor.errors import RetensorError
from retensor.files import brief, broken_link, described

LARGEST_FILE = 512 * 2**20


def read_json(path: str | os.PathLike[str], what: str, error: type[RetensorError]) -> Any:
    """What the JSON file ``path`` holds.

    Parameters
    ----------
    path : str or path
    what : str
        What the file should be, for messages: ``"graph"``, ``"plan"``.
    error : type
        The kind of :class:`RetensorError` to raise.

    Raises
    ------
    RetensorError
        Of type ``error``, where the file is missing, a directory, a pipe, over 512 MiB, not UTF-8, not JSON,
        nested too deeply, repeats a key, or holds a number that JSON does not have.
    """
    source = Path(path)
    shown = brief(source)
    if (fault := broken_link(source)) is not None:
        raise error(f"'{shown}' {fault}; give the path of a {what} file")
    try:
        # Looked at before opening: opening a named pipe would wait for ever.
        status = source.stat()
        if stat.S_ISDIR(status.st_mode):
            raise error(f"'{shown}' is a directory; give the path of a {what} file")
        if not stat.S_ISREG(status.st_mode):
            raise error(f"'{shown}' is not a regular file; give the path of a {what} file")
        if status.st_size > LARGEST_FILE:
            raise error(f"'{shown}' has {status.st_size:,} bytes; a {what} file has up to {LARGEST_FILE:,}")
        data = source.read_bytes()
    except FileNotFoundError:
        raise error(f"there is no file '{shown}'; give the path of a {what} file") from None
    except (OSError, ValueError) as fault_of_system:
        reason = getattr(fault_of_system, "strerror", None) or fault_of_system
        raise error(f"cannot read '{shown}': {reason}; give the path of a {what} file") from None
    return _parsed(data, shown, what, error)


def _parsed(data: bytes, shown: str, what: str, error: type[RetensorError]) -> Any:
    def constant(text: str) -> NoReturn:
        raise error(f"{shown} holds the number {text}, which JSON does not have")

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in entries:
            if key in table:
                raise error(f"{shown} has the key {described(key)} twice in one object")
            table[key] = value
        return table

    if not data.strip():
        raise error(f"{shown} is empty; a {what} file is JSON")
    if data.startswith(codecs.BOM_UTF8):
        raise error(f"{shown} starts with a byte order mark, which JSON does not have; save it as UTF-8 without")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise error(f"{shown} is not UTF-8 text (byte {fault.start}); a {what} file is JSON") from None
    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=pairs)
    except json.JSONDecodeError as fault:
        raise error(f"{shown} is not JSON: {fault.msg} in line {fault.lineno}") from None
    except RecursionError:
        raise error(f"{shown} is nested too deeply to be a {what}") from None
    except ValueError:  # Python refuses integers of thousands of digits
        raise error(f"{shown} holds a number with too many digits") from None
