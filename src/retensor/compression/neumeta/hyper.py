"""The hypernetwork: a network whose inner layers are generated, and ordinary networks sampled from it."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import torch
from torch import nn

from retensor.compression.neumeta.field import shaped, values
from retensor.compression.neumeta.generated import Generated, generated
from retensor.compression.neumeta.space import WidthSpace, check_amounts, check_width
from retensor.errors import RetensorError
from retensor.files import brief, described
from retensor.replacing.norms import exactly
from retensor.replacing.norms import fold_norms as fuse
from retensor.replacing.replace import copied, replace
from retensor.replacing.state import load as load_state
from retensor.replacing.state import read_header, save


class NeuMeta(nn.Module):
    """A family of networks, one for each width, in one implicit function a generated tensor.

    Parameters
    ----------
    space : WidthSpace
    hidden, depth, freqs : int
        Of each tensor's implicit function (:class:`WeightField`): 256 x 4 with 16 octaves in the paper's smaller
        settings, 512 x 8 with 32 in its larger ones.
    scale : float
        Start of the residual scales.
    norm : float, optional
        NORM; the largest size of a generated tensor at the full width by default.
    seed : int
        Of the initial values.

    Attributes
    ----------
    net : nn.Module
        The space's network with :class:`Generated` layers in place of those that are generated. It runs at the present
        ``width``, and :func:`retensor.fold` turns it into the plain network of that width.
    trained : torch.Tensor
        The least and the largest width that it was fitted at; zeros before.

    Raises
    ------
    TypeError, ValueError
        Where an argument is of another kind, or not above 0.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    >>> hyper = NeuMeta(WidthSpace(net, "*", example=torch.zeros(1, 4)), hidden=8, depth=2, freqs=2)
    >>> from retensor.compression.neumeta import warm_start
    >>> _ = warm_start(hyper, steps=5, widths=range(4, 13))
    >>> hyper.sample(width=5, k=1)
    Sequential(
      (0): Linear(in_features=4, out_features=5, bias=True)
      (1): ReLU()
      (2): Linear(in_features=5, out_features=3, bias=True)
    )
    """

    def __init__(
        self,
        space: WidthSpace,
        hidden: int = 256,
        depth: int = 4,
        freqs: int = 16,
        *,
        scale: float = 0.1,
        norm: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(space, WidthSpace):
            raise TypeError(f"a family is made of a WidthSpace, not of {described(space)}")
        for name, size in (("hidden", hidden), ("depth", depth), ("freqs", freqs)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is a whole number from 1, not {described(size)}")
        shapes = space.shapes(space.full_width)
        outputs = max(math.prod(shape[2:]) for shape in shapes.values())
        sizes = [size for shape in shapes.values() for size in shape[:2]]
        field = {
            "hidden": hidden, "depth": depth, "freqs": freqs, "outputs": outputs, "scale": scale,
            "norm": float(max(len(shapes), *sizes) if norm is None else norm),
        }  # fmt: skip
        places = {}
        numbers = {name: i for i, name in enumerate(shapes)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in space.layers:
                mine = [numbers[f"{name}.{label}"] for label in ("weight", "bias") if f"{name}.{label}" in numbers]
                places[exactly(name)] = generated(
                    space.net.get_submodule(name), space.geometry(name), numbers=mine, of=len(shapes), field=field,
                )  # fmt: skip
        self.net = replace(space.net, places)
        for parameter in self.net.parameters():
            parameter.requires_grad_(False)
        for layer in self.layers.values():
            layer.fields.requires_grad_(True)
        self.register_buffer("trained", torch.zeros(2, dtype=torch.int64))
        # Of every group that can be reordered, so that any family of the network has the same names.
        self._movable = tuple(space.movable)
        for i, (producers, channels) in enumerate(space.movable.items()):
            self.register_buffer(f"order_{i}", torch.tensor(space.orders.get(producers, range(channels))))

    @property
    def layers(self) -> dict[str, Generated]:
        """Generated layers by name in ``net``."""
        return {name: module for name, module in self.net.named_modules() if isinstance(module, Generated)}

    @property
    def full_width(self) -> int:
        """H, the width of the network it was made of."""
        return next(iter(self.layers.values())).geometry.reference

    @property
    def width(self) -> int:
        """The present width: what ``forward`` and :func:`retensor.fold` take."""
        return next(iter(self.layers.values())).width

    @width.setter
    def width(self, width: int) -> None:
        check_width(width)
        for layer in self.layers.values():
            layer.width = width

    @property
    def orders(self) -> dict[tuple[str, ...], list[int]]:
        """How channels were reordered, as in :class:`WidthSpace`: to undo it, ``torch.tensor(order).argsort()``."""
        found = {producers: self.get_buffer(f"order_{i}").tolist() for i, producers in enumerate(self._movable)}
        return {producers: order for producers, order in found.items() if order != sorted(order)}

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The network of the present width, of one sample without noise."""
        return self.net(*arguments, **named)

    def fields(self) -> list[nn.Parameter]:
        """Parameters of the implicit functions: what is trained."""
        return [parameter for layer in self.layers.values() for parameter in layer.fields.parameters()]

    def generated_parameters(self, width: int) -> int:
        """Elements of the tensors that are generated at a width.

        Raises
        ------
        ValueError
            Where the width is below 1.
        """
        check_width(width)
        shapes = [shape for layer in self.layers.values() for shape in layer.geometry.shapes(width).values()]
        return sum(map(math.prod, shapes))

    def targets(self) -> dict[str, torch.Tensor]:
        """Values of the generated tensors in the network it was made of, by name."""
        return {
            f"{name}.{label}": getattr(layer, f"full_{label}")
            for name, layer in self.layers.items()
            for label in layer.fields
        }

    def resampled(self, width: int) -> dict[str, torch.Tensor]:
        """The targets at another width, as :meth:`WidthSpace.resampled` has them."""
        check_width(width)
        return {
            f"{name}.{label}": part
            for name, layer in self.layers.items()
            for label, part in layer.geometry.resampled(layer.full_weight, layer.full_bias, width).items()
        }

    def weights(
        self, width: int, *, noise: float = 0.0, generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        """Generate all tensors at a width, by name, with their gradients.

        Parameters
        ----------
        width : int
        noise : float
            nu: ``U(-0.5, 0.5) nu`` is added to all six raw coordinates of every entry.
        generator : torch.Generator, optional
            Of the noise, on the CPU; torch's own by default.

        Raises
        ------
        ValueError
            Where the width is below 1, or the noise is below 0 or not finite.

        Examples
        --------
        >>> net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
        >>> hyper = NeuMeta(WidthSpace(net, "*", example=torch.zeros(1, 4)), hidden=8, depth=2, freqs=2)
        >>> {name: tuple(value.shape) for name, value in hyper.weights(5).items()}
        {'0.weight': (5, 4), '0.bias': (5,), '2.weight': (3, 5), '2.bias': (3,)}
        """
        check_width(width)
        check_amounts(noise=noise)
        names, fields, raws, shapes = [], [], [], []
        for name, layer in self.layers.items():
            mine = layer.geometry.shapes(width)
            for label, raw in layer.coordinates(width).items():
                if noise:
                    drawn = torch.rand(raw.shape, generator=generator, dtype=raw.dtype)
                    raw = raw + (drawn.to(raw.device) - 0.5) * noise
                names.append(f"{name}.{label}")
                fields.append(layer.fields[label])
                raws.append(raw)
                shapes.append(mine[label])
        found = values(fields, raws)
        return {name: shaped(value, shape) for name, value, shape in zip(names, found, shapes, strict=True)}

    def sample(
        self,
        width: int | None = None,
        *,
        params: float | None = None,
        k: int = 100,
        noise: float = 1.0,
        seed: int = 0,
    ) -> nn.Module:
        """The network of a width: ordinary layers, and no hypernetwork inside.

        Parameters
        ----------
        width : int, optional
        params : float, optional
            Instead: the generated parameters as a part of those at the full width; the nearest width is taken.
        k : int
            Samples of the weights whose mean is taken: one without noise, the others with.
        noise : float
            nu of these.
        seed : int
            Of the noise.

        Returns
        -------
        nn.Module
            In the mode of ``net``.

        Raises
        ------
        ValueError
            Where the width is below 1, ``params`` not above 0, both or neither are given, ``k`` is below 1, or the
            noise is below 0 or not finite.

        Warns
        -----
        UserWarning
            Where the width is outside of those it was fitted at, or it was never fitted.
        """
        if (width is None) == (params is None):
            raise ValueError("give a width, or the part of parameters to keep as params, and not both")
        if width is None:
            assert params is not None
            width = self._width_of(params)
        check_width(width)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"the mean is over k samples, at least 1, not {described(k)}")
        least, most = self.trained.tolist()
        if not most:
            warnings.warn(
                "the family was never fitted, so its weights are no better than random; use warm_start and fit before",
                stacklevel=2,
            )
        elif not least <= width <= most:
            warnings.warn(
                f"width {width} is outside of {least} to {most}, which the family was fitted at; measure it before "
                "you use it",
                stacklevel=2,
            )
        check_amounts(noise=noise)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            mean = {name: value.double() for name, value in self.weights(width).items()}
            for _ in range(k - 1):
                for name, value in self.weights(width, noise=noise, generator=generator).items():
                    mean[name] += value
        places: dict[Any, nn.Module] = {}
        for name, layer in self.layers.items():
            tensors = {label: (mean[f"{name}.{label}"] / k).to(layer.full_weight.dtype) for label in layer.fields}
            places[exactly(name)] = layer.plain(tensors["weight"], tensors.get("bias"))
        found = replace(self.net, places)
        for parameter in found.parameters():
            parameter.requires_grad_(True)
        return found

    def bypassed(self) -> nn.Module:
        """The full network with nothing but zeros in the generated layers: what it is worth without them."""
        zeros = {name: torch.zeros_like(value) for name, value in self.targets().items()}
        return replace(
            self.net,
            {
                exactly(name): layer.plain(zeros[f"{name}.weight"], zeros.get(f"{name}.bias"))
                for name, layer in self.layers.items()
            },
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the family to one safetensors file (:func:`retensor.save`); :func:`load` reads it.

        The fixed layers, the weights it was fitted to and the channels' orders are in it as well.

        Raises
        ------
        RetensorError, OSError
            Where the file cannot be written.
        """
        save(self, path)

    def _width_of(self, params: float) -> int:
        if isinstance(params, bool) or not isinstance(params, int | float) or not params > 0:
            raise ValueError(
                f"params is the part of the generated parameters to keep, above 0, not {described(params)}"
            )
        wanted = params * self.generated_parameters(self.full_width)
        low, high = 1, 1
        while self.generated_parameters(high) < wanted:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.generated_parameters(middle) < wanted else (low, middle)
        return min((low, high), key=lambda width: abs(self.generated_parameters(width) - wanted))


def load(path: str | os.PathLike[str], model: nn.Module, *, example: Any) -> NeuMeta:
    """Read a family that :meth:`NeuMeta.save` wrote.

    Parameters
    ----------
    path : str or path
    model : nn.Module
        Like the one that the family was made of, before fusing, such as ``timm.create_model(...)``; its values do not
        matter, and it stays as it is.
    example : torch.Tensor, tuple or mapping
        As in :class:`WidthSpace`.

    Raises
    ------
    RetensorError
        Where the file is missing, damaged, or holds no family of this model.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    >>> hyper = NeuMeta(WidthSpace(net, "*", example=torch.zeros(1, 4)), hidden=8, depth=2, freqs=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "family.safetensors")
    ...     hyper.save(path)
    ...     again = load(path, net, example=torch.zeros(1, 4))
    >>> torch.equal(again(torch.ones(1, 4)), hyper(torch.ones(1, 4)))
    True
    """
    kinds = [entry for entry in read_header(path)["replacements"] if entry["kind"] == Generated.kind()]
    names = [entry["name"].removeprefix("net.") for entry in kinds]
    if not names:
        raise RetensorError(f"'{brief(path)}' holds no family of widths; NeuMeta.save writes one")
    fused = fuse(model, example=example)
    known = {name for name, _ in fused.named_modules()}
    for name in names:
        if name not in known:
            raise RetensorError(
                f"'{brief(path)}' generates '{brief(name)}', which the model lacks; give a model like it"
            )
    base = NeuMeta(WidthSpace(fused, names, example=example), hidden=1, depth=1, freqs=1)
    found = load_state(path, base)
    assert isinstance(found, NeuMeta)
    for layer in found.layers.values():
        layer.fields.requires_grad_(True)
    return found


def skeleton(hyper: NeuMeta) -> nn.Module:
    """The plain network that generated tensors are run in, without gradients of its own."""
    net = replace(
        copied(hyper.net),
        {exactly(name): layer.plain(layer.full_weight, layer.full_bias) for name, layer in hyper.layers.items()},
    )
    return net.requires_grad_(False)
