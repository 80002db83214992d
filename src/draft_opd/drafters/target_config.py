"""What families share when a new drafter takes its shape from the target."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from draft_opd.models.target import Target
from draft_opd.utils.errors import UserError


class ShapeOptions(BaseModel):
    """Options of every family; None means "as the target has it"."""

    model_config = ConfigDict(extra="forbid")

    intermediate_size: int | None = Field(None, ge=1, description="width of the MLP")
    num_attention_heads: int | None = Field(None, ge=1, description="query heads")
    num_key_value_heads: int | None = Field(None, ge=1, description="key and value heads")
    head_dim: int | None = Field(None, ge=2, multiple_of=2, description="width of a head")


def rope_parameters(config) -> dict:
    """Rotary parameters of a transformers config, whichever release wrote it."""
    rope = getattr(config, "rope_parameters", None) or {"rope_type": "default"}
    if "full_attention" in rope:  # one entry per layer type
        rope = rope["full_attention"]
    return {"rope_theta": getattr(config, "rope_theta", None) or 10000.0, **rope}


def older_rope_keys(config) -> dict:
    """The two keys that transformers 4, and engines that follow it, read."""
    rope = rope_parameters(config)
    plain = rope.get("rope_type", "default") == "default"
    return {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if plain else dict(rope),
    }


def config_for(target: Target, options: ShapeOptions) -> dict[str, Any]:
    """Keys of a transformers config for layers that fit `target`. Raises `UserError`."""
    o, t = options, target.config
    heads = o.num_attention_heads or t.num_attention_heads
    kv_heads = o.num_key_value_heads or getattr(t, "num_key_value_heads", None) or heads
    kv_heads = min(heads, kv_heads)
    if heads % kv_heads:
        raise UserError(
            f"model.options: {heads} attention heads are not a multiple of {kv_heads} key/value heads"
        )
    return {
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": o.intermediate_size or t.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": o.head_dim or getattr(t, "head_dim", None) or t.hidden_size // heads,
        "rms_norm_eps": getattr(t, "rms_norm_eps", 1e-6),
        "max_position_embeddings": target.max_positions,
        "rope_parameters": dict(rope_parameters(t)),
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


@torch.no_grad()
def adopt_final_norm(norm: nn.Module, target: Target) -> None:
    """The target's final norm is where a useful logit scale starts."""
    weight = getattr(getattr(target.decoder, "norm", None), "weight", None)
    if weight is not None and weight.shape == norm.weight.shape:
        norm.weight.copy_(weight)


def raise_mismatch(target: Target, what: str, ours: object, theirs: object) -> None:
    """Raises the `UserError` of a drafter that does not fit."""
    raise UserError(
        f"this drafter does not fit target '{target.name}': {what} {ours} against the target's {theirs}"
    )
