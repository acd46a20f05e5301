"""onnx's shape inference and function inlining, in a process of their own that may crash or hang.

Both are C++ that trusts its input: on a malformed model they can read out of bounds, abort, or loop (an Einsum
with the equation ``...i...j->`` never ends, a LayerNormalization with a huge axis is a segmentation fault). So
they run in a child process, started once and used again, under a limit on memory and on time. A child that dies
or is late costs one :class:`GraphError`; the next request starts another.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import onnx
import onnx.onnx_cpp2py_export

from retensor.errors import GraphError
from retensor.graph.onnx_worker import HEADER

SECONDS = 5.0
"""Time that one request may take; one of a sound model takes well under a millisecond."""


class InferenceError(Exception):
    """What onnx said about a model that it understood and refused."""


class _Child:
    """The process at work, and the lock that lets one request in at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0

    def ask(self, kind: bytes, model: bytes, what: str) -> bytes:
        with self.lock:
            process = self.process
            # A child belongs to the process that started it: after a fork its pipes are another's.
            if process is None or self.owner != os.getpid() or process.poll() is not None:
                process = self._start()
            try:
                assert process.stdin is not None
                process.stdin.write(HEADER.pack(kind, len(model)))
                process.stdin.write(model)
                process.stdin.flush()
                deadline = time.monotonic() + SECONDS
                status, size = HEADER.unpack(self._read(process, HEADER.size, deadline))
                answer = self._read(process, size, deadline)
            except TimeoutError:
                self.stop()
                raise GraphError(
                    f"ONNX's shape inference does not end within {SECONDS:.0f} s at {what}; it is malformed"
                ) from None
            except (OSError, EOFError):
                self.stop()
                raise GraphError(f"ONNX's shape inference crashes at {what}; it is malformed") from None
            except BaseException:
                # Half an answer may still be under way (Ctrl-C): never take it for the next one's.
                self.stop()
                raise
        if status != b"+":
            raise InferenceError(answer.decode(errors="replace"))
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        library = onnx.onnx_cpp2py_export.__file__
        script = Path(__file__).with_name("onnx_worker.py")
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", str(script), library],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Ctrl-C on the terminal is for the parent to handle.
                start_new_session=True,
            )
        except OSError as error:
            raise GraphError(
                f"cannot start the process for ONNX's shape inference: {error.strerror or error}"
            ) from None
        self.owner = os.getpid()
        return self.process

    def _read(self, process: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
        assert process.stdout is not None
        handle = process.stdout.fileno()
        parts: list[bytes] = []
        while size > 0:
            # Pipes cannot be waited for on Windows; there a request has no time limit.
            if os.name == "posix" and not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(handle, min(size, 2**20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
            return
        process.kill()
        with contextlib.suppress(OSError):
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


_child = _Child()
atexit.register(_child.stop)


def infer_shapes(model: onnx.ModelProto, what: str, strict: bool) -> onnx.ModelProto:
    """``model`` with the types that onnx infers.

    Parameters
    ----------
    model : ModelProto
    what : str
        What to call the model in an error.
    strict : bool
        Raise where onnx meets a contradiction, instead of leaving types out.

    Raises
    ------
    InferenceError
        Where onnx refuses the model.
    GraphError
        Where onnx crashes on it or does not end.
    """
    answer = _child.ask(b"s" if strict else b"l", model.SerializeToString(), what)
    return onnx.ModelProto.FromString(answer)


def inline_functions(model: onnx.ModelProto, what: str) -> onnx.ModelProto:
    """``model`` with calls of its own functions replaced by their nodes.

    Raises
    ------
    InferenceError
        Where onnx refuses the model.
    GraphError
        Where onnx crashes on it or does not end.
    """
    return onnx.ModelProto.FromString(_child.ask(b"f", model.SerializeToString(), what))
