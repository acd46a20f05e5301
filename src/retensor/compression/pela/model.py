"""Whole models: compressed by a plan, rebuilt from a checkpoint, and put back into plain layers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from retensor.bars import bar
from retensor.compression.pela.layer import LowRankLinear, is_conv1d, layout_of, matrix_of, shape_of
from retensor.compression.pela.ranks import LayerPlan, Plan, check_finite
from retensor.compression.pela.ranks import plan as plan_of
from retensor.errors import MissingExtraError, RetensorError
from retensor.files import brief, broken_link, described
from retensor.replacing import fold, replace
from retensor.replacing.match import exactly
from retensor.replacing.state import KEY, compare
from retensor.replacing.state import load as load_state


def compress(
    model: nn.Module, plan: Plan | float = 2.0, *, init: Literal["svd", "random"] = "svd", seed: int = 0
) -> nn.Module:
    """The student: a copy of a model whose planned layers are of low rank.

    Parameters
    ----------
    model : nn.Module
        Left as it is, so that it can be the teacher.
    plan : Plan or float
        Made by :func:`plan` for this model; a number is the ratio of the plan that is made here.
    init : {"svd", "random"}
        ``svd``: the closest layers of these ranks. ``random``: as new ``nn.Linear`` layers, only to measure what the
        decomposition is worth.
    seed : int
        Of the random values.

    Returns
    -------
    nn.Module
        Keep it with :func:`retensor.save`, whatever library the model is of (models of transformers have their
        ``save_pretrained`` too), and read either with :func:`load`; :func:`merge` gives plain layers back.

    Raises
    ------
    TypeError, ValueError
        Where the plan is none, or one of a model with other layers; and what :func:`plan` and
        :func:`retensor.replace` raise.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    >>> student = compress(net, 2.0)
    >>> list(student.state_dict())
    ['0.0.weight', '0.1.weight', '0.1.bias', '2.0.weight', '2.1.weight', '2.1.bias']
    """
    if not isinstance(plan, Plan):
        plan = plan_of(model, plan, energies=False)
    if init not in ("svd", "random"):
        raise ValueError(f"init is {described(init)}; it is 'svd' or 'random'")
    generator = torch.Generator().manual_seed(seed)

    def make(layer: nn.Module, wanted: LayerPlan) -> nn.Module:
        if init == "svd":
            check_finite(wanted.name, layer)
            made = LowRankLinear.from_layer(layer, wanted.rank)
        else:
            made = _random(layer, wanted, generator)
        advance()
        return made

    with bar("layers of low rank", len(plan.layers)) as advance:
        return _replaced(model, plan, make)


def skeleton(base: nn.Module, plan: Plan | float = 2.0) -> nn.Module:
    """A copy of a model with the shapes of its student, for loading a checkpoint into.

    No decomposition is worked out, and what is to be loaded is not a number until then: a factor that a checkpoint
    lacks cannot go unnoticed.

    Parameters
    ----------
    base, plan
        As in :func:`compress`.

    Returns
    -------
    nn.Module

    Raises
    ------
    TypeError, ValueError
        As :func:`compress`.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    >>> empty = skeleton(net)
    >>> bool(empty[0][0].weight.isnan().all())
    True
    >>> empty.load_state_dict(compress(net).state_dict())
    <All keys matched successfully>
    """
    if not isinstance(plan, Plan):
        plan = plan_of(base, plan, energies=False)
    return _replaced(base, plan, _unfilled)


def load(source: str | os.PathLike[str] | Mapping[str, torch.Tensor], base: nn.Module) -> nn.Module:
    """Rebuild a student from a checkpoint, for fine-tuning: the ranks are those of its tensors.

    Parameters
    ----------
    source : str, path or mapping of str to torch.Tensor
        A file that :func:`retensor.save` wrote; a plain safetensors file, or the folder with ``model.safetensors`` that
        ``save_pretrained`` of a transformers model writes; or a state dict, such as one of the authors' checkpoints
        that you have read yourself. Names are ``layer.0.weight``, ``layer.1.weight`` and ``layer.1.bias``.
    base : nn.Module
        A model of the original architecture, which stays as it is.

    Returns
    -------
    nn.Module
        In training mode where the base is; of the base's types.

    Raises
    ------
    RetensorError
        Where the file is missing or damaged, or names, shapes or kinds of number differ from those of the base, which
        lies on a real device: all must be there.
    TypeError
        Where an argument is of another kind.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    >>> student = compress(net, 3.0)
    >>> same = load(student.state_dict(), base=net)
    >>> same[0].rank, torch.equal(same(torch.ones(1, 64)), student(torch.ones(1, 64)))
    (14, True)
    """
    if not isinstance(base, nn.Module):
        raise TypeError(f"the base of a checkpoint is an nn.Module, not {described(base)}")
    if isinstance(source, Mapping):
        return _filled(base, source, "the checkpoint")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"a checkpoint is a path or a state dict, not {described(source)}")
    path = Path(source)
    path = path / "model.safetensors" if path.is_dir() else path
    tensors, ours = _read(path)
    return load_state(path, base) if ours else _filled(base, tensors, brief(path))


def merge(student: nn.Module) -> nn.Module:
    """Plain layers with the weights ``B A`` in a copy of a student: :func:`retensor.fold`.

    Parameters
    ----------
    student : nn.Module

    Returns
    -------
    nn.Module
        Of the architecture that was compressed, with outputs equal within rounding.

    Raises
    ------
    TypeError
        Where it is no module.

    Examples
    --------
    >>> merge(compress(nn.Sequential(nn.Linear(64, 32)), 2.0))
    Sequential(
      (0): Linear(in_features=64, out_features=32, bias=True)
    )
    """
    return fold(student)


@torch.no_grad()
def deviations(teacher: nn.Module, student: nn.Module) -> dict[str, float]:
    """The largest absolute entry of ``B A - W`` of every replaced layer, by name: what the repair's L_WP holds down.

    Parameters
    ----------
    teacher, student : nn.Module
        The original and what :func:`compress` made of it.

    Returns
    -------
    dict of str to float

    Raises
    ------
    ValueError
        Where the student has no replaced layers, or the teacher lacks one.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(64, 32))
    >>> student = compress(net, 2.0)
    >>> list(deviations(net, student)), deviations(net, student)["0"] > 0
    (['0'], True)
    """
    return {
        # Where the weight is of a wider type than the factors, nothing is rounded off.
        name: float((layer.product() - matrix_of(original)).abs().max())
        for name, layer, original in pairs(teacher, student)
    }


def pairs(teacher: nn.Module, student: nn.Module) -> list[tuple[str, LowRankLinear, nn.Module]]:
    """Every replaced layer of a student with the teacher's layer, whose weight may become another tensor later."""
    found: list[tuple[str, LowRankLinear, nn.Module]] = []
    for name, layer in student.named_modules():
        if not isinstance(layer, LowRankLinear):
            continue
        try:
            original = teacher.get_submodule(name)
        except AttributeError:
            original = None
        if original is None or not (isinstance(original, nn.Linear) or is_conv1d(original)):
            raise ValueError(
                f"the teacher has no linear layer '{name}', which the student replaces; the teacher is the model that "
                "was compressed"
            )
        shape = list(matrix_of(original).shape)
        if shape != [layer.out_features, layer.in_features]:
            raise ValueError(
                f"'{name}' has a weight of shape {shape} in the teacher, and stands for one of "
                f"{[layer.out_features, layer.in_features]} in the student; the teacher is the model that was "
                "compressed"
            )
        found.append((name, layer, original))
    if not found:
        raise ValueError(f"the {type(student).__name__} has no layers of low rank; compress a model to make a student")
    return found


