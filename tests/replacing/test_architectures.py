"""Twelve architectures of timm and transformers, replaced by what does the same: equal bits, and back by folding."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import retensor as rt
from retensor.data import seeded
from retensor.replacing import Replacement

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


class Wrapped(Replacement):
    """Calls the layer it stands for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)

    def to_dense(self) -> nn.Module:
        return self.layer


def picture(name: str, size: int = 64, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        return timm.create_model(name, pretrained=False, num_classes=10, **options), torch.randn(2, 3, size, size)

    return make


def text(model: str, config: str, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        settings = getattr(transformers, config)(vocab_size=64, **options)
        return getattr(transformers, model)(settings), torch.randint(0, 64, (2, 12))

    return make


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MODELS = {
    "resnet18": picture("resnet18"),
    "vit_tiny": picture("vit_tiny_patch16_224", img_size=64),
    "swin_tiny": picture("swin_tiny_patch4_window7_224", img_size=64, window_size=4),
    "convnext_atto": picture("convnext_atto"),
    "mobilenetv3": picture("mobilenetv3_small_050"),
    "efficientnet_b0": picture("efficientnet_b0"),
    "mixer_s32": picture("mixer_s32_224", 224),
    "poolformer": picture("poolformer_s12"),
    "bert": text("BertModel", "BertConfig", **SMALL),
    "distilbert": text("DistilBertModel", "DistilBertConfig", dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "gpt2": text("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, use_cache=False),
    "llama": text("LlamaForCausalLM", "LlamaConfig", **SMALL, use_cache=False),
}
LAYERS = (nn.Linear, nn.Conv2d, transformers.pytorch_utils.Conv1D)


def linear_or_convolution(name: str, layer: nn.Module) -> bool:
    return isinstance(layer, LAYERS)


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(x)
    return found if isinstance(found, torch.Tensor) else found[0]


@pytest.fixture(params=MODELS)
def made(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    with seeded(0):
        model, x = MODELS[request.param]()
    return model.eval(), x


def test_replaced_by_what_does_the_same_it_gives_the_same_bits_and_folds_back(
    made: tuple[nn.Module, torch.Tensor],
) -> None:
    model, x = made
    expected, names = output(model, x), list(model.state_dict())
    pickled, twin = pickle.dumps(model), copy.deepcopy(model)
    done = rt.replace(model, {linear_or_convolution: Wrapped})
    replaced = sum(isinstance(module, Wrapped) for module in done.modules())
    assert replaced == sum(isinstance(module, LAYERS) for module in model.modules()) > 5
    assert torch.equal(output(done, x), expected)
    plain = rt.fold(done)
    assert list(plain.state_dict()) == names
    assert torch.equal(output(plain, x), expected)
    # The caller's model, its copies and its pickle are as they were.
    assert pickle.dumps(model) == pickled
    assert list(model.state_dict()) == list(twin.state_dict()) == names
    assert torch.equal(output(model, x), expected)
    assert torch.equal(output(twin, x), expected)


def test_a_state_dict_goes_round(made: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = made
    done = rt.replace(model, {linear_or_convolution: Wrapped})
    other = copy.deepcopy(done)
    for parameter in other.parameters():
        parameter.data.add_(1)
    other.load_state_dict(done.state_dict())
    assert torch.equal(output(other, x), output(model, x))


def test_it_can_be_exported_and_compiled(made: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = made
    expected = output(model, x)
    done = rt.replace(model, {linear_or_convolution: Wrapped})
    for one in (done, rt.fold(done)):
        program = torch.export.export(one, (x,), strict=False)
        assert torch.allclose(output(program.module(), x), expected, atol=1e-5)
        torch.compiler.reset()
        assert torch.allclose(output(torch.compile(one, backend="aot_eager"), x), expected, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler here")
@pytest.mark.parametrize("name", ["vit_tiny", "llama"])
def test_a_compiler_takes_it(name: str) -> None:
    with seeded(0):
        model, x = MODELS[name]()
    done = rt.replace(model.eval(), {nn.Linear: Wrapped})
    torch.compiler.reset()
    assert torch.allclose(output(torch.compile(done), x), output(model, x), atol=1e-4)


def test_a_tied_classifier_is_refused_or_replaced_with_its_embedding() -> None:
    model, x = MODELS["gpt2"]()
    with pytest.raises(ValueError, match=r"'transformer\.wte\.weight' and 'lm_head\.weight' are one tensor"):
        rt.replace(model, {"lm_head": lambda layer: nn.Linear(32, 64, bias=False)})

    class Scaled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.weight = nn.Parameter(layer.weight.detach().clone())
            self.look_up = isinstance(layer, nn.Embedding)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight[x] if self.look_up else x @ self.weight.T

    done = rt.replace(model.eval(), {"lm_head": Scaled}, tied="both")
    assert done.lm_head.weight is done.transformer.wte.weight
    assert torch.allclose(output(done, x), output(model, x), atol=1e-5)
