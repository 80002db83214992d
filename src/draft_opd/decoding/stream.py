"""One prompt to a terminal: text as it comes, accepted draft tokens marked."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.text import Text

from draft_opd.decoding.draft_length import Length, length_and_controller
from draft_opd.decoding.generate import Timing, speculate
from draft_opd.decoding.rounds import Round
from draft_opd.decoding.sampling import Sampling
from draft_opd.drafters.base import Drafter
from draft_opd.models.target import Target
from draft_opd.utils.console import Screen


class Detokenizer:
    """Text of a growing list of ids; a piece is held back while its last character is not whole."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids = tokenizer, []
        # Only the piece before is decoded again: what a token's text is depends on its neighbour.
        self.before = self.read = 0

    def push(self, ids: list[int]) -> str:
        self.ids += ids
        text = self._new()
        if text.endswith("\ufffd"):
            return ""
        if text:
            self.before, self.read = self.read, len(self.ids)
        return text

    def rest(self) -> str:
        """What was held back, as it is."""
        return self._new()

    def _new(self) -> str:
        old, new = (
            self.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in (self.ids[self.before : self.read], self.ids[self.before :])
        )
        return new[len(old) :]


def stream(
    target: Target,
    drafter: Drafter,
    prompt: str,
    screen: Screen,
    *,
    raw: bool = False,
    mark: str = "auto",
    thinking: bool | None = None,
    max_new_tokens: int = 512,
    draft_length: Length = None,
    tree: Sequence[int] | None = None,
    confidence: float | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> dict:
    """Prints while decoding (nothing in JSON mode) and returns the figures."""
    if raw or not getattr(target.tokenizer, "chat_template", None):
        ids = target.tokenizer.encode(prompt)
    else:
        ids = target.chat_ids([{"role": "user", "content": prompt}], thinking)
    text = Detokenizer(target.tokenizer)
    colour = mark == "auto" and screen.out.is_terminal
    brackets = mark == "brackets" or (mark == "auto" and not colour)

    def show(piece: str, drafted: bool) -> None:
        if screen.as_json or not piece:
            return
        if drafted and brackets:
            piece = f"⟦{piece}⟧"
        style = "bold green" if drafted and colour else ""
        screen.out.print(Text(piece, style=style), end="")
        sys.stdout.flush()

    def on_round(_row: int, tokens: list[int], made: Round) -> None:
        show(text.push(tokens[: made.accepted]), True)
        show(text.push(tokens[made.accepted :]), False)

    length, pace = length_and_controller(draft_length, drafter.draft_length)
    clock, began = Timing(), time.perf_counter()
    result = speculate(
        target,
        drafter,
        [ids],
        max_new_tokens=max_new_tokens,
        draft_length=length,
        tree=tree,
        confidence=confidence,
        sampling=sampling,
        seed=seed,
        pace=pace,
        timing=clock,
        on_round=on_round,
    )[0]
    seconds = time.perf_counter() - began
    count, rounds = len(result.token_ids), len(result.rounds)
    value = {
        "text": target.tokenizer.decode(result.token_ids, skip_special_tokens=True),
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "tokens": count,
        "rounds": rounds,
        "tau": result.tau,
        "drafted_tokens": sum(r.accepted for r in result.rounds),
        "seconds": seconds,
        "tokens_per_second": count / max(clock.decode, 1e-9),
    }
    if not screen.as_json:
        screen.out.print()
    shown = "green" if colour else "marked" if brackets else "not marked"
    screen.say(
        f"{count} tokens in {rounds} rounds: τ {value['tau']:.2f}, "
        f"{value['drafted_tokens']} of them drafted ({shown}); "
        f"{value['tokens_per_second']:.1f} tokens/s; ended by {result.finish_reason}"
    )
    return value