def _replaced(model: nn.Module, plan: Plan, make: Callable[[nn.Module, LayerPlan], nn.Module]) -> nn.Module:
    wanted = {layer.name: layer for layer in plan.layers}
    for name, layer in wanted.items():
        _check_fits(model, name, layer)

    def maker(layer: LayerPlan) -> Callable[[nn.Module], nn.Module]:
        return lambda old: make(old, layer)

    return replace(model, {exactly(name): maker(layer) for name, layer in wanted.items()})


def _check_fits(model: nn.Module, name: str, wanted: LayerPlan) -> None:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the plan replaces '{name}', which the model lacks; plan for this model") from None
    if not isinstance(layer, nn.Linear) and not is_conv1d(layer):
        raise ValueError(f"'{name}' of the plan is no linear layer but a {type(layer).__name__}; plan for this model")
    shape = shape_of(layer)
    if shape != (wanted.in_features, wanted.out_features):
        raise ValueError(
            f"'{name}' has {shape[0]} inputs and {shape[1]} outputs, and {wanted.in_features} and "
            f"{wanted.out_features} in the plan; plan for this model"
        )


def _random(layer: nn.Module, wanted: LayerPlan, generator: torch.Generator) -> LowRankLinear:
    """Factors as ``nn.Linear`` draws them, with the layer's bias."""
    made = _unfilled(layer, wanted)
    with torch.no_grad():
        for factor in made:
            bound = factor.in_features**-0.5
            factor.weight.uniform_(-bound, bound, generator=generator)
        if made.bias is not None:
            made.bias.copy_(layer.bias)
    return made


