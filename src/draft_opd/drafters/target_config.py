"""What families share when a new drafter takes its shape from the target."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from draft_opd.models.target import Target
from draft_opd.models.target_info import config_number
from draft_opd.utils.errors import UserError


class ShapeOptions(BaseModel):
    """Options of every family; None means "as the target has it"."""

    model_config = ConfigDict(extra="forbid")

    intermediate_size: int | None = Field(None, ge=1, description="width of the MLP")
    num_attention_heads: int | None = Field(None, ge=1, description="query heads")
    num_key_value_heads: int | None = Field(None, ge=1, description="key and value heads")
    head_dim: int | None = Field(None, ge=2, multiple_of=2, description="width of a head")


def full_attention(rope: dict) -> dict:
    """The parameters themselves, also where there is one entry per layer type."""
    return rope.get("full_attention", rope)


def rope_parameters(config) -> dict:
    """Rotary parameters of a transformers config, whichever release wrote it."""
    rope = full_attention(getattr(config, "rope_parameters", None) or {"rope_type": "default"})
    return {"rope_theta": getattr(config, "rope_theta", None) or 10000.0, **rope}


def older_rope_keys(config) -> dict:
    """The two keys that transformers 4, and engines that follow it, read."""
    rope = rope_parameters(config)
    plain = rope.get("rope_type", "default") == "default"
    return {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if plain else dict(rope),
    }


# Of the target's rotary positions, those that a drafter has too: it rotates whole heads, text positions.
KEPT_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
NOT_THE_DRAFTERS = ("partial_rotary_factor", "mrope_section", "mrope_interleaved", "type")
NO_ROTARY_THETA = 1e6  # for drafters of targets without rotary positions


def drafter_rope(config: Any) -> dict:
    """Rotary parameters of a new drafter: the target's base (and scaling, where whole heads can have
    it). Engines honour a partial factor that a drafter's config names, and training does not rotate
    partly, so none is named."""
    if not (getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)):
        return {"rope_type": "default", "rope_theta": NO_ROTARY_THETA}
    rope = {k: v for k, v in rope_parameters(config).items() if k not in NOT_THE_DRAFTERS}
    if rope.get("rope_type", "default") in KEPT_ROPE_TYPES:
        return rope
    return {"rope_type": "default", "rope_theta": rope["rope_theta"]}


def config_for(target: Target, options: ShapeOptions) -> dict[str, Any]:
    """Keys of a transformers config for layers that fit `target`. Raises `UserError`."""
    o, t = options, target.config
    heads = o.num_attention_heads or config_number(t, "num_attention_heads") or 8
    kv_heads = o.num_key_value_heads or config_number(t, "num_key_value_heads") or heads
    kv_heads = min(heads, kv_heads)
    if heads % kv_heads:
        raise UserError(
            f"model.options: {heads} attention heads are not a multiple of {kv_heads} key/value heads"
        )
    width = o.head_dim or config_number(t, "head_dim") or t.hidden_size // heads
    return {
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": o.intermediate_size
        or config_number(t, "intermediate_size")
        or 4 * target.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width + width % 2,  # rotary positions turn pairs
        "rms_norm_eps": getattr(t, "rms_norm_eps", 1e-6),
        "max_position_embeddings": target.max_positions,
        "rope_parameters": drafter_rope(t),
        "tie_word_embeddings": False,
        "attention_bias": False,
    }


def initialise(module: nn.Module) -> None:
    """Small random matrices, no bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


FINAL_NORMS = ("norm", "final_layernorm", "norm_f", "embedding_norm")


@torch.no_grad()
def adopt_final_norm(norm: nn.Module, target: Target) -> None:
    """The target's final norm is where a useful logit scale starts. Its scale is measured, since some
    multiply by w and some by 1 + w."""
    theirs = next((x for n in FINAL_NORMS if (x := getattr(target.decoder, n, None)) is not None), None)
    weight = getattr(theirs, "weight", None)
    if weight is None or weight.shape != norm.weight.shape:
        return
    # Of a vector whose numbers are all 1 and -1, in turn, a norm leaves its own scale (LayerNorm too).
    x = torch.ones_like(weight)
    x[1::2] = -1
    scale = theirs(x[None])[0] * x
    for exact in (weight, 1 + weight):
        if torch.allclose(scale, exact, rtol=1e-2, atol=1e-3):
            norm.weight.copy_(exact)


def raise_mismatch(target: Target, what: str, ours: object, theirs: object) -> None:
    """Raises the `UserError` of a drafter that does not fit."""
    raise UserError(
        f"this drafter does not fit target '{target.name}': {what} {ours} against the target's {theirs}"
    )
