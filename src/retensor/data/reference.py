"""Small reference models, trained once on real data and kept on disk, so that tests and claims share one training."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from retensor.data.sets import Split, digits, mnist5k
from retensor.data.training import fit, seeded
from retensor.errors import RetensorError
from retensor.files import described
from retensor.units import check_seed


class DigitsCNN(nn.Module):
    """A residual network for 8x8 digits: a convolution to 16 channels, a block 16 -> ``inner`` -> 16, and a classifier.

    Batch normalisation follows each convolution, or nothing does where ``norm`` is False.
    """

    def __init__(self, inner: int = 32, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1, bias=not norm)
        self.bn = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.block = ResidualBlock(16, inner, norm)
        self.head = nn.Linear(16 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, 10) of pictures of shape (batch, 1, 8, 8)."""
        x = self.block(functional.relu(self.bn(self.conv(x))))
        logits: torch.Tensor = self.head(functional.adaptive_avg_pool2d(x, 2).flatten(1))
        return logits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, ``channels`` -> ``inner`` -> ``channels``, beside the identity."""

    def __init__(self, channels: int, inner: int, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(inner) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=not norm)
        self.bn2 = nn.BatchNorm2d(channels) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the same shape as ``x``."""
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(x + self.bn2(self.conv2(inner)))


def digits_vit(width: int = 48, depth: int = 3, *, img_size: int = 8, patch_size: int = 2) -> nn.Module:
    """A vision transformer of timm's for 8x8 digits, untrained: 4 heads, patches of 2x2.

    Its linear layers begin by their number of inputs, as torch's do: timm's standard deviation of 0.02 is meant for
    hundreds of channels, and leaves so narrow a network with trained weights of nearly low rank.
    """
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=img_size, patch_size=patch_size, in_chans=1, num_classes=10, embed_dim=width, depth=depth, num_heads=4
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return model


def digits_cnn_plain() -> nn.Module:
    """:class:`DigitsCNN` without batch normalisation, untrained."""
    return DigitsCNN(norm=False)


def digits_mlp(width: int = 128) -> nn.Module:
    """A perceptron for 8x8 digits, untrained: 64 -> ``width`` -> ``width`` -> 10 with ReLU."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def mnist_cnn() -> nn.Module:
    """A plain convolutional network for 28x28 digits, untrained: three 5x5 convolutions and a classifier."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(48, 48, 5, padding=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(48 * 4, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How a reference model is made: its network, its data, and how it is trained."""

    make: Callable[[], nn.Module]
    data: Callable[[], Split]
    steps: int
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 1e-2


REFERENCES = {
    "digits-vit": Recipe(digits_vit, digits, steps=1000),
    "digits-cnn": Recipe(DigitsCNN, digits, steps=400),
    "digits-cnn-plain": Recipe(digits_cnn_plain, digits, steps=400),
    "digits-mlp": Recipe(digits_mlp, digits, steps=400),
    "mnist-cnn": Recipe(mnist_cnn, mnist5k, steps=400),
}
"""Reference models by name."""


def reference(name: str, *, seed: int = 0) -> tuple[nn.Module, Split]:
    """A trained model and its data.

    The first call trains it, for some seconds to a minute, and keeps it in the user's cache
    (:func:`retensor.planning.cache_folder`); a file that is damaged is made anew.

    Parameters
    ----------
    name : str
        One of :data:`REFERENCES`.
    seed : int
        Of the initial values and of the training's order. The data's split is the same for all.

    Returns
    -------
    model : nn.Module
        In eval mode.
    data : Split

    Raises
    ------
    TypeError, ValueError
        Where no model has that name, or the seed is no whole number of 64 bits.

    Examples
    --------
    >>> model, data = reference("digits-mlp")
    >>> from retensor.data import accuracy
    >>> accuracy(model, data.x_test, data.y_test) > 0.95
    True
    """
    check_seed(seed)
    if not isinstance(name, str) or name not in REFERENCES:
        raise ValueError(f"{described(name)} is no reference model; they are {', '.join(REFERENCES)}")
    from retensor.planning.cache import cache_folder
    from retensor.replacing.state import load, save

    recipe = REFERENCES[name]
    with seeded(seed):
        model = recipe.make()
    data = recipe.data()
    path = cache_folder() / "reference" / f"{name}-{seed}-{_fingerprint(recipe)}.safetensors"
    try:
        return load(path, model).eval(), data
    except RetensorError:
        # Not there yet, or not whole.
        pass
    fit(
        model, data.x, data.y, steps=recipe.steps, batch=recipe.batch, lr=recipe.lr, weight_decay=recipe.weight_decay,
        seed=seed,
    )  # fmt: skip
    # Where the cache cannot be written, the next call trains again.
    with suppress(OSError, RetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save(model, path)
    return model.eval(), data


def _fingerprint(recipe: Recipe) -> str:
    """What the trained values depend on: the recipe, this file, the loop, and torch's version."""
    here = Path(inspect.getfile(DigitsCNN)), Path(inspect.getfile(fit))
    parts = [torch.__version__, repr((recipe.steps, recipe.batch, recipe.lr, recipe.weight_decay))]
    return hashlib.sha256("\n".join([*parts, *(path.read_text() for path in here)]).encode()).hexdigest()[:12]
