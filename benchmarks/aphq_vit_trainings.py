"""What the claims about APHQ-ViT put in few bits: vision transformers trained on noisy digits, each run a job."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from retensor.compression import aphq
from retensor.compression.aphq.mlp import fitted_mlps, with_relus
from retensor.compression.aphq.runs import Traced
from retensor.data import accuracy, digits, fit, seeded
from retensor.data.reference import digits_vit

TUNING, SEEDS = 0, (1, 2, 3)
WIDTH, DEPTH, TRAINED, COPIES, NOISE = 48, 4, 900, 4, 0.2
CALIB, RECON, BATCH, ROUNDS, ITERS, MLP_ITERS, FEW = 64, 512, 32, 2, 200, 300, 64
RATES, ACT_RATE = (1e-2, 3e-2, 1e-1), 1e-3
"""Of what rounds weights, tried for each method, and of steps of activations."""
MLP_RATES = (1e-3, 3e-3)
STARTS = (2.0, None)
"""What the first loss of a block is scaled to, tried for squares: as importance has it, and as it was published."""
COMMON: dict[str, Any] = {"calib": CALIB, "recon": RECON, "batch": BATCH, "rounds": ROUNDS, "act_lr": ACT_RATE}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"iters": 0},
    "brecq": {"loss": "mse", "qdrop": 0.0, "input_drop": 1.0},
    "qdrop": {"loss": "mse"},
    "hessian": {"loss": "hessian_brecq"},
    "each": {"loss": "aph", "average": False},
    "aph": {"loss": "aph"},
    "ones": {"loss": "aph", "direction": "ones", "eps": 1e-6},
    "mr+rtn": {"iters": 0, "mlp": True},
    "mr+qdrop": {"loss": "mse", "mlp": True},
    "mr+aph": {"loss": "aph", "mlp": True},
}
NAMES = {
    "rtn": "RTN, calibrated",
    "brecq": "BRECQ, squares, raw inputs",
    "qdrop": "QDrop, squares",
    "hessian": "QDrop, BRECQ's Hessian",
    "each": "QDrop, APH without averaging",
    "aph": "QDrop, APH",
    "ones": "QDrop, APH by the published direction",
    "mr+rtn": "MR, RTN, calibrated",
    "mr+qdrop": "MR, QDrop, squares",
    "mr+aph": "MR, QDrop, APH",
}
ORDER = ("rtn", "brecq", "qdrop", "aph", "mr+aph")
"""From the worst to the best, as the paper has them."""
LEARNED = tuple(name for name, given in METHODS.items() if given.get("iters") != 0)
SQUARES = tuple(name for name, given in METHODS.items() if given.get("loss") == "mse")
Settings = Mapping[str, tuple[float, float | None]]
"""Of methods, the rate and what the first loss is scaled to."""


@dataclass(frozen=True)
class Pictures:
    """Digits with noise."""

    x: torch.Tensor
    y: torch.Tensor
    test: torch.Tensor
    y_test: torch.Tensor


@dataclass(frozen=True)
class Outcome:
    """What became of a network."""

    kl: float
    """Mean divergence of its predictions from the given network's, on test pictures."""
    accuracy: float


@dataclass(frozen=True)
class Run:
    """Methods on one network at one number of bits."""

    whole: float
    """Accuracy of the given network."""
    methods: dict[str, Outcome]
    mlps: dict[str, float] = field(default_factory=dict)
    averaging: dict[str, float] = field(default_factory=dict)


@cache
def pictures() -> Pictures:
    """8x8 digits, several noisy copies of each for training and one for the test."""
    data, generator = digits(), torch.Generator().manual_seed(0)

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x + NOISE * torch.randn(x.shape, generator=generator)

    x = torch.cat([noisy(data.x) for _ in range(COPIES)])
    return Pictures(x, data.y.repeat(COPIES), noisy(data.x_test), data.y_test)


def trained(seed: int) -> dict[str, torch.Tensor]:
    """The state of a network after training; a job of its own."""
    data = pictures()
    with seeded(seed):
        model = digits_vit(WIDTH, DEPTH)
    fit(model, data.x, data.y, steps=TRAINED, seed=seed)
    return model.state_dict()


