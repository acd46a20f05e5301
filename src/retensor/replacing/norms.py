"""``fold_norms``: batch normalisations folded into the layers before them, in a copy of the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from retensor.errors import MissingExtraError, RetensorError
from retensor.files import brief
from retensor.graph.modes import evaluating
from retensor.replacing.replace import replace

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight has rows for its outputs and columns for its inputs."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_norms(model: nn.Module, *, example: Any) -> nn.Module:
    """Fold every batch normalisation into the layer before it: ``w*g/sqrt(var+eps)``, and the bias accordingly.

    Parameters
    ----------
    model : nn.Module
        With its trained values, which cannot be loaded afterwards. It stays as it is.
    example : torch.Tensor, tuple or mapping
        An input, arguments, or keyword arguments.

    Returns
    -------
    nn.Module
        A copy in eval mode, with ``nn.Identity`` in the places of the normalisations; timm's ``BatchNormAct2d`` become
        that and their activation. One whose input is used elsewhere too, or that comes before its layer, stays.

    Raises
    ------
    MissingExtraError
        Where torch-pruning is not installed.
    RetensorError
        Where the model cannot be followed.

    Examples
    --------
    >>> fold_norms(nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)), example=torch.zeros(1, 1, 4, 4))
    Sequential(
      (0): Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
    )
    """
    model = _apart(model).eval()
    pairs = normalised(model, example)
    fused: dict[str, nn.Module] = {}
    for name, norm in pairs.items():
        layer, after = model.get_submodule(name), model.get_submodule(norm)
        fold = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        fused[name] = fold(layer, after)
    if not fused:
        return model
    places: dict[Any, nn.Module] = {exactly(name): layer for name, layer in fused.items()}
    places |= {exactly(name): nn.Identity() for name in pairs.values()}
    return replace(model, places).eval()


def exactly(name: str) -> Callable[[str, nn.Module], bool]:
    """A pattern that means the layer of that name alone, whatever letters it has."""
    return lambda given, _: given == name


def normalised(net: nn.Module, example: Any) -> dict[str, str]:
    """Layers whose outputs go to one batch normalisation and nowhere else, with its name."""
    found, names = dependencies(net, example)
    pairs: dict[str, str] = {}
    for module, node in found.module2node.items():
        if type(module) not in NORMS or len(node.inputs) != 1:
            continue
        source = node.inputs[0]
        follows = len(source.outputs) == 1 and source.outputs[0] is node
        if follows and isinstance(source.module, LAYERS) and module.running_mean is not None:
            pairs[names[source.module]] = names[module]
    return pairs


def _apart(model: nn.Module) -> nn.Module:
    """timm's normalisations with an activation in them, as torch's and the activation."""

    def found(_: str, module: nn.Module) -> bool:
        # timm need not be installed.
        kind = type(module)
        return isinstance(module, nn.BatchNorm2d) and (kind.__module__, kind.__name__) == (
            "timm.layers.norm_act",
            "BatchNormAct2d",
        )

    def split(norm: Any) -> nn.Module:
        plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        plain.load_state_dict(norm.state_dict())
        return nn.Sequential(plain.eval(), norm.drop, norm.act)

    return replace(model, {found: split}, unmatched="ignore")


def run(net: nn.Module, example: Any) -> Any:
    """The outputs of a network for an example as the other functions take it."""
    if isinstance(example, Mapping):
        return net(**example)
    return net(*example) if isinstance(example, tuple | list) else net(example)


def dependencies(net: nn.Module, example: Any) -> tuple[Any, dict[Any, str]]:
    """The graph of torch-pruning's of which layers feed which, and the names of modules.

    Raises
    ------
    MissingExtraError
        Where torch-pruning is not installed.
    RetensorError
        Where it cannot follow the network.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingExtraError("finding channels that belong together", "compression") from error
    # The graph is read off the gradients' one, so every parameter needs one.
    wanted = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    try:
        # The tracer sets eval mode too, and leaves it.
        with evaluating(net), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for parameter in net.parameters():
                parameter.requires_grad_(True)
            graph = torch_pruning.DependencyGraph().build_dependency(net, example_inputs=example)
    except Exception as error:  # whatever the network or the tracer raise
        raise RetensorError(
            f"the channels of {type(net).__name__} cannot be followed for this example: {brief(error)}; give an "
            "example that the network takes"
        ) from error
    finally:
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(wanted[name])
    return graph, {module: name for name, module in net.named_modules()}
