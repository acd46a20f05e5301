r"""Kernel-supervised hashing of queries and keys to a few bits.

W. Liu, J. Wang, R. Ji, Y.-G. Jiang, S.-F. Chang, "Supervised Hashing with Kernels", CVPR 2012, as J. Liu, Z. Pan,
H. He, J. Cai, B. Zhuang use it for attention in "EcoFormer: Energy-Saving Attention with Linear Complexity", NeurIPS
2022, arXiv 2209.09004. With anchors :math:`u_1..u_m` and centred kernel values
:math:`\bar k(x) = [\exp(-\|x - u_j\|^2 / 2\sigma) - \mu_j]_j`, bit r is :math:`\mathrm{sign}(a_r^\top \bar k(x))`. The
:math:`a_r` are found one after the other, so that the product of two codes approaches the number of bits where a pair
of samples is labelled 1 and minus that where it is -1: each begins at the leading generalised eigenvector of
:math:`\bar K^\top R \bar K a = \lambda \bar K^\top \bar K a`, where R is what the bits before have left of the labels,
and is improved by gradients of the same objective with :math:`2 / (1 + e^{-z}) - 1` for the sign.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from retensor.errors import RetensorError


class KernelHash(nn.Module):
    """Hash functions of several heads, which :meth:`fit` learns from samples.

    Parameters
    ----------
    heads, head_dim : int
    bits : int
        Of a code.
    anchors, samples, similar : int
        m anchors and training samples that are drawn, and how many nearest (and farthest) samples of each are labelled
        1 (and -1).

    Examples
    --------
    >>> hashing = KernelHash(2, 8, bits=4)
    >>> x = torch.randn(3, 2, 50, 8, generator=torch.Generator().manual_seed(0))
    >>> hashing.fit(x)
    >>> codes = hashing(x)
    >>> codes.shape, codes.unique().tolist()
    (torch.Size([3, 2, 50, 4]), [-1.0, 1.0])
    """

    anchor: torch.Tensor
    mean: torch.Tensor
    a: torch.Tensor
    fitted: torch.Tensor

    def __init__(
        self, heads: int, head_dim: int, bits: int = 16, anchors: int = 25, samples: int = 300, similar: int = 10
    ) -> None:
        super().__init__()
        self.bits, self.anchors, self.samples, self.similar = bits, anchors, samples, similar
        self.register_buffer("anchor", torch.zeros(heads, anchors, head_dim))
        self.register_buffer("mean", torch.zeros(heads, anchors))
        self.register_buffer("a", torch.zeros(heads, bits, anchors))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(self, x: torch.Tensor, *, seed: int = 0, steps: int = 100, lr: float = 5e-4) -> None:
        """Learn the hash functions.

        Parameters
        ----------
        x : torch.Tensor
            Normalised queries or keys of shape (batch, heads, tokens, head_dim).
        seed : int
            Of which are drawn.
        steps, lr
            Of the improvement by gradients, with Nesterov's momentum of 0.9.

        Raises
        ------
        ValueError
            Where there are fewer samples than anchors.
        """
        points = x.detach().transpose(1, 2).flatten(0, 1).to(torch.float32)
        if len(points) < max(self.anchors, 2 * self.similar):
            raise ValueError(
                f"{len(points)} tokens cannot teach a hash of {self.anchors} anchors and {self.similar} similar "
                f"samples; give at least {max(self.anchors, 2 * self.similar)}"
            )
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed)).to(points.device)
        drawn = points[order[: self.samples]].transpose(0, 1)
        self.anchor.copy_(points[order[: self.anchors]].transpose(0, 1))
        kernel = self._kernel(drawn[None])[0]
        self.mean.copy_(kernel.mean(1))
        kernel = kernel - self.mean[:, None]
        rest = self.bits * labels(drawn, self.similar)
        for r in range(self.bits):
            first = _leading(kernel, rest)
            better = _improved(kernel, rest, first, steps, lr)
            value, least = (_objective(_signs(kernel, a), rest) for a in (better, first))
            self.a[:, r] = torch.where((value < least)[:, None], better, first)
            code = _signs(kernel, self.a[:, r])
            rest = rest - code[:, :, None] * code[:, None, :]
        self.fitted.fill_(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Codes of -1 and 1, of shape (batch, heads, tokens, bits); a gradient flows within -1 and 1.

        Raises
        ------
        RetensorError
            Where nothing has been learned.
        """
        if not torch.compiler.is_compiling() and not bool(self.fitted):
            raise RetensorError(
                "a hash of the attention has not been learned; convert with calibration=<some inputs>, or call "
                "fit_hashes(model, inputs)"
            )
        centred = self._kernel(x) - self.mean[:, None]
        y = torch.einsum("bhnm,hrm->bhnr", centred, self.a)
        soft = y.clamp(-1, 1)
        return torch.where(y > 0, 1.0, -1.0).to(y.dtype) - soft.detach() + soft

    def config(self) -> dict[str, Any]:
        """Arguments besides the heads'."""
        return {"bits": self.bits, "anchors": self.anchors, "samples": self.samples, "similar": self.similar}

    def _kernel(self, x: torch.Tensor) -> torch.Tensor:
        """The width is the mean squared distance of each sample's head."""
        distance = (
            x.square().sum(-1, keepdim=True)
            + self.anchor.square().sum(-1)[:, None]
            - 2 * x @ self.anchor.transpose(-1, -2)
        ).clamp_min(0)
        width = distance.mean((-1, -2), keepdim=True).clamp_min(1e-12)
        return torch.exp(-distance / (2 * width))


