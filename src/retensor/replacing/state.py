"""Models with replacements as files: tensors as safetensors, and a JSON header that says how to rebuild the rest.

The header holds, under the key ``retensor``, ``{"schema": "retensor.state/1", "replacements": [{"name", "kind",
"config"}], "parametrizations": [{"name", "tensor", "kind", "config"}], "shared": {name: name of the same module},
"tied": {name: name of the tensor kept}, "sha256": of all that and of the tensors}``.
Reading one runs no code: kinds are looked up among classes that are there, and values are checked by name, shape and
that sum, which tells of a file that was damaged, not of one that was forged.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from retensor.errors import MissingExtraError, RetensorError
from retensor.files import brief, broken_link, described, write_atomic
from retensor.replacing.kinds import Reparametrization, Replacement, _Kind, kind_named
from retensor.replacing.match import inside
from retensor.replacing.replace import copied, equal, put, settle

SCHEMA = "retensor.state/1"
KEY = "retensor"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's state, and what its replacements are, to one safetensors file.

    Parameters
    ----------
    model : nn.Module
        Replacements and parametrizations of this library are described in the header; of everything else only the
        tensors are kept, so that :func:`load` needs the model that was replaced in.
    path : str or path
        Written whole or not at all.

    Raises
    ------
    TypeError
        Where it is no module, or the path is none.
    RetensorError
        Where the file cannot be written, a tensor is of a kind that safetensors does not keep, or the file could not
        be loaded again: a replacement has no ``config`` or holds other tensors than that makes, or a parametrization
        of this library lies below another one.
    MissingExtraError
        Where safetensors is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the state of an nn.Module is saved, not of {described(model)}")
    _check_path(path)
    tensors, tied = _state(model)
    replacements: list[dict[str, Any]] = []
    parametrizations: list[dict[str, Any]] = []
    shared: dict[str, str] = {}
    seen: dict[int, str] = {}
    parametrized: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(inside(name, outer) for outer in (*seen.values(), *shared)):
            continue
        if isinstance(module, Replacement):
            if id(module) in seen:
                shared[name] = seen[id(module)]
                continue
            seen[id(module)] = name
            replacements.append({"name": name, **_described(module, name)})
        elif parametrize.is_parametrized(module):
            if id(module) in parametrized:
                shared[name] = parametrized[id(module)]
                continue
            parametrized[id(module)] = name
            for label, steps in module.parametrizations.items():
                ours = [isinstance(step, Reparametrization) for step in steps]
                if ours != sorted(ours):
                    raise RetensorError(
                        f"'{f'{name}.{label}'.removeprefix('.')}' has a parametrization of this library below another "
                        "one, and loading puts them on top; fold it, or register it last"
                    )
            parametrizations.extend(
                {"name": name, "tensor": label, **_described(step, name)}
                for label, steps in module.parametrizations.items()
                for step in steps
                if isinstance(step, Reparametrization)
            )
    header = {
        "schema": SCHEMA,
        "replacements": replacements,
        "parametrizations": parametrizations,
        "shared": shared,
        "tied": tied,
    }
    try:
        header["sha256"] = _digest(header, tensors)
        content = _safetensors().save(tensors, metadata={KEY: json.dumps(header)})
    except (TypeError, ValueError, RecursionError) as error:
        raise RetensorError(f"the configuration of a replacement is no JSON: {brief(error)}") from None
    except KeyError as error:
        raise RetensorError(
            f"the model's state has the type {error.args[0]}, which safetensors does not keep"
        ) from None
    for entry in replacements:
        _check_rebuilt(model.get_submodule(entry["name"]), entry["name"], entry["config"])
    write_atomic(path, content)


def load(path: str | os.PathLike[str], base: nn.Module | None = None) -> nn.Module:
    """Rebuild a model that :func:`save` wrote.

    Parameters
    ----------
    path : str or path
    base : nn.Module, optional
        A model like the one that was replaced in, such as ``timm.create_model(...)``; its values do not matter, and it
        stays as it is. Not needed where the file describes the whole model.

    Returns
    -------
    nn.Module
        In training mode where ``base`` is.

    Raises
    ------
    RetensorError
        Where the file is missing, damaged, of another kind, or does not fit ``base``: the first name that differs, or
        the shapes.
    TypeError
        Where ``base`` is no module, or the path is none.
    """
    if base is not None and not isinstance(base, nn.Module):
        raise TypeError(f"the base of a saved state is an nn.Module, not {described(base)}")
    if isinstance(base, torch.jit.ScriptModule):
        raise TypeError("the base of a saved state is a model that is not scripted yet; load before scripting")
    _check_path(path)
    shown = brief(path)
    tensors, header = _read(Path(path), shown)
    whole = header.get("sha256") == _digest(header, tensors)
    for name, kept in header["tied"].items():
        if kept not in tensors or name in tensors:
            raise RetensorError(f"'{shown}' ties '{brief(name)}' to '{brief(kept)}', which it does not hold")
        tensors[name] = tensors[kept]
    model = _rebuilt(base, header, tensors, shown)
    compare(tensors, model.state_dict(keep_vars=True), shown)
    if not whole:
        raise RetensorError(f"'{shown}' was altered after it was written; save the model anew")
    _check_shared(tensors, model, shown)
    model.load_state_dict(tensors)
    _tie(model, header["tied"])
    for module in model.modules():
        if isinstance(module, Replacement):
            module.loaded(model)
    return model


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a saved state says of itself, without its tensors."""
    return _read(Path(path), brief(path), values=False)[1]


