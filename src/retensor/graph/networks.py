"""Networks by name, built with random weights and without the network: torchvision, timm and three of our own.

A name is ``torchvision:resnet50``, ``timm:vit_tiny_patch16_224``, one of ``torch:transformer``, ``torch:darts`` and
``torch:amoebanet_d``, one of the names of :data:`PAPER_NETWORKS` (``ResNet-50``) or :data:`SEARCHED_NETWORKS`
(``PNASNet-5``), or bare, which is looked for in torchvision and then in timm. Each network comes with the input size
it was made for; planning needs sizes only, so no weights are ever downloaded.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, cast

from retensor.errors import GraphError, MissingExtraError
from retensor.graph import searched
from retensor.graph.modes import evaluating
from retensor.graph.structure import LARGEST_TENSOR

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

PAPER_NETWORKS: dict[str, str] = {
    "ResNet-50": "torchvision:resnet50",
    "DenseNet-121": "torchvision:densenet121",
    "ResNeXt-50": "torchvision:resnext50_32x4d",
    "R(2+1)D-18": "torchvision:r2plus1d_18",
    "S3D": "torchvision:s3d",
    "FCN": "torchvision:fcn_resnet50",
    "L-RASPP": "torchvision:lraspp_mobilenet_v3_large",
    "DeepLabV3": "torchvision:deeplabv3_resnet50",
    "Transformer": "torch:transformer",
    "ViT": "torchvision:vit_b_16",
}
"""The ten human-designed networks of the COSMA paper: its name for each, and ours."""

SEARCHED_NETWORKS: dict[str, str] = {
    "PNASNet-5": "timm:pnasnet5large",
    "NASNet-A": "timm:nasnetalarge",
    "AmoebaNet-D": "torch:amoebanet_d",
    "DARTS": "torch:darts",
}
"""The four networks of the COSMA paper that an architecture search made: its name for each, and ours.

