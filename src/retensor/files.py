"""Files are written to a temporary name beside the target and renamed, so none is ever half-written.

A target that is a link is followed first, so that the link stays and the file behind it changes; what is no
ordinary file (a device, a pipe, a link in a circle) is refused, because a rename would put a file in its place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path

from retensor.errors import RetensorError

MOST_LINKS = 40
"""Links that are followed to one file, as many as Linux follows itself."""

# Folders of the system whose entries are no files of anybody's; shared memory is an ordinary file system.
_SYSTEM = ("/dev", "/proc", "/sys")
_ORDINARY = ("/dev/shm",)


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all; a link is written through.

    Raises
    ------
    RetensorError
        Where the target is no ordinary file or cannot be written.
    """
    where = f"cannot write '{brief(path)}'"
    target = writable_target(path, where)
    if target.exists() and not os.access(target, os.W_OK):
        raise RetensorError(f"{where}: it is read-only; name another file or change its mode")
    data = content.encode() if isinstance(content, str) else content
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
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
        raise RetensorError(f"{where}: {error.strerror or error}; name a file elsewhere or make room") from error


def writable_target(path: str | os.PathLike[str], where: str) -> Path:
    """The file that writing to ``path`` means, every link followed; it need not be there yet.

    Parameters
    ----------
    path : str or path
    where : str
        How a sentence about it starts, such as ``cannot write 'plan.json'``.

    Raises
    ------
    RetensorError
        Where it is a directory, a device, a pipe, a place in ``/dev``, ``/proc`` or ``/sys``, or a link in a circle.
    """
    step = Path(path)
    try:
        for _ in range(MOST_LINKS):
            step = Path(os.path.realpath(step.parent)) / step.name
            # Asked at every link: /dev/stdout may lead to an ordinary file and is not one itself.
            if _is_system(step):
                raise RetensorError(f"{where}: it is not an ordinary file but a part of the system; name another")
            if not step.is_symlink():
                break
            step = step.parent / step.readlink()
        else:
            raise RetensorError(f"{where}: it is a link that leads in a circle; name another file")
        mode = step.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return step
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).lower()
        raise RetensorError(f"{where}: {reason}; name a file elsewhere") from error
    if stat.S_ISDIR(mode):
        raise RetensorError(f"{where}: it is a directory; name a file")
    if not stat.S_ISREG(mode):
        raise RetensorError(f"{where}: it is not an ordinary file; name another")
    return step


def _is_system(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in _SYSTEM) and not any(
        path.is_relative_to(folder) for folder in _ORDINARY
    )


def broken_link(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with ``path`` where it is a link to nothing, for a sentence; None where it is not."""
    link = Path(path)
    try:
        if not link.is_symlink():
            return None
        link.stat()
    except FileNotFoundError:
        return f"is a link to '{brief(link.readlink())}', which is not there"
    except OSError as error:
        # Other faults are told by who opens the file.
        return "is a link that leads in a circle" if error.errno == errno.ELOOP else None
    except ValueError:
        return None
    return None


def brief(name: object, limit: int = 120) -> str:
    """A path or name for a sentence: on one line, its middle left out where it is long.

    >>> brief("net\\n.onnx"), brief("x" * 300 + ".onnx", 20)
    ('net\\\\n.onnx', 'xxxxxxxx...xxxx.onnx')
    """
    text = str(name)
    if len(text) > limit:
        text = text[: (limit - 3) // 2] + "..." + text[-((limit - 3) - (limit - 3) // 2) :]
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def described(value: object, limit: int = 60) -> str:
    """Any value for a sentence, as Python writes it; its type where that fails, as for numbers of many digits.

    >>> described(["x"]), described(10**5000)
    ("['x']", 'a value of type int')
    """
    try:
        return brief(repr(value), limit)
    except Exception:  # the value is not ours, nor is its __repr__
        return f"a value of type {type(value).__name__}"