def _digest(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """The sum of a header, but for the sum itself, and of tensors: their names, types, shapes and values."""
    told = {key: value for key, value in header.items() if key != "sha256"}
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        if value.numel():
            found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingExtraError("keeping a model's state", "torch") from error
    return safetensors.torch


def _state(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by name, each stored once, and the names that stand for one that is kept under another."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise RetensorError(f"'{name}' of the model's state is {described(tensor)}; only tensors are kept")
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            raise RetensorError(
                f"'{name}' of the model's state has no shape yet; run the model once before it is saved"
            )
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer) or tensor.is_nested:
            kind = "nested tensor" if tensor.is_nested else type(tensor).__name__
            raise RetensorError(
                f"'{name}' of the model's state is a {kind}, which safetensors does not keep; save the model before "
                "its tensors are made those"
            )
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided or tensor.dtype == torch.complex128:
            what = "no values" if tensor.is_meta else f"the type {tensor.dtype} and layout {tensor.layout}"
            raise RetensorError(f"'{name}' of the model's state has {what}, which safetensors does not keep")
        key = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        # Views of one storage would be refused.
        try:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
        except NotImplementedError:
            # Of the types of fewer than eight bits torch has little more than the names.
            raise RetensorError(
                f"'{name}' of the model's state has the type {tensor.dtype}, which safetensors does not keep"
            ) from None
    return tensors, tied


def _described(module: _Kind, name: str) -> dict[str, Any]:
    try:
        config = module.config()
    except NotImplementedError as error:
        raise RetensorError(f"'{name}': {error}") from None
    except Exception as error:  # the class may be the caller's own, and what it looks at replaced
        raise RetensorError(f"'{name}': config() of {type(module).__name__} fails: {brief(error)}") from error
    if not isinstance(config, dict):
        raise RetensorError(f"'{name}': config() of {type(module).__name__} is {described(config)}; a dict is needed")
    return {"kind": module.kind(), "config": config}


def _check_path(path: Any) -> None:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"the path of a saved state is text or a path, not {described(path)}")


def _check_rebuilt(module: nn.Module, name: str, config: Mapping[str, Any]) -> None:
    """Refuse a replacement that its configuration does not make again: its file could not be loaded."""
    try:
        with torch.device("meta"):
            made = cast(Replacement, module).from_config(config).state_dict()
    except Exception as error:  # the class may be the caller's own
        raise RetensorError(
            f"'{name}': {type(module).__name__} cannot be made again of its config(): {brief(error)}"
        ) from error
    held = module.state_dict()
    differ = [label for label in (*held, *made) if (label in held) != (label in made)]
    if differ:
        what = "holds" if differ[0] in held else "lacks"
        raise RetensorError(
            f"'{name}': this {type(module).__name__} {what} '{brief(differ[0])}', other than what its config() makes, "
            "so that the file could not be loaded; what was put inside a replacement is folded before it is saved"
        )


