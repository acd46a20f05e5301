"""The process in which onnx's C++ meets models that are not to be trusted; run as a script, never imported.

It loads onnx's compiled module alone, by path, which takes a few hundredths of a second, and answers requests on
its standard input until that closes. See :mod:`retensor.graph.onnx_guard` for the other end.
"""

import importlib.machinery
import importlib.util
import os
import signal
import struct
import sys
from typing import Any

LARGEST_MEMORY = 4 * 2**30
LONGEST_REQUEST = 30
HEADER = struct.Struct("<cQ")


def serve(library: str) -> None:
    """Answer requests with ``library``, onnx's compiled module, until standard input closes."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    # Whatever the C++ prints must not get among the answers.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (LARGEST_MEMORY, LARGEST_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass
    loader = importlib.machinery.ExtensionFileLoader("onnx_cpp2py_export", library)
    spec = importlib.util.spec_from_loader("onnx_cpp2py_export", loader)
    assert spec is not None
    onnx: Any = importlib.util.module_from_spec(spec)
    loader.exec_module(onnx)
    while header := requests.read(HEADER.size):
        kind, size = HEADER.unpack(header)
        model = requests.read(size)
        # Should the parent be gone by the time that this loops, nobody else ends it.
        if hasattr(signal, "alarm"):
            signal.alarm(LONGEST_REQUEST)
        try:
            if kind == b"f":
                answer = onnx.inliner.inline_local_functions(model, False)
            else:
                answer = onnx.shape_inference.infer_shapes(model, False, kind == b"s", False)
            status = b"+"
        except Exception as error:
            answer, status = str(error).encode(errors="replace")[:4096], b"-"
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        answers.write(HEADER.pack(status, len(answer)) + answer)
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
