"""Who wrote each token of a response: what the report colours."""

from __future__ import annotations

from draft_opd.decoding.generate import Generation
from draft_opd.decoding.stream import Detokenizer

DRAFTED, OWN = "drafted", "own"


def pieces(tokenizer, made: Generation) -> list[dict]:
    """The response in order, token by token; their texts joined are the whole text.

    Each has `text`, `by` ("drafted": proposed and accepted; "own": the target's), `round` (from 0),
    and, on a token of the target's that replaced a draft, `rejected`: what had been drafted from
    there on, as text. A special token has no text but its name, under `special`.
    """
    text, found, at = Detokenizer(tokenizer), [], 0
    for number, r in enumerate(made.rounds):
        count = min(r.accepted + 1, len(made.token_ids) - at)
        for k in range(count):
            piece = {
                "text": text.push([made.token_ids[at + k]]),
                "by": DRAFTED if k < r.accepted else OWN,
                "round": number,
            }
            token = made.token_ids[at + k]
            if not tokenizer.decode([token], skip_special_tokens=True):
                piece["special"] = tokenizer.decode([token], skip_special_tokens=False)
            refused = [i for i in r.drafted[r.accepted :] if i >= 0]
            if k == r.accepted and refused:
                piece["rejected"] = tokenizer.decode(refused, skip_special_tokens=False)
            found.append(piece)
        at += count
    if found:
        found[-1]["text"] += text.rest()
    return found


def sample(task: str, prompt_text: str, tokenizer, made: dict[str, Generation]) -> dict:
    """One prompt as every side answered it."""
    return {
        "task": task,
        "prompt": prompt_text,
        "sides": [
            {
                "side": name,
                "tau": g.tau,
                "rounds": len(g.rounds),
                "tokens": len(g.token_ids),
                "pieces": pieces(tokenizer, g),
            }
            for name, g in made.items()
        ],
    }