def _read(path: Path, shown: str, values: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    _safetensors()
    from safetensors import SafetensorError, safe_open

    if (fault := broken_link(path)) is not None:
        raise RetensorError(f"'{shown}' {fault}; give the path of a saved state")
    try:
        there, ordinary = path.exists(), path.is_file()
    except OSError as error:
        raise RetensorError(f"'{shown}' cannot be read: {error.strerror}; give the path of a saved state") from None
    if not ordinary:
        what = "is no ordinary file" if there else "is not there"
        raise RetensorError(f"'{shown}' {what}; give the path of a saved state")
    try:
        with safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()} if values else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise RetensorError(f"'{shown}' is no whole safetensors file: {brief(error)}") from None
    if KEY not in metadata:
        raise RetensorError(f"'{shown}' is a safetensors file that retensor did not write; load it into a plain model")
    try:
        header = json.loads(metadata[KEY])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise RetensorError(f"'{shown}' has no header of schema '{SCHEMA}'")
    lists = all(_entries(header.get(part), keys) for part, keys in _PARTS.items())
    maps = all(
        isinstance(header.get(part), dict) and all(isinstance(kept, str) for kept in header[part].values())
        for part in ("shared", "tied")
    )
    if not lists or not maps:
        raise RetensorError(f"the header of '{shown}' is damaged; save the model anew")
    return tensors, header


_PARTS = {"replacements": {"name", "kind", "config"}, "parametrizations": {"name", "tensor", "kind", "config"}}


def _entries(given: Any, keys: set[str]) -> bool:
    return isinstance(given, list) and all(
        isinstance(entry, dict)
        and set(entry) == keys
        and isinstance(entry["config"], dict)
        and all(isinstance(entry[key], str) for key in keys - {"config"})
        for entry in given
    )


def _rebuilt(
    base: nn.Module | None, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], shown: str
) -> nn.Module:
    whole = [entry for entry in header["replacements"] if not entry["name"]]
    if whole:
        model = _module(whole[0], Replacement, "", tensors, shown)
        # There is no base whose types it could be of; what stays wide in a narrow model follows by tensor.
        if types := {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}:
            model.to(min(types, key=lambda dtype: torch.finfo(dtype).bits))
        for name, value in model.state_dict(keep_vars=True).items():
            if value.is_floating_point() and tensors[name].is_floating_point():
                value.data = value.data.to(tensors[name].dtype)
        if base is not None:
            model.train(base.training)
        return model
    if base is None:
        raise RetensorError(f"'{shown}' holds a part of a model; give the model it was replaced in as base")
    model = copied(base)
    for entry in header["replacements"]:
        name = entry["name"]
        new = _module(entry, Replacement, f"{name}.", tensors, shown)
        old = _found(model, name, shown)
        if any(tensor.is_complex() for tensor in old.state_dict().values()):
            for label, value in new.state_dict(keep_vars=True).items():
                if (kept := tensors[f"{name}.{label}"]).is_complex() and not value.is_complex():
                    value.data = value.data.to(kept.dtype)
        settle(old, new)
        put(model, name, new)
    for name, same in header["shared"].items():
        _found(model, name, shown)
        if inside(name, same) or inside(same, name):
            raise RetensorError(f"'{shown}' puts '{brief(same)}' in the place of '{brief(name)}', which lies around it")
        put(model, name, _found(model, same, shown))
    for entry in header["parametrizations"]:
        layer = _found(model, entry["name"], shown)
        if not isinstance(getattr(layer, entry["tensor"], None), torch.Tensor):
            raise RetensorError(f"'{brief(entry['name'])}' of the base has no tensor '{brief(entry['tensor'])}'")
        before = (
            len(layer.parametrizations[entry["tensor"]]) if parametrize.is_parametrized(layer, entry["tensor"]) else 0
        )
        place = f"{entry['name']}.parametrizations.{entry['tensor']}.{before}."
        step = _module(entry, Reparametrization, place.removeprefix("."), tensors, shown)
        step.to(getattr(layer, entry["tensor"]).device)
        # Values come from the file: none is worked out from the base's.
        parametrize.register_parametrization(layer, entry["tensor"], step, unsafe=True)
    return model


