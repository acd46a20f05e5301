"""Importance of the numbers that a module gives: the perturbation Hessian of a vision transformer's predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from retensor.compression.aphq.config import Config, Direction
from retensor.compression.aphq.runs import Behind, Shifted, Traced, Watched, exchange, shell
from retensor.compression.aphq.spec import Spec, check_images, find_spec
from retensor.quantizing.samples import first_tensor

RELATIVE = {torch.float64: 1e-3}
OTHERWISE = 1e-2
"""How far an output is moved, relative to its root mean square."""


def perturbation_hessian(
    model: nn.Module,
    images: torch.Tensor,
    module: str | Sequence[str],
    *,
    average: bool = True,
    temp: float = 20.0,
    direction: Direction = "rademacher",
    draws: int = 1,
    eps: float | None = None,
    batch: int = 32,
    spec: Spec | None = None,
    rerun: bool = False,
    seed: int = 0,
) -> Any:
    r"""How much the predictions of a model turn on each number that a module gives.

    .. math::
        h = \Big| \nabla_z L(z + \varepsilon v) - \nabla_z L(z - \varepsilon v) \Big| \approx 2 \varepsilon |H v|,
        \qquad L(z) = \mathrm{KL}\big(\mathrm{softmax}(f(z_0) / T) \,\|\, \mathrm{softmax}(f(z) / T)\big)

    with the divergence averaged over a batch. The gradient is 0 where nothing is moved, so that everything rests on
    these differences.

    Parameters
    ----------
    model : nn.Module
        A classifier in float32 or float64; it runs in eval mode and is left as it is.
    images : torch.Tensor
        Shape (n, ...), of the model's type.
    module : str or sequence of str
        Its name; it gives one tensor whose first axis is the images. Of several, what they give is kept by one run.
    average : bool
        Whether importance is averaged over the images, which takes 1/n of the memory.
    temp, direction, draws, eps
        See :class:`Config`. In a pre-norm transformer a shift of all numbers of a token by as much is taken out by
        every layer normalisation behind it, so that ``H v`` is exactly 0 for ``v`` all ones: with ``direction="ones"``
        rounding errors are measured.
    batch : int
        Images that run at once. What the divergence is divided by is this number, for the last batch too.
    spec : Spec, optional
        Whose blocks before the module need not run; :func:`find_spec`'s by default, and none where it finds none.
    rerun : bool
        Whether the whole model runs each time instead of what lies behind the module; for checks.
    seed : int
        Of the signs.

    Returns
    -------
    torch.Tensor, or dict of str to torch.Tensor for several
        Shape (1, ...) where averaged, or (n, ...).

    Raises
    ------
    TypeError, ValueError
        Where the type is too coarse (half precision), or the module is not there or gives something else.
    RuntimeError
        Where importance is not finite, or 0 everywhere.

    Examples
    --------
    >>> from retensor.data import reference
    >>> model, digits = reference("digits-vit")
    >>> perturbation_hessian(model, digits.x[:64], "blocks.1").shape
    torch.Size([1, 17, 48])
    """
    config = Config(temp=temp, direction=direction, draws=draws, eps=eps, batch=batch, seed=seed)
    check_images(model, images, 1)
    names = blocks_of(model, spec)
    asked = [module] if isinstance(module, str) else list(module)
    keep = dict.fromkeys(kept for name in asked for kept in (name, *before(names, name)))
    traced = Traced(model, images, names, keep, batch)
    found = {name: importance(traced, name, traced.kept[name], config, average=average, rerun=rerun) for name in asked}
    return found[module] if isinstance(module, str) else found


def importance(
    traced: Traced, name: str, outputs: torch.Tensor, config: Config, *, average: bool = True, rerun: bool = False
) -> torch.Tensor:
    """:func:`perturbation_hessian` of a module whose outputs for the traced images are known."""
    if not outputs.is_floating_point() or outputs.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"'{name}' gives {outputs.dtype}; differences of gradients are lost in it, so run the model in float32"
        )
    images, batch = traced.images, traced.batch
    if len(outputs) % len(images):
        raise ValueError(f"'{name}' gives {len(outputs)} rows for {len(images)} images; a multiple is needed")
    behind = Behind(traced, name, outputs, rerun=rerun)
    eps = config.eps
    if eps is None:
        eps = RELATIVE.get(outputs.dtype, OTHERWISE) * float(outputs.double().square().mean().sqrt())
    generator = torch.Generator().manual_seed(config.seed)
    found: list[torch.Tensor] = []
    total: torch.Tensor | None = None
    for start in range(0, len(images), batch):
        values = traced.rows(outputs, start)
        wanted = functional.softmax(traced.logits[start : start + batch] / config.temp, -1)
        part = torch.zeros_like(values)
        for _ in range(config.draws):
            v = _direction(values, config.direction, generator)
            plus, minus = (
                _gradient(lambda shift: behind(start, shift), sign * eps * v, wanted, config.temp, batch)  # noqa: B023
                for sign in (1.0, -1.0)
            )
            part += (plus - minus).abs() / config.draws
        if average:
            total = part.sum(0, keepdim=True) if total is None else total + part.sum(0, keepdim=True)
        else:
            found.append(part)
    h = total / len(outputs) if total is not None else torch.cat(found)
    return _sound(h, name, config)


def gradients(model: nn.Module, name: str, images: torch.Tensor, logits: torch.Tensor, config: Config) -> torch.Tensor:
    """Squared gradients of the divergence of a model from given outputs, by what a module gives: BRECQ's weights.

    Returns
    -------
    torch.Tensor
        Shape (images, ...).
    """
    net = shell(model)
    stub = Shifted(net.get_submodule(name))
    exchange(net, name, stub)
    found = []
    for start in range(0, len(images), config.batch):
        part = images[start : start + config.batch]
        zero = torch.zeros_like(_output(net, stub, part))

        def run(shift: torch.Tensor, part: torch.Tensor = part) -> torch.Tensor:
            stub.value = shift
            return first_tensor(net(part), "the model")

        wanted = functional.softmax(logits[start : start + config.batch] / config.temp, -1)
        found.append(_gradient(run, zero, wanted, config.temp, config.batch).square())
    return _sound(torch.cat(found), name, config)


def blocks_of(model: nn.Module, spec: Spec | None) -> tuple[str, ...]:
    """Blocks of a spec or of the model's own; none where none are known."""
    if spec is None:
        try:
            spec = find_spec(model)
        except ValueError:
            return ()
    spec.check(model)
    return tuple(spec.blocks)


