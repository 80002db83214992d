"""Attention of few queries whose key and value heads serve several query heads each.

transformers repeats keys and values for every query head, which for a decoding step copies the
whole context several times. With few queries the query heads of a group become queries of one head: the
same products, and nothing is copied. This is the only place that touches transformers' attention
registry.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from draft_opd.models.block_sparse import TileMask, flex

NAME = "draft_opd_grouped"
FEW = 64  # queries; of more, repeating the mask would cost more than repeating keys


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None):
    """q [batch, heads, m, d], k and v [batch, kv_heads, n, d], mask [batch, 1, m, n] -> like q."""
    batch, heads, count, width = q.shape
    groups = heads // k.shape[1]
    q = q.reshape(batch, k.shape[1], groups * count, width)
    if mask is not None and groups > 1:
        mask = mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, count, -1)


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    if isinstance(attention_mask, TileMask):
        return flex(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None
    one_mask = attention_mask is not None and attention_mask.shape[1] == 1
    more = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    if query.shape[2] > FEW or not one_mask or dropout or more:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    out = grouped(query, key, value, attention_mask[..., : key.shape[2]], scaling)
    return out.transpose(1, 2).contiguous(), None


def use_grouped(model: PreTrainedModel) -> bool:
    """Lets a model that attends with SDPA attend like this; whether it takes boolean masks."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True