def rebuilt(state: Mapping[str, torch.Tensor]) -> nn.Module:
    """The network of a state that :func:`trained` gave."""
    model = digits_vit(WIDTH, DEPTH)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def split(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the pictures that networks are put in few bits by, and of others of as many that choose settings."""
    order = torch.randperm(len(pictures().x), generator=torch.Generator().manual_seed(seed))
    return order[:RECON], order[RECON : 2 * RECON]


def tried(
    state: Mapping[str, torch.Tensor], seed: int, bits: int, lr: float, start: float | None, mlp_lr: float,
    names: Sequence[str],
) -> dict[str, float]:  # fmt: skip
    """The divergence of methods that learn, on pictures for training that they did not see, at one rate each."""
    data, model = pictures(), rebuilt(state)
    seen, others = split(seed)
    rates = dict.fromkeys(METHODS, (lr, start))
    found = put(model, data.x[seen], bits, rates, mlp_lr, names, seed)
    return {name: divergence(few.model, model, data.x[others]) for name, few in found.items()}


def run(
    state: Mapping[str, torch.Tensor], seed: int, bits: int, rates: Settings, mlp_lr: float,
    names: Sequence[str], aside: bool,
) -> Run:  # fmt: skip
    """Methods at their rates, judged by test pictures, and with ``aside`` what else is asked; a job of its own."""
    data, model = pictures(), rebuilt(state)
    seen, others = split(seed)
    found = put(model, data.x[seen], bits, rates, mlp_lr, names, seed)
    outcomes = {
        name: Outcome(divergence(few.model, model, data.test), accuracy(few.model, data.test, data.y_test))
        for name, few in found.items()
    }
    whole = accuracy(model, data.test, data.y_test)
    if not aside:
        return Run(whole, outcomes)
    mlps = smoothed(model, data.x[seen], bits, mlp_lr, seed)
    return Run(whole, outcomes, mlps, averaged(model, data.x[seen][:FEW], data.x[others], bits, rates, seed))


def put(
    model: nn.Module, x: torch.Tensor, bits: int, rates: Settings, mlp_lr: float, names: Sequence[str],
    seed: int,
) -> dict[str, aphq.Quantized]:  # fmt: skip
    """A network in few bits by each method; those of one kind share what is searched."""
    base = config(bits, mlp_lr, seed)
    spec = aphq.find_spec(model)
    ready: dict[bool, aphq.Calibrated] = {}
    for mlp in {METHODS[name].get("mlp", False) for name in names}:
        net = aphq.reconstruct_mlp(model, x, base) if mlp else model
        ready[mlp] = aphq.calibrate(net, x, base, spec=spec)
    found = {}
    for name in names:
        given = {"mlp": False, "iters": ITERS, **METHODS[name]}
        lr, start = rates.get(name, (0.0, None))
        found[name] = aphq.reconstruct_blocks(ready[given["mlp"]], x, replace(base, lr=lr, start=start, **given))
    return found


def config(bits: int, mlp_lr: float, seed: int) -> aphq.Config:
    """What all methods have in common."""
    return aphq.Config(w_bits=bits, a_bits=bits, mlp_iters=MLP_ITERS, mlp_lr=mlp_lr, seed=seed, **COMMON)


@torch.no_grad()
def divergence(few: nn.Module, model: nn.Module, x: torch.Tensor) -> float:
    """Mean divergence of predictions."""
    told, wanted = functional.log_softmax(few(x), -1), functional.softmax(model(x), -1)
    return float(functional.kl_div(told, wanted, reduction="batchmean"))


def smoothed(model: nn.Module, x: torch.Tensor, bits: int, mlp_lr: float, seed: int) -> dict[str, float]:
    """Accuracies before, with ReLUs put in, and with MLPs reconstructed; how far out positive hidden numbers lie."""
    data, spec = pictures(), aphq.find_spec(model)
    fitted = fitted_mlps(model, x, config(bits, mlp_lr, seed), spec).model
    nets = {"before": model, "swapped": with_relus(model, spec), "fitted": fitted}
    found = {name: accuracy(net, data.test, data.y_test) for name, net in nets.items()}
    return {**found, **{f"{name} tail": tail(net, data.test, spec) for name, net in nets.items()}}


@torch.no_grad()
def tail(model: nn.Module, x: torch.Tensor, spec: aphq.Spec) -> float:
    """The 99.9 % quantile of the positive inputs of MLPs' second layers over their median, averaged over MLPs."""
    seen: list[torch.Tensor] = []
    handles = [
        model.get_submodule(f"{name}.fc2").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for name in spec.mlp
    ]
    model(x)
    for handle in handles:
        handle.remove()
    ratios = []
    for values in seen:
        high, middle = torch.quantile(values[values > 0], torch.tensor([0.999, 0.5]))
        ratios.append(float(high / middle))
    return sum(ratios) / len(ratios)


def averaged(
    model: nn.Module, x: torch.Tensor, others: torch.Tensor, bits: int, rates: Settings, seed: int
) -> dict[str, float]:
    """The loss of blocks on pictures that were not seen, fitted by few pictures with averaged importance and without.

    What weighs it is the importance by the unseen pictures.
    """
    base = replace(config(bits, 0.0, seed), recon=len(x), calib=len(x), mlp=False, iters=ITERS)
    ready = aphq.calibrate(model, x, base)
    blocks = [name for name in ready.spec.blocks if name.startswith("blocks.")]
    weights = {name: aphq.perturbation_hessian(model, others, name, seed=seed + 1) for name in blocks}
    wanted = Traced(model, others, ready.spec.blocks, blocks, len(others)).kept
    found = {}
    for name in ("aph", "each"):
        few = aphq.reconstruct_blocks(ready, x, replace(base, lr=rates[name][0], average=name == "aph"))
        given = Traced(few.model, others, ready.spec.blocks, blocks, len(others)).kept
        losses = [
            float(((given[b] - wanted[b]).square() * weights[b]).sum() / (wanted[b].square() * weights[b]).sum())
            for b in blocks
        ]
        found[name] = sum(losses) / len(losses)
        found[f"{name} kl"] = divergence(few.model, model, others)
    return found


def measured_curvature(state: Mapping[str, torch.Tensor], seed: int) -> dict[str, float]:
    """Correlations of estimates with the exact diagonal of the Gauss-Newton matrix, averaged over blocks."""
    seen, _ = split(seed)
    x, model = pictures().x[seen][:64], rebuilt(state)
    wide, far = rebuilt(state).double(), x.double()
    ways: dict[str, tuple[nn.Module, torch.Tensor, dict[str, Any]]] = {
        "signs, float32": (model, x, {}),
        "signs, float64": (wide, far, {}),
        "8 draws, float32": (model, x, {"draws": 8}),
        "ones, 1e-6, float32": (model, x, {"direction": "ones", "eps": 1e-6}),
    }
    found = dict.fromkeys(ways, 0.0)
    nothing = 0.0
    # Behind the last block the class token alone counts.
    names = [f"blocks.{i}" for i in range(DEPTH - 1)]
    for name in names:
        exact = curvature(wide, far, name)
        for way, (net, given, options) in ways.items():
            h = aphq.perturbation_hessian(net, given, name, seed=seed, **options)
            pair = torch.stack([h.double().flatten(), exact.flatten()])
            found[way] += float(torch.corrcoef(pair)[0, 1]) / len(names)
        ones, signs = (
            aphq.perturbation_hessian(wide, far, name, seed=seed, direction=kind, eps=1e-3)
            for kind in ("ones", "rademacher")
        )
        nothing = max(nothing, float(ones.mean() / signs.mean()))
    return {**found, "ones beside signs, float64": nothing}


def curvature(model: nn.Module, x: torch.Tensor, name: str, temp: float = 20.0) -> torch.Tensor:
    """The diagonal of the Gauss-Newton matrix of the divergence by what a block gives, averaged over pictures."""
    traced = Traced(model, x, [], [name], len(x))
    shift = torch.zeros_like(traced.kept[name]).requires_grad_()
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, out: out + shift)
    logits = model(x) / temp
    handle.remove()
    p = functional.softmax(logits.detach(), -1)
    rows = [torch.autograd.grad(logits[:, k].sum(), shift, retain_graph=True)[0] for k in range(p.shape[1])]
    jacobian, shares = torch.stack(rows, 1), p[..., None, None]
    mean = (shares * jacobian).sum(1, keepdim=True)
    return (shares * (jacobian - mean).square()).sum(1).mean(0)


