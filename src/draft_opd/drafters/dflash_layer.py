"""A layer of the DFlash drafter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from draft_opd.drafters.attention import ProjectedAttention, attend

# A layer's keys and values of a block -> those that the block sees, its own among them.
Join = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class DFlashAttention(ProjectedAttention):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__(config, config.hidden_size, config.attention_bias)
        self.kind = config.layer_types[layer]

    def forward(self, x: Tensor, join: Join, rotary, visibility, before: Tensor | None = None):
        """before [batch, n, H]: context states in front of the block, whose keys are not in the cache yet;
        `rotary` then holds their positions too."""
        every = x if before is None else torch.cat([before, x], 1)
        own = rotary if before is None else tuple(r[:, -x.shape[1] :] for r in rotary)
        out = attend(self.queries(x, own), *join(*self.keys_values(every, rotary)), visibility, self.kind)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DFlashLayer(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.self_attn = DFlashAttention(config, layer)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, join: Join, rotary, visibility, before: Tensor | None = None):
        x = x + self.self_attn(self.input_layernorm(x), join, rotary, visibility, before)
        return x + self.mlp(self.post_attention_layernorm(x))
