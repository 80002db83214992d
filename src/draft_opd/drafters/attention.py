"""Attention of packed draft blocks: every block sees its own prefix and itself, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half

from draft_opd.models.block_sparse import FLEX_MINIMUM, TILE, flex, tile_mask
from draft_opd.models.gqa_attention import FEW, grouped
from draft_opd.utils.errors import UserError


class Rotary:
    """Cosines and sines of rotary positions. Not a part of the module: frequencies stay float32 whatever
    the drafter is cast to, since rounded ones drift at far positions."""

    def __init__(self, config: PretrainedConfig):
        """Raises `UserError` for a config that rotates a part of each head only (but for Gemma 4's way, which
        turns whole heads, most pairs by no angle)."""
        rope = getattr(config, "rope_parameters", None) or {}
        part = rope.get("partial_rotary_factor") or 1.0
        if part != 1.0 and rope.get("rope_type") != "proportional":
            raise UserError(
                f"the drafter's config.json rotates {part:g} of each head (partial_rotary_factor), which is "
                "not supported. If draft-opd 0.1 trained it, it rotates whole heads: set 1.0"
            )
        self._embedding = LlamaRotaryEmbedding(config=config)

    @property
    def inv_freq(self) -> Tensor:
        return self._embedding.inv_freq

    def __call__(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """like: for device and type; positions [batch, m] -> two of [batch, m, head_dim]."""
        if self.inv_freq.device != like.device:
            self._embedding.to(like.device)
        return self._embedding(like, positions)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, heads, m, d] at rotary positions; cos, sin [batch, m, d]."""
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


