"""Files are written to a temporary name beside the target and renamed, so none is ever half-written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from retensor.errors import RetensorError


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all.

    Raises
    ------
    RetensorError
        Where the target is a directory or cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise RetensorError(f"cannot write '{target}': it is a directory; name a file")
    if target.exists() and not os.access(target, os.W_OK):
        raise RetensorError(f"cannot write '{target}': it is read-only")
    data = content.encode() if isinstance(content, str) else content
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes the file private; a result is meant to be read like any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise RetensorError(f"cannot write '{target}': {error.strerror or error}") from error