def _unfilled(layer: nn.Module, wanted: LayerPlan) -> LowRankLinear:
    return LowRankLinear.from_config(
        {
            "in_features": wanted.in_features,
            "out_features": wanted.out_features,
            "rank": wanted.rank,
            "bias": layer.bias is not None,
            "layout": layout_of(layer),
        }
    ).trained_as(layer)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """Tensors of a safetensors file, or whether its header is ours, which is then read by :func:`retensor.load`."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingExtraError("reading a checkpoint", "torch") from error
    shown = brief(path)
    if (fault := broken_link(path)) is not None:
        raise RetensorError(f"'{shown}' {fault}; give the path of a checkpoint")
    if not path.is_file():
        many = (path.parent / "model.safetensors.index.json").is_file()
        raise RetensorError(
            f"'{shown}' is not there; "
            + ("save the model in one file" if many else "give the path of a safetensors file or of a folder with one")
        )
    try:
        with safe_open(path, "pt") as stream:
            if KEY in (stream.metadata() or {}):
                return {}, True
            return {name: stream.get_tensor(name) for name in stream.keys()}, False  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise RetensorError(
            f"'{shown}' is no whole safetensors file: {brief(error)}; give a state dict for files of other kinds"
        ) from None


def _filled(base: nn.Module, tensors: Mapping[str, torch.Tensor], shown: str) -> nn.Module:
    """A copy of ``base`` with layers of the ranks that the tensors have, and with all of their values."""
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise RetensorError(f"'{brief(name)}' of '{shown}' is {described(value)}; a state dict holds tensors alone")
    layers = []
    for name, module in base.named_modules():
        dot = f"{name}." if name else ""
        first, second = tensors.get(f"{dot}0.weight"), tensors.get(f"{dot}1.weight")
        if (not isinstance(module, nn.Linear) and not is_conv1d(module)) or first is None or second is None:
            continue
        inputs, outputs = shape_of(module)
        rank = first.shape[0] if first.ndim == 2 else 0
        if (tuple(first.shape), tuple(second.shape)) != ((rank, inputs), (outputs, rank)) or rank < 1:
            raise RetensorError(
                f"'{dot}0.weight' and '{dot}1.weight' of {shown} have shapes {list(first.shape)} and "
                f"{list(second.shape)}, which are no factors of a layer of {inputs} inputs and {outputs} outputs; give "
                "the architecture it was compressed from as base"
            )
        layers.append(LayerPlan(name, inputs, outputs, rank, module.bias is not None, layout_of(module)))
    if not layers:
        raise RetensorError(
            f"'{shown}' has no layer of low rank that the base has as a linear one; give the architecture it was "
            "compressed from as base"
        )
    try:
        model = _replaced(base, Plan(1.0, tuple(layers), {}, 0, 0), _unfilled)
    except ValueError as error:
        raise RetensorError(f"'{shown}' does not fit the base: {error}") from None
    mine = model.state_dict(keep_vars=True)
    # What the base ties is kept once in files of transformers.
    kept = {id(mine[name]): tensor for name, tensor in tensors.items() if name in mine}
    tensors = {**{name: kept[id(own)] for name, own in mine.items() if id(own) in kept}, **tensors}
    compare(tensors, mine, shown)
    model.load_state_dict(tensors)
    return model
