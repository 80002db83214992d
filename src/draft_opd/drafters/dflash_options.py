"""The shape of a new DFlash drafter, and what its recipe takes from it."""

from __future__ import annotations

from pydantic import Field

from draft_opd.drafters.target_config import ShapeOptions


def default_target_layers(num_target_layers: int, count: int) -> tuple[int, ...]:
    """`count` layers spread from the second to the third-last (0-based), as z-lab does."""
    if count == 1:
        return (num_target_layers // 2,)
    span = num_target_layers - 4
    return tuple(round(1 + i * span / (count - 1)) for i in range(count))


def default_decay(block_size: int) -> float:
    """γ_sft of the published recipe: 7 for 16, 5 for 10, 4 for 8 (linear between)."""
    if block_size <= 10:
        return max(1.0, 4 + (block_size - 8) / 2)
    return 5 + (block_size - 10) / 3


class DFlashOptions(ShapeOptions):
    """Shape of a new drafter; None means "as the target has it"."""

    num_layers: int = Field(1, ge=1, description="draft layers")
    block_size: int = Field(16, ge=2, description="B: the anchor's token and B - 1 drafted ones")
    target_layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="0-based layers that are tapped; None: spread evenly"
    )
    num_target_features: int | None = Field(None, ge=1, description="how many, if spread evenly")
    mask_token_id: int | None = Field(None, ge=0, description="None: one that the target never says")
