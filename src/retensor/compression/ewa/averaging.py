"""The averaging of experts after each step of an optimizer: schedule, state, and what it has done."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from retensor.compression.ewa.assignment import check_choice
from retensor.compression.ewa.experts import Experts, needed_layers
from retensor.files import described

Schedule: TypeAlias = Literal["linear", "constant", "cosine"]
Form: TypeAlias = Literal["mean", "others"]

_SCHEDULES = ("linear", "constant", "cosine")
_FORMS = ("mean", "others")


@torch.no_grad()
def average_(model: nn.Module, share_rate: float, *, form: Form = "mean") -> None:
    r"""Draw the experts of a model together once, in place.

    Every tensor of an expert, biases too: :math:`E_i \leftarrow (1 - \beta) E_i + \beta \bar E`. The mean stays, and
    deviations from it shrink by :math:`1 - \beta`.

    Parameters
    ----------
    model : nn.Module
    share_rate : float
        From 0 to 1: :math:`\beta`, or :math:`\beta'` in the form of the others.
    form : {"mean", "others"}
        ``"others"`` is :math:`E_i \leftarrow (1 - \beta') E_i + \frac{\beta'}{N - 1} \sum_{j \ne i} E_j`, the same map
        with :math:`\beta = \beta' N / (N - 1)`.

    Raises
    ------
    ValueError
        Where the rate lies outside 0 to 1 in the form of the mean, or the model has no experts.

    Examples
    --------
    >>> from timm.models.vision_transformer import VisionTransformer
    >>> from retensor.compression import ewa
    >>> vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3)
    >>> experts = ewa.convert(vit, num_experts=4)
    >>> before, _ = [max(layer.spread) for layer in ewa.stats(experts)], average_(experts, 0.25)
    >>> [round(max(layer.spread) / was, 6) for layer, was in zip(ewa.stats(experts), before, strict=True)]
    [0.75]
    """
    layers = needed_layers(model)
    rates = {id(layer): _rate(share_rate, form, layer.num_experts) for _, layer in layers}
    for _, layer in layers:
        _average(layer, rates[id(layer)])


class Averaging:
    """The averages that :func:`attach` makes. Its state is the number of steps done.

    Attributes
    ----------
    share_rate : float
        r.
    schedule, form : str
    total_steps : int
        T.
    until : float
        Part of training in which experts are averaged.
    average_state : bool
    steps : int
        Steps of the optimizer so far.
    beta : float
        Share rate of the last step, as a weight of the mean.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        layers: list[Experts],
        share_rate: float,
        schedule: Schedule,
        total_steps: int,
        until: float,
        average_state: bool,
        form: Form,
    ) -> None:
        self.share_rate = share_rate
        self.schedule = schedule
        self.total_steps = total_steps
        self.until = until
        self.average_state = average_state
        self.form = form
        self.steps = 0
        self.beta = 0.0
        self._warned = False
        self._layers = layers
        self._optimizer = weakref.ref(optimizer)
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def rate(self, step: int) -> float:
        """Share rate of a step, 1 being the first: :math:`r t / T` of the linear schedule, and 0 after ``until``.

        With ``until`` below 1 the schedule runs within that part, and reaches r at its end.
        """
        last = self.until * self.total_steps
        if self.until < 1 and step > last:
            return 0.0
        done = min(1.0, step / last)
        if self.schedule == "constant":
            return self.share_rate
        if self.schedule == "cosine":
            return self.share_rate * (0.5 - 0.5 * math.cos(math.pi * done))
        return self.share_rate * done

    def state_dict(self) -> dict[str, Any]:
        """The number of steps done, for a checkpoint."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after that number of steps.

        Raises
        ------
        ValueError
            Where the state holds no such number.
        """
        steps = state.get("steps") if isinstance(state, Mapping) else None
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"{described(state)} is no state of an average; it holds 'steps', a number from 0")
        self.steps = steps

    def detach(self) -> None:
        """Average no more."""
        self._hook.remove()
        for layer in self._layers:
            if _averaging_of(layer) is self:
                del _attached[layer]

    def _settings(self) -> tuple[Any, ...]:
        return self.share_rate, self.schedule, self.total_steps, self.until, self.average_state, self.form

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # A scaler of mixed precision hands this to optimizers that skip the step themselves.
        found = getattr(optimizer, "found_inf", None)
        if found is not None and float(found) > 0:
            return
        self.steps += 1
        if self.steps > self.total_steps and not self._warned:
            self._warned = True
            held = f"the share rate is held at {self.share_rate}" if self.until == 1 else "experts are not averaged"
            warnings.warn(
                f"the optimizer took more than the total of {self.total_steps} steps; {held} from here", stacklevel=2
            )
        rate = self.rate(self.steps)
        for layer in self._layers:
            self.beta = _rate(rate, self.form, layer.num_experts)
            _average(layer, self.beta)
            if self.average_state:
                for _name, tensor in layer.experts():
                    for value in optimizer.state.get(tensor, {}).values():
                        if isinstance(value, torch.Tensor) and value.shape == tensor.shape:
                            _drawn_together(value, self.beta)


