"""A layer of DeepSpec's drafters for Gemma 4: the target's full-attention layer over a draft block.

DeepSpec `modeling/dspark/gemma4/modeling.py` (afdfa7c). Unlike the usual layer it norms what attention and
MLP give, norms values without a weight, does not scale attention, and may take its values from the keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from draft_opd.drafters.attention import rotated
from draft_opd.drafters.dflash_layer import DFlashAttention, DFlashLayer, Join


class Gemma4Attention(DFlashAttention):
    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.eps = config.rms_norm_eps
        if config.gemma4["attention_k_eq_v"]:
            self.v_proj = None

    def queries(self, x: Tensor, rotary) -> Tensor:
        return super().queries(x, rotary) * self.head_dim**0.5  # attention divides by it

    def keys_values(self, x: Tensor, rotary, norm: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        keys = self._split(self.k_proj(x))
        values = keys if self.v_proj is None else self._split(self.v_proj(x))
        v = nn.functional.rms_norm(values.float(), (self.head_dim,), eps=self.eps).to(values.dtype)
        return rotated((norm or self.k_norm)(keys).transpose(1, 2), *rotary), v.transpose(1, 2)


class Gemma4Layer(DFlashLayer):
    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.self_attn = Gemma4Attention(config, layer)
        self.pre_feedforward_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, x: Tensor, join: Join, rotary, visibility, before: Tensor | None = None):
        out = self.self_attn(self.input_layernorm(x), join, rotary, visibility, before)
        x = x + self.post_attention_layernorm(out)
        out = self.mlp(self.pre_feedforward_layernorm(x))
        return (x + self.post_feedforward_layernorm(out)) * self.layer_scalar
