"""Walking a model unit by unit: what reaches each, what is fitted, and what stays as it was."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from retensor.quantizing import (
    AdaRound,
    Affine,
    Fitting,
    Learning,
    Method,
    QuantizedLayer,
    RoundToNearest,
    Storage,
    find_units,
    reconstruct,
)
from retensor.quantizing.samples import calibration_samples, caught

CPU = torch.device("cpu")


class Nearest(Method):
    """Round to nearest, with nothing learned; remembers what it was given."""

    def __init__(self, quantizer: Affine) -> None:
        self.quantizer, self.seen = quantizer, list[Fitting]()

    def begin(self, fitting: Fitting) -> Sequence[torch.optim.Optimizer]:
        self.seen.append(fitting)
        for name in fitting.unit.layers:
            layer = fitting.layer(name)
            fitting.place(name, Learning(layer, RoundToNearest(layer.weight, self.quantizer)))
        return []

    def end(self, fitting: Fitting) -> dict[str, Any]:
        for name in fitting.unit.layers:
            fitting.place(name, fitting.layer(name).finished())
        return {"layers": len(fitting.unit.layers)}


class Adaptive(Nearest):
    """AdaRound on Adam."""

    def begin(self, fitting: Fitting) -> Sequence[torch.optim.Optimizer]:
        for name in fitting.unit.layers:
            layer = fitting.layer(name)
            fitting.place(name, Learning(layer, AdaRound(layer.weight, self.quantizer)))
        return [torch.optim.Adam([fitting.layer(name).learner.V for name in fitting.unit.layers], lr=3e-2)]

    def loss(self, fitting: Fitting, found: torch.Tensor, wanted: torch.Tensor, done: float) -> torch.Tensor:
        size = wanted.square().sum(1).mean()
        rounding = sum(fitting.layer(name).learner.regulariser(done) for name in fitting.unit.layers)
        return super().loss(fitting, found, wanted, done) / size + 1e-4 * rounding


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x))) + shift


class Net(nn.Module):
    """A stem, blocks that share an argument, something between the last two, and a head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.shift = nn.Parameter(torch.ones(1, width))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.stem(x))
        x = self.blocks[0](x, self.shift)
        x = self.blocks[1](x, self.shift)
        x = self.blocks[2](x * 1.5, self.shift)
        return self.head(x)


