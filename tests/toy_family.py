"""A whole drafter family in one file: the next token follows from the one before alone (a neural
bigram). It is here to show what a family needs, and what it does not."""

from __future__ import annotations

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from draft_opd.drafters.base import Drafter
from draft_opd.drafters.registry import register
from draft_opd.drafters.target_config import raise_mismatch


class NoCache:
    """It looks at nothing but the last token, so it keeps nothing of the text."""

    def reserve(self, capacity): ...

    def set_bound(self, slots, filled=False, static=False, fused=False): ...

    def allocate(self, rows, capacity):
        return self

    def first_rows(self, rows):
        return self

    def copy_rows(self, source, rows): ...

    def move_rows(self, source, rows): ...

    def select(self, rows): ...

    def snapshot(self): ...

    def rollback(self, state, lengths): ...


class BigramOptions(BaseModel):
    draft_length: int = Field(4, ge=1)


@register("bigram")
class BigramDrafter(Drafter):
    options = BigramOptions
    target_layers = (0,)
    formats = ("toy",)
    sees_drafts = True

    def __init__(self, hidden_size: int, draft_length: int):
        super().__init__()
        self.hidden_size, self.draft_length = hidden_size, draft_length
        self.mix = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    @classmethod
    def create(cls, target, counts=None, **options):
        return cls(target.hidden_size, BigramOptions(**options).draft_length).to(target.device)

    @classmethod
    def matches(cls, config):
        return "BigramDraftModel" in (config.get("architectures") or [])

    @classmethod
    def from_files(cls, config, tensors):
        return cls(config["hidden_size"], config["draft_length"]), tensors

    def config_dict(self):
        return {
            "architectures": ["BigramDraftModel"],
            "hidden_size": self.hidden_size,
            "draft_length": self.draft_length,
        }

    def check_target(self, target):
        if self.hidden_size != target.hidden_size:
            raise_mismatch(target, "hidden size", self.hidden_size, target.hidden_size)

    def build_cache(self, target, ids, features):
        return NoCache()

    def extend_cache(self, context, target, ids, features, positions): ...

    def head(self, target):
        return target.head

    def _next(self, target, before: Tensor) -> Tensor:
        """Token ids [...] -> hidden states [..., H] of the token that follows each."""
        return self.mix(target.embed(before).to(self.mix[0].weight.dtype))

    def replay(self, target, context, anchors, ids, drafted):
        return self._next(target, torch.cat([ids[..., None], drafted[..., :-1]], -1).clamp_min(0))

    def propose(self, target, context, anchors, ids, draft_length, choose):
        tokens, probs, before = [], [], ids
        for _ in range(draft_length):
            logits = self.logits(target, self._next(target, before)).flatten(0, 1)
            found, prob = choose(logits[:, None])
            before = found.view(ids.shape)
            tokens.append(before)
            probs.append(prob)
        shape = (*ids.shape, draft_length)
        sampled = None if probs[0] is None else torch.cat(probs, 1).view(*shape, -1)
        return torch.stack(tokens, -1), sampled

    def position_decay(self, num_draft_tokens):
        return 4.0

    def forward_token_counts(self, num_draft_tokens):
        return [1] * num_draft_tokens