By the paper's name each reads its input of 1x3x224x224, where timm's own default is 331 pixels.
"""

IMAGE = (1, 3, 224, 224)
"""Default input of an image network: batch, channels, height, width."""

VIDEO = (1, 3, 16, 224, 224)
"""Default input of a video network: batch, channels, frames, height, width."""

TRANSFORMER_TOKENS = 128
"""Tokens of the source and of the target of ``torch:transformer`` (batch 1, 512 features a token)."""


@dataclass(frozen=True)
class Network:
    """A network ready to be exported.

    Attributes
    ----------
    name : str
        Its full name, with the library in front.
    module : torch.nn.Module
        In eval mode, with random weights.
    arguments : dict of str to torch.Tensor
        One example input for each argument of ``forward``, by the argument's name.
    """

    name: str
    module: torch.nn.Module
    arguments: dict[str, Any]


def names() -> list[str]:
    """Every name that :func:`build` knows, with the library in front.

    Examples
    --------
    >>> "torchvision:resnet50" in names()
    True
    """
    torchvision, timm = _library("torchvision"), _library("timm")
    return [
        *(f"torch:{name}" for name in _OWN),
        *(f"torchvision:{name}" for name in torchvision.models.list_models()),
        *(f"timm:{name}" for name in timm.list_models()),
    ]


def build(name: str, inputs: Mapping[str, Sequence[int]] | None = None) -> Network:
    """Build a network by name, with random weights from a fixed seed.

    Parameters
    ----------
    name : str
        ``"torchvision:resnet50"``, ``"timm:..."``, ``"torch:transformer"``, ``"torch:darts"``,
        ``"torch:amoebanet_d"``, a paper's name, or a bare name.
    inputs : mapping of str to sequence of int, optional
        Shapes by the name of ``forward``'s argument; a network of one input also answers to ``"x"``.
        The others keep their default: 1x3x224x224 (timm: the model's own, but not by the paper's name),
        video 1x3x16x224x224.

    Raises
    ------
    GraphError
        Where no library knows the name, or ``inputs`` names an argument that the network does not have.
    MissingExtraError
        Where torch, torchvision or timm is not installed.

    Notes
    -----
    The global random state is left as it was found. ``torch:transformer`` is ``torch.nn.Transformer()`` with
    its defaults (6+6 layers, 512 features, 8 heads, feed-forward 2048), reading 128 source and 128 target tokens;
    the other two of ``torch:`` are in :mod:`retensor.graph.searched`.

    Examples
    --------
    >>> network = build("squeezenet1_1", inputs={"x": (1, 3, 64, 64)})
    >>> network.name, tuple(network.arguments["x"].shape)
    ('torchvision:squeezenet1_1', (1, 3, 64, 64))
    """
    library, model = _resolve(name)
    torch = _library("torch")
    # A private stretch of the default generator: the caller's random numbers go on as if nothing had been built.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        module, size = _BUILDERS[library](model)
    if name in SEARCHED_NETWORKS:
        size = IMAGE
    module.eval()
    shapes = module_shapes(module, inputs, size)
    return Network(f"{library}:{model}", module, _zeros(shapes))


def module_shapes(
    module: torch.nn.Module, inputs: Mapping[str, Sequence[int]] | None, default: Sequence[int] | None
) -> dict[str, tuple[int, ...]]:
    """Shape of each argument of ``module.forward``: from ``inputs``, else ``default`` where it is required.

    Raises
    ------
    GraphError
        Where ``inputs`` names no argument, gives no shape, or leaves out a required argument without default.
    """
    signature = inspect.signature(module.forward).parameters.values()
    plain = [p for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.POSITIONAL_ONLY)]
    required = [p.name for p in plain if p.default is p.empty]
    given = {key: checked_shape(key, shape) for key, shape in (inputs or {}).items()}
    if len(required) == 1 and list(given) == ["x"] and "x" not in [p.name for p in plain]:
        given = {required[0]: given["x"]}
    unknown = [key for key in given if key not in [p.name for p in plain]]
    if unknown:
        known = ", ".join(f"'{p.name}'" for p in plain) or "none"
        raise GraphError(f"the network has no input '{unknown[0]}'; its inputs are {known}")
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in plain:
        if parameter.name in given:
            shapes[parameter.name] = given[parameter.name]
        elif parameter.name in required:
            if default is None:
                raise GraphError(f"the shape of input '{parameter.name}' is not known; give it among the inputs")
            shapes[parameter.name] = tuple(default)
    return shapes


def module_arguments(
    module: torch.nn.Module, example_inputs: Any, inputs: Mapping[str, Sequence[int]] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments to export ``module`` with."""
    import torch

    if example_inputs is None:
        if not inputs:
            raise ValueError("a module needs example inputs or the shapes of its inputs to be exported with")
        shapes = module_shapes(module, inputs, None)
        return (), _zeros(shapes)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, torch.Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = tuple(example_inputs)
    if inputs:
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise GraphError(f"the example inputs do not fit forward of {type(module).__name__}: {error}") from error
        for key, shape in inputs.items():
            if not isinstance(bound.arguments.get(key), torch.Tensor):
                known = ", ".join(f"'{k}'" for k, v in bound.arguments.items() if isinstance(v, torch.Tensor))
                raise GraphError(f"the module has no tensor input '{key}'; its inputs are {known or 'none'}")
            bound.arguments[key] = bound.arguments[key].new_zeros(checked_shape(key, shape))
        args, kwargs = bound.args, dict(bound.kwargs)
    return args, kwargs


