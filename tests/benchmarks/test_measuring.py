"""What claims measure with: statistics against SciPy's, calls in turn, and jobs in processes."""

from __future__ import annotations

import os

import pytest
import torch
from benchmarks.measuring import Mean, on_all_cores, paired, power, threads, times
from scipy import stats


def test_means_have_the_interval_of_students_t() -> None:
    values = [0.3, 0.5, 0.1, 0.9, 0.4]
    found = Mean.of(values)
    low, high = stats.t.interval(0.95, 4, loc=found.mean, scale=stats.sem(values))
    assert found.error == pytest.approx(stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.above(low - 1e-9)
    assert not found.above(low + 1e-9)
    assert found.below(high + 1e-9)
    assert not found.below(high - 1e-9)
    assert found.within(low + 1e-9)
    assert not found.within(low - 1e-9)
    assert str(found) == "0.44 ± 0.13"


def test_differences_are_of_the_same_seeds_and_judged_by_the_paired_test() -> None:
    ours, theirs = [1.0, 2.0, 3.0, 4.0], [0.5, 1.4, 2.6, 3.5]
    found = paired(ours, theirs)
    assert found.mean == pytest.approx(0.5)
    assert (stats.ttest_rel(ours, theirs).pvalue < 0.05) == found.above() is True
    assert (found.verdict, found.why) == ("held", "")
    assert str(found) == "+0.50 ± 0.04"
    level = paired([1.0, 2.0, 3.0], [0.5, 2.4, 2.9])
    assert stats.ttest_rel([1.0, 2.0, 3.0], [0.5, 2.4, 2.9]).pvalue > 0.05
    assert (level.verdict, level.why) == ("not held", "Not told apart from nothing (95 % interval).")
    below = paired(theirs, ours)
    assert (below.verdict, below.why) == ("not held", "Below it.")
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])


def test_calls_are_timed_in_turn_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    found = times({"one": lambda: calls.append("one"), "two": lambda: calls.append("two")}, rounds=3)
    assert calls == ["two", "one", "one", "two", "two", "one", "one", "two"]
    assert {name: len(taken) for name, taken in found.seconds.items()} == {"one": 3, "two": 3}
    assert found.ratio("one", "one") == 1
    assert found["two"] > 0


def test_ratios_are_medians_over_rounds() -> None:
    from benchmarks.measuring import Times

    found = Times({"a": [1.0, 10.0, 3.0], "b": [2.0, 5.0, 3.0]})
    assert found.ratio("a", "b") == 1
    assert found["a"] == 3


def test_powers_are_slopes_on_logarithmic_axes() -> None:
    assert power([1, 2, 4], [3.0, 24.0, 192.0]) == pytest.approx(3)


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def _job(number: int, other: int) -> tuple[int, int, int]:
    return number * other, torch.get_num_threads(), os.getpid()


def test_jobs_run_in_other_processes_of_one_thread_and_come_back_in_order() -> None:
    told: list[str] = []
    found = on_all_cores(_job, [(n, 2) for n in range(20)], told.append, "products")
    assert [product for product, _, _ in found] == [2 * n for n in range(20)]
    assert {count for _, count, _ in found} == {1}
    assert os.getpid() not in {process for _, _, process in found}
    assert told[-1] == "20 of 20 products"
