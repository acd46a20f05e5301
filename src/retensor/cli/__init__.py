"""The command line, ``retensor …``: bounds, plan, verify, run, compare, sweep and graph.

Exit codes: 0 done, 2 bad input, 3 a scratchpad too small for one operator, 130 stopped by a second Ctrl-C.
A mistake is one sentence on stderr; with ``--json`` stdout carries one object either way. Each command's
work is imported when it runs, so that ``retensor -h`` is quick.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import TracebackType

import typer

from retensor.cli.output import print_error, print_json
from retensor.errors import InfeasibleError, RetensorError

BAD_INPUT = 2
INFEASIBLE = 3
INTERRUPTED = 130

# Typer carries its own copy of click, or uses the installed one, depending on its version; this is the
# base of its usage errors in both.
_UsageError: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def main() -> None:
    """Run the command line with this process's arguments and exit."""
    code = run(sys.argv[1:])
    # All is said and written: a Ctrl-C that comes late changes nothing any more.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code == INTERRUPTED:
        # A solver's thread may still be inside C++; an interpreter that is torn down around it aborts.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str
        What follows ``retensor``.
    """
    from retensor.cli.app import app

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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    return code


def _guarded(arguments: Sequence[str], as_json: bool, app: typer.Typer) -> int:
    """Run the command and turn what it raises into a sentence and an exit code."""
    try:
        code = int(app(list(arguments), prog_name="retensor", standalone_mode=False) or 0)
        # Newer Typers turn Ctrl-C into this code and say nothing.
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code
    except InfeasibleError as error:
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
        print_error(str(error))
        return INFEASIBLE
    except _UsageError as error:
        sentence = getattr(error, "format_message", error.__str__)()
    except BrokenPipeError:
        raise
    except (RetensorError, OSError) as error:
        sentence = str(error)
    except MemoryError:
        sentence = "there is not enough memory for this model; use a machine with more"
    except (ValueError, TypeError) as error:
        if not _raised_by_retensor(error.__traceback__):
            raise
        sentence = str(error)
    except (KeyboardInterrupt, typer.Abort):
        sentence = "stopped by Ctrl-C"
        if as_json:
            print_json({"status": "interrupted", "error": sentence})
        print_error(sentence)
        return INTERRUPTED
    if as_json:
        print_json({"status": "error", "error": sentence})
    print_error(sentence)
    return BAD_INPUT


def _raised_by_retensor(trace: TracebackType | None) -> bool:
    """Whether the innermost frame is ours: a check of an argument, not a bug inside a library we call."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")).startswith("retensor.")