def labels(points: torch.Tensor, similar: int) -> torch.Tensor:
    """1 for the most similar pairs, -1 for the least, 0 for others; by products, of shape (heads, n, n).

    >>> labels(torch.eye(3)[None], 1)[0].diagonal()
    tensor([1., 1., 1.])
    """
    product = points @ points.transpose(-1, -2)
    found = torch.zeros_like(product)
    found.scatter_(-1, product.topk(similar, -1, largest=False).indices, -1.0)
    found.scatter_(-1, product.topk(similar, -1).indices, 1.0)
    # A pair is labelled once; where its two members differ the labels meet in the middle.
    return (found + found.transpose(-1, -2)) / 2


def _leading(kernel: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """The generalised eigenvector of the largest value, scaled so that its bits have unit variance."""
    right = kernel.transpose(-1, -2) @ kernel
    ridge = 1e-6 * right.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-12)
    right = right + ridge * torch.eye(right.shape[-1], device=right.device)
    left = kernel.transpose(-1, -2) @ rest @ kernel
    root = torch.linalg.cholesky(right)
    inner = torch.linalg.solve_triangular(root, left, upper=False)
    inner = torch.linalg.solve_triangular(root, inner.transpose(-1, -2), upper=False)
    vectors = torch.linalg.eigh((inner + inner.transpose(-1, -2)) / 2).eigenvectors[..., -1:]
    a = torch.linalg.solve_triangular(root.transpose(-1, -2), vectors, upper=True)[..., 0]
    spread = torch.einsum("hm,hmk,hk->h", a, right, a)
    return a * (kernel.shape[1] / spread).sqrt()[:, None]


def _improved(kernel: torch.Tensor, rest: torch.Tensor, start: torch.Tensor, steps: int, lr: float) -> torch.Tensor:
    a = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([a], lr=lr, momentum=0.9, nesterov=True)
    for _ in range(steps):
        with torch.enable_grad():
            soft = 2 * torch.sigmoid(torch.einsum("hnm,hm->hn", kernel, a)) - 1
            (a.grad,) = torch.autograd.grad(_objective(soft, rest).sum(), a)
        optimizer.step()
    return a.detach()


def _objective(code: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    return -torch.einsum("hn,hnl,hl->h", code, rest, code) / code.shape[-1]


def _signs(kernel: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    y = torch.einsum("hnm,hm->hn", kernel, a)
    return torch.where(y > 0, 1.0, -1.0).to(y.dtype)