@contextlib.contextmanager
def _exporting(module: torch.nn.Module) -> Iterator[None]:
    """``module`` in eval mode, without gradients and without fused transformer layers; as it was afterwards."""
    import torch

    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fast path turns a whole encoder layer into one opaque operator that no accelerator has.
        torch.backends.mha.set_fastpath_enabled(False)
        # Where it fails, torch prints the program so far, besides raising an error.
        with evaluating(module), torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def export(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """Export ``module`` in eval mode, without gradients and fused layers.

    Raises
    ------
    GraphError
        Where torch cannot export it.
    """
    import torch

    with _exporting(module):
        try:
            return torch.export.export(module, args, kwargs)
        except Exception as error:
            # torch raises errors of many types here, private ones among them.
            raise GraphError(f"torch.export cannot export {type(module).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def checked_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` as a tuple, refused where a dimension is not a positive integer or the tensor is absurd."""
    sizes = tuple(shape) if isinstance(shape, (list, tuple)) else (None,)
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise GraphError(f"input '{name}' has shape {shape!r}; give positive integers such as (1, 3, 224, 224)")
    sizes = cast("tuple[int, ...]", sizes)
    if len(sizes) > 64 or 4 * prod(sizes) > LARGEST_TENSOR:
        raise GraphError(f"input '{name}' of shape {sizes} is larger than 2**50 bytes; give a smaller shape")
    return sizes


def _zeros(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """An example of each input; only its size matters."""
    import torch

    try:
        return {key: torch.zeros(shape) for key, shape in shapes.items()}
    except RuntimeError as error:
        largest = max(shapes, key=lambda key: prod(shapes[key]))
        raise GraphError(
            f"input '{largest}' of shape {shapes[largest]} does not fit in memory; give a smaller shape"
        ) from error


def _library(name: str) -> Any:
    """Import torch, torchvision or timm, or say what to install."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError("building a network by name", "torch") from error


def _resolve(name: str) -> tuple[str, str]:
    """Library and model that ``name`` stands for."""
    library, colon, model = {**PAPER_NETWORKS, **SEARCHED_NETWORKS}.get(name, name).partition(":")
    if not colon:
        library, model = "", name
    if library in ("", "torchvision") and model in _library("torchvision").models.list_models():
        return "torchvision", model
    if library in ("", "timm") and _is_timm(model):
        return "timm", model
    if library == "torch" and model in _OWN:
        return library, model
    if library not in ("", "torchvision", "timm", "torch"):
        raise GraphError(f"'{name}' names no library; write torchvision:NAME, timm:NAME or {_own_names()}")
    raise GraphError(f"no network is named '{name}'{_suggestion(library, model)}")


def _is_timm(model: str) -> bool:
    timm = _library("timm")
    # Only registered names: `hf-hub:` and `local-dir:` would reach for files and for the net.
    return ":" not in model and bool(timm.is_model(model))


def _suggestion(library: str, model: str) -> str:
    known = [name for name in names() if not library or name.startswith(f"{library}:")]
    short = {name.partition(":")[2].lower(): name for name in reversed(known)}
    near = difflib.get_close_matches(model.lower(), short, n=3, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(f"'{short[name]}'" for name in near) + "?"
    return f"; give a torchvision or timm name such as 'torchvision:resnet50', or {_own_names()}"


def _own_names() -> str:
    """The names after ``torch:``, as a message lists them."""
    return " or ".join(f"torch:{name}" for name in _OWN)


def _torchvision(model: str) -> tuple[torch.nn.Module, Sequence[int]]:
    models = _library("torchvision").models
    builder = models.get_model_builder(model)
    # Segmentation and detection models load a trained backbone unless told not to.
    absent = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    video = builder.__module__.startswith(models.video.__name__)
    return builder(**absent), VIDEO if video else IMAGE


def _timm(model: str) -> tuple[torch.nn.Module, Sequence[int]]:
    module = _library("timm").create_model(model, pretrained=False)
    settings = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
    return module, (1, *settings.get("input_size", IMAGE[1:]))


def _own(model: str) -> tuple[torch.nn.Module, Sequence[int]]:
    return _OWN[model]()


def _transformer() -> tuple[torch.nn.Module, Sequence[int]]:
    return _library("torch").nn.Transformer(), (TRANSFORMER_TOKENS, 1, 512)


def _darts() -> tuple[torch.nn.Module, Sequence[int]]:
    return searched.darts(), IMAGE


def _amoebanet_d() -> tuple[torch.nn.Module, Sequence[int]]:
    return searched.amoebanet_d(), IMAGE


_OWN = {"transformer": _transformer, "darts": _darts, "amoebanet_d": _amoebanet_d}
_BUILDERS = {"torchvision": _torchvision, "timm": _timm, "torch": _own}
