"""The claims about learned codebooks: what they run repeats, and their verdicts follow from the figures."""

from __future__ import annotations

import torch

from benchmarks import claim_jlcm as claim
from benchmarks import jlcm_rows as rows
from benchmarks import jlcm_trainings as trainings


def test_a_layer_on_its_own_repeats_and_learning_lowers_its_error() -> None:
    name = trainings.PILOT[:1]
    first = trainings.layerwise(1, trainings.Way(4), 0.1, name, steps=20)
    assert first == trainings.layerwise(1, trainings.Way(4), 0.1, name, steps=20)
    kept = trainings.layerwise(1, trainings.Way(4), 0.1, name, steps=0)
    assert first[name[0]] < kept[name[0]]
    # The error of the codes by hand.
    model, data, _, _ = trainings.model_of(1)
    found = {}
    layer = model.get_submodule(name[0])
    handle = layer.register_forward_hook(lambda _, x, out: found.update(x=x[0], out=out - layer.bias))
    with torch.no_grad():
        model(data.x_test)
        handle.remove()
        codes = trainings.start_of(layer.weight, trainings.Way(4))
        # Codewords are kept in 16 bits.
        weight = codes.codebook.half().float()[0][codes.indices.long()]
        off = (found["x"] @ weight.T - found["out"]).square().sum() / found["out"].square().sum()
    assert abs(float(off) / kept[name[0]] - 1) < 1e-4


def test_equal_steps_are_a_worse_start_than_clusters() -> None:
    weight = trainings.model_of(1)[0].get_submodule(trainings.PILOT[0]).weight
    both = [trainings.start_of(weight, trainings.Way(4, start=start)) for start in claim.STARTS]
    errors = [float((codes.weight() - weight).square().sum()) for codes in both]
    assert errors[0] < 0.6 * errors[1]


def test_first_steps_are_equally_long_and_change_the_share_that_was_asked_for() -> None:
    found = trainings.first_jumps(1, 16, 0.1, flat=True)
    assert abs(found[claim.DEFAULT]["flips"] - 0.1) < 0.01
    assert found[claim.OURS]["mean_jump"] < found[claim.DEFAULT]["mean_jump"]


def test_tuning_does_not_look_at_the_test_set() -> None:
    _, data, calibration, other = trainings.model_of(1)
    assert len(calibration) + len(other) == len(data.x)
    out = trainings.whole(1, 4, 1, 0.1, steps=0, tuning=True)
    assert out["accuracy"] != out["accuracy"]


def test_where_nothing_moves_no_jump_is_called_short(monkeypatch) -> None:
    still = {"flips": 0.0, "mean_jump": 0.0, "longest_jump": 0.0}
    far = {"flips": 0.1, "mean_jump": 2.0, "longest_jump": 3.0}
    ways = {way: still if way == claim.OURS else far for way in claim.WAYS}
    monkeypatch.setattr(claim, "first_jumps", lambda *_: ways)
    monkeypatch.setattr(claim, "layerwise", lambda seed, way, rate, *_: {"a": 1.0 + seed + rate})
    monkeypatch.setattr(claim, "on_all_cores", lambda function, jobs, *_: [function(*job) for job in jobs])
    assert claim.gradients(lambda _: None)[0][0].verdict != "held"


def test_integers_are_the_nearer_of_two_kinds_and_their_bits_are_counted() -> None:
    model, _, _, other = trainings.model_of(1)
    both = [rows.in_integers(model, 4, 16, symmetric) for symmetric in (True, False)]
    assert [bits for _, bits in both] == [4 + 16 / 16, 4 + 20 / 16]
    with torch.no_grad():
        off = [float((made(other) - model(other)).square().sum()) for made, _ in both]
    assert rows.integers_of(1, 4, 16)[1] == both[off.index(min(off))][1]


def test_verdicts_follow_the_figures() -> None:
    better, worse = [1.0, 1.1, 0.9], [2.0, 2.2, 2.1]
    assert claim._better("k-means", {4: (better, worse), 16: (better, worse)}).verdict == "held"
    assert claim._better("k-means", {4: (better, worse), 16: (worse, better)}).verdict == "partly held"
    tie = claim._better("k-means", {4: (better, better)})
    assert tie.verdict == "not held"
    assert "Not told apart" in tie.reason


def test_a_llama_of_seven_billion_parameters_takes_two_gigabytes() -> None:
    (one,), (table,) = rows.sizes(lambda _: None)
    assert one.verdict == "held"
    # By hand: 2 bits of 6.48 billion weights, the embedding in float16, and some megabytes of labels and codebooks.
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    least = (linear / 4 + 2 * 32000 * 4096) / 1e9
    assert least < table.rows[0][1] < least * 1.002
