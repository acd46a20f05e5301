"""The arguments that commands share, their checks, and the one way a command loads its model."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retensor.errors import RetensorError

if TYPE_CHECKING:
    from retensor.graph.structure import Graph

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="An .onnx file, a graph .json, or a name: resnet50, onnx:densenet121, torchvision:resnet50, "
        "timm:vit_tiny_patch16_224.",
        show_default=False,
    ),
]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, as written by retensor plan -o.")]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="NAME=SHAPE", help="Fix an input's shape: name=1x3x224x224. May be repeated."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="TYPE", help="Count elements as this type, such as int8; default the model's own."),
]
Fuse = Annotated[
    bool, typer.Option("--fuse/--no-fuse", help="Take normalisation and activation into their convolution.")
]
InPlace = Annotated[bool, typer.Option("--in-place", help="Let elementwise operators overwrite their only input.")]
Weights = Annotated[bool, typer.Option("--weights", help="Keep parameters in the scratchpad too.")]
Alignment = Annotated[int, typer.Option("--alignment", metavar="BYTES", help="Every address is a multiple of this.")]
TimeLimit = Annotated[
    float, typer.Option("--time-limit", metavar="SECONDS", help="Stop a solve here with the best found and its gap.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Seed of whatever is random.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Scratchpad = Annotated[
    str,
    typer.Option(
        "--scratchpad", metavar="SIZE", help="2MiB, 512KB, bytes, or relative to the model: M_R, 1.2*M_R, M_H, M_P."
    ),
]

_SHAPE = re.compile(r"\d{1,18}(?:[x,]\d{1,18})*")


def load_model(model: str, inputs: Sequence[str] | None, dtype: str | None, fuse: bool, in_place: bool) -> Graph:
    """Load the model that a command names."""
    shapes = parse_inputs(inputs)
    from retensor.graph import load

    return load(model, inputs=shapes or None, dtype=dtype, fuse=fuse, in_place=in_place)


def load_again(model: str, options: Mapping[str, Any]) -> Graph:
    """Load a model with the options that a plan recorded, so that it is the graph the plan was made for."""
    from retensor.graph import load

    return load(
        model,
        inputs=options.get("inputs") or None,
        dtype=options.get("dtype"),
        fuse=bool(options.get("fuse", True)),
        in_place=bool(options.get("in_place", False)),
    )


def parse_inputs(texts: Sequence[str] | None) -> dict[str, list[int]]:
    """Shapes by input name from ``name=1x3x224x224``.

    >>> parse_inputs(["image=1x3x8x8", "n=4"])
    {'image': [1, 3, 8, 8], 'n': [4]}
    """
    shapes: dict[str, list[int]] = {}
    for text in texts or ():
        name, _, shape = text.rpartition("=")
        if not name or not _SHAPE.fullmatch(shape):
            raise ValueError(f"--input '{text[:80]}' is not NAME=SHAPE; write name=1x3x224x224")
        if name in shapes:
            raise ValueError(f"--input names '{name}' twice; give each input one shape")
        shapes[name] = [int(size) for size in re.split("[x,]", shape)]
        if 0 in shapes[name]:
            raise ValueError(f"--input '{text[:80]}' has a dimension of 0; dimensions are 1 or more")
    return shapes


def check_time_limit(seconds: float) -> None:
    """Refuse a time limit that is no positive number of seconds."""
    if not math.isfinite(seconds) or seconds <= 0:
        raise ValueError(f"--time-limit is a number of seconds above 0, not {seconds:g}")


def check_alignment(alignment: int) -> None:
    """Refuse an alignment that the accelerator model refuses."""
    from retensor.planning.plan import Accelerator

    Accelerator(scratchpad=1, alignment=alignment)


def check_outputs(model: str, outputs: Mapping[str, Path | None], suffixes: Mapping[str, Sequence[str]]) -> None:
    """Make sure that every file a command will write can be written, before any work is done.

    Parameters
    ----------
    model : str
        The input, which no output may replace.
    outputs : mapping of str to Path or None
        Option name to file; None where the option was not given.
    suffixes : mapping of str to sequence of str
        Option name to the suffixes it allows; options without an entry allow any.

    Raises
    ------
    ValueError, RetensorError
        With the option and what is wrong with its file.
    """
    taken: dict[Path, str] = {}
    source = Path(model)
    if os.sep in model or source.suffix:
        taken[Path(os.path.realpath(source))] = "the input"
    for option, path in outputs.items():
        if path is None:
            continue
        allowed = suffixes.get(option)
        if allowed and path.suffix.lower() not in allowed:
            raise ValueError(f"{option} '{path}' ends in none of {', '.join(allowed)}; name a file that does")
        real = Path(os.path.realpath(path))
        if real in taken:
            raise ValueError(f"{option} '{path}' is also {taken[real]}; name another file")
        taken[real] = f"the file of {option}"
        _check_writable(option, path)


def _check_writable(option: str, path: Path) -> None:
    where = f"cannot write {option} '{path}'"
    if path.is_dir():
        raise RetensorError(f"{where}: it is a directory; name a file")
    if path.exists():
        if not path.is_file():
            raise RetensorError(f"{where}: it is not an ordinary file; name another")
        # A file nobody may write was locked on purpose, whatever the superuser could do.
        if not os.access(path, os.W_OK) or not path.stat().st_mode & 0o222:
            raise RetensorError(f"{where}: it is read-only; name another file or change its mode")
    parent = path.parent
    if not parent.is_dir():
        raise RetensorError(f"{where}: there is no folder '{parent}'; make it first")
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise RetensorError(f"{where}: {(error.strerror or str(error)).lower()}; name a file elsewhere") from error