def made(seed: int = 0) -> tuple[Net, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(), torch.randn(100, 5)


def test_units_are_blocks_and_the_layers_outside_in_the_order_of_calls() -> None:
    net, x = made()
    units = find_units(net.eval(), calibration_samples(x, CPU))
    assert [unit.name for unit in units] == ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert units[1].layers == ("blocks.0.a", "blocks.0.b")
    assert [unit.first for unit in units] == [True, False, False, False, False]
    assert [unit.last for unit in units] == [False, False, False, False, True]
    # Between the stem and the first block the arguments differ, and the third block's is scaled on its way.
    assert [unit.follows for unit in units] == [None, None, 0, None, None]
    alone = find_units(net, calibration_samples(x, CPU), ())
    assert [unit.name for unit in alone][:3] == ["stem", "blocks.0.a", "blocks.0.b"]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_blocks_of_timm_models_are_found(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False).eval()
    units = find_units(model, calibration_samples(torch.randn(2, 3, 224, 224), CPU))
    wanted = {
        "resnet18": ["conv1", "layer1.0", "layer1.1"],
        "vit_tiny_patch16_224": ["patch_embed.proj", "blocks.0", "blocks.1"],
        "swin_tiny_patch4_window7_224": ["patch_embed.proj", "layers.0.blocks.0", "layers.0.blocks.1"],
        "convnext_atto": ["stem.0", "stages.0.blocks.0", "stages.0.blocks.1"],
    }[name]
    assert [unit.name for unit in units][:3] == wanted
    layers = {n for n, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert sorted(layer for unit in units for layer in unit.layers) == sorted(layers)
    if name.startswith("vit"):
        assert [unit.follows for unit in units[2:13]] == [0] * 11


def test_units_of_a_transformers_model_take_named_arguments() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config).eval()
    batch = {"input_ids": torch.randint(0, 50, (6, 7)), "attention_mask": torch.ones(6, 7, dtype=torch.long)}
    batch["attention_mask"][:, 5:] = 0
    method = Nearest(Affine(8, axis=0))
    done = reconstruct(model, batch, method)
    assert [unit.name for unit in done.report][:3] == [f"encoder.layer.{i}" for i in range(3)]
    wanted, found = model(**batch).last_hidden_state, done.model(**batch).last_hidden_state
    assert 0 < float((found - wanted).detach().abs().max()) < 0.05


def test_what_reaches_a_unit_is_what_a_run_of_both_models_gives() -> None:
    net, x = made()
    method = Nearest(Affine(3))
    done = reconstruct(net, x, method)
    net.eval()
    samples = calibration_samples(x, CPU)
    for fitting in method.seen:
        name = fitting.unit.name
        for model, kept in ((net, fitting.clean), (done.model, fitting.inputs)):
            arguments, named = caught(model, name, samples, Storage()).take(slice(0, 100))
            mine, also = kept.take(slice(0, 100))
            assert named == also == {}
            assert all(torch.equal(one, other) for one, other in zip(arguments, mine, strict=True))
        arguments, _ = fitting.clean.take(slice(0, 100))
        assert torch.equal(net.get_submodule(name)(*arguments), fitting.target.flatten(0, 1))


def test_the_given_model_and_chance_stay_as_they_were() -> None:
    net, x = made()
    net.train()
    net.blocks[0].eval()
    state, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    before = torch.random.get_rng_state()
    done = reconstruct(net, x, Adaptive(Affine(4)), steps=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in done.model.parameters())
    assert not done.model.training


def test_the_same_seed_gives_the_same_model_and_another_does_not() -> None:
    net, x = made()
    one, two, other = (reconstruct(net, x, Adaptive(Affine(2)), steps=40, seed=seed).model for seed in (0, 0, 1))
    packed = [
        torch.cat([m.packed for m in model.modules() if isinstance(m, QuantizedLayer)]) for model in (one, two, other)
    ]
    assert torch.equal(packed[0], packed[1])
    assert not torch.equal(packed[0], packed[2])


def test_fitting_lowers_the_error_of_every_unit_that_rounding_leaves() -> None:
    net, x = made()
    nearest, fitted = (
        reconstruct(net, x, method, steps=300, batch=32) for method in (Nearest(Affine(3)), Adaptive(Affine(3)))
    )
    assert all(unit.before == pytest.approx(unit.after, rel=1e-4) for unit in nearest.report)
    # The stem's inputs are independent, for which the nearest number is best.
    assert fitted.report[0].after == pytest.approx(nearest.report[0].after, rel=0.05)
    for rounded, better in zip(nearest.report[1:], fitted.report[1:], strict=True):
        assert better.after < 0.8 * rounded.after, better.name
    # What is reported is what the model gives.
    with torch.no_grad():
        wanted = net.eval()(x)
        apart = float((fitted.model(x) - wanted).square().sum() / wanted.square().sum())
    assert apart == pytest.approx(fitted.report[-1].after, rel=1e-4)


def test_errors_are_those_of_codes_where_a_method_says_so() -> None:
    looks: Counter[str] = Counter()

    class Judged(Adaptive):
        """Its weights lie between codes while they are learned."""

        @contextmanager
        def judged(self, fitting: Fitting) -> Iterator[None]:
            looks[fitting.unit.name] += 1
            learners = [fitting.layer(name).learner for name in fitting.unit.layers]
            for learner in learners:
                learner.hard = True
            yield
            for learner in learners:
                learner.hard = False

    net, x = made()
    nearest, soft, hard = (
        reconstruct(net, x, method(Affine(3)), steps=0).report[0] for method in (Nearest, Adaptive, Judged)
    )
    # Numbers beyond the ends of the range are clipped, all others are whole so far.
    assert soft.before < 0.2 * nearest.before
    assert hard.before == pytest.approx(nearest.before, rel=1e-6)
    # And so are the values at ten moments and at the end, on samples that are held out.
    looks.clear()
    reconstruct(net, x, Judged(Affine(3)), steps=20, held_out=0.2)
    assert looks == dict.fromkeys(("stem", "blocks.0", "blocks.1", "blocks.2", "head"), 12)


def test_no_step_uses_what_is_held_out_and_the_best_values_are_kept() -> None:
    net, x = made()
    used: dict[str, set[int]] = {}

    class Worse(Adaptive):
        """Its steps make everything worse, so that what it begins with is best."""

        def begin(self, fitting: Fitting) -> Sequence[torch.optim.Optimizer]:
            optimizers = super().begin(fitting)
            fitting.kept["begun"] = [fitting.layer(name).learner.V.detach().clone() for name in fitting.unit.layers]
            return optimizers

        def loss(self, fitting: Fitting, found: torch.Tensor, wanted: torch.Tensor, done: float) -> torch.Tensor:
            target = fitting.target.flatten(0, 1)
            mine = used.setdefault(fitting.unit.name, set())
            mine.update(int((target - row).abs().sum(1).argmin()) for row in wanted)
            return -(found - wanted).square().mean()

        def end(self, fitting: Fitting) -> dict[str, Any]:
            for name, begun in zip(fitting.unit.layers, fitting.kept["begun"], strict=True):
                assert torch.equal(fitting.layer(name).learner.V, begun)
            return super().end(fitting)

    reconstruct(net, x, Worse(Affine(3)), steps=20, held_out=0.25, blocks=["blocks.1"])
    assert [len(some) for some in used.values()] == [75] * len(used)
    assert len(used) == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_samples_are_kept_in_half_the_bytes_or_on_disk(tmp_path: Any, dtype: torch.dtype) -> None:
    net, x = made()
    plain = Nearest(Affine(4, axis=0))
    reconstruct(net, x, plain)
    for storage in (Storage(dtype), Storage(folder=tmp_path), Storage(dtype, tmp_path)):
        method = Nearest(Affine(4, axis=0))
        done = reconstruct(net, x, method, storage=storage)
        kept = method.seen[2].clean.leaves[0].value
        assert kept.dtype == (storage.dtype or torch.float32)
        assert method.seen[2].clean.take(slice(0, 2))[0][0].dtype == torch.float32
        precision = {None: 0.0, torch.float16: 2e-3, torch.bfloat16: 2e-2}[storage.dtype]
        theirs = plain.seen[2].clean.leaves[0].value
        assert float((kept.float() - theirs).abs().max()) <= precision * float(theirs.abs().max())
        assert done.report[-1].after < 0.02
    assert not list(tmp_path.iterdir())


def test_a_part_of_the_inputs_is_mixed() -> None:
    net, x = made()
    method = Nearest(Affine(2))
    reconstruct(net, x, method)
    fitting, chosen = method.seen[2], torch.arange(100)
    clean, other = fitting.clean.take(chosen)[0], fitting.inputs.take(chosen)[0]
    for share in (0.0, 0.5, 1.0):
        found, _ = fitting.clean.mixed(fitting.inputs, chosen, share, torch.Generator().manual_seed(0))
        taken = (found[0] == other[0]).double().mean()
        assert bool(((found[0] == clean[0]) | (found[0] == other[0])).all())
        assert abs(float(taken) - share) < 0.06
        # What is one for all samples comes as it is.
        assert found[1] is clean[1]


def test_layers_that_are_reached_through_a_changed_tensor_are_caught_anew() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))
    x = made()[1]
    assert [unit.follows for unit in find_units(net, calibration_samples(x, CPU))] == [None, None]
    method = Nearest(Affine(8))
    reconstruct(net, x, method)
    assert float(method.seen[1].clean.leaves[0].value.min()) == 0


