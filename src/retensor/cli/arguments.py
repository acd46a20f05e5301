"""The arguments that commands share, their checks, and the one way a command loads its model."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retensor.errors import MissingExtraError, PlanError, RetensorError
from retensor.files import brief, writable_target

if TYPE_CHECKING:
    from retensor.graph.structure import Graph
    from retensor.planning.plan import Accelerator, Plan

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
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Count elements as this type, such as int8; default the model's own. Where that changes a size, the plan "
        "can be verified but not run.",
    ),
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
    str | None,
    typer.Option(
        "--scratchpad",
        metavar="SIZE",
        help="2MiB, 512KB, bytes, or relative to the model: M_R, 1.2*M_R, M_H, M_P; of another size than the "
        "accelerator's where both are given.",
    ),
]
Chip = Annotated[
    str | None,
    typer.Option("--accelerator", metavar="NAME", help="A public accelerator; retensor accelerators lists them."),
]
ChipAlignment = Annotated[
    int | None,
    typer.Option(
        "--alignment", metavar="BYTES", help="Every address is a multiple of this; default the accelerator's, else 1."
    ),
]

_SHAPE = re.compile(r"\d{1,18}(?:[x,]\d{1,18})*")


def load_model(model: str, inputs: Sequence[str] | None, dtype: str | None, fuse: bool, in_place: bool) -> Graph:
    """Load the model that a command names."""
    shapes = parse_inputs(inputs)
    from retensor.graph import load

    return load(model, inputs=shapes or None, dtype=dtype, fuse=fuse, in_place=in_place)


def load_again(model: str, found: Plan) -> Graph:
    """Load a model with the options that a plan recorded, so that it is the graph the plan was made for.

    Raises
    ------
    PlanError
        Where the plan was made for a graph of another name, or the model does not take the options it recorded.
    """
    from retensor.graph import load

    options = found.graph_options
    try:
        graph = load(
            model,
            inputs=options.get("inputs") or None,
            dtype=options.get("dtype"),
            fuse=bool(options.get("fuse", True)),
            in_place=bool(options.get("in_place", False)),
        )
    except MissingExtraError:
        raise
    except (RetensorError, ValueError) as error:
        # Options of one model make no sense for another; what is wrong is the model, not the options.
        raise _explained(model, found, error) from error
    if graph.digest != found.graph_digest and graph.name != found.graph_name:
        raise _other_graph(found, graph.name)
    return graph


def _explained(model: str, found: Plan, error: Exception) -> Exception:
    """What to say where ``model`` could not be loaded as the plan recorded."""
    from retensor.graph import load

    try:
        name = load(model).name
    except (RetensorError, ValueError) as plain:
        if str(plain) == str(error):
            return error
    else:
        if name != found.graph_name:
            return _other_graph(found, name)
    return PlanError(
        f"this plan was made for graph '{found.graph_name}', and '{model}' cannot be loaded as that was: {error}"
    )


def _other_graph(found: Plan, name: str) -> PlanError:
    return PlanError(
        f"this plan was made for graph '{found.graph_name}', not '{name}'; give the model it was made for, "
        f"or plan this one"
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


def chosen_accelerator(
    scratchpad: str | None, chip: str | None, alignment: int | None, *, needed: bool = True
) -> Accelerator | None:
    """The accelerator that ``--scratchpad``, ``--accelerator`` and ``--alignment`` describe together.

    Raises
    ------
    ValueError
        Where one is refused, or nothing is given and one is ``needed``.
    """
    from retensor.planning.accelerators import PRESETS, accelerator_named
    from retensor.planning.plan import Accelerator

    if chip is None and scratchpad is None:
        if needed:
            raise ValueError("how much scratchpad is not said; give --scratchpad SIZE or --accelerator NAME")
        if alignment is not None:
            check_alignment(alignment)
        return None
    if chip is None:
        return Accelerator(scratchpad=str(scratchpad), alignment=1 if alignment is None else alignment)
    if chip not in PRESETS and chip[:1].isdigit():
        raise ValueError(
            f"--accelerator '{brief(chip, 60)}' is a size, not a name; write --scratchpad {brief(chip, 60)}"
        )
    found = accelerator_named(chip)
    return replace(
        found,
        scratchpad=found.scratchpad if scratchpad is None else scratchpad,
        alignment=found.alignment if alignment is None else alignment,
    )


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
    written = [path for path in outputs.values() if path is not None]
    taken: dict[str | tuple[int, int], str] = dict.fromkeys(_places(model), "the input")
    # Nothing of the model can be lost where no output is there yet, and asking for its data means reading it.
    if taken and any(_places(path) for path in written):
        taken |= {place: "the input's external data" for file in _data_of(model) for place in _places(file)}
    for option, path in outputs.items():
        if path is None:
            continue
        allowed = suffixes.get(option)
        if allowed and path.suffix.lower() not in allowed:
            raise ValueError(f"{option} '{path}' ends in none of {', '.join(allowed)}; name a file that does")
        target = writable_target(path, f"cannot write {option} '{brief(path)}'")
        places: set[str | tuple[int, int]] = _places(target) or {str(target)}
        for place in places & taken.keys():
            raise ValueError(f"{option} '{brief(path)}' is also {taken[place]}; name another file")
        taken |= dict.fromkeys(places, f"the file of {option}")
        _check_writable(f"cannot write {option} '{brief(path)}'", target)


def _places(path: str | Path) -> set[str | tuple[int, int]]:
    """What tells whether a file that is there is the same as another: its own path, and its number on the disk."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return set()
    return {os.path.realpath(path), (status.st_dev, status.st_ino)}


def _data_of(model: str) -> list[Path]:
    """Files that hold the weights of an ONNX file; nothing where it is none, which loading it will say."""
    from retensor.graph.onnx_file import external_files

    try:
        return external_files(model)
    except RetensorError:
        return []


def _check_writable(where: str, target: Path) -> None:
    # A file nobody may write was locked on purpose, whatever the superuser could do.
    if target.exists() and (not os.access(target, os.W_OK) or not target.stat().st_mode & 0o222):
        raise RetensorError(f"{where}: it is read-only; name another file or change its mode")
    parent = target.parent
    if not parent.is_dir():
        raise RetensorError(f"{where}: there is no folder '{brief(parent)}'; make it first")
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=f".{target.name[:40]}."):
            pass
    except OSError as error:
        raise RetensorError(f"{where}: {(error.strerror or str(error)).lower()}; name a file elsewhere") from error