class ProjectedAttention(nn.Module):
    """Queries, keys and values of an attention layer, as Llama (`normed`: as Qwen3) makes them; the
    names are those of published files."""

    def __init__(self, config, inputs: int, bias: bool, normed: bool = True):
        """config: of transformers; inputs: width of what is attended to and of the queries' states."""
        super().__init__()
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(inputs, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(inputs, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(inputs, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=bias)
        self.q_norm, self.k_norm = (
            LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if normed else nn.Identity()
            for _ in range(2)
        )

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def queries(self, x: Tensor, rotary) -> Tensor:
        """[batch, m, inputs] -> rotated queries [batch, heads, m, d]."""
        q = self.q_norm(self._split(self.q_proj(x))).transpose(1, 2)
        return rotated(q, *rotary)

    def keys_values(self, x: Tensor, rotary, norm: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """[batch, m, inputs] -> rotated keys and values, each [batch, kv_heads, m, d]; `norm` in the place of
        the layer's own."""
        k = (norm or self.k_norm)(self._split(self.k_proj(x))).transpose(1, 2)
        v = self._split(self.v_proj(x)).transpose(1, 2)
        return rotated(k, *rotary), v


@dataclass
class BlockMask:
    """Who sees what: block i, at anchors[:, i], sees context slots before its anchor.

    anchors [batch, A]; `size` tokens a block. `context` cache slots are read; the blocks' own keys
    follow them. `in_place`: each row has one block, and its keys are inside these slots, at its
    positions; `filled`: every block ends at the last slot. `causal`: a token of a block sees itself
    and earlier tokens of the block; None: only in layers of kind sliding_attention, as engines serve
    them. `window` bounds the distance to a key in those layers.
    """

    anchors: Tensor
    size: int
    context: int
    causal: bool | None = None
    window: int | None = None
    in_place: bool = False
    filled: bool = False
    _made: dict = field(default_factory=dict)

    @property
    def keys(self) -> int:
        return self.context + (0 if self.in_place else self.anchors.shape[1] * self.size)

    def rule(self, kind: str, context: int | Tensor):
        """mask_mod(batch, head, query, key) for flex_attention; also builds the dense mask. context:
        slots of it, a tensor where a compiler would make another kernel for every other number."""
        anchors, size = self.anchors, self.size
        sliding = kind == "sliding_attention"
        causal = sliding if self.causal is None else self.causal
        window = self.window if sliding else None
        in_place = self.in_place

        def visible(b, h, q, k):
            block, offset = q // size, q % size
            anchor = anchors[b, block]
            if in_place:
                own = k - anchor
                inside = (own >= 0) & (own < size)
            else:
                own = k - context
                inside = (own >= 0) & (own // size == block)
            if causal:
                inside = inside & (own % size <= offset)
            before = (k < context) & (k < anchor)
            if window is not None:
                before = before & (anchor + offset - k < window)
            return inside | before

        return visible

    def dense(self, kind: str) -> Tensor | None:
        """Boolean mask [batch, 1, A * size, context + A * size], [.., context] in place; None where
        every query sees every key."""
        sliding = kind == "sliding_attention"
        if self.filled and not sliding and not self.causal:
            return None
        if kind not in self._made:
            batch, count = self.anchors.shape
            device = self.anchors.device
            q = torch.arange(count * self.size, device=device)[None, :, None]
            k = torch.arange(self.keys, device=device)[None, None, :]
            b = torch.arange(batch, device=device)[:, None, None]
            self._made[kind] = self.rule(kind, self.context)(b, None, q, k)[:, None]
        return self._made[kind]

    def sparse(self, kind: str):
        """The same as tiles for `flex`, from the anchors: no [queries, keys] matrix is made."""
        if ("sparse", kind) not in self._made:
            some, whole = self.tiles(kind)
            context = torch.full((), self.context, device=self.anchors.device)
            rule = self.rule(kind, context)
            queries = self.anchors.shape[1] * self.size
            self._made["sparse", kind] = tile_mask(some, whole, rule, queries, self.keys)
        return self._made["sparse", kind]

    def tiles(self, kind: str) -> tuple[Tensor, Tensor]:
        """Tiles [batch, query tiles, key tiles] in which some query may see some key, and those in which
        every query sees every key. Not for `in_place`."""
        count, device = self.anchors.shape[1], self.anchors.device
        queries, keys = -(-count * self.size // TILE), -(-self.keys // TILE)
        first = torch.arange(queries, device=device) * TILE
        blocks = (first // self.size, ((first + TILE - 1) // self.size).clamp_max(count - 1))
        # Anchors of every query tile: gathered, the last block repeated where a tile has fewer.
        steps = torch.arange(-(-TILE // self.size) + 1, device=device)
        index = torch.minimum(blocks[0][:, None] + steps, blocks[1][:, None])
        anchors = self.anchors[:, index].clamp_max(self.context)  # [batch, query tiles, blocks of a tile]
        lowest, highest = anchors.amin(-1)[..., None], anchors.amax(-1)[..., None]
        start = torch.arange(keys, device=device) * TILE
        own = torch.stack([self.context + blocks[0] * self.size, self.context + (blocks[1] + 1) * self.size])
        inside = (start < own[1, :, None]) & (start + TILE > own[0, :, None])
        some, whole = (start < highest) | inside, start + TILE <= lowest
        if self.window is not None and kind == "sliding_attention":
            some = some & ((start + TILE > lowest - self.window) | inside)
            whole = torch.zeros_like(whole)
        return some, whole


@dataclass
class DenseMask:
    """A mask that has been made already [batch, 1, queries, keys], in the place of a `BlockMask`."""

    mask: Tensor

    def dense(self, _kind: str) -> Tensor:
        return self.mask


def attend(q: Tensor, k: Tensor, v: Tensor, visibility: BlockMask | DenseMask, kind: str) -> Tensor:
    """q [batch, heads, A * size, d]; k, v [batch, kv_heads, context + A * size, d] -> like q.

    SDPA with a dense mask; flex_attention on CUDA when there are many blocks.
    """
    if q.is_cuda and q.shape[2] >= FLEX_MINIMUM:
        return flex(q, k, v, visibility.sparse(kind))
    if q.shape[2] <= FEW:
        return grouped(q, k, v, visibility.dense(kind))
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visibility.dense(kind))