@pytest.mark.parametrize(
    ("calibration", "error", "words"),
    [
        ([], ValueError, "no batch"),
        (torch.zeros(1, 5), ValueError, "1 sample"),
        ([torch.zeros(2, 5), torch.zeros(2, 6)], ValueError, "pad or cut"),
        ([torch.zeros(2, 5), {"x": torch.zeros(2, 5)}], ValueError, "differ in their arguments"),
        ((torch.zeros(2, 5), torch.zeros(3, 5)), ValueError, "as many"),
        ({"x": 3}, TypeError, "tensors alone"),
        ("digits", TypeError, "a batch is a tensor"),
        (torch.full((4, 5), float("nan")), ValueError, "not finite"),
    ],
)
def test_calibration_data_that_cannot_serve_are_named(calibration: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        reconstruct(made()[0], calibration, Nearest(Affine(4)))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"steps": -1}, ValueError, "steps"),
        ({"batch": 0}, ValueError, "batch"),
        ({"batch": True}, ValueError, "batch"),
        ({"input_mix": 1.5}, ValueError, "input_mix"),
        ({"held_out": 1.0}, ValueError, "held_out"),
        ({"blocks": "blocks.0"}, TypeError, "list of names"),
        ({"blocks": ["block.0"]}, ValueError, "no block 'block.0'.*blocks.0"),
        ({"blocks": ["blocks", "blocks.0"]}, ValueError, "lies in"),
        ({"blocks": ["drop"]}, ValueError, "calls no linear layer"),
        ({"method": "flexround"}, TypeError, "Method"),
        ({"model": 3}, TypeError, "nn.Module"),
    ],
)
def test_arguments_that_cannot_serve_are_named(given: dict[str, Any], error: type[Exception], words: str) -> None:
    net, x = made()
    arguments = {"model": net, "calibration": x, "method": Nearest(Affine(4)), **given}
    with pytest.raises(error, match=words):
        reconstruct(**arguments)