def attach(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    share_rate: float,
    total_steps: int,
    schedule: Schedule = "linear",
    until: float = 1.0,
    average_state: bool = False,
    form: Form = "mean",
) -> Averaging:
    """Average a model's experts after every step of an optimizer, with no change to the training loop.

    A step that a gradient scaler skips is none. Attach before what else looks at the weights after a step (moving
    averages, checkpoints), so that it sees the averaged ones.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    model : nn.Module
        With experts (:func:`convert`, :func:`route`).
    share_rate : float
        r, from 0 to 1: the highest share rate.
    total_steps : int
        T. After it the rate is held, and one warning is given.
    schedule : {"linear", "constant", "cosine"}
        From 0 to r along a line or half a cosine, or r throughout.
    until : float
        Part of the steps in which experts are averaged, above 0 and up to 1: below 1 is Early EWA. The schedule runs
        within that part.
    average_state : bool
        Whether the optimizer's moments are drawn together as well. By default each expert keeps its own.
    form : {"mean", "others"}
        What the rate weighs; see :func:`average_`.

    Returns
    -------
    Averaging
        The same one where these arguments have been attached already. Keep its ``state_dict`` in checkpoints.

    Raises
    ------
    TypeError, ValueError
        Where an argument is not as above, the optimizer does not train the experts, or they are averaged already, with
        other arguments or after another optimizer's steps.

    Examples
    --------
    >>> import torch
    >>> from timm.layers import Mlp
    >>> from retensor.compression import ewa
    >>> model = ewa.convert(nn.Sequential(Mlp(8, 16)), num_experts=4, layers="all")
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> averaging = ewa.attach(optimizer, model, share_rate=0.3, total_steps=3)
    >>> for _ in range(3):
    ...     model(torch.ones(2, 4, 8)).sum().backward()
    ...     optimizer.step()
    >>> averaging.steps, averaging.beta, ewa.stats(model)[0].tokens
    (3, 0.3, (2, 2, 2, 2))
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"experts are averaged after the steps of an optimizer of torch, not of {described(optimizer)}")
    check_choice("schedule", schedule, _SCHEDULES)
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps is {described(total_steps)}; it is a whole number from 1")
    if isinstance(until, bool) or not isinstance(until, int | float) or not 0 < until <= 1:
        raise ValueError(f"until is {described(until)}; it lies above 0 and up to 1")
    if until * total_steps < 1:
        raise ValueError(f"until is {until}, which of {total_steps} steps is not one; no expert would be averaged")
    named = needed_layers(model)
    layers = [layer for _, layer in named]
    for layer in layers:
        _rate(share_rate, form, layer.num_experts)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in named:
        if any(id(p) not in trained and p.requires_grad for _, p in layer.experts()):
            raise ValueError(
                f"the optimizer does not train '{name}'; make it of the parameters of the converted model, which is "
                "another one than the model it was made of"
            )
    settings = share_rate, schedule, total_steps, until, average_state, form
    for known in filter(None, map(_averaging_of, layers)):
        alike = known._settings() == settings and [*map(id, known._layers)] == [*map(id, layers)]
        if alike and known._optimizer() is optimizer:
            return known
        how = "after the steps of another optimizer" if alike else "with other arguments"
        raise ValueError(f"these experts are averaged already, {how}; call detach() of what attach returned before")
    made = Averaging(optimizer, layers, *settings)
    _attached.update({layer: weakref.ref(made) for layer in layers})
    return made


@dataclass(frozen=True)
class LayerStats:
    """One feed-forward network of experts.

    Attributes
    ----------
    name : str
    spread : tuple of float
        Of each expert, the norm of its deviation from the mean, divided by the norm of the mean.
    beta : float
        Share rate of the last average.
    tokens : tuple of int
        Tokens of each expert in the last pass that shared them out; empty before.
    """

    name: str
    spread: tuple[float, ...]
    beta: float
    tokens: tuple[int, ...]


@torch.no_grad()
def stats(model: nn.Module) -> list[LayerStats]:
    """How far apart the experts are, how strongly they are drawn together, and how many tokens each has had.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    list of LayerStats
        One for each feed-forward network of experts, in the model's order.

    Raises
    ------
    ValueError
        Where the model has no experts.

    Examples
    --------
    >>> from timm.layers import Mlp
    >>> from retensor.compression import ewa
    >>> stats(ewa.convert(nn.Sequential(Mlp(8, 16)), num_experts=2, layers="all", init="copy"))
    [LayerStats(name='0', spread=(0.0, 0.0), beta=0.0, tokens=())]
    """
    groups: dict[int, list[Experts]] = {}
    for _, layer in needed_layers(model):
        groups.setdefault(id(layer.assignment), []).append(layer)
    found = []
    for layers in groups.values():
        # Norms are added up in double precision, whatever the weights' own.
        stacked = torch.cat([tensor.double().flatten(1) for layer in layers for _, tensor in layer.experts()], 1)
        mean = stacked.mean(0)
        spread = (stacked - mean).norm(dim=1) / mean.norm()
        shares = layers[0].assignment
        found.append(LayerStats(layers[0].group, tuple(spread.tolist()), shares.beta, shares.sizes))
    return found


# What averages each layer; it lives as long as its optimizer, whose hook it is.
_attached: weakref.WeakKeyDictionary[Experts, weakref.ref[Averaging]] = weakref.WeakKeyDictionary()


def _averaging_of(layer: Experts) -> Averaging | None:
    known = _attached.get(layer)
    averaging = None if known is None else known()
    return averaging if averaging is not None and averaging._optimizer() is not None else None


def _rate(share_rate: float, form: Form, num_experts: int) -> float:
    """A share rate as a weight of the mean."""
    check_choice("form", form, _FORMS)
    if not isinstance(share_rate, int | float) or not 0 <= share_rate <= 1:
        raise ValueError(f"share_rate is {described(share_rate)}; it lies between 0 and 1")
    if form == "mean":
        return float(share_rate)
    rate = share_rate * num_experts / (num_experts - 1)
    if rate > 1 + 1e-12:
        raise ValueError(
            f"share_rate is {share_rate}; of the others' mean at most {(num_experts - 1) / num_experts:.4g} can be "
            f"taken by {num_experts} experts, which makes them equal"
        )
    return min(1.0, float(rate))


def _average(layer: Experts, beta: float) -> None:
    layer.assignment.beta = beta
    if beta:
        for _, tensor in layer.experts():
            _drawn_together(tensor, beta)


def _drawn_together(stacked: torch.Tensor, beta: float) -> None:
    mean = stacked.mean(0, keepdim=True)
    stacked.lerp_(mean.expand_as(stacked), beta)
