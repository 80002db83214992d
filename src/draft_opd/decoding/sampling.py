"""Temperature, top-k and top-p, applied alike to target and drafter before verification.

Recipes hold a `Sampling`, and are read before torch is loaded: so torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor


class Sampling(BaseModel):
    """How the target samples. `draft` says how the drafter picks when the target samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_k: int = Field(0, ge=0, description="0 keeps all")
    top_p: float = Field(1.0, gt=0, le=1, description="1 keeps all")
    draft: Literal["sample", "argmax"] = Field(
        "sample", description="draw the draft from q (exact residual), or take its argmax"
    )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def takes_argmax(self) -> bool:
        """Whether drafts are the drafter's argmax, and so follow from the text alone."""
        return self.greedy or self.draft == "argmax"

    @property
    def as_tuple(self) -> tuple[float, int, float]:
        """(temperature, top_k, top_p): what the target's text depends on."""
        return self.temperature, self.top_k, self.top_p

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] logits -> the distribution that is sampled, float32 (one-hot when greedy)."""
        if self.greedy:
            return one_hot(logits.argmax(-1), logits.shape[-1])
        scaled = logits.float() / self.temperature
        if 0 < self.top_k < scaled.shape[-1]:
            least = scaled.topk(self.top_k, -1).values[..., -1:]
            scaled = scaled.masked_fill(scaled < least, -inf)
        probs = scaled.softmax(-1)
        if self.top_p < 1:
            ordered, order = probs.sort(-1, descending=True)
            # Keep the smallest set whose mass reaches top_p: drop what starts beyond it.
            dropped = ordered.cumsum(-1) - ordered >= self.top_p
            probs = probs.masked_fill(dropped.scatter(-1, order, dropped), 0.0)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs

    def chooser(self, uniforms: Tensor | None = None) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """How a drafter turns logits [rows, m, V] into ids [rows, m] and their distribution.

        uniforms [rows, K]: the random number of every offset, where drafts are sampled. Calls take
        them from left to right, m at a time.
        """
        from draft_opd.decoding.noise import pick

        used = 0

        def choose(logits: Tensor) -> tuple[Tensor, Tensor | None]:
            nonlocal used
            if self.greedy:
                return logits.argmax(-1), None
            if self.draft == "argmax":
                ids = logits.argmax(-1)
                return ids, one_hot(ids, logits.shape[-1])
            probs = self.probabilities(logits)
            if uniforms is None:
                raise ValueError("drawing drafts needs random numbers")
            used += logits.shape[1]
            return pick(probs, uniforms[:, used - logits.shape[1] : used]), probs

        return choose


def one_hot(ids: Tensor, size: int) -> Tensor:
    """[...] ids -> [..., size] in float32."""
    from torch.nn import functional

    return functional.one_hot(ids, size).float()
