"""The command line, ``retensor …``: bounds, plan, verify, run, compare, cost, sweep, pack, graph.

Exit codes: 0 done; 2 bad input, or a plan that verify finds invalid or run finds different; 3 a scratchpad too
small for one operator, or proved too small for buffers; 4 a packing that was not decided in time; 130 stopped by
Ctrl-C before there was a result.
A mistake is one sentence on stderr; with ``--json`` stdout carries one object either way. Each command's
work is imported when it runs, so that ``retensor -h`` is quick.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from retensor.errors import InfeasibleError, RetensorError
from retensor.files import brief

if TYPE_CHECKING:
    import typer

BAD_INPUT = 2
INFEASIBLE = 3
INTERRUPTED = 130


def main() -> None:
    """Run the command line with this process's arguments and exit."""
    try:
        _open_streams()
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        # While typer and the commands were still being imported.
        code = INTERRUPTED
        with contextlib.suppress(OSError):
            print("retensor: stopped by Ctrl-C", file=sys.stderr)
    # All is said and written: a Ctrl-C that comes late changes nothing any more.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # Else the interpreter tries again while it ends, and makes its own exit code of it.
            _mute(stream)
    if code == INTERRUPTED:
        # A solver's thread may still be inside C++; an interpreter that is torn down around it aborts.
        os._exit(code)
    sys.exit(code)


def _open_streams() -> None:
    """Put the null device where a stream was closed before the start (``>&-``): nobody wants what goes there."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken, which is this one: no file opened later is mistaken for a stream.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def _mute(stream: TextIO) -> None:
    """Send what a stream still holds nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str
        What follows ``retensor``.
    """
    from retensor.cli.app import app
    from retensor.cli.output import print_error

    as_json = "--json" in arguments
    # A name that the terminal's encoding lacks is no reason to fail.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = _guarded(arguments, as_json, app)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        # Typer and rich make SystemExit of a broken pipe.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # Whoever read the output has read enough (``| head``); files are written before anything is printed.
        _mute(sys.stdout)
        code = 0
    except OSError as error:
        _mute(sys.stdout)
        print_error(f"cannot write to stdout: {error.strerror or error}; files named by options are complete")
        code = BAD_INPUT
    return code


def _guarded(arguments: Sequence[str], as_json: bool, app: typer.Typer) -> int:
    """Run the command and turn what it raises into a sentence and an exit code."""
    import typer

    from retensor.cli.output import print_error, print_json

    # Typer carries its own copy of click, or uses the installed one, depending on its version; this is the
    # base of its usage errors in both.
    bases = typer.BadParameter.__mro__
    usage_error: type[Exception] = next(base for base in bases if base.__name__ == "ClickException")
    try:
        code = int(app(list(arguments), prog_name="retensor", standalone_mode=False) or 0)
        # Newer Typers turn Ctrl-C into this code and say nothing.
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code
    except InfeasibleError as error:
        print_error(str(error))
        if as_json:
            print_json(
                {
                    "status": "infeasible",
                    "error": str(error),
                    "operator": error.operator,
                    "required_bytes": error.required_bytes,
                    "available_bytes": error.available_bytes,
                    "missing_bytes": error.required_bytes - error.available_bytes,
                }
            )
        return INFEASIBLE
    except usage_error as error:
        sentence = getattr(error, "format_message", error.__str__)()
    except BrokenPipeError:
        raise
    except RetensorError as error:
        sentence = str(error)
    except OSError as error:
        # Files are read and written with sentences of their own; without a name it is a stream that fails.
        if error.filename is None:
            raise
        sentence = f"'{brief(error.filename)}': {error.strerror or error}"
    except MemoryError:
        sentence = "there is not enough memory for this model; use a machine with more"
    except (ValueError, TypeError) as error:
        if not _raised_by_retensor(error.__traceback__):
            raise
        sentence = str(error)
    except (KeyboardInterrupt, typer.Abort):
        sentence = "stopped by Ctrl-C"
        print_error(sentence)
        if as_json:
            print_json({"status": "interrupted", "error": sentence})
        return INTERRUPTED
    # stderr first: stdout may be what fails.
    print_error(sentence)
    if as_json:
        print_json({"status": "error", "error": sentence})
    return BAD_INPUT


def _raised_by_retensor(trace: TracebackType | None) -> bool:
    """Whether the innermost frame is ours: a check of an argument, not a bug inside a library we call."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")).startswith("retensor.")
