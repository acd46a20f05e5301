"""Which token goes to which expert: random uniform partition, or a router's choice."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from retensor.files import described

EvalMode = Literal["folded", "ensemble", "rup"]
FewTokens = Literal["raise", "fold"]
GradScale = Literal["none", "N"]
Mode = Literal["folded", "ensemble", "rup", "routed"]

EVAL_MODES = ("folded", "ensemble", "rup")
MOST_EXPERTS = 10_000
"""More are refused as a slip of the keyboard: each is a layer's weights over again."""
SETTINGS = ("num_experts", "eval_mode", "few_tokens", "grad_scale", "top_k")


class Assignment:
    """How the tokens of one pass are shared out; the layers of one FFN's experts hold it together.

    Random uniform partition: the n tokens of the batch (all positions of all samples) are permuted and cut into N
    parts, whose sizes differ by one at most; part i is expert i's. No gradient flows through the choice, every pass
    draws anew, and nothing is weighted. With a router (``top_k > 0``) a token goes to the experts of the ``top_k``
    largest softmax probabilities, whose outputs are weighted by these probabilities and summed; none is dropped.

    Parameters
    ----------
    num_experts : int
        N.
    eval_mode : {"folded", "ensemble", "rup"}
        What evaluation computes: one FFN of the mean weights, the mean of all experts' outputs, or a partition as in
        training. A router routes in evaluation too.
    few_tokens : {"raise", "fold"}
        What a partition of fewer than N tokens does.
    grad_scale : {"none", "N"}
        ``"N"`` multiplies the experts' gradients by N. With a loss that is a mean over the batch each expert sees 1/N
        of the tokens, so that under plain SGD the mean of the experts moves by 1/N of what one FFN would; optimizers
        such as Adam, which divide by the gradient's size, hide the factor.
    top_k : int
        Experts of each token that a router chooses; 0 for random uniform partition.

    Attributes
    ----------
    sizes : tuple of int
        Tokens of each expert in this thread's last pass that shared tokens out; empty before.
    chosen : torch.Tensor or None
        Of that pass, the permutation (n,), or with a router the experts (n, ``top_k``).
    balance : torch.Tensor or None
        Of this thread's last routed pass, the loss that is 1 where all experts have equal shares.
    beta : float
        Share rate of the last average; see :func:`retensor.compression.ewa.attach`.
    generator : torch.Generator or None
        Source of permutations; torch's own for the device where None.

    Raises
    ------
    TypeError, ValueError
        Where an argument is not as above.

    Examples
    --------
    >>> shares = Assignment(4)
    >>> tokens = torch.arange(10.0).reshape(5, 2, 1)
    >>> shares.begin(tokens, training=True)
    >>> parts = shares.take(tokens)
    >>> tuple(parts.shape), shares.sizes, bool((shares.give(parts) == tokens).all())
    ((4, 3, 1), (3, 3, 2, 2), True)
    """

    def __init__(
        self,
        num_experts: int,
        *,
        eval_mode: EvalMode = "folded",
        few_tokens: FewTokens = "raise",
        grad_scale: GradScale = "none",
        top_k: int = 0,
    ) -> None:
        for name, number in (("num_experts", num_experts), ("top_k", top_k)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name} is a whole number, not {described(number)}")
        if num_experts < 2:
            raise ValueError(f"num_experts is {num_experts}; a mixture needs at least 2 experts")
        if num_experts > MOST_EXPERTS:
            raise ValueError(f"num_experts is {described(num_experts)}; a mixture has at most {MOST_EXPERTS} experts")
        if not 0 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}; of {num_experts} experts 1 to {num_experts} can be chosen")
        check_choice("eval_mode", eval_mode, EVAL_MODES)
        check_choice("few_tokens", few_tokens, ("raise", "fold"))
        check_choice("grad_scale", grad_scale, ("none", "N"))
        self.num_experts = num_experts
        self.eval_mode = eval_mode
        self.few_tokens = few_tokens
        self.grad_scale = grad_scale
        self.top_k = top_k
        self.generator: torch.Generator | None = None
        self.beta = 0.0
        self._pass = _Pass()

    @property
    def mode(self) -> Mode:
        """What this thread's last pass does."""
        return self._pass.mode

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each expert."""
        return self._pass.sizes

    @property
    def chosen(self) -> torch.Tensor | None:
        """Permutation, or the router's choice."""
        return self._pass.chosen

    @property
    def balance(self) -> torch.Tensor | None:
        """Loss of the router's balance."""
        return self._pass.balance

    def settings(self) -> dict[str, Any]:
        """Arguments that make an equal one."""
        return {name: getattr(self, name) for name in SETTINGS}

    def begin(self, x: torch.Tensor, *, training: bool, router: nn.Module | None = None) -> None:
        """Share out the tokens of a pass.

        Parameters
        ----------
        x : torch.Tensor
            Of shape (..., features).
        training : bool
        router : nn.Module, optional
            From (n, features) to scores of shape (n, N).

        Raises
        ------
        ValueError
            Where there are fewer tokens than experts, unless ``few_tokens`` is ``"fold"``.
        """
        now = self._pass
        now.lead = x.shape[:-1]
        now.tokens = x.numel() // x.shape[-1]
        if router is not None:
            now.mode = "routed"
            self._choose(x.reshape(now.tokens, -1), router)
            return
        now.mode = "rup" if training else self.eval_mode
        if now.mode == "rup":
            if now.tokens < self.num_experts:
                if self.few_tokens == "raise":
                    raise ValueError(
                        f"{now.tokens} tokens cannot be shared out among {self.num_experts} experts; give larger "
                        "batches, fewer experts, or few_tokens='fold' to compute the mean FFN for such batches"
                    )
                now.mode = "folded"
                return
            self._partition(x.device)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens as their experts take them.

        Parameters
        ----------
        x : torch.Tensor
            Of shape (..., features), as given to :meth:`begin`.

        Returns
        -------
        torch.Tensor
            Of shape (N, tokens of the largest part, features) in a partition, where smaller parts end in a row of no
            meaning; (N, n, features) in an ensemble; and (n * top_k, features), sorted by expert, with a router.
        """
        now = self._pass
        rows = x.reshape(now.tokens, x.shape[-1])
        if now.mode == "ensemble":
            return rows.expand(self.num_experts, *rows.shape)
        if now.mode == "routed":
            return rows.index_select(0, now.order // self.top_k)
        if now.spare:
            rows = torch.cat((rows, rows.new_zeros(now.spare, rows.shape[1])))
        return _Reorder.apply(rows, now.order, now.back).reshape(self.num_experts, -1, rows.shape[1])

    def give(self, y: torch.Tensor) -> torch.Tensor:
        """Outputs of the experts, of the shape that :meth:`take` gives, back at their tokens' places."""
        now = self._pass
        if now.mode == "ensemble":
            return y.mean(0).reshape(*now.lead, y.shape[-1])
        if now.mode == "routed":
            weighted = y * now.gates.to(y.dtype)[:, None]
            found = weighted.new_zeros(now.tokens, y.shape[-1]).index_add(0, now.order // self.top_k, weighted)
            return found.reshape(*now.lead, y.shape[-1])
        rows = _Reorder.apply(y.reshape(-1, y.shape[-1]), now.back, now.order)[: now.tokens]
        return rows.reshape(*now.lead, y.shape[-1])

    def _partition(self, device: torch.device) -> None:
        now = self._pass
        n, experts = now.tokens, self.num_experts
        each, larger = divmod(n, experts)
        now.sizes = tuple(each + (i < larger) for i in range(experts))
        now.spare = (experts - larger) % experts
        drawn_on = device if self.generator is None else self.generator.device
        order = torch.randperm(n, generator=self.generator, device=drawn_on).to(device)
        now.chosen = order
        if now.spare:
            # Rows of zeros fill the smaller parts, so that all experts are one product.
            spare = torch.arange(n, n + now.spare, device=device)[:, None]
            head, tail = order.split([larger * (each + 1), now.spare * each])
            order = torch.cat((head, torch.cat((tail.reshape(now.spare, each), spare), 1).flatten()))
        now.order = order
        now.back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=device))

    def _choose(self, rows: torch.Tensor, router: nn.Module) -> None:
        now = self._pass
        probabilities = router(rows).float().softmax(-1)
        gates, now.chosen = probabilities.topk(self.top_k, dim=-1)
        picked = now.chosen.flatten()
        # Stable, so that an expert's tokens keep their order.
        now.order = picked.argsort(stable=True)
        now.gates = gates.flatten()[now.order]
        counts = torch.bincount(picked, minlength=self.num_experts)
        now.sizes = tuple(counts.tolist())
        share = counts.to(probabilities.dtype) / max(1, len(picked))
        now.balance = self.num_experts * (share * probabilities.mean(0)).sum()

    def __getstate__(self) -> dict[str, Any]:
        # Without what belongs to a pass, which holds a part of its gradients' graph.
        return {**self.settings(), "generator": self.generator, "beta": self.beta}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pass = _Pass()


class _Pass(threading.local):
    """What one thread's pass leaves for the layers behind: threads that share a model share no partition."""

    def __init__(self) -> None:
        self.mode: Mode = "folded"
        self.sizes: tuple[int, ...] = ()
        self.chosen: torch.Tensor | None = None
        self.balance: torch.Tensor | None = None
        self.lead: tuple[int, ...] = ()
        self.tokens = 0
        self.spare = 0
        self.order = self.back = self.gates = torch.empty(0)


def check_choice(name: str, given: Any, choices: Iterable[str]) -> None:
    """Raise where a setting is none of its values."""
    choices = tuple(choices)
    if given not in choices:
        raise ValueError(f"{name} is {described(given)}; it is one of {', '.join(map(repr, choices))}")


class _Reorder(torch.autograd.Function):
    """Rows in another order, whose gradient is the inverse order: no adding up as for a general gather."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        order, back = ctx.saved_tensors
        return _Reorder.apply(gradient, back, order), None, None
