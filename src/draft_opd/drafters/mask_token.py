"""Which token stands for MASK in a new drafter's blocks."""

from __future__ import annotations

from draft_opd.models.target import Target
from draft_opd.utils.errors import UserError


def find_mask_token(target: Target) -> int:
    """A token id that never occurs in text, to stand for MASK.

    In this order: the tokenizer's own mask token, an unused row of the embedding table, a
    special token that neither starts, ends nor pads text.
    """
    tokenizer = target.tokenizer
    if tokenizer is not None:
        if tokenizer.mask_token_id is not None:
            return tokenizer.mask_token_id
        if len(tokenizer) < target.vocab_size:
            return len(tokenizer)
        used = {tokenizer.bos_token_id, tokenizer.eos_token_id, *target.stop_ids}
        used |= {tokenizer.pad_token_id}
        template = tokenizer.chat_template or ""
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items()):
            if token.special and token_id not in used and token.content not in str(template):
                return token_id
    raise UserError(
        f"target '{target.name}' has no spare token for MASK: set model.options.mask_token_id in the recipe"
    )
