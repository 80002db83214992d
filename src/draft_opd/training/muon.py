"""Muon: a step along the orthogonalised momentum of each matrix.

Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024); the size
of the update from "Muon is Scalable for LLM Training" (arXiv 2502.16982, section 2.2). It computes
what `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` computes, but the type of its products can
be chosen: torch's is always bfloat16, which CPUs without bfloat16 units multiply about 30 times
slower than float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt

import torch
from torch import Tensor

# The quintic iteration's coefficients: steepest at zero, not exact at one.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """[m, n] -> [m, n] in `dtype`: about U V^T of its singular value decomposition U S V^T, by the
    Newton-Schulz iteration. Singular values come out between 0.5 and 1.5."""
    a, b, c = COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(dtype, copy=True)
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=1e-7))  # so that no singular value is above 1
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; updates have the root mean square of AdamW's, so that one
    learning rate serves both. For matrices only."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        momentum: float = 0.95,
    ):
        """dtype: of the products. Raises ValueError for a parameter that is no matrix."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon is for matrices, not for shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = orthogonalize(p.grad.lerp(average, momentum), self.dtype)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * 0.2 * sqrt(max(p.shape)))
        return loss
