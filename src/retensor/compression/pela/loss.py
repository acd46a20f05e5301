"""The loss of the repair: the task, the teacher's features, and the distance of every product from its weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from retensor.compression.pela.layer import LowRankLinear, matrix_of
from retensor.compression.pela.model import pairs
from retensor.files import described
from retensor.replacing.match import suggestions

Features: TypeAlias = (
    "Literal['blocks'] | Sequence[str] | Callable[[nn.Module, Any], tuple[Any, Sequence[torch.Tensor]]]"
)
"""``"blocks"``, names of modules, or a function that runs a model and returns its output and its features."""


PARTS = ("task", "fd", "wp", "logit")
"""Names of the parts of the loss."""


class PELALoss:
    r"""The loss of the repair, ``L_task + alpha L_FD + gamma L_WP + beta L_logit``; one pass of each model a call.

    Parameters
    ----------
    teacher : nn.Module
        The original. It is set to eval mode, gives no gradients, and must share no parameter with the student.
    student : nn.Module
        What :func:`compress` made of it. All its parameters train. Both may be wrapped by ``torch.compile`` or for
        data parallelism.
    alpha : float
        Of the features' distance, :func:`feature_loss`. The paper takes 1 for DeiT and Swin and 0.1 for ALBEF.
    gamma : float
        Of the weights' distance, :func:`weight_loss`. 1 for Swin and ALBEF; the authors' scripts for DeiT take 0.
    eps : float
        The distance of weights that is aimed at: 1e-3 for DeiT and ALBEF, 0 for Swin.
    beta : float
        Of the mean squared distance of the outputs.
    features : "blocks", sequence of str, or callable
        ``"blocks"``: outputs of all transformer blocks (:func:`blocks`). Names: outputs of those modules. A function of
        ``(model, x)`` that returns ``(output, features)``: what it takes.
    one_sided : bool
        Whether distances of weights below ``eps`` cost nothing. By default they are pushed up to it, as in the paper's
        code.

    Raises
    ------
    TypeError
        Where an argument is of another kind.
    ValueError
        Where a weight of the loss is negative; the student has no layers of low rank; teacher and student share a
        parameter or do not fit; or no blocks are found or named.

    Notes
    -----
    Parts whose weight is 0 are not worked out and told as nan, and the teacher runs only where it is needed. Swin of
    the authors compares the pooled features instead; that is ``features=lambda model, x: ...`` with one of timm's
    ``forward_features`` and ``forward_head``.

    Examples
    --------
    >>> from retensor.compression import pela
    >>> from retensor.data.reference import digits_vit
    >>> teacher = digits_vit()
    >>> student = pela.compress(teacher, 3.0)
    >>> loss = PELALoss(teacher, student)
    >>> x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    >>> total, parts = loss(x, lambda logits: functional.cross_entropy(logits, y))
    >>> total.backward()
    >>> [name for name, part in parts.items() if not part.isnan()]
    ['task', 'fd', 'wp']
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        alpha: float = 1.0,
        gamma: float = 1.0,
        eps: float = 1e-3,
        beta: float = 0.0,
        features: Features = "blocks",
        one_sided: bool = False,
    ) -> None:
        for model in (teacher, student):
            if not isinstance(model, nn.Module):
                raise TypeError(f"teacher and student are nn.Modules; one is {described(model)}")
        for name, value in {"alpha": alpha, "gamma": gamma, "eps": eps, "beta": beta}.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} is a number, not {described(value)}")
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it is 0 or more")
        self._pairs = pairs(unwrapped(teacher), unwrapped(student))
        _check_apart(teacher, student)
        self.teacher, self.student = teacher.eval(), student
        self.alpha, self.gamma, self.eps, self.beta = alpha, gamma, eps, beta
        self.one_sided = one_sided
        # Names and kinds are checked where nothing is compared, too; only blocks need not be found then.
        run = (
            _plain
            if not alpha and isinstance(features, str) and features == "blocks"
            else _runner(unwrapped(student), unwrapped(teacher), features)
        )
        self._run = run if alpha else _plain

    def __call__(
        self, x: Any, task: Callable[[Any], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch, and its parts.

        Parameters
        ----------
        x : torch.Tensor, sequence or mapping
            What both models are given: one argument, several, or keyword arguments.
        task : callable, optional
            The task's loss of the student's output. Without it the student is only held to its teacher.

        Returns
        -------
        total : torch.Tensor
            A scalar to call ``backward`` on.
        parts : dict of str to torch.Tensor
            Before weighting and without gradients: ``task``, ``fd``, ``wp`` and ``logit``; nan those that were not
            worked out.

        Raises
        ------
        ValueError
            Where features of both models differ in number or shape, or nothing is to be worked out.
        """
        output, features = self._run(self.student, x)
        terms: dict[str, tuple[float, torch.Tensor]] = {}
        if task is not None:
            terms["task"] = (1.0, task(output))
        if self.alpha or self.beta:
            if any(module.training for module in self.teacher.modules()):
                self.teacher.eval()
            with torch.no_grad():
                wanted, targets = self._run(self.teacher, x)
            if self.alpha:
                terms["fd"] = (self.alpha, feature_loss(features, targets))
            if self.beta:
                terms["logit"] = (self.beta, _mse(_logits(output), _logits(wanted)))
        if self.gamma:
            terms["wp"] = (
                self.gamma,
                weight_loss(
                    ((layer, matrix_of(original)) for _, layer, original in self._pairs),
                    self.eps,
                    one_sided=self.one_sided,
                ),
            )
        if not terms:
            raise ValueError("there is no loss: alpha, beta and gamma are 0; give a loss of the task")
        nothing = torch.tensor(math.nan)
        parts = {name: terms[name][1].detach() if name in terms else nothing for name in PARTS}
        total = torch.stack([weight * value.to(next(iter(terms.values()))[1]) for weight, value in terms.values()])
        return total.sum(), parts


def feature_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """L_FD: the mean over blocks of the mean squared distance of their outputs.

    Parameters
    ----------
    student, teacher : sequence of torch.Tensor
        One a block, of equal shapes; no gradient goes to the teacher's. Types under float32 are compared in float32.

    Returns
    -------
    torch.Tensor
        A scalar of float32 at least.

    Raises
    ------
    ValueError
        Where there are none, or number or shapes differ.

    Examples
    --------
    >>> feature_loss([torch.zeros(2, 3), torch.zeros(2, 3)], [torch.ones(2, 3), 2 * torch.ones(2, 3)])
    tensor(2.5000)
    """
    if not student or len(student) != len(teacher):
        raise ValueError(
            f"{len(student)} features of the student and {len(teacher)} of the teacher; one each is needed"
        )
    for number, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        if ours.shape != theirs.shape:
            raise ValueError(
                f"feature {number} has shape {list(ours.shape)} in the student and {list(theirs.shape)} in the teacher"
            )
    return torch.stack([_mse(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]).mean()


def weight_loss(
    layers: Iterable[tuple[LowRankLinear, torch.Tensor]], eps: float = 1e-3, *, one_sided: bool = False
) -> torch.Tensor:
    """L_WP: the mean over replaced layers of ``(max |B A - W| - eps)^2``, the largest absolute entry.

    Parameters
    ----------
    layers : iterable of (LowRankLinear, torch.Tensor)
        Each with the weight it stands for, of shape (out, in), which gets no gradient.
    eps : float
    one_sided : bool
        Whether a largest entry under ``eps`` costs nothing.

    Returns
    -------
    torch.Tensor
        Of float32 at least. Its gradient goes to the row of B and the column of A that make the largest entry (the
        first where several are equal): the full product is only looked through, which costs one matrix product a layer
        and none backward.

    Examples
    --------
    >>> layer = LowRankLinear(4, 4, rank=2)
    >>> weight_loss([(layer, layer.product().detach() + 0.5)], eps=0.1).item()
    0.16...
    """
    terms = []
    for layer, weight in layers:
        a, b = layer[0].weight, layer[1].weight
        wide = torch.promote_types(a.dtype, torch.float32)
        # Autocast would multiply in half precision, whose rounding is as large as what is measured.
        with torch.autocast(a.device.type, enabled=False):
            with torch.no_grad():
                at = torch.addmm(weight.to(wide), b.to(wide), a.to(wide), beta=-1).abs_().argmax()
            row, column = at // a.shape[1], at % a.shape[1]
            entry = (b.index_select(0, row[None]).to(wide) @ a.index_select(1, column[None]).to(wide)).squeeze()
        distance = (entry - weight.detach()[row, column].to(wide)).abs() - eps
        terms.append((distance.clamp_min(0) if one_sided else distance) ** 2)
    if not terms:
        raise ValueError("there are no layers of low rank to compare; compress a model to make a student")
    return torch.stack(terms).mean()


def blocks(student: nn.Module) -> list[str]:
    """Names of a student's blocks: members of lists of modules of one class that have replaced layers inside.

    Of lists in lists those whose classes are called a block or a layer are taken (Swin's blocks and not its stages, a
    decoder's layers and not its experts), else the innermost.

    Examples
    --------
    >>> from retensor.compression import pela
    >>> from retensor.data.reference import digits_vit
    >>> blocks(pela.compress(digits_vit()))
    ['blocks.0', 'blocks.1', 'blocks.2']
    """
    lists = {
        name: children
        for name, module in student.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and not isinstance(module, LowRankLinear)
        and (children := list(module)) and len({type(child) for child in children}) == 1
        and not isinstance(children[0], LowRankLinear)
        and any(isinstance(part, LowRankLinear) for child in children for part in child.modules())
    }  # fmt: skip
    called = {
        name: children
        for name, children in lists.items()
        if any(word in type(children[0]).__name__.lower() for word in ("block", "layer"))
    }
    lists = called or lists
    return [
        f"{name}.{number}".lstrip(".")
        for name, children in lists.items()
        if not any(other != name and other.startswith(f"{name}." if name else "") for other in lists)
        for number in range(len(children))
    ]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what ``torch.compile`` and data parallelism put around it, whose names are those of the plan."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


_Run: TypeAlias = "Callable[[nn.Module, Any], tuple[Any, Sequence[torch.Tensor]]]"


def _runner(student: nn.Module, teacher: nn.Module, features: Any) -> _Run:
    if callable(features):
        return features
    if features == "blocks":
        names = blocks(student)
        if not names:
            raise ValueError(
                f"no blocks are found in the {type(student).__name__}; name the modules whose outputs are to be "
                "compared in features, or pass alpha=0"
            )
    elif isinstance(features, str) or not isinstance(features, Sequence):
        raise TypeError(f"features are 'blocks', names of modules, or a function, not {described(features)}")
    else:
        names = list(features)
        if not names:
            raise ValueError("features name no module; pass alpha=0 to compare none")
    for model, who in ((student, "student"), (teacher, "teacher")):
        known = {name for name, _ in model.named_modules()}
        for name in names:
            if name not in known:
                raise ValueError(f"the {who} has no module {described(name)}; {suggestions(name, known)}")

    def run(model: nn.Module, x: Any) -> tuple[Any, Sequence[torch.Tensor]]:
        with _outputs_of(unwrapped(model), names) as found:
            output = _called(model, x)
        silent = [name for name in names if not found[name]]
        if silent:
            raise ValueError(f"'{silent[0]}' has not run and gave no feature; leave it out of features")
        return output, [feature for name in names for feature in found[name]]

    return run


@contextmanager
def _outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What modules return while this is open, each time they run; the model keeps no hook afterwards."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def keeper(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name].append(_tensor_of(output, name))

        return keep

    handles = [model.get_submodule(name).register_forward_hook(keeper(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensor_of(output: Any, name: str) -> torch.Tensor:
    """The tokens a block returns, alone or before what else it returns."""
    values = output.values() if isinstance(output, Mapping) else output
    if not isinstance(values, torch.Tensor):
        values = next((value for value in values or () if isinstance(value, torch.Tensor)), None)
    if values is None:
        raise ValueError(f"'{name}' returns no tensor to compare; leave it out of features")
    return values


def _plain(model: nn.Module, x: Any) -> tuple[Any, Sequence[torch.Tensor]]:
    return _called(model, x), []


def _called(model: nn.Module, x: Any) -> Any:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple | list) else model(x)


def _logits(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else _tensor_of(output, "the model")


def _mse(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(ours.dtype, torch.float32)
    return functional.mse_loss(ours.to(wide), theirs.detach().to(wide))


def _check_apart(teacher: nn.Module, student: nn.Module) -> None:
    theirs = {id(parameter): name for name, parameter in teacher.named_parameters()}
    for name, parameter in student.named_parameters():
        if id(parameter) in theirs:
            raise ValueError(
                f"'{name}' of the student is '{theirs[id(parameter)]}' of the teacher, which would train with it; the "
                "teacher is the model that was given to compress, not a part of its result"
            )