def _found(model: nn.Module, name: str, shown: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise RetensorError(
            f"'{shown}' replaces '{brief(name)}', which the base lacks; give a model like the one it was saved from"
        ) from None


def _module(
    entry: Mapping[str, Any], family: type[_Kind], prefix: str, tensors: Mapping[str, torch.Tensor], shown: str
) -> nn.Module:
    kind = kind_named(entry["kind"])
    if not issubclass(kind, family):
        raise RetensorError(f"'{shown}' has {entry['kind']} in the place of another kind of part")
    try:
        # Without memory first: a small file may describe a module that no memory would hold.
        with torch.device("meta"):
            sketch = kind.from_config(entry["config"])
        compare(
            {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)},
            {prefix + name: tensor for name, tensor in sketch.state_dict(keep_vars=True).items()},
            shown,
            values=False,
        )
        return kind.from_config(entry["config"])
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError, MemoryError) as error:
        raise RetensorError(f"'{shown}' describes a {kind.__name__} that cannot be made: {brief(error)}") from None


def _check_shared(tensors: Mapping[str, torch.Tensor], model: nn.Module, shown: str) -> None:
    """Refuse tensors that are two in a file and one in the model: the last to be loaded would be both."""
    seen: dict[tuple[Any, ...], str] = {}
    for name, mine in model.state_dict(keep_vars=True).items():
        if not mine.numel():
            continue
        key = mine.device, mine.untyped_storage()._cdata, mine.storage_offset(), tuple(mine.shape), mine.stride()
        first = seen.setdefault(key, name)
        if tensors[first] is not tensors[name] and not equal(tensors[first], tensors[name]):
            raise RetensorError(
                f"'{brief(first)}' and '{brief(name)}' differ in '{shown}' and are one tensor in the model; give a "
                "model where they are two"
            )


def _tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Let the parameters that were one tensor be one again."""
    for name, kept in tied.items():
        (path, _, leaf), (other, _, label) = name.rpartition("."), kept.rpartition(".")
        owner, source = model.get_submodule(path), model.get_submodule(other)
        if owner._parameters.get(leaf) is not None and source._parameters.get(label) is not None:
            owner._parameters[leaf] = source._parameters[label]


def compare(
    theirs: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor], shown: str, values: bool = True
) -> None:
    """Refuse tensors of a file that are not a model's by name, shape and kind of number, in a sentence."""
    strange = [name for name in theirs if name not in ours]
    absent = [name for name in ours if name not in theirs]
    if strange or absent:
        what = f"holds '{brief(strange[0])}', which the model lacks" if strange else f"lacks '{absent[0]}'"
        raise RetensorError(f"'{shown}' {what}; give a model like the one it was saved from")
    for name, tensor in theirs.items():
        mine = ours[name]
        if isinstance(mine, nn.parameter.UninitializedTensorMixin):
            raise RetensorError(f"'{brief(name)}' of the model has no shape yet; run the model once before loading")
        if tensor.shape != mine.shape:
            raise RetensorError(
                f"'{brief(name)}' has shape {list(tensor.shape)} in '{shown}' and {list(mine.shape)} in the model; "
                "give a model like the one it was saved from"
            )
        if values and mine.is_meta:
            raise RetensorError(
                f"'{brief(name)}' of the model lies on the meta device, where values cannot be loaded; make the base "
                "on a real one, or call to_empty before"
            )
        # Within floating-point types a value is rounded; between kinds, or beyond the range, it would be another one.
        if values and (tensor.is_floating_point(), tensor.is_complex()) != (
            mine.is_floating_point(),
            mine.is_complex(),
        ):
            raise RetensorError(
                f"'{brief(name)}' is of type {tensor.dtype} in '{shown}' and {mine.dtype} in the model; give a model "
                "like the one it was saved from"
            )
        if values and tensor.dtype != mine.dtype and not _holds(mine.dtype, tensor):
            raise RetensorError(
                f"'{brief(name)}' is of type {tensor.dtype} in '{shown}' and holds numbers beyond {mine.dtype}, its "
                "type in the model; give a model of the type it was saved from"
            )


def _holds(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    """Whether a type holds the numbers of a tensor, those of floating point within rounding."""
    if tensor.is_complex():
        return _holds(dtype.to_real(), torch.view_as_real(tensor))
    if not tensor.is_floating_point():
        return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
    wide = tensor.to(torch.float64)
    return bool((wide.abs() <= torch.finfo(dtype).max).logical_or(~wide.isfinite()).all())
