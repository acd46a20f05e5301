"""Forty architectures of timm and transformers, and fvcore's count of their multiply-accumulates.

fvcore (https://github.com/facebookresearch/fvcore) traces a module with ``torch.jit`` and counts one for each
multiply-add of convolutions, ``linear``, ``addmm``, ``mm``, ``bmm``, ``matmul`` and ``einsum``. It also adds estimates
for normalisation, adaptive pooling and interpolation, which are no multiply-accumulates here, and knows no fused
attention and no LSTM, which are. What both count is compared group by group.

Weights are random. timm's models have their own size; transformers' are two layers of 128 features where their
configuration has such fields, since architecture and not size is what is compared.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from retensor.costing import CostSheet

TIMM = (
    "botnet26t_256",
    "convnext_atto",
    "densenet121",
    "dla34",
    "edgenext_xx_small",
    "efficientnet_b0",
    "ghostnet_100",
    "halonet26t",
    "lambda_resnet26t",
    "levit_128s",
    "mixer_s32_224",
    "mobilenetv3_small_100",
    "pit_ti_224",
    "poolformer_s12",
    "pvt_v2_b0",
    "regnetx_002",
    "repvgg_a0",
    "resmlp_12_224",
    "resnet18",
    "starnet_s1",
    "vgg11",
    "vit_tiny_patch16_224",
)

_SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
_PAIR = {
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 256 for side in ("encoder", "decoder")},
    "d_model": 128,
}
_TEXT = {"input_ids": (1, 32)}
_IMAGE = {"pixel_values": (1, 3, 64, 64)}

TRANSFORMERS: Mapping[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "AlbertModel": (_SMALL | {"embedding_size": 64}, _TEXT),
    "BartModel": (_PAIR, _TEXT | {"decoder_input_ids": (1, 8)}),
    "BertModel": (_SMALL, _TEXT),
    "CLIPVisionModel": (_SMALL | {"image_size": 64, "patch_size": 16}, _IMAGE),
    "DebertaV2Model": (_SMALL, _TEXT),
    "Dinov2Model": (_SMALL | {"image_size": 64, "patch_size": 16}, _IMAGE),
    "DistilBertModel": ({"n_layers": 2, "dim": 128, "hidden_dim": 256, "n_heads": 4}, _TEXT),
    "GemmaForCausalLM": (_SMALL | {"num_key_value_heads": 1, "head_dim": 32}, _TEXT),
    "GPT2LMHeadModel": ({"n_layer": 2, "n_embd": 128, "n_head": 4}, _TEXT),
    "LlamaForCausalLM": (_SMALL | {"num_key_value_heads": 2}, _TEXT),
    "MambaForCausalLM": ({"num_hidden_layers": 2, "hidden_size": 64}, _TEXT),
    "MobileBertModel": ({"num_hidden_layers": 2}, _TEXT),
    "MPNetModel": (_SMALL, _TEXT),
    "SegformerModel": ({"depths": [1, 1, 1, 1]}, _IMAGE),
    "SqueezeBertModel": (_SMALL | {"embedding_size": 128}, _TEXT),
    "T5ForConditionalGeneration": (
        {"num_layers": 2, "d_model": 128, "num_heads": 4, "d_kv": 32, "d_ff": 256},
        _TEXT | {"decoder_input_ids": (1, 8)},
    ),
    "Wav2Vec2Model": (_SMALL | {"num_conv_pos_embeddings": 16}, {"input_values": (1, 4000)}),
    "WhisperForConditionalGeneration": (
        _PAIR | {"max_source_positions": 50},
        {"input_features": (1, 80, 100), "decoder_input_ids": (1, 8)},
    ),
}
NAMES = (*(f"timm:{name}" for name in TIMM), *(f"transformers:{name}" for name in TRANSFORMERS))
"""The forty, with the library in front."""

_GROUPS = {
    **dict.fromkeys(("conv", "conv1d", "conv2d", "conv3d"), "convolutions"),
    **dict.fromkeys(("linear", "addmm", "mm", "bmm", "matmul"), "products"),
    "einsum": "einsum",
}


@dataclass(frozen=True)
class Count:
    """fvcore's count: by group of what both count, and by operator of what only fvcore does."""

    groups: Mapping[str, int]
    others: Mapping[str, int]


def build(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A module in eval mode with random weights, and its keyword arguments."""
    library, _, model = name.partition(":")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        if library == "timm":
            import timm

            module = timm.create_model(model)
            return module.eval(), {"x": torch.zeros(1, *module.pretrained_cfg["input_size"])}
        import transformers

        options, shapes = TRANSFORMERS[model]
        kind = getattr(transformers, model)
        module = kind(kind.config_class(**options, use_cache=False))
    # Tokens must be among the vocabulary; any other input may be zero.
    inputs = {key: torch.ones(size, dtype=torch.long if key.endswith("ids") else None) for key, size in shapes.items()}
    return module.eval(), inputs


class _Tensors(torch.nn.Module):
    """A module called by position that returns tensors only, as ``torch.jit`` wants them."""

    def __init__(self, module: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.module(**dict(zip(self.names, values, strict=True)))
        results = result.values() if isinstance(result, dict) else [result]
        return tuple(value for value in results if isinstance(value, torch.Tensor))


def fvcore_count(module: torch.nn.Module, inputs: Mapping[str, Any]) -> Count:
    """fvcore's count of a module, which is run once."""
    from fvcore.nn import FlopCountAnalysis

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # fvcore says of every operator that it leaves out that it does.
        logging.disable(logging.WARNING)
        try:
            found = FlopCountAnalysis(_Tensors(module, list(inputs)).eval(), tuple(inputs.values())).by_operator()
        finally:
            logging.disable(logging.NOTSET)
    groups, others = _split({key: int(value) for key, value in found.items()})
    return Count(groups, others)


def sheet_count(sheet: CostSheet) -> Count:
    """The same of a cost sheet."""
    return Count(*_split(sheet.macs_by_kind))


def _split(by_kind: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    groups: dict[str, int] = {}
    others = {}
    for kind, macs in by_kind.items():
        if kind in _GROUPS:
            groups[_GROUPS[kind]] = groups.get(_GROUPS[kind], 0) + macs
        elif macs:
            others[kind] = macs
    return groups, others
