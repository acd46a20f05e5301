"""Files of buffers: CSV as MiniMalloc reads and writes it, with a column ``offset`` once they are packed.

The columns are ``id``, ``lower``, ``upper`` and ``size``, in any order; ``alignment`` and ``offset`` (where a buffer
must lie; empty or -1: anywhere) may be there. Other names are known too: ``buffer`` and ``buffer_id`` for the id,
``start`` and ``begin`` for lower, and ``end`` for the last moment a buffer is alive, one before ``upper``. Further
columns are kept as they are; ``gaps``, moments at which a buffer is not alive, must be empty.
"""

from __future__ import annotations

import csv
import io
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from retensor.errors import RetensorError
from retensor.files import brief, broken_link
from retensor.planning.packing import Buffer

LARGEST_FILE = 256 * 2**20
_NAMES = {"buffer": "id", "buffer_id": "id", "start": "lower", "begin": "lower", "end": "upper"}
_NEEDED = ("id", "lower", "upper", "size")


@dataclass(frozen=True)
class BufferTable:
    """A file of buffers: its buffers, and its header and rows as they were."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    buffers: tuple[Buffer, ...]

    def with_offsets(self, offsets: Sequence[int]) -> str:
        """The CSV again, with each buffer's offset in the column ``offset``, which is the last if it is new."""
        names = [name.strip() for name in self.header]
        at = names.index("offset") if "offset" in names else len(names)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*self.header[:at], "offset", *self.header[at + 1 :]])
        writer.writerows(
            [*row[:at], str(offset), *row[at + 1 :]] for row, offset in zip(self.rows, offsets, strict=True)
        )
        return text.getvalue()


def read_buffers(path: str | os.PathLike[str]) -> BufferTable:
    """Read a CSV of buffers.

    Raises
    ------
    RetensorError
        Where the file cannot be read, a column is missing or twice, or a row is wrong; with the line.

    Examples
    --------
    >>> read_buffers("buffers.csv").buffers  # doctest: +SKIP
    """
    shown = brief(path)
    lines = csv.reader(io.StringIO(_text(path, shown)), strict=True)
    try:
        header = next((row for row in lines if row), None)
        if header is None:
            raise RetensorError(f"'{shown}' is empty; its first line names the columns: id,lower,upper,size")
        columns, inclusive = _columns(header, shown)
        rows, buffers = [], []
        known: dict[str, int] = {}
        for row in lines:
            if not row:
                continue
            where = f"'{shown}', line {lines.line_num}"
            if len(row) != len(header):
                raise RetensorError(f"{where} has {len(row)} fields; the header has {len(header)}")
            buffer = _buffer(row, columns, inclusive, where)
            if buffer.id in known:
                raise RetensorError(
                    f"{where} has the id '{brief(buffer.id, 60)}' of line {known[buffer.id]}; give each buffer its own"
                )
            known[buffer.id] = lines.line_num
            rows.append(tuple(row))
            buffers.append(buffer)
    except csv.Error as error:
        raise RetensorError(f"'{shown}', line {lines.line_num} is not CSV: {error}") from None
    if not buffers:
        raise RetensorError(f"'{shown}' has a header but no buffers; give each a line: id,lower,upper,size")
    return BufferTable(tuple(header), tuple(rows), tuple(buffers))


def _text(path: str | os.PathLike[str], shown: str) -> str:
    if (fault := broken_link(path)) is not None:
        raise RetensorError(f"'{shown}' {fault}; give the path of a CSV file of buffers")
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise RetensorError(f"'{shown}' is not a regular file; give the path of a CSV file of buffers")
        if status.st_size > LARGEST_FILE:
            raise RetensorError(f"'{shown}' has {status.st_size:,} bytes; a file of buffers has up to {LARGEST_FILE:,}")
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RetensorError(f"there is no file '{shown}'; give the path of a CSV file of buffers") from None
    except UnicodeDecodeError as error:
        raise RetensorError(f"'{shown}' is not UTF-8 text (byte {error.start}); a file of buffers is CSV") from None
    except (OSError, ValueError) as error:
        raise RetensorError(f"cannot read '{shown}': {getattr(error, 'strerror', None) or error}") from None


def _columns(header: Sequence[str], shown: str) -> tuple[dict[str, int], bool]:
    """Where each column that is known lies, and whether the upper moments are inclusive."""
    columns: dict[str, int] = {}
    for at, name in enumerate(cell.strip() for cell in header):
        meant = _NAMES.get(name, name)
        if meant in columns:
            raise RetensorError(f"'{shown}' has the column '{brief(meant, 60)}' twice; name each once")
        columns[meant] = at
    if missing := [name for name in _NEEDED if name not in columns]:
        raise RetensorError(
            f"'{shown}' has no column '{missing[0]}'; its first line must name id, lower, upper and size, and names "
            f"{brief(', '.join(header), 80)}"
        )
    return columns, header[columns["upper"]].strip() == "end"


def _buffer(row: Sequence[str], columns: dict[str, int], inclusive: bool, where: str) -> Buffer:
    cells = {name: row[at].strip() for name, at in columns.items()}
    if cells.get("gaps"):
        raise RetensorError(f"{where} has gaps, which cannot be packed; give each stretch of the buffer's life its own")

    def number(name: str) -> int:
        try:
            # Python refuses thousands of digits itself, and takes digits of other alphabets and underscores.
            if not cells[name].isascii() or "_" in cells[name]:
                raise ValueError
            return int(cells[name])
        except ValueError:
            raise RetensorError(f"{where}: {name} is '{brief(cells[name], 40)}', not a whole number") from None

    optional = {name: number(name) for name in _optional(cells)}
    if optional.get("offset") == -1:
        del optional["offset"]
    try:
        return Buffer(cells["id"], number("lower"), number("upper") + inclusive, number("size"), **optional)
    except ValueError as error:
        raise RetensorError(f"{where}: {error}") from None


def _optional(cells: dict[str, str]) -> Iterator[str]:
    return (name for name in ("alignment", "offset") if cells.get(name))
