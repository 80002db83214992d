"""A DFlash body whose logits are corrected by the token before: what DSpark and DFlash2 have in common.

The body fills its block in one forward. Then tokens are picked from left to right, each from the body's
logits and a term that depends on the token picked before. That term is linear in a vector e [r]. So the
hidden states of such a drafter are [h; e], the body's and the correction's, and its LM head has two parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from draft_opd.drafters.base import Choose, over_target
from draft_opd.drafters.dflash import DFlashDrafter


class CorrectedDFlash(DFlashDrafter):
    """See the module docstring. A family gives `correction`, `corrected` and the second part of the head."""

    sees_drafts = True
    taken_from = ("dflash",)

    def correction(self, hidden: Tensor, before: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """hidden [..., H] of a slot, before [...]: the token in front of it -> e [..., r], and what the next
        slot needs of this one (None at the first)."""
        raise NotImplementedError

    def corrections(self, hidden: Tensor, before: Tensor) -> Tensor:
        """The same for all slots [..., K, H], [..., K] -> [..., K, r]; here for families without a state."""
        return self.correction(hidden, before)[0]

    def corrected(self, logits: Tensor, e: Tensor) -> Tensor:
        """The body's logits [..., Vd] and e [..., r] -> the draft's; -inf for what cannot be drafted."""
        raise NotImplementedError

    def correction_weight(self) -> Tensor:
        """[Vd, r]: the second part of the head."""
        raise NotImplementedError

    # -- Drafter ----------------------------------------------------------------------------

    def head_weights(self, target) -> tuple[Tensor, ...]:
        return (*super().head_weights(target), self.correction_weight())

    def _body_logits(self, target, hidden: Tensor) -> Tensor:
        return super().draft_logits(target, hidden)

    def draft_logits(self, target, hidden: Tensor) -> Tensor:
        h, e = hidden.split([self.config.hidden_size, hidden.shape[-1] - self.config.hidden_size], -1)
        return self.corrected(self._body_logits(target, h), e)

    def replay(self, target, context, anchors, ids, drafted) -> Tensor:
        hidden = self._blocks(target, context, anchors, ids, drafted.shape[2])
        before = torch.cat([ids[:, :, None], drafted[:, :, :-1]], 2)
        e = self.corrections(hidden, before)
        return torch.cat([hidden, e.to(hidden.dtype)], -1)

    def propose(self, target, context, anchors, ids, draft_length, choose: Choose, confidence=None):
        hidden = self._blocks(target, context, anchors, ids, draft_length).flatten(0, 1)
        logits = self._body_logits(target, hidden)
        before, state = ids.flatten(), None
        drafted, probs, sure = [], [], torch.ones_like(before, dtype=torch.bool)
        for k in range(draft_length):
            if confidence is not None:
                # From the token before, not from this one: where the block ends says nothing of the draw.
                sure = sure & (torch.sigmoid(self.confidence(hidden[:, k], before).float()) >= confidence)
            e, state = self.correction(hidden[:, k], before, state)
            found = self.corrected(logits[:, k], e.to(hidden.dtype))
            tokens, q = choose(over_target(found, self.vocabulary, target.vocab_size)[:, None])
            before = tokens[:, 0]
            drafted.append(torch.where(sure, before, -1))
            if q is not None:
                probs.append(q[:, 0])
        shape = anchors.shape
        tokens = torch.stack(drafted, 1).unflatten(0, shape)
        return tokens, torch.stack(probs, 1).unflatten(0, shape) if probs else None

    # -- beginning with a DFlash drafter ----------------------------------------------------

    @classmethod
    def grow(cls, drafter, target, **options):
        """Takes the body as it is, with its slot convention; what is new changes nothing at first. Only the
        options of the correction count. Raises `UserError` where the body cannot be this family's."""
        own = cls.options.model_validate(options)
        config = type(drafter.config).from_dict(drafter.config.to_dict())
        config.dflash_config = {
            **drafter.config_dict()["dflash_config"],
            **cls.own_keys(own),
            "sample_from_anchor": drafter.anchor_first,
        }
        config.block_size = drafter.block_size
        made = cls(
            config,
            own_embeddings=drafter.embed_tokens is not None,
            own_head=drafter.lm_head is not None,
        )
        _, unknown = made.load_state_dict(drafter.state_dict(), strict=False)
        if unknown:
            raise ValueError(f"the body of a {cls.family} drafter lacks {unknown}")
        return made.to(drafter.device)


def table(rows: int, rank: int, std: float) -> nn.Embedding:
    """A table of vectors, normal with that deviation."""
    made = nn.Embedding(rows, rank)
    nn.init.normal_(made.weight, std=std)
    return made
