"""Answers kept on disk: plans and bounds that need no second search, safe from kills and from each other.

A folder of JSON files ``ab/<key>-<time limit>-<checksum>.json``: the key names the task, ``ab`` are its first two
digits, the time limit is the longest search so far, and the checksum is that of key, limit and content. A file is
written under a temporary name and renamed, never changed, and removed only after a file that is at least as good
in everything has taken its place. So nothing is locked, a process may be killed at any moment, and of two processes
that answer the same task at once neither loses what the other found. A file that is cut short, altered or another
task's counts as absent, and goes when the task is answered.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import stat
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic

from retensor.errors import PlanError, RetensorError
from retensor.files import brief, write_atomic
from retensor.jsonfile import LARGEST_FILE
from retensor.planning.tasks import AnswerT, Task

STALE_SECONDS = 3600.0
"""A temporary file is written in milliseconds; one of this age was left by a process that was killed."""

_NAME = re.compile(r"([0-9a-f]{32})-([0-9a-z.+-]{1,24})-([0-9a-f]{32})\.json")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}-.*")
_MOST_TRIES = 16


@dataclass(frozen=True, slots=True)
class Kept(Generic[AnswerT]):
    """An answer, and the longest time limit it was searched with."""

    answer: AnswerT
    time_limit: float


@dataclass
class _Seen(Generic[AnswerT]):
    """The files of one task: all there are, those that answer it, and those that are broken."""

    all: set[Path] = field(default_factory=set)
    good: dict[Path, Kept[AnswerT]] = field(default_factory=dict)
    bad: set[Path] = field(default_factory=set)


class PlanCache:
    """A folder of answers; see the module for what it promises.

    Parameters
    ----------
    folder : path
        Made where it is not there. On a cluster: a folder that every machine sees.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._given = os.fspath(folder)
        self.folder = Path(self._given)

    def prepare(self) -> None:
        """Make the folder, and remove temporary files that killed processes left in it.

        Raises
        ------
        RetensorError
            Where it is a file, or cannot be made or written to.
        """
        where = f"cannot keep plans in '{brief(self._given)}'"
        if not self._given.strip() or "\0" in self._given:
            raise RetensorError(f"{where}: that is no name of a folder; name one, or keep none")
        try:
            if self.folder.exists() and not self.folder.is_dir():
                raise RetensorError(f"{where}: it is a file; name a folder, or keep none")
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
            self._sweep_out()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise RetensorError(f"{where}: {reason}; name a folder elsewhere, or keep none") from error

    def find(self, task: Task[AnswerT]) -> Kept[AnswerT] | None:
        """The best answer kept for ``task``, replayed against its graph; None where there is none."""
        return _joined(task, list(self._look(task).good.values()))

    def serves(self, task: Task[AnswerT], kept: Kept[AnswerT], time_limit: float) -> bool:
        """Whether a search of ``time_limit`` seconds is not worth while: it was done, or nothing is left to find."""
        return task.proved(kept.answer) or time_limit <= kept.time_limit

    def holds(self, task: Task[AnswerT]) -> bool:
        """Whether some file is there for ``task``, good or not."""
        return any(True for _ in self._files(task.key))

    def keep(self, task: Task[AnswerT], answer: AnswerT, time_limit: float) -> Kept[AnswerT]:
        """Keep ``answer`` with what is known already, and return the best of both.

        Raises
        ------
        RetensorError
            Where the folder cannot be written to.
        """
        best = Kept(answer, time_limit)
        seen = _Seen[AnswerT]()
        for _ in range(_MOST_TRIES):
            seen = self._look(task, seen)
            best = _joined(task, [best, *seen.good.values()]) or best
            target, content = self._file(task, best)
            if target not in seen.good:
                self._write(target, content)
                seen.good[target] = best
            # What now is there is as good as each of them in everything; another process may be at the same.
            for path in (seen.good.keys() | seen.bad) - {target}:
                with contextlib.suppress(OSError):
                    path.unlink()
            # Whoever looks last sees all that was written, so two processes that meet here leave one file.
            if set(self._files(task.key)) <= seen.all | {target}:
                break
        return best

    def _file(self, task: Task[AnswerT], kept: Kept[AnswerT]) -> tuple[Path, bytes]:
        content = json.dumps(task.write(kept.answer), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        limit = repr(float(kept.time_limit))
        return self._folder(task.key) / f"{task.key}-{limit}-{_checksum(task.key, limit, content)}.json", content

    def _write(self, target: Path, content: bytes) -> None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RetensorError(f"cannot write '{brief(target)}': {error.strerror or error}") from error
        write_atomic(target, content)

    def _folder(self, key: str) -> Path:
        return self.folder / key[:2]

    def _files(self, key: str) -> list[Path]:
        """The files of one task, whole or not."""
        try:
            found = sorted(self._folder(key).iterdir())
        except OSError:
            return []
        return [path for path in found if (match := _NAME.fullmatch(path.name)) and match[1] == key]

    def _look(self, task: Task[AnswerT], before: _Seen[AnswerT] | None = None) -> _Seen[AnswerT]:
        """Read the files of one task, but for those that are known from ``before``."""
        seen = _Seen[AnswerT]()
        for _ in range(_MOST_TRIES):
            seen = _Seen[AnswerT]()
            vanished = False
            for path in self._files(task.key):
                seen.all.add(path)
                try:
                    kept = before.good[path] if before and path in before.good else _load(task, path)
                except FileNotFoundError:
                    # Another process has put a better one in its place: look again.
                    vanished = True
                except OSError:
                    # It may be whole and readable to others or later: neither used nor removed.
                    continue
                else:
                    if kept is None:
                        seen.bad.add(path)
                    else:
                        seen.good[path] = kept
            if not vanished:
                break
        return seen

    def _sweep_out(self) -> None:
        oldest = time.time() - STALE_SECONDS
        for folder in self.folder.iterdir():
            if not re.fullmatch("[0-9a-f]{2}", folder.name) or not folder.is_dir():
                continue
            for path in folder.iterdir():
                # Another process may sweep out the same file.
                with contextlib.suppress(OSError):
                    if _TEMPORARY.fullmatch(path.name) and path.stat().st_mtime < oldest:
                        path.unlink()


def cache_folder() -> Path:
    """Where the command line keeps plans: ``$RETENSOR_CACHE``, or ``retensor/plans`` in the user's cache folder.

    That is ``$XDG_CACHE_HOME`` or ``~/.cache``; on macOS ``~/Library/Caches``; on Windows ``%LOCALAPPDATA%``. The
    folder may be removed at any time.

    Examples
    --------
    >>> cache_folder()  # doctest: +SKIP
    PosixPath('/home/me/.cache/retensor/plans')
    """
    if chosen := os.environ.get("RETENSOR_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "retensor" / "plans"


def _joined(task: Task[AnswerT], found: list[Kept[AnswerT]]) -> Kept[AnswerT] | None:
    def join(one: Kept[AnswerT], other: Kept[AnswerT]) -> Kept[AnswerT]:
        return Kept(task.join(one.answer, other.answer), max(one.time_limit, other.time_limit))

    return functools.reduce(join, found) if found else None


def _load(task: Task[AnswerT], path: Path) -> Kept[AnswerT] | None:
    """What a file holds; None where it is not what it says, or no answer to ``task``."""
    content = _content(path)
    if content is None:
        return None
    try:
        return Kept(task.read(json.loads(content)), float(path.name[33:-38]))
    except (PlanError, ValueError, RecursionError):
        return None


def _content(path: Path) -> bytes | None:
    """A file's bytes where they are those it was written with, else None."""
    status = path.stat()
    match = _NAME.fullmatch(path.name)
    if match is None or not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
        return None
    content = path.read_bytes()
    return content if _checksum(match[1], match[2], content) == match[3] else None


def _checksum(key: str, limit: str, content: bytes) -> str:
    return hashlib.sha256(f"{key} {limit}\n".encode() + content).hexdigest()[:32]
