"""Large networks as graphs, without a byte of weights: built on fake tensors, which have sizes and no data.

The U-net is diffusers' class with the published configuration of Stable Diffusion XL, the decoder is transformers'
Llama with that of the 7-billion-parameter model. Nothing is downloaded.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from retensor.graph import Graph, load
from retensor.graph.training import training_graph

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

TOKENS = 512


def unet() -> Graph:
    """The U-net of Stable Diffusion XL on a latent image of 128x128, 8-bit, operator by operator."""
    import torch

    mode = _fake()
    with mode:
        from diffusers import UNet2DConditionModel

        module = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        arguments = (torch.zeros(1, 4, 128, 128), torch.zeros(1), torch.zeros(1, 77, 2048))
        return _loaded(mode, module, arguments, {"added_cond_kwargs": added})


def decoder(layers: int = 32) -> Graph:
    """Llama 7B reading ``TOKENS`` tokens, 8-bit, operator by operator."""
    import torch

    mode = _fake()
    with mode:
        return _loaded(mode, _llama(layers), (torch.zeros(1, TOKENS, dtype=torch.long),), {})


def decoder_training(layers: int = 32) -> Graph:
    """One step of training of the decoder: forward, mean of the logits, and backward to every weight; 8-bit."""
    import torch

    with _fake():
        # A mask of its own, or transformers looks at the data to tell whether there are several sequences.
        mask = torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bool)
        arguments = {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long), "attention_mask": mask}
        return training_graph(_llama(layers), arguments, dtype="int8")


def resnet_training(images: int = 8) -> Graph:
    """One step of training of ResNet-50 on a batch of images, with batch statistics; 8-bit."""
    import torch
    from torchvision.models import resnet50

    with _fake():
        return training_graph(resnet50().train(), torch.zeros(images, 3, 224, 224), dtype="int8")


def _llama(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32_000, hidden_size=4_096, intermediate_size=11_008, num_hidden_layers=layers,
            num_attention_heads=32, num_key_value_heads=32, use_cache=False,
        )
    )  # fmt: skip


def _fake() -> FakeTensorMode:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _loaded(mode: FakeTensorMode, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Graph:
    import torch

    with mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), arguments, named)
    graph = load(program, dtype="int8", fuse=False)
    return Graph(type(module).__name__, graph.operators, graph.tensors, graph.outputs, graph.aliases, graph.options)
