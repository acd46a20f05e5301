"""Cost sheets side by side: before and after, or one model against others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from retensor.costing.price import cost
from retensor.costing.sheet import CostSheet
from retensor.files import described

SCHEMA = "retensor.comparison/1"


@dataclass(frozen=True)
class Comparison:
    """Cost sheets side by side. ``print`` shows a table, a notebook too.

    Attributes
    ----------
    names : tuple of str
        Of the models, each another.
    sheets : tuple of CostSheet
    columns : mapping of str to tuple of float or None
        Further figures by name, one for each model: accuracy, say.
    """

    names: tuple[str, ...]
    sheets: tuple[CostSheet, ...]
    columns: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> CostSheet:
        """The sheet of the model of that name."""
        if name not in self.names:
            raise KeyError(f"no model is named {described(name)}; there are {', '.join(self.names)}")
        return self.sheets[self.names.index(name)]

    def as_dict(self) -> dict[str, Any]:
        """The JSON form, described by ``cost.schema.json`` beside this module."""
        return {
            "schema": SCHEMA,
            "models": [
                {
                    "name": name,
                    "sheet": sheet.as_dict(),
                    "columns": {label: figures[i] for label, figures in self.columns.items()},
                }
                for i, (name, sheet) in enumerate(zip(self.names, self.sheets, strict=True))
            ],
        }

    def plot(self, path: str | os.PathLike[str], *, against: str | None = None, dark: bool = False) -> None:
        """Draw it; see :func:`retensor.costing.plot_comparison`."""
        from retensor.costing.picture import plot_comparison

        plot_comparison(path, self, against=against, dark=dark)

    def __str__(self) -> str:
        """The table as plain text."""
        from retensor.costing.table import render

        return render(self.sheets, self.names, self.columns)

    def __rich__(self) -> Any:
        from retensor.costing.table import table

        return table(self.sheets, self.names, self.columns)

    def _repr_html_(self) -> str:
        from retensor.costing.table import html_table

        return html_table(self.sheets, self.names, self.columns)


def compare(
    *models: Any,
    inputs: Any = None,
    accelerator: Any = None,
    names: Sequence[str] | None = None,
    parameters: bool = False,
    dtype: str | None = None,
    fuse: bool = True,
    in_place: bool = False,
    alignment: int | None = None,
    time_limit: float = 10.0,
    seed: int = 0,
    progress: Any = None,
    **columns: Sequence[float | None] | Mapping[str, float],
) -> Comparison:
    """Cost sheets of several models side by side.

    Parameters
    ----------
    *models
        What :func:`retensor.cost` takes, or sheets that it made. The first is what the others are compared with.
    inputs, accelerator, parameters, dtype, fuse, in_place, alignment, time_limit, seed, progress
        For each model that is no sheet yet, as in :func:`retensor.cost`.
    names : sequence of str, optional
        What to call the models; their own names by default, numbered where two are alike.
    **columns
        Further figures: a sequence with one for each model, or a mapping of names to figures, such as
        ``accuracy=[0.91, 0.90]``.

    Raises
    ------
    TypeError, ValueError
        Where a column has no figure a model, or names repeat.

    Examples
    --------
    >>> import torch
    >>> before = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    >>> after = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 64))
    >>> print(compare(before, after, inputs=(1, 64), names=["before", "after"], accuracy=[0.91, 0.9]))
                                   before                after
    parameters                    33.09 k     4.192 k   x0.127
    parameters and buffers      129.2 KiB   16.38 KiB   x0.127
    multiply-accumulates          32.77 k     4.096 k   x0.125
    activation peak                 2 KiB       384 B  x0.188
    M_R, least to run               2 KiB       384 B  x0.188
    M_P, least without traffic      2 KiB       384 B  x0.188
    accuracy                         0.91         0.9   -0.01
    """
    if not models:
        raise ValueError("there is nothing to compare; give models, or sheets that retensor.cost made")
    for label, given in columns.items():
        if isinstance(given, (str, bytes)) or not isinstance(given, (Sequence, Mapping)):
            raise TypeError(
                f"compare has no argument '{label}', and {described(given, 40)} is no column; "
                f"a column has one figure a model, as in {label}=[0.91, 0.9]"
            )
    if names is not None:
        _check_names(names, len(models))
    sheets = [
        model
        if isinstance(model, CostSheet)
        else cost(
            model, inputs, accelerator, parameters=parameters, dtype=dtype, fuse=fuse, in_place=in_place,
            alignment=alignment, time_limit=time_limit, seed=seed, progress=progress,
        )
        for model in models
    ]  # fmt: skip
    titles = list(names) if names is not None else _numbered([sheet.name for sheet in sheets])
    figures = {label: _figures(label, given, titles) for label, given in columns.items()}
    return Comparison(tuple(titles), tuple(sheets), figures)


def _check_names(names: Sequence[str], count: int) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names are a sequence of str, one a model, not {described(names, 60)}")
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"{count} models need {count} names, each another, not {described(list(names), 60)}")


def _numbered(names: Sequence[str]) -> list[str]:
    """Names that differ: repeated ones get a number."""
    times, seen, found = Counter(names), Counter[str](), []
    for name in names:
        seen[name] += 1
        title = name if times[name] == 1 else f"{name} ({seen[name]})"
        while title in found:
            title += "'"
        found.append(title)
    return found


def _figures(label: str, given: Any, names: Sequence[str]) -> tuple[float | None, ...]:
    if isinstance(given, Mapping):
        strange = [name for name in given if name not in names]
        if strange:
            raise ValueError(f"column '{label}' names {described(strange[0])}; the models are {', '.join(names)}")
        given = [given.get(name) for name in names]
    if len(given) != len(names):
        raise ValueError(f"column '{label}' has {len(given)} figures; the {len(names)} models need one each")
    try:
        figures = [None if figure is None else float(figure) for figure in given]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"column '{label}' holds {described(list(given), 40)}; it has numbers, or None") from None
    if not all(figure is None or isfinite(figure) for figure in figures):
        raise ValueError(f"column '{label}' has a figure that is not finite; leave it out as None")
    return tuple(figures)
