"""DSpark: a DFlash body with a Markov head, and a head that says how sure it is (arXiv 2607.05147).

The logits of a slot are those of the body plus W2 e. e follows from the token before: its row of W1
(`vanilla`), that row gated by the body's state (`gated`), or the output of a small recurrent cell (`rnn`).
W2 is zero at first, so a new head changes nothing. Equations and names: DeepSpec's `modeling/dspark`, commit
afdfa7c9.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from draft_opd.drafters.corrected import CorrectedDFlash, table
from draft_opd.drafters.dflash_options import DFlashOptions, default_decay
from draft_opd.drafters.layouts import dspark as layout
from draft_opd.drafters.registry import register
from draft_opd.drafters.target_config import initialise
from draft_opd.utils.errors import UserError, one_line

MarkovKind = Literal["vanilla", "gated", "rnn"]
KINDS = get_args(MarkovKind)


class DSparkOptions(DFlashOptions):
    """Shape of a new drafter; None means "as the target has it"."""

    block_size: int = Field(7, ge=2, description="B: slots of a block, which drafts as many tokens")
    markov_rank: int = Field(256, ge=1, description="r: width of the tables of the Markov head")
    markov_head_type: MarkovKind = Field("vanilla", description="vLLM reads vanilla only")
    enable_confidence_head: bool = Field(True, description="a head that says how likely a token passes")
    confidence_head_with_markov: bool = Field(True, description="it sees the token before, too")
    sample_from_anchor: bool = Field(
        True, description="the anchor's slot predicts too; false: B - 1 tokens a block, as DFlash"
    )


class MarkovHead(nn.Module):
    """e [..., r] of the token before and the body's state; `markov_w2` turns it into logits."""

    def __init__(self, kind: MarkovKind, vocab: int, drafted: int, hidden: int, rank: int):
        super().__init__()
        self.kind, self.rank = kind, rank
        self.markov_w1 = table(vocab, rank, 0.02)
        self.markov_w2 = nn.Linear(rank, drafted, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        if kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)
        initialise(self)
        nn.init.zeros_(self.markov_w2.weight)

    def forward(self, hidden: Tensor, before: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """hidden [..., H], before [...], the recurrent cell's state [..., r] -> e, the next state."""
        row = self.markov_w1(before)
        if self.kind == "vanilla":
            return row, None
        hidden = hidden.to(row.dtype)
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat([hidden, row], -1))).to(row.dtype) * row, None
        state = torch.zeros_like(row) if state is None else state
        mixed = self.joint_proj(torch.cat([state, row, hidden], -1)).to(row.dtype)
        keep, candidate, out = mixed.chunk(3, -1)
        keep = torch.sigmoid(keep)
        return torch.tanh(out), keep * state + (1 - keep) * torch.tanh(candidate)


class ConfidenceHead(nn.Module):
    """A logit of the chance that a token passes, given that those before it did."""

    def __init__(self, inputs: int):
        super().__init__()
        self.proj = nn.Linear(inputs, 1)
        initialise(self)


@register("dspark")
class DSparkDrafter(CorrectedDFlash):
    """See the module docstring. `config`: a Qwen3Config with the keys of the heads in its `dflash_config`."""

    vllm_method = "dspark"
    options = DSparkOptions
    layout_module = layout
    mapped_formats = ()
    sft_loss = "dspark"
    tables = ("lm_head", "markov_head.markov_w", "confidence_head")

    def __init__(self, config, *, own_embeddings: bool = False, own_head: bool = False):
        super().__init__(config, own_embeddings=own_embeddings, own_head=own_head)
        o, hidden = config.dflash_config, config.hidden_size
        rank, kind = o["markov_rank"], o.get("markov_head_type") or "vanilla"
        if kind not in KINDS:
            raise UserError(
                f"the config.json has markov_head_type '{one_line(kind, 60)}': known are {', '.join(KINDS)}"
            )
        drafted = config.vocab_size if self.vocabulary is None else len(self.d2t)
        self.markov_head = MarkovHead(kind, config.vocab_size, drafted, hidden, rank)
        self.has_confidence = bool(o.get("enable_confidence_head"))
        self.with_markov = bool(o.get("confidence_head_with_markov"))
        if self.has_confidence:
            self.confidence_head = ConfidenceHead(hidden + (rank if self.with_markov else 0))

    @classmethod
    def own_keys(cls, o: DSparkOptions) -> dict[str, Any]:
        keys = {name: getattr(o, name) for name in layout.HEAD_KEYS}
        return {**keys, "sample_from_anchor": o.sample_from_anchor}

    @property
    def weights_per_token(self) -> int:
        return self.markov_head.markov_w2.weight.numel()

    @property
    def plain_formats(self) -> tuple[str, ...]:
        own = self.lm_head is not None or self.embed_tokens is not None
        if self.causal is not False or (own and self.vocabulary is None):
            return ()
        sglang = ("sglang",) if self.anchor_first and self.vocabulary is None else ()
        # DeepSpec reads what SGLang does, with copies of the target's embeddings and head in the file.
        deepspec = ("deepspec",) if sglang and not own else ()
        # vLLM and speculators have the vanilla head only.
        vanilla = self.markov_head.kind == "vanilla"
        return ("vllm", *sglang, "speculators", *deepspec) if vanilla else (*sglang, *deepspec)

    def sglang_flags(self) -> dict[str, int | str]:
        return {"algorithm": "DSPARK", "num-draft-tokens": self.draft_length + 1}

    def position_decay(self, num_draft_tokens: int) -> float:
        return default_decay(num_draft_tokens + 1)  # 4 for 7 tokens, as published

    # -- drafting ---------------------------------------------------------------------------

    def correction(self, hidden, before, state=None):
        return self.markov_head(hidden, before, state)

    def corrections(self, hidden: Tensor, before: Tensor) -> Tensor:
        if self.markov_head.kind != "rnn":
            return super().corrections(hidden, before)
        found, state = [], None
        for k in range(hidden.shape[-2]):
            e, state = self.correction(hidden[..., k, :], before[..., k], state)
            found.append(e)
        return torch.stack(found, -2)

    def corrected(self, logits: Tensor, e: Tensor) -> Tensor:
        w2 = self.markov_head.markov_w2
        return logits + w2(e.to(w2.weight.dtype)).to(logits.dtype)

    def correction_weight(self) -> Tensor:
        return self.markov_head.markov_w2.weight

    def confidence(self, hidden: Tensor, before: Tensor) -> Tensor | None:
        if not self.has_confidence:
            return None
        seen = hidden[..., : self.config.hidden_size]
        if self.with_markov:
            row = self.markov_head.markov_w1(before)
            seen = torch.cat([seen.to(row.dtype), row], -1)
        proj = self.confidence_head.proj
        return proj(seen.to(proj.weight.dtype))[..., 0]
