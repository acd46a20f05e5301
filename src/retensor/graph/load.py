"""One entrance for every source of a graph: an ONNX file, a JSON file, a name, a torch program.

A name without a prefix is looked up among the light models that the onnx package brings, then in torchvision,
then in timm; ``onnx:``, ``torchvision:``, ``timm:`` and ``torch:`` name one of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retensor.errors import GraphError, MissingExtraError
from retensor.files import brief
from retensor.graph.json import read_graph
from retensor.graph.merge import merge
from retensor.graph.structure import Graph
from retensor.units import check_flags

_LONGEST_NAME = 200
_TORCH_FILES = (".pt2", ".pt", ".pth")
_PREFIXES = ("torchvision:", "timm:", "torch:")


def load(
    source: Any,
    *,
    inputs: Mapping[str, Sequence[int]] | None = None,
    dtype: str | None = None,
    fuse: bool = True,
    in_place: bool = False,
) -> Graph:
    """A graph from a file, a name, or a torch program.

    Parameters
    ----------
    source : str, path or torch.export.ExportedProgram
        Path of an ``.onnx`` or a graph ``.json`` file; a name: ``"resnet50"``, ``"onnx:densenet121"``,
        ``"torchvision:resnet50"``, ``"timm:vit_tiny_patch16_224"``, ``"torch:transformer"``; or a program.
    inputs : mapping of str to sequence of int, optional
        Shapes of inputs whose dimensions the model leaves open.
    dtype : str, optional
        Count each element of a floating-point tensor at this type (``"int8"``); ``None``: the model's own.
    fuse, in_place : bool
        What to merge, see :func:`retensor.graph.merge.merge`. A JSON graph is read as it is written; only
        ``in_place`` applies to it.

    Returns
    -------
    Graph
        Its ``options`` say how it was loaded.

    Raises
    ------
    GraphError
        Where the source is unknown, malformed, or has no static shapes.
    MissingExtraError
        Where it needs torch and torch is not installed.

    Examples
    --------
    >>> graph = load("onnx:squeezenet", dtype="int8")
    >>> graph.name, len(graph.operators), graph.operators[0].kind
    ('squeezenet', 39, 'Conv+Relu')
    """
    check_flags(fuse=fuse, in_place=in_place)
    if not isinstance(source, (str, os.PathLike)):
        return _from_torch(source, inputs, dtype, fuse, in_place)
    text = os.fspath(source)
    if not isinstance(text, str):
        raise GraphError("a model is named by text, not by bytes")
    if not text.strip():
        raise GraphError("the model's name is empty; give an .onnx file, a graph .json, or a name such as resnet50")
    if isinstance(source, str):
        if text.startswith(_PREFIXES):
            return _from_torch(text, inputs, dtype, fuse, in_place)
        if text.startswith("onnx:"):
            return _from_light(text.removeprefix("onnx:"), inputs, dtype, fuse, in_place)
    path = Path(text)
    if _is_file_name(path) or not isinstance(source, str):
        _refuse_torch_file(path)
        if path.suffix.lower() == ".json" or _starts_as_json(path):
            return _from_json(path, inputs, dtype, in_place)
        from retensor.graph.onnx import load_onnx

        return load_onnx(path, inputs=inputs, dtype=dtype, fuse=fuse, in_place=in_place)
    if text in light_models():
        return _from_light(text, inputs, dtype, fuse, in_place)
    if len(text) > _LONGEST_NAME:
        raise GraphError(f"no network is named '{brief(text)}'; give an .onnx file, a graph .json, or a name")
    try:
        return _from_torch(text, inputs, dtype, fuse, in_place)
    except MissingExtraError:
        raise GraphError(
            f"there is no file {text[:200]!r} and no ONNX light model of that name ({', '.join(light_models())}); "
            'for names of torchvision and timm: pip install "retensor[torch]"'
        ) from None


def light_models() -> tuple[str, ...]:
    """Names of the models that the installed onnx package brings along, weights left out.

    >>> "resnet50" in light_models()
    True
    """
    return tuple(sorted(path.stem.removeprefix("light_") for path in _light_folder().glob("light_*.onnx")))


def _light_folder() -> Path:
    import onnx

    return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def _is_file_name(path: Path) -> bool:
    """Whether a text means a file: it is there, or is written like a path."""
    try:
        # A link to nothing is a file name too, and the loaders say where it leads.
        there = path.exists() or path.is_symlink()
    except (OSError, ValueError):
        there = True
    return there or path.suffix.lower() in (".onnx", ".json", *_TORCH_FILES) or len(path.parts) > 1


def _refuse_torch_file(path: Path) -> None:
    """Say how to load a file of PyTorch's: reading one can run code, so that is left to whoever trusts it."""
    if path.suffix.lower() == ".pt2":
        raise GraphError(
            f"'{path}' is a torch.export archive (.pt2), which is not opened here because reading one can run code; "
            f"if you trust it, load it yourself: program = torch.export.load({str(path)!r}); "
            "graph = retensor.graph.load(program)"
        )
    if path.suffix.lower() in _TORCH_FILES:
        raise GraphError(
            f"'{path}' is a pickled PyTorch file ({path.suffix}), which is not opened here because reading one can run "
            "code; export the module: program = torch.export.export(module.eval(), (example_input,)); "
            "graph = retensor.graph.load(program)"
        )


def _starts_as_json(path: Path) -> bool:
    try:
        # A pipe would be waited for.
        if path.suffix.lower() == ".onnx" or not path.is_file():
            return False
        with path.open("rb") as stream:
            return stream.read(64).lstrip().startswith(b"{")
    except (OSError, ValueError):
        return False


def _from_light(
    name: str, inputs: Mapping[str, Sequence[int]] | None, dtype: str | None, fuse: bool, in_place: bool
) -> Graph:
    from retensor.graph.onnx import load_onnx

    if name not in light_models():
        raise GraphError(f"there is no ONNX light model {name[:80]!r}; there are {', '.join(light_models())}")
    path = _light_folder() / f"light_{name}.onnx"
    return _named(load_onnx(path, inputs=inputs, dtype=dtype, fuse=fuse, in_place=in_place), name)


def _named(graph: Graph, name: str) -> Graph:
    return Graph(name, graph.operators, graph.tensors, graph.outputs, graph.aliases, graph.options, graph.program)


def _from_json(path: Path, inputs: Mapping[str, Sequence[int]] | None, dtype: str | None, in_place: bool) -> Graph:
    graph = read_graph(path)
    # A plan repeats the options its graph was written with; others would need the model itself.
    if dtype is not None and dtype != graph.options.get("dtype"):
        raise GraphError(
            f"'{path}' is a bare graph whose bytes are as written; dtype= (--dtype) needs the model itself"
        )
    given = {name: list(shape) for name, shape in (inputs or {}).items()}
    if given and given != graph.options.get("inputs"):
        raise GraphError(
            f"'{path}' is a bare graph whose shapes are as written; inputs= (--input) needs the model itself"
        )
    if not in_place:
        return graph
    merged = merge(graph, fuse=False, in_place=True)
    options = {**graph.options, "in_place": True}
    return Graph(merged.name, merged.operators, merged.tensors, merged.outputs, merged.aliases, options)


def _from_torch(
    source: Any, inputs: Mapping[str, Sequence[int]] | None, dtype: str | None, fuse: bool, in_place: bool
) -> Graph:
    try:
        from retensor.graph.torch import load_torch
    except ImportError:
        raise MissingExtraError("loading a torch model", "torch") from None
    graph: Graph = load_torch(source, inputs=inputs, dtype=dtype, fuse=fuse, in_place=in_place)
    return graph
