"""Saved states give the model back, and what is damaged or of another model is refused in a sentence."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.replacing.layers import Doubled, Keeper, SameLinear, Tied, same
from torch import nn
from torch.nn.utils import parametrize

import retensor as rt
from retensor.errors import RetensorError
from retensor.replacing.state import KEY, SCHEMA, read_header


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2, bias=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_state_goes_out_and_in(tmp_path: Path, dtype: torch.dtype) -> None:
    model = rt.replace(net().to(dtype), {"2": same, "3": same})
    parametrize.register_parametrization(model[0], "weight", Doubled())
    model(torch.randn(5, 4, dtype=dtype))
    rt.save(model, tmp_path / "m.safetensors")
    base = net(1).to(dtype)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    done = rt.load(tmp_path / "m.safetensors", base)
    assert str(done) == str(model)
    for name, value in model.state_dict().items():
        assert torch.equal(done.state_dict()[name], value)
    x = torch.randn(3, 4, dtype=dtype)
    assert torch.equal(done.eval()(x), model.eval()(x))
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())


def test_a_replacement_alone_needs_no_base(tmp_path: Path) -> None:
    layer = same(nn.Linear(3, 5))
    rt.save(layer, tmp_path / "l.safetensors")
    done = rt.load(tmp_path / "l.safetensors")
    assert isinstance(done, SameLinear)
    assert torch.equal(done.inner.weight, layer.inner.weight)


def test_ties_and_shared_layers_are_kept_once_and_are_one_again(tmp_path: Path) -> None:
    model = Tied()
    rt.save(model, tmp_path / "t.safetensors")
    assert "head.weight" not in load_file(tmp_path / "t.safetensors")
    done = rt.load(tmp_path / "t.safetensors", Tied())
    assert done.head.weight is done.embed.weight
    layer = nn.Linear(4, 4)
    twice = rt.replace(nn.Sequential(layer, nn.ReLU(), layer), {"0": same})
    rt.save(twice, tmp_path / "s.safetensors")
    other = nn.Linear(4, 4)
    back = rt.load(tmp_path / "s.safetensors", nn.Sequential(other, nn.ReLU(), other))
    assert back[0] is back[2]
    assert torch.equal(back[0].inner.weight, twice[0].inner.weight)


def test_a_parametrized_layer_in_two_places_is_parametrized_once(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Doubled())
    model, other, x = nn.Sequential(layer, nn.ReLU(), layer), nn.Linear(4, 4), torch.randn(2, 4)
    rt.save(model, tmp_path / "s.safetensors")
    back = rt.load(tmp_path / "s.safetensors", nn.Sequential(other, nn.ReLU(), other))
    assert torch.equal(back(x), model(x))


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (nn.Linear(2, 2, dtype=torch.complex64), "is of type torch.float32"),
        (nn.Linear(2, 2, device="meta"), "lies on the meta device"),
        (torch.jit.script(nn.Linear(2, 2)), "not scripted yet"),
    ],
)
def test_bases_of_other_kinds_are_told(tmp_path: Path, base: nn.Module, said: str) -> None:
    rt.save(nn.Linear(2, 2), tmp_path / "m.safetensors")
    with pytest.raises((RetensorError, TypeError), match=said):
        rt.load(tmp_path / "m.safetensors", base)


class Configured(Keeper):
    """Says something else than a dict, or no JSON."""

    said: Any = None

    def config(self) -> Any:
        return self.said


@pytest.mark.parametrize(("said", "told"), [(None, "a dict is needed"), ({"type": torch.float32}, "is no JSON")])
def test_configurations_that_are_none_are_told(tmp_path: Path, said: Any, told: str) -> None:
    model = Configured(nn.Linear(2, 2))
    model.said = said
    with pytest.raises(RetensorError, match=told):
        rt.save(model, tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, dtype=torch.complex128),
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
    ],
)
def test_tensors_that_cannot_be_kept_are_told_by_name(tmp_path: Path, tensor: torch.Tensor) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("odd", tensor)
    with pytest.raises(RetensorError, match="'odd' of the model's state has"):
        rt.save(model, tmp_path / "m.safetensors")


def test_the_header_says_how_to_rebuild(tmp_path: Path) -> None:
    rt.save(rt.replace(net(), {"2": same}), tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors")
    assert header["schema"] == SCHEMA
    (entry,) = header["replacements"]
    assert entry["name"] == "2"
    assert entry["kind"].endswith("layers.SameLinear")
    assert entry["config"] == {"inputs": 8, "outputs": 8, "bias": True}


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "give the model it was replaced in as base"),
        (nn.Sequential(nn.Linear(4, 8)), "replaces '2', which the base lacks"),
        (nn.Sequential(*net()[:3]), "holds '3.weight', which the model lacks"),
        (nn.Sequential(*net(), nn.Linear(2, 2)), "lacks '4.weight'"),
        (
            nn.Sequential(nn.Linear(5, 8), *net()[1:]),
            r"'0.weight' has shape \[8, 4\] in '.*' and \[8, 5\] in the model",
        ),
    ],
)
def test_a_base_that_does_not_fit_is_told(tmp_path: Path, base: nn.Module | None, said: str) -> None:
    rt.save(rt.replace(net(), {"2": same}), tmp_path / "m.safetensors")
    with pytest.raises(RetensorError, match=said):
        rt.load(tmp_path / "m.safetensors", base)


def test_what_cannot_be_described_or_saved_is_told(tmp_path: Path) -> None:
    with pytest.raises(RetensorError, match="'0': Keeper cannot be saved"):
        rt.save(rt.replace(net(), {"0": Keeper}), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="is saved, not of 3"):
        rt.save(3, tmp_path / "m.safetensors")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"is an nn\.Module, not 3"):
        rt.load(tmp_path / "m.safetensors", 3)  # type: ignore[arg-type]


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(RetensorError, match="is not there"):
        rt.load(tmp_path / "none.safetensors", net())
    with pytest.raises(RetensorError, match="is no ordinary file"):
        rt.load(tmp_path, net())
    (tmp_path / "text").write_text("hello")
    with pytest.raises(RetensorError, match="no whole safetensors file"):
        rt.load(tmp_path / "text", net())
    save_file({"x": torch.zeros(1)}, tmp_path / "plain")
    with pytest.raises(RetensorError, match="that retensor did not write"):
        rt.load(tmp_path / "plain", net())


def written(path: Path, **changes: Any) -> Path:
    """A state whose header differs in some keys."""
    rt.save(rt.replace(net(), {"2": same}), path)
    header = read_header(path) | changes
    save_file(load_file(path), path, metadata={KEY: json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": "other/1"}, "no header of schema"),
        ({"replacements": 3}, "is damaged"),
        ({"replacements": [{"name": "2"}]}, "is damaged"),
        ({"tied": []}, "is damaged"),
        ({"tied": {"a": "b"}}, "ties 'a' to 'b', which it does not hold"),
        ({"replacements": [{"name": "2", "kind": "os.system", "config": {}}]}, "no replacement is called 'os.system'"),
        ({"replacements": [{"name": "2", "kind": "retensor.planning.x", "config": {}}]}, "no replacement is called"),
        ({"replacements": [{"name": "2", "kind": SameLinear.kind(), "config": {"a": 1}}]}, "that cannot be made"),
        ({"replacements": [{"name": "2", "kind": SameLinear.kind(), "config": {"inputs": -1, "outputs": 8}}]}, "made"),
        # Four terabytes, which are never asked for.
        (
            {"replacements": [{"name": "2", "kind": SameLinear.kind(), "config": {"inputs": 10**6, "outputs": 10**6}}]},
            r"in the model; give a model like the one",
        ),
        ({"replacements": [{"name": "2", "kind": Doubled.kind(), "config": {}}]}, "in the place of another kind"),
        ({"shared": {"9": "2"}}, "replaces '9', which the base lacks"),
        ({"shared": {"2.inner": "2"}}, "which lies around it"),
        (
            {"parametrizations": [{"name": "0", "tensor": "no", "kind": Doubled.kind(), "config": {}}]},
            "has no tensor 'no'",
        ),
    ],
)
def test_headers_that_are_wrong_are_told(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RetensorError, match=said):
        rt.load(written(tmp_path / "m.safetensors", **changes), net())


def test_replacements_are_told_when_all_of_a_model_is_loaded(tmp_path: Path) -> None:
    seen: list[nn.Module] = []

    class Told(SameLinear):
        def loaded(self, model: nn.Module) -> None:
            assert torch.equal(self.inner.weight, model.get_submodule("2").inner.weight)
            seen.append(model)

    def told(layer: nn.Linear) -> Told:
        made = Told(layer.in_features, layer.out_features)
        made.inner.load_state_dict(layer.state_dict())
        return made

    path = tmp_path / "m.safetensors"
    rt.save(rt.replace(net(), {"2": told}), path)
    assert rt.load(path, net()) is seen[0]
    assert len(seen) == 1


def test_a_flipped_bit_among_values_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    rt.save(rt.replace(net(), {"2": same}), path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in (start, (start + len(whole)) // 2, len(whole) - 1):
        data = bytearray(whole)
        data[at] ^= 1
        path.write_bytes(data)
        with pytest.raises(RetensorError, match="was altered after it was written"):
            rt.load(path, net())
    path.write_bytes(whole)
    rt.load(path, net())


def test_mutated_files_are_read_or_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    rt.save(rt.replace(net(), {"2": same}), path)
    whole, draw = path.read_bytes(), random.Random(0)
    refused: list[str] = []
    for _ in range(400):
        data = bytearray(whole)
        if draw.random() < 0.3:
            data = data[: draw.randrange(len(data))]
        for _ in range(draw.randrange(3)):
            if data:
                data[draw.randrange(min(len(data), 900))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            rt.load(path, net())
        except RetensorError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(path.name in said or "no replacement is called" in said for said in refused)
