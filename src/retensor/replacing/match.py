"""Which layers a pattern means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from torch import nn

from retensor.files import described

Pattern: TypeAlias = "str | type[nn.Module] | Callable[[str, nn.Module], bool]"
"""A glob of names, a class of layers, or a function of name and module."""


def matching(model: nn.Module, pattern: Pattern) -> list[str]:
    """Names of the modules that a pattern means, outermost first, in the model's order.

    Parameters
    ----------
    model : nn.Module
    pattern : str, type or callable
        A glob: ``*`` is any part of a name between two dots, ``**`` any number of parts, ``?`` one letter, ``[0-3]``
        one of several. A class: all modules of it. A function of ``(name, module)`` that returns whether it is meant.

    Raises
    ------
    TypeError
        Where the pattern is something else.

    Examples
    --------
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> matching(net, "*"), matching(net, "**.0"), matching(net, nn.Linear)
    (['0', '1'], ['0', '1.0'], ['0', '1.0'])
    """
    meant = meaning(pattern)
    return [name for name, module in model.named_modules(remove_duplicate=False) if meant(name, module)]


def exactly(name: str) -> Pattern:
    """The pattern of one layer by its name, whatever letters it holds.

    >>> from torch import nn
    >>> matching(nn.ModuleDict({"a[1]": nn.ReLU(), "a1": nn.ReLU()}), exactly("a[1]"))
    ['a[1]']
    """
    return Exactly(name)


@dataclass(frozen=True)
class Exactly:
    """Means the layer of one name."""

    name: str

    def __call__(self, name: str, module: nn.Module) -> bool:
        """Whether it is this one."""
        return name == self.name


def meaning(pattern: Any) -> Callable[[str, nn.Module], bool]:
    """A pattern as a function of name and module."""
    if isinstance(pattern, str):
        expression = _expression(pattern)
        # The model itself, which has no name, is meant by the empty pattern alone.
        return lambda name, _: bool(name or not pattern) and expression.fullmatch(name) is not None
    if isinstance(pattern, type):
        if not issubclass(pattern, nn.Module):
            raise TypeError(f"{described(pattern)} is no class of modules")
        return lambda _, module: isinstance(module, pattern)
    if callable(pattern) and not isinstance(pattern, nn.Module):
        return lambda name, module: bool(pattern(name, module))
    raise TypeError(
        f"{described(pattern)} is no pattern; one is a glob such as 'blocks.*.mlp.fc1', a class of modules, "
        "or a function of name and module"
    )


def shown(pattern: Any) -> str:
    """A pattern for a sentence."""
    return described(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", described(pattern))


def inside(name: str, outer: str) -> bool:
    """Whether a module is another one or lies in it, by their names; all lie in the model, whose name is empty.

    >>> inside("blocks.1.mlp", "blocks.1"), inside("blocks.10", "blocks.1")
    (True, False)
    """
    return not outer or name == outer or name.startswith(f"{outer}.")


def suggestions(pattern: Any, names: Iterable[str]) -> str:
    """What to say of a pattern that means nothing: names that look like it, or some that there are."""
    known = [name for name in names if name]
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5) if isinstance(pattern, str) else []
    some = ", ".join(f"'{name}'" for name in near or known[:3])
    return f"names here are such as {some}" if some else "the model has no layers inside"


@lru_cache(maxsize=1024)
def _expression(glob: str) -> re.Pattern[str]:
    return re.compile("".join(_translated(glob)))


def _translated(glob: str) -> Iterator[str]:
    at = 0
    while at < len(glob):
        if glob.startswith("**.", at):
            # Any number of parts, none too.
            yield r"(?:[^.]+\.)*"
            at += 3
        elif glob.startswith("**", at):
            yield ".+"
            at += 2
        elif glob[at] == "*":
            yield "[^.]*"
            at += 1
        elif glob[at] == "?":
            yield "[^.]"
            at += 1
        elif glob[at] == "[" and (end := glob.find("]", at + (3 if glob.startswith("[!", at) else 2))) > 0:
            inside = glob[at + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            one = f"[^.{inside[1:]}]" if inside.startswith("!") else f"[{inside.replace('^', chr(92) + '^')}]"
            try:
                re.compile(one)
            except re.error:
                # A range that runs backwards means no letter.
                one = "(?!)"
            yield one
            at = end + 1
        else:
            yield re.escape(glob[at])
            at += 1
