"""What all factored convolutions have in common: arguments, factors, the run of the chain, and the way back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from retensor.compression.apriori.chain import Geometry, run, run_recomputed
from retensor.compression.apriori.formats import Factors, Shape, Stage, format_named, resolved, swapped
from retensor.files import described
from retensor.replacing import Replacement

Init = Literal["match", "xavier", "decompose", "default"]
Implementation = Literal["factorized", "fused", "reconstructed"]
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_VECTORISED = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = ("factorized", "fused", "reconstructed")
_DENSE: dict[tuple[int, bool], type[nn.Module]] = {
    (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip


class Factored(Replacement):
    """What plain and transposed layers have in common; arguments are those of :class:`FactoredConv2d`."""

    dims: ClassVar[int]
    transposed: ClassVar[bool] = False
    only_cp: ClassVar[bool] = False
    """Whether the format is in the name of the class."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | str | Sequence[int],
        output_padding: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
        padding_mode: str,
        *,
        rank: int | Sequence[int],
        format: str,
        init: Init,
        implementation: Implementation,
        recompute: bool,
        channels_last: bool,
        generator: torch.Generator | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        _positive(in_channels=in_channels, out_channels=out_channels, groups=groups)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups={groups} does not divide {in_channels} input and {out_channels} output channels; take a "
                "common divisor of both"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = self._sizes("kernel_size", kernel_size, 1)
        self.stride = self._sizes("stride", stride, 1)
        self.dilation = self._sizes("dilation", dilation, 1)
        self.output_padding = self._sizes("output_padding", output_padding, 0)
        if isinstance(padding, str):
            self._check_named(padding)
            self.padding: str | tuple[int, ...] = padding
        else:
            self.padding = self._sizes("padding", padding, 0)
        if padding_mode not in PADDING_MODES or (self.transposed and padding_mode != "zeros"):
            allowed = "'zeros'" if self.transposed else ", ".join(map(repr, PADDING_MODES))
            raise ValueError(f"padding_mode is {described(padding_mode)}; here it is {allowed}")
        self.padding_mode = padding_mode
        self.shape = Shape(in_channels, out_channels, self.kernel_size, groups)
        if self.only_cp and format != "cp":
            raise ValueError(
                f"format is {described(format)}, but {type(self).__name__} is of format 'cp'; take "
                f"{type(self).__name__.replace('CP', 'Factored')}"
            )
        self.form = format_named(format, self.dims)
        self.format = format
        self.rank = resolved(self.form, self.shape, rank)
        _check_implementation(implementation, format)
        self.implementation = implementation
        self.recompute = recompute
        self.channels_last = channels_last
        if self.form.parameters(self.shape, self.rank) > self.shape.dense_parameters:
            warnings.warn(
                f"rank {rank} takes {self.form.parameters(self.shape, self.rank):,} parameters and the dense kernel "
                f"{self.shape.dense_parameters:,}; a lower rank, or the dense layer, is smaller",
                stacklevel=3,
            )
        # Pairs, for a mapping would be sorted.
        self.factors = _Factors(
            [
                (name, nn.Parameter(torch.empty(sizes, device=device, dtype=dtype)))
                for name, sizes in self.form.factors(self.shape, self.rank).items()
            ]
        )
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters(init, generator=generator)

    def reset_parameters(
        self, init: Init = "match", *, variance: float | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Draw the factors anew; see :func:`retensor.compression.apriori.initialise_`."""
        from retensor.compression.apriori.init import initialise_

        initialise_(self, init, variance=variance, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution of ``x``, of shape (batch, in_channels, ...) or (in_channels, ...)."""
        return self._run(x)

    def kernel(self) -> torch.Tensor:
        """The dense kernel, as ``weight`` of the layer of torch that it stands for; differentiable."""
        kernel = self.form.kernel(self.shape, self.factors)
        return swapped(kernel, self.groups) if self.transposed else kernel

    def to_dense(self) -> nn.Module:
        """The layer of torch with that kernel."""
        arguments: dict[str, Any] = {
            "stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups,
            "bias": self.bias is not None, "padding_mode": self.padding_mode,
        }  # fmt: skip
        if self.transposed:
            arguments["output_padding"] = self.output_padding
        factor = next(iter(self.factors.values()))
        dense = _DENSE[self.dims, self.transposed](
            self.in_channels, self.out_channels, self.kernel_size, **arguments, device=factor.device, dtype=factor.dtype
        )
        with torch.no_grad():
            dense.weight.copy_(self.kernel())
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def stages(self) -> list[Stage]:
        """The chain of convolutions that the layer runs."""
        return self._stages(self.factors)

    def output_shapes(self, sizes: Sequence[int]) -> list[tuple[int, ...]]:
        """Channels and sizes of what each stage puts out, for an input of those sizes; nothing is computed."""
        geometry = self.geometry(sizes)
        x = torch.empty(1, self.in_channels, *sizes, device="meta")
        shapes = []
        for stage in self.stages():
            x = run(x, [Stage(stage.weight.to("meta", x.dtype), stage.groups, stage.axes, stage.order)], geometry, None)
            shapes.append(tuple(x.shape[1:]))
        return shapes

    def macs(self, sizes: Sequence[int]) -> int:
        """Multiply-accumulates of one sample of those sizes.

        A plain convolution multiplies once an output element; a transposed one, once an input element.
        """
        shapes = self.output_shapes(sizes)
        seen = [(self.in_channels, *sizes), *shapes] if self.transposed else [(0,), *shapes]
        total = 0
        for i, stage in enumerate(self.stages()):
            out, into = stage.weight.shape[0] // stage.groups, stage.weight.shape[1]
            taps = math.prod(stage.weight.shape[2:])
            elements = math.prod(seen[i] if self.transposed else shapes[i])
            total += elements * taps * (out if self.transposed else into)
        return total

    def geometry(self, sizes: Sequence[int], output_size: Sequence[int] | None = None) -> Geometry:
        """Where the layer reads, for an input of those sizes."""
        sides: list[tuple[int, int]] = []
        for i in range(self.dims):
            if self.padding == "same":
                whole = self.dilation[i] * (self.kernel_size[i] - 1)
                sides.append((whole // 2, whole - whole // 2))
            elif isinstance(self.padding, str):
                sides.append((0, 0))
            else:
                sides.append((self.padding[i], self.padding[i]))
        extra = self.output_padding
        if output_size is not None:
            extra = self._extra(sizes, output_size, sides)
        return Geometry(self.stride, self.dilation, tuple(sides), self.padding_mode, extra, self.transposed)

    def config(self) -> dict[str, Any]:
        """Arguments that make a layer of the same shape."""
        arguments: dict[str, Any] = {
            "in_channels": self.in_channels, "out_channels": self.out_channels, "kernel_size": list(self.kernel_size),
            "stride": list(self.stride), "padding": self.padding if isinstance(self.padding, str) else
            list(self.padding), "dilation": list(self.dilation), "groups": self.groups, "bias": self.bias is not None,
            "padding_mode": self.padding_mode, "rank": list(self.rank), "implementation": self.implementation,
            "recompute": self.recompute, "channels_last": self.channels_last,
        }  # fmt: skip
        if self.transposed:
            arguments["output_padding"] = list(self.output_padding)
        return arguments if self.only_cp else arguments | {"format": self.format}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        """A layer of that shape; its values are loaded afterwards, and a rank above the dense size is no news."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return cls(**config)

    def extra_repr(self) -> str:
        """The arguments that matter, for ``print``."""
        rank = self.rank[0] if len(self.rank) == 1 else self.rank
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}", f"format={self.format!r}"]
        parts += [f"rank={rank}", f"stride={self.stride}", f"padding={self.padding!r}"]
        if set(self.dilation) != {1}:
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join(parts)

    def _run(self, x: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        batched = x.dim() == self.dims + 2
        x = x if batched else x.unsqueeze(0)
        compiling = torch.compiler.is_compiling()
        plain = x.is_contiguous()
        last = torch.channels_last_3d if self.dims == 3 else torch.channels_last
        if self.channels_last and self.dims > 1 and not compiling and x.dtype in _VECTORISED:
            # Depthwise filters over planes that lie apart are several times slower.
            x = x.contiguous(memory_format=last)
        geometry = self.geometry(x.shape[2:], output_size)
        names, parameters = list(self.factors), list(self.factors.values())

        def chain(part: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
            factors = dict(zip(names, given, strict=False))
            return run(part, self._stages(factors), geometry, given[-1] if self.bias is not None else None)

        if self.bias is not None:
            parameters.append(self.bias)
        # Transformations of torch.func keep what they need themselves.
        transformed = torch._C._are_functorch_transforms_active()
        again = self.recompute and torch.is_grad_enabled() and not compiling and not transformed
        y = run_recomputed(x, chain, parameters) if again else chain(x, *parameters)
        if plain and not compiling:
            # Whoever gave planes may want to see planes, as with ``view``.
            y = y.contiguous()
        elif self.channels_last and self.dims > 1 and not compiling and x.dtype in _VECTORISED:
            # ``separable`` orders channels anew on its way.
            y = y.contiguous(memory_format=last)
        return y if batched else y.squeeze(0)

    def _stages(self, factors: Factors) -> list[Stage]:
        if self.implementation == "reconstructed":
            return [Stage(self.form.kernel(self.shape, factors), self.groups, tuple(range(self.dims)))]
        if self.implementation == "fused":
            return self.form.fused(self.shape, factors)
        return self.form.stages(self.shape, factors)

    def _sizes(self, name: str, given: Any, least: int) -> tuple[int, ...]:
        values = (given,) * self.dims if isinstance(given, int) else given
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"{name} is {described(given)}; an int is needed, or {self.dims} of them")
        if any(isinstance(value, bool) or not isinstance(value, int) for value in values):
            raise TypeError(f"{name} is {described(given)}; an int is needed, or {self.dims} of them")
        if len(values) != self.dims or any(value < least for value in values):
            raise ValueError(f"{name} is {described(given)}; {self.dims} numbers of at least {least} are needed")
        return tuple(values)

    def _check_named(self, padding: str) -> None:
        if self.transposed or padding not in ("same", "valid"):
            allowed = "numbers" if self.transposed else "'same', 'valid' or numbers"
            raise ValueError(f"padding is {described(padding)}; here it is {allowed}")
        if padding == "same" and any(stride > 1 for stride in self.stride):
            raise ValueError(
                f"padding='same' cannot be kept at stride {self.stride}, least of all with kernels of even size; give "
                "the padding as numbers"
            )

    def _extra(self, sizes: Sequence[int], wanted: Sequence[int], sides: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Output padding that makes a transposed convolution's output as large as is wanted."""
        wanted = list(wanted)[-self.dims :]
        extra = []
        for i, size in enumerate(sizes):
            least = (size - 1) * self.stride[i] - 2 * sides[i][0] + self.dilation[i] * (self.kernel_size[i] - 1) + 1
            if not 0 <= wanted[i] - least < max(self.stride[i], self.dilation[i]):
                raise ValueError(
                    f"output_size {tuple(wanted)} is out of reach along axis {i}: it starts at {least} and ends below "
                    f"{least + max(self.stride[i], self.dilation[i])}"
                )
            extra.append(wanted[i] - least)
        return tuple(extra)


class _Factors(nn.ParameterDict):
    """Factors by name, which a change of a model's memory format passes by."""

    def __repr__(self) -> str:
        return ", ".join(f"{name} {tuple(factor.shape)}" for name, factor in self.items())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Module.to gives the format to everything of four or five axes and fails at factors of five.
        return super()._apply(lambda tensor: fn(tensor.flatten()).reshape(tensor.shape), recurse)


def _positive(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {described(value)}; an int is needed")
        if value < 1:
            raise ValueError(f"{name} is {value}; at least 1 is needed")


def _check_implementation(implementation: Any, format: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {described(implementation)}; it is one of {', '.join(map(repr, IMPLEMENTATIONS))}"
        )
    if implementation == "fused" and format != "cp":
        raise ValueError(f"implementation='fused' joins the filters of format 'cp'; '{format}' runs 'factorized'")
