"""EAGLE-3's decoder layer: attention of one step over a context and the block's own steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from draft_opd.drafters.attention import ProjectedAttention


class Eagle3Attention(ProjectedAttention):
    """Queries of one step against context slots and the block's own earlier steps.

    qk_norm: queries and keys are normed head by head, as in Qwen3.
    """

    def __init__(self, config: LlamaConfig, qk_norm: bool):
        super().__init__(config, 2 * config.hidden_size, bias=False, normed=qk_norm)
        self.groups = config.num_attention_heads // config.num_key_value_heads

    def forward(self, x: Tensor, rotary, context, seen: Tensor, own_k: Tensor, own_v: Tensor):
        """x [batch, A, 2H], one query a block; context (k, v) [batch, heads, C, d]; seen
        [batch, A, C]; own_k, own_v [batch, kv_heads, A, steps, d]. Returns [batch, A, H]."""
        q = self.queries(x, rotary) * self.head_dim**-0.5
        keys, values = context
        own_k, own_v = (t.repeat_interleave(self.groups, 1) for t in (own_k, own_v))
        far = (q @ keys.to(q.dtype).transpose(2, 3)).masked_fill(~seen[:, None], -torch.inf)
        near = (q[:, :, :, None] * own_k).sum(-1)
        weights = torch.cat([far, near], -1).float().softmax(-1).to(own_v.dtype)
        width = keys.shape[2]
        out = weights[..., :width] @ values.to(weights.dtype)
        out = out + (weights[..., width:, None] * own_v).sum(3)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Eagle3Layer(nn.Module):
    def __init__(self, config: LlamaConfig, qk_norm: bool, norm_before_residual: bool):
        super().__init__()
        self.self_attn = Eagle3Attention(config, qk_norm)
        self.norm_before_residual = norm_before_residual
        self.mlp = LlamaMLP(config)
        for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
            setattr(self, name, LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps))

    def forward(self, hidden: Tensor, x: Tensor, *attended) -> Tensor:
        """Attention over `attended` and MLP, added to the residual [batch, A, H]."""
        hidden = hidden + self.self_attn(x, *attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def join(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Token embeddings and hidden states, normed and side by side [..., 2H]; the residual."""
        normed = self.hidden_norm(hidden)
        x = torch.cat([self.input_layernorm(embedded), normed], -1)
        return x, normed if self.norm_before_residual else hidden
