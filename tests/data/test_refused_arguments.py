"""Arguments that would train or count something else are refused in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import retensor as rt
from retensor.data import accuracy, digits, fit, reference

X, Y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("clip", [-1, 0, float("nan")])
def test_a_norm_that_would_turn_steps_around_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match="clip is the largest norm of all gradients, above 0"):
        fit(nn.Linear(2, 2), X, Y, steps=1, clip=clip)


@pytest.mark.parametrize("changes", [{"steps": 1.5}, {"steps": "a"}, {"steps": True}, {"batch": 1.5}, {"batch": True}])
def test_numbers_of_training_are_whole(changes: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(changes))} is an int"):
        fit(nn.Linear(2, 2), X, Y, **{"steps": 1, **changes})


def test_a_model_that_is_none_is_told() -> None:
    with pytest.raises(TypeError, match=r"an nn\.Module is trained, not None"):
        fit(None, X, Y, steps=1)  # type: ignore[arg-type]


def test_an_accuracy_of_something_else_is_refused() -> None:
    model = nn.Linear(2, 2)
    for batch in (0, -1):
        with pytest.raises(ValueError, match="a batch has at least one sample"):
            accuracy(model, X, Y, batch=batch)
    with pytest.raises(TypeError, match="batch is an int"):
        accuracy(model, X, Y, batch=1.5)  # type: ignore[arg-type]
    for classes in (Y.float(), Y.tolist()):
        with pytest.raises(TypeError, match="classes whole numbers"):
            accuracy(model, X, classes)
    # One score for each input has class 0 as its largest, whatever it is.
    with pytest.raises(ValueError, match=r"the model gives \[4, 1\]; a row of at least two scores"):
        accuracy(nn.Linear(2, 1), X, Y)


def test_splits_and_references_name_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="the share of test samples is a number such as 0"):
        digits(test="a")  # type: ignore[arg-type]
    for seed in (True, 2**40, -1, "a"):
        with pytest.raises(ValueError, match="is a whole number from 0 on, not"):
            digits(seed=seed)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is a whole number from 0 on, not"):
            digits().few(5, seed=seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="True training samples"):
        digits().few(True)
    with pytest.raises(ValueError, match=r"\['digits-mlp'\] is no reference model"):
        reference(["digits-mlp"])  # type: ignore[arg-type]
    for number in ("a", 1.5, True):
        with pytest.raises(TypeError, match="seed is an int"):
            reference("digits-mlp", seed=number)  # type: ignore[arg-type]


def test_figures_that_are_no_numbers_are_named() -> None:
    sheet = rt.cost(nn.Linear(2, 2), (1, 2))
    for figures in (["x", "y"], [10**400, 1], [[1], 2]):
        with pytest.raises(ValueError, match=r"column 'share' holds .*; it has numbers, or None"):
            rt.compare(sheet, sheet, share=figures)
    with pytest.raises(TypeError, match="inputs are tensors, or shapes such as"):
        rt.cost(nn.Linear(2, 2), 5)
