"""DFlash2: a DFlash body with convolutions inside its blocks, and a selector among candidates.

Around attention and MLP of every layer a causal convolution over a few slots of the block mixes a slot with
those before it; its kernels follow from the layer's normed input. Of the body's logits U_k the K largest are
candidates C_k, and a walk from left to right takes one of each, given the one before:

    S_k(v | u) = U_k(v) + <A[u] * R h_k, D[v]>,  v in C_k

The draft's distribution is the softmax of S_k over C_k, and zero elsewhere. Equations and names: z-lab's
package dflash 0.1.0 (`GroupedDynamicCausalConv`, `CandidateSelector`). A new one drafts as the DFlash body
alone would: the convolutions are the identity, and D is zero. Its training is unpublished; ours is a guess
(`losses/heads.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from draft_opd.drafters.corrected import CorrectedDFlash, table
from draft_opd.drafters.dflash_layer import DFlashLayer
from draft_opd.drafters.dflash_options import DFlashOptions
from draft_opd.drafters.layouts import dflash2 as layout
from draft_opd.drafters.registry import register
from draft_opd.drafters.target_config import initialise
from draft_opd.utils.errors import UserError

NOT_LOADED = "nothing of what DFlash2 adds to DFlash was loaded (misnamed tensors, which SGLang passes over)"


class DFlash2Options(DFlashOptions):
    """Shape of a new drafter; None means "as the target has it"."""

    block_size: int = Field(8, ge=2, description="B: the anchor's token and B - 1 drafted ones")
    conv_kernel_size: int = Field(2, ge=1, description="slots that a convolution looks at")
    conv_group_size: int = Field(16, ge=1, description="channels that share a kernel's dynamic part")
    selector_rank: int = Field(256, ge=1, description="r: width of the selector's tables")
    selector_top_k: int = Field(16, ge=1, description="K: candidates a slot")


class DynamicConvolution(nn.Module):
    """y[i, c] = Σ_j (base[j, c] + δ[i, j, group of c]) x[i - j, c], within a block. There are two kernels,
    before and behind a sublayer; δ of both follows from the sublayer's input."""

    def __init__(self, hidden: int, taps: int, group: int):
        super().__init__()
        self.taps, self.group = taps, group
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, hidden))
        self.kernel_projection = nn.Linear(hidden, 2 * taps * hidden // group, bias=False)
        self.become_identity()

    def become_identity(self) -> None:
        nn.init.zeros_(self.base_kernel)
        nn.init.ones_(self.base_kernel.data[:, 0])
        nn.init.zeros_(self.kernel_projection.weight)

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., H] -> δ of both kernels, [..., taps, H / group, 1] each."""
        dynamic = self.kernel_projection(x).unflatten(-1, (2, self.taps, -1, 1))
        return dynamic.select(-4, 0), dynamic.select(-4, 1)

    def forward(self, x: Tensor, which: int, dynamic: Tensor) -> Tensor:
        """x [..., B, H]: whole blocks; dynamic [..., B, taps, H / group, 1]."""
        grouped = x.unflatten(-1, (-1, self.group))
        base = self.base_kernel[which].to(x.dtype).unflatten(-1, (-1, self.group))
        out = torch.zeros_like(grouped)
        for j in range(self.taps):
            before = grouped if j == 0 else F.pad(grouped, (0, 0, 0, 0, j, 0))[..., : x.shape[-2], :, :]
            out = out + (base[j] + dynamic[..., j, :, :]) * before
        return out.flatten(-2)


class DFlash2Layer(DFlashLayer):
    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        o = config.dflash_config
        sizes = (config.hidden_size, o["conv_kernel_size"], o["conv_group_size"])
        self.attention_conv, self.mlp_conv = DynamicConvolution(*sizes), DynamicConvolution(*sizes)

    def forward(self, x, join, rotary, visibility, before=None):
        # A cache's block is alone in its row: a mask that was made already does not say how long it is.
        size = getattr(visibility, "size", x.shape[1])

        def attention(y: Tensor) -> Tensor:
            return self.self_attn(y, join, rotary, visibility, before)

        x = x + _around(self.attention_conv, attention, self.input_layernorm(x), size)
        return x + _around(self.mlp_conv, self.mlp, self.post_attention_layernorm(x), size)


def _around(conv: DynamicConvolution, part, x: Tensor, size: int) -> Tensor:
    """`part` between the two convolutions; x [batch, A * size, H]. Convolutions begin anew at every block."""
    blocks = x.unflatten(1, (-1, size))
    first, second = conv.kernels(blocks)
    inner = part(conv(blocks, 0, first).flatten(1, 2))
    return conv(inner.unflatten(1, (-1, size)), 1, second).flatten(1, 2)


class CandidateSelector(nn.Module):
    def __init__(self, vocab: int, hidden: int, rank: int):
        super().__init__()
        self.predecessor_codebook = table(vocab, rank, 1.0)
        self.successor_codebook = table(vocab, rank, 0.0)
        self.hidden_projection = nn.Linear(hidden, rank, bias=False)
        initialise(self)


def _plain_dflash(_config: dict, tensors: dict[str, Tensor]) -> None:
    for name, value in tensors.items():
        if name.endswith("base_kernel"):
            value.zero_()[:, 0] = 1.0
        elif name.endswith(("kernel_projection.weight", "successor_codebook")):
            value.zero_()


@register("dflash2")
class DFlash2Drafter(CorrectedDFlash):
    """See the module docstring. `config` is a Qwen3Config; the four sizes are in its `dflash_config`."""

    options = DFlash2Options
    layout_module = layout
    layer_class = DFlash2Layer
    tables = ("lm_head", "candidate_selector.predecessor", "candidate_selector.successor")

    def __init__(self, config, *, own_embeddings: bool = False, own_head: bool = False):
        group = config.dflash_config["conv_group_size"]
        if config.hidden_size % group:
            raise UserError(f"conv_group_size: {config.hidden_size} channels are not a multiple of {group}")
        if config.dflash_config["selector_top_k"] > config.vocab_size:
            raise UserError(f"selector_top_k: there are {config.vocab_size} tokens to choose among")
        super().__init__(config, own_embeddings=own_embeddings, own_head=own_head)
        if self.vocabulary is not None:
            raise UserError("a DFlash2 drafter has no draft vocabulary: its tables are over all tokens")
        if self.anchor_first:
            raise UserError(
                "sample_from_anchor must be false: a DFlash2 drafter's anchor slot predicts nothing"
            )
        for layer in self.layers:  # which the body has made random
            layer.attention_conv.become_identity()
            layer.mlp_conv.become_identity()
        self.num_candidates = config.dflash_config["selector_top_k"]
        self.candidate_selector = CandidateSelector(
            config.vocab_size, config.hidden_size, config.dflash_config["selector_rank"]
        )

    @classmethod
    def own_keys(cls, o: DFlash2Options) -> dict[str, Any]:
        return {name: getattr(o, name) for name in layout.SIZES}

    def known_faults(self, num_layers: int):
        return {NOT_LOADED: _plain_dflash, **super().known_faults(num_layers)}

    def tensors(self) -> dict[str, Tensor]:
        return layout.without_suffixes(super().tensors())

    # -- drafting ---------------------------------------------------------------------------

    def correction(self, hidden, before, state=None):
        selector = self.candidate_selector
        projected = selector.hidden_projection(hidden.to(selector.hidden_projection.weight.dtype))
        return selector.predecessor_codebook(before) * projected, None

    def corrected(self, logits: Tensor, e: Tensor) -> Tensor:
        unary, ids = logits.topk(min(self.num_candidates, logits.shape[-1]), -1)
        rows = self.candidate_selector.successor_codebook(ids)
        scores = unary + (rows * e[..., None, :].to(rows.dtype)).sum(-1).to(unary.dtype)
        return torch.full_like(logits, -torch.inf).scatter(-1, ids, scores)

    def correction_weight(self) -> Tensor:
        return self.candidate_selector.successor_codebook.weight
