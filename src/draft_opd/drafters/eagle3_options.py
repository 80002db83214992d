"""The shape of a new EAGLE-3 drafter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from draft_opd.drafters.target_config import ShapeOptions
from draft_opd.utils.errors import UserError

# The training-time test of the published recipes unrolls 7 steps weighted 0.8^step.
STEPS, STEP_DECAY = 7, 4.4814  # 0.8^k = exp(-k / 4.4814)


def default_target_layers(count: int) -> tuple[int, ...]:
    """0-based layers whose outputs are hidden_states[2], [n // 2] and [n - 3]; spread evenly where
    a short target makes these collide."""
    layers = (1, count // 2 - 1, count - 4)
    if len(set(layers)) == 3 and min(layers) >= 0 and list(layers) == sorted(layers):
        return layers
    if count < 4:
        raise UserError(f"EAGLE-3 taps three layers before the last; the target has {count}")
    return (0, (count - 2) // 2, count - 2)


class Eagle3Options(ShapeOptions):
    """Shape of a new drafter; None means "as the target has it"."""

    draft_length: int = Field(STEPS, ge=1, description="steps unrolled in training; K")
    draft_vocab_size: int | None = Field(None, ge=2, description="None: the whole vocabulary")
    target_layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="0-based layers that are tapped; None: engines' default"
    )
    attention: Literal["llama", "qwen3"] = Field("llama", description="qwen3: q and k normed")
    norm_before_residual: bool = Field(False, description="the residual begins behind hidden_norm")
    norm_output: bool = Field(False, description="the normed state is fed back (EAGLE 3.1)")
    norm_before_fc: bool = Field(False, description="one norm over the features of all layers")
    fc_norm: bool = Field(False, description="one norm for the features of each layer")
