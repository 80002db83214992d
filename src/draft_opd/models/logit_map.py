"""What a model does to logits behind its LM head: a scale (Granite, Cohere), a soft cap (Gemma 2, Gemma 4).

It is read from the config and checked by a forward in which the head's input is made large: logits of a fresh
model are so small that a cap does not show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 300.0  # logits of the probe: ten times the usual cap of 30
SCALES = ("logit_scale", "lm_head_multiplier")  # multiplied with
DIVISORS = ("logits_scaling",)
CAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True)
class LogitMap:
    """z -> cap · tanh(scale · z / cap); without a cap scale · z."""

    scale: float = 1.0
    cap: float | None = None

    @property
    def is_identity(self) -> bool:
        return self.scale == 1.0 and self.cap is None

    def __call__(self, logits: Tensor) -> Tensor:
        """Of any shape; the same type."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, logits: Tensor) -> Tensor:
        """Its derivative there."""
        if self.cap is None:
            return torch.full_like(logits, self.scale)
        return self.scale * (1 - torch.tanh(logits * self.scale / self.cap).square())


IDENTITY = LogitMap()


def find_logit_map(model: nn.Module, head: nn.Module, config: Any) -> LogitMap | None:
    """The map that config.json names, if the model does just that; None where it does anything else."""
    scale = 1.0
    for name in SCALES:
        scale *= _number(config, name) or 1.0
    for name in DIVISORS:
        scale /= _number(config, name) or 1.0
    cap = next((value for name in CAPS if (value := _number(config, name))), None)
    found = LogitMap(scale, cap)
    raw, final = _probe(model, head)
    # The model computes in its own type: 16 bit has 2 to 3 digits.
    bound = 1e-3 if raw.dtype == torch.float32 else 2e-2
    wanted = found(raw.float())
    return found if bool(((final.float() - wanted).abs() <= bound * wanted.abs() + bound).all()) else None


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) and value > 0 else None


@torch.inference_mode()
def _probe(model: nn.Module, head: nn.Module) -> tuple[Tensor, Tensor]:
    """Large logits as the head gives them, and as the model does."""
    ids = torch.arange(3, device=head.weight.device)[None]
    seen: dict[str, Any] = {"factor": 1.0}

    def before(_module, inputs):
        return (inputs[0] * seen["factor"],)

    def behind(_module, _inputs, output):
        seen["raw"] = output

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(behind)]
    try:
        model(input_ids=ids, use_cache=False)
        largest = float(seen["raw"].abs().max())
        seen["factor"] = LARGE / largest if 0 < largest < LARGE else 1.0
        final = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen["raw"], final