def test_models_that_cannot_be_walked_are_named() -> None:
    x = made()[1]
    with pytest.raises(RuntimeError, match="meta"):
        reconstruct(Net().to("meta"), x, Nearest(Affine(4)))
    broken = Net()
    with torch.no_grad():
        broken.blocks[1].a.weight[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match=r"'blocks\.1'"):
        reconstruct(broken, x, Nearest(Affine(4)))
    with pytest.raises(ValueError, match="no linear layer"):
        reconstruct(nn.Sequential(nn.ReLU()), x, Nearest(Affine(4)))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    with pytest.raises(ValueError, match="'layer' is called more than once"):
        reconstruct(Twice(), x, Nearest(Affine(4)))


def test_a_loss_that_is_no_number_names_the_unit_and_the_step() -> None:
    class Broken(Adaptive):
        def loss(self, *_: Any) -> torch.Tensor:
            return torch.tensor(float("nan"), requires_grad=True)

    net, x = made()
    with pytest.raises(RuntimeError, match=r"loss of 'stem' .* at step 0; take a lower"):
        reconstruct(net, x, Broken(Affine(4)), steps=2)


def test_a_language_model_with_a_cache_is_walked_without_and_keeps_its_setting() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    assert model.config.use_cache
    # A cache that went from step to step would hold keys of graphs that are gone, which is an error.
    ids = {"input_ids": torch.arange(12).reshape(2, 6)}
    done = reconstruct(model, ids, Adaptive(Affine(8, axis=0)), steps=3, batch=2)
    assert all(report.after < 1e-2 for report in done.report)
    assert model.config.use_cache
    assert done.model.config.use_cache


def test_a_caller_without_gradients_gets_the_same_codes() -> None:
    net, x = made()
    wanted = reconstruct(net, x, Adaptive(Affine(3)), steps=3).model.state_dict()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            found = reconstruct(net, x.clone(), Adaptive(Affine(3)), steps=3).model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_samples_held_out_leave_one_to_fit_with() -> None:
    net, x = made()
    done = reconstruct(net, x[:4], Adaptive(Affine(4, axis=0)), steps=2, held_out=0.9)
    assert all(report.after < 0.1 for report in done.report)
