"""Which parts of a vision transformer are reconstructed, and which layers follow a normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from retensor.files import described
from retensor.replacing.match import inside, suggestions

MLP = ("fc1", "act", "fc2")
"""Names in timm's MLPs of the first layer, the activation and the second layer."""

_BLOCKS = {
    ("timm.models.vision_transformer", "Block"),
    ("timm.models.swin_transformer", "SwinTransformerBlock"),
    ("timm.models.swin_transformer", "PatchMerging"),
}
_KNOWN = "timm's PatchEmbed, Block, SwinTransformerBlock and PatchMerging"


@dataclass(frozen=True)
class Spec:
    """The parts of a model by their names.

    Parameters
    ----------
    blocks : sequence of str
        What is reconstructed at once. Every layer outside of them is reconstructed alone.
    mlp : mapping of str to (str, str, str)
        For each MLP whose activation becomes a ReLU, the names in it of the first layer, the activation and the second
        layer, such as ``("fc1", "act", "fc2")``.
    norm_linear_pairs : sequence of (str, str)
        Layer normalisations, each with the one linear layer that uses its output; both lie in one block.

    Examples
    --------
    >>> Spec(["blocks.0"], {"blocks.0.mlp": ("fc1", "act", "fc2")}, [("blocks.0.norm1", "blocks.0.attn.qkv")]).blocks
    ('blocks.0',)
    """

    blocks: Sequence[str]
    mlp: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    norm_linear_pairs: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.blocks, str):
            raise TypeError(f"blocks is a list of names, not {described(self.blocks)}")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "mlp", {name: tuple(parts) for name, parts in self.mlp.items()})
        object.__setattr__(self, "norm_linear_pairs", tuple((norm, layer) for norm, layer in self.norm_linear_pairs))

    def check(self, model: nn.Module) -> None:
        """Refuse names that the model lacks, and pairs that are none.

        Raises
        ------
        ValueError
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"an nn.Module is put in few bits, not {described(model)}")
        known = dict(model.named_modules())
        inner = [f"{name}.{part}" for name, parts in self.mlp.items() for part in parts]
        paired = [name for pair in self.norm_linear_pairs for name in pair]
        for name in (*self.blocks, *self.mlp, *inner, *paired):
            if name not in known:
                raise ValueError(f"the model has no '{name}', which spec names; {suggestions(name, known)}")
        for name, parts in self.mlp.items():
            for part in (parts[0], parts[2]):
                if not isinstance(known[f"{name}.{part}"], nn.Linear | nn.Conv2d):
                    raise ValueError(
                        f"'{name}.{part}' is a {type(known[f'{name}.{part}']).__name__}; the layers of an MLP are "
                        "linear or convolutions"
                    )
        for norm, layer in self.norm_linear_pairs:
            kinds = known[norm], known[layer]
            if not isinstance(kinds[0], nn.LayerNorm) or not isinstance(kinds[1], nn.Linear):
                raise ValueError(
                    f"'{norm}' and '{layer}' are {type(kinds[0]).__name__} and {type(kinds[1]).__name__}; a pair is a "
                    "LayerNorm and a Linear"
                )
            if kinds[0].weight is None or kinds[0].bias is None:
                raise ValueError(f"'{norm}' has no weight or no bias to take the channels' steps; leave the pair out")
            if not any(inside(norm, block) and inside(layer, block) for block in self.blocks):
                raise ValueError(f"'{norm}' and '{layer}' lie in no common block; name one that holds both in blocks")


def find_spec(model: nn.Module) -> Spec:
    """The parts of a vision transformer or a Swin transformer of timm's.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    Spec
        Embedding of patches, blocks and mergings of patches; MLPs that hold ``fc1``, ``act`` and ``fc2``; ``norm1``
        with ``attn.qkv``, ``norm2`` with ``mlp.fc1``, ``norm`` with ``reduction``.

    Raises
    ------
    ValueError
        Where there is no such block.

    Examples
    --------
    >>> import timm
    >>> find_spec(timm.create_model("test_vit", pretrained=False)).norm_linear_pairs[:2]
    (('blocks.0.norm1', 'blocks.0.attn.qkv'), ('blocks.0.norm2', 'blocks.0.mlp.fc1'))
    """
    blocks: list[str] = []
    found = False
    mlp: dict[str, tuple[str, str, str]] = {}
    pairs: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        kinds = {(kind.__module__, kind.__name__) for kind in type(module).__mro__}
        if ("timm.layers.patch_embed", "PatchEmbed") in kinds:
            blocks.append(name)
        if not kinds & _BLOCKS:
            continue
        found = True
        blocks.append(name)
        for norm, layer in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"), ("norm", "reduction")):
            if _plain_norm(_child(module, norm)) and isinstance(_child(module, layer), nn.Linear):
                pairs.append((f"{name}.{norm}", f"{name}.{layer}"))
        if all(_child(module, f"mlp.{part}") is not None for part in MLP):
            mlp[f"{name}.mlp"] = MLP
    if not found:
        raise ValueError(
            f"the {type(model).__name__} has none of the blocks that are known, {_KNOWN}; name its blocks with "
            "spec=aphq.Spec(blocks=['encoder.0', ...])"
        )
    return Spec(blocks, mlp, pairs)


def check_images(model: Any, images: Any, batch: int) -> None:
    """Refuse what is no model, what are no images, and fewer of them than a batch."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"an nn.Module is put in few bits, not {described(model)}")
    if not isinstance(images, torch.Tensor) or not images.is_floating_point() or images.ndim < 2:
        raise TypeError(f"images are a floating-point tensor of shape (images, ...), not {described(images)}")
    if len(images) < max(batch, 1):
        raise ValueError(f"there are {len(images)} images and a batch is {batch}; give more, or a smaller batch")


def _child(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _plain_norm(norm: nn.Module | None) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None
