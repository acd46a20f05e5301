"""MiniMalloc's own program, run on a CSV; it is built outside this repository, from github.com/google/minimalloc."""

from __future__ import annotations

import csv
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def solve(
    program: str, buffers: Sequence[tuple[int, int, int]], capacity: int, *, time_limit: float
) -> tuple[tuple[int, ...] | bool | None, float]:
    """Addresses (False: none, None: out of time) and the seconds that the program says its solver took.

    It runs with its default options. Its one thread's time does not include starting it or reading the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "buffers.csv", Path(folder) / "packed.csv"
        lines = [f"{i},{lower},{upper},{size}\n" for i, (lower, upper, size) in enumerate(buffers)]
        source.write_text("id,lower,upper,size\n" + "".join(lines))
        done = subprocess.run(
            [program, f"--capacity={capacity}", f"--input={source}", f"--output={target}", f"--timeout={time_limit}s"],
            capture_output=True, text=True, check=False, timeout=time_limit + 60,
        )  # fmt: skip
        took = re.search(r"Elapsed time ([\d.]+)s", done.stderr)
        if took is None:
            raise RuntimeError(f"'{program}' did not run as MiniMalloc does: {done.stderr[:200]}")
        seconds = float(took[1])
        if "DEADLINE_EXCEEDED" in done.stderr:
            return None, seconds
        if done.returncode:
            return False, seconds
        with target.open() as stream:
            offsets = {int(row["id"]): int(row["offset"]) for row in csv.DictReader(stream)}
        return tuple(offsets[i] for i in range(len(buffers))), seconds