def before(names: tuple[str, ...], module: str) -> tuple[str, ...]:
    """The unit before the one that a module lies in, where it does, by the order in which they are named."""
    at = next((i for i, name in enumerate(names) if module.startswith(f"{name}.")), None)
    return () if not at else (names[at - 1],)


@torch.no_grad()
def _output(net: nn.Module, stub: Shifted, part: torch.Tensor) -> torch.Tensor:
    """What the module behind which something is added gives for images."""
    watcher = Watched(stub.inner)
    stub.inner, stub.value = watcher, torch.zeros((), dtype=part.dtype, device=part.device)
    net(part)
    stub.inner = watcher.inner
    return first_tensor(watcher.output, "the module")


def _direction(values: torch.Tensor, direction: Direction, generator: torch.Generator) -> torch.Tensor:
    if direction == "ones":
        return torch.ones_like(values)
    drawn = torch.randint(0, 2, values.shape, generator=generator)
    return (2 * drawn - 1).to(values)


def _gradient(
    run: Callable[[torch.Tensor], torch.Tensor], shift: torch.Tensor, wanted: torch.Tensor, temp: float, batch: int
) -> torch.Tensor:
    """Of the divergence from what is wanted, by what is added to a module's output."""
    with torch.enable_grad():
        shift = shift.detach().requires_grad_()
        told = functional.log_softmax(run(shift) / temp, -1)
        value = functional.kl_div(told, wanted, reduction="sum") / batch
        (gradient,) = torch.autograd.grad(value, shift)
    return gradient


def _sound(h: torch.Tensor, name: str, config: Config) -> torch.Tensor:
    if not bool(torch.isfinite(h).all()):
        raise RuntimeError(
            f"the importance of what '{name}' gives is not finite; look at the model's weights and at the images, and "
            "give a smaller eps"
        )
    if not bool(h.any()):
        cause = (
            "a shift by all ones is taken out by every layer normalisation behind it, so take direction='rademacher'"
            if config.direction == "ones"
            else "eps is too small for the type of the numbers, or the outputs do not depend on it"
        )
        raise RuntimeError(f"the importance of what '{name}' gives is 0 everywhere: {cause}")
    return h