def eight_bits(state: Mapping[str, torch.Tensor], seed: int) -> dict[str, float]:
    """Accuracies in 8 bits: of this package, and of peers that round activations by each input's own range."""
    data, model = pictures(), rebuilt(state)
    seen, _ = split(seed)
    ours = aphq.quantize(
        model, data.x[seen], replace(config(8, 0.0, seed), iters=0, mlp=False)
    )  # fmt: skip
    return {
        "whole": accuracy(model, data.test, data.y_test),
        "ours": accuracy(ours.model, data.test, data.y_test),
        "torchao": accuracy(torchao_int8(rebuilt(state)), data.test, data.y_test),
        "onnxruntime": onnxruntime_int8(model, data),
    }


def torchao_int8(model: nn.Module) -> nn.Module:
    """torchao's 8-bit weights with activations rounded for each token, in place."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def onnxruntime_int8(model: nn.Module, data: Pictures) -> float:
    """The accuracy of ONNX Runtime's dynamic 8-bit network."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    from retensor.quantizing import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        to_onnx(model, data.test, path / "whole.onnx")
        quantize_dynamic(path / "whole.onnx", path / "few.onnx")
        session = onnxruntime.InferenceSession(path / "few.onnx")
        logits = session.run(None, {session.get_inputs()[0].name: data.test.numpy()})[0]
    return float((torch.from_numpy(logits).argmax(-1) == data.y_test).double().mean())
