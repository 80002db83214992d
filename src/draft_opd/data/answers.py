"""Answers that one already has: logged conversations as trajectories, and every turn of one as a prompt.

Such text is not the target's own. A drafter can be trained on it (SFT on foreign text), but the rounds that
decoding would have had do not follow from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from draft_opd.data.conversation import ASSISTANT, Conversation
from draft_opd.data.prompts import Prompt, conversations_in
from draft_opd.data.row_files import read_rows
from draft_opd.data.skipped import Skipped
from draft_opd.data.trajectory import Trajectory, read_trajectories
from draft_opd.models.rows import pad_rows
from draft_opd.models.target import Target
from draft_opd.models.target_info import TargetInfo
from draft_opd.utils.errors import RowProblem, UserError

SCORED = 2**26  # logits computed at a time


def read_conversations(
    name: str | Path, limit: int | None, skipped: Skipped
) -> Iterator[tuple[str, int, str, Conversation]]:
    """(file, line, id, conversation) of every row; see `read_prompts`."""
    ids: set[str] = set()
    for row, place, found in conversations_in(itertools.islice(read_rows(name), limit), skipped):
        unique = found.id or place
        if unique in ids:
            names = (f"{unique}-{k}" for k in itertools.count(2))
            unique = next(name for name in names if name not in ids)
        ids.add(unique)
        yield row.file, row.line, unique, found


def turns_of(conversation: Conversation) -> list[int]:
    """Indices of the messages that are answers."""
    return [i for i, m in enumerate(conversation.messages) if i and m["role"] == ASSISTANT]


def ends_of(conversation: Conversation) -> list[int]:
    """Where the target is to answer: before every logged answer, and behind a last question."""
    messages = conversation.messages
    open_end = [len(messages)] if messages[-1]["role"] != ASSISTANT else []
    return turns_of(conversation) + open_end


def _turn(row_id: str, k: int, count: int) -> str:
    return row_id if count == 1 else f"{row_id}/turn-{k + 1}"


def every_turn(name: str | Path, limit: int | None, skipped: Skipped) -> list[Prompt]:
    """A prompt for every assistant turn of the first `limit` conversations, each on the history as it
    was logged; a conversation without answers is one prompt."""
    found = []
    for file, line, row_id, c in read_conversations(name, limit, skipped):
        ends = ends_of(c)
        skipped.seen += max(0, len(ends) - 1)  # the unit is a turn
        for k, end in enumerate(ends):
            label = _turn(row_id, k, len(ends))
            found.append(Prompt(label, c.messages[:end], (), c.tools, c.template_kwargs, file, line))
    skipped.check()
    if not found:
        raise UserError(f"'{name}' holds no conversations")
    return found


def regenerate(
    name: str | Path,
    limit: int | None,
    skipped: Skipped,
    ask: Callable[[list[Prompt]], Path],
    decode: Callable[[list[int]], str],
) -> Path:
    """The same on a history that the target answered itself, turn by turn; returns what `ask` wrote.

    ask(prompts): collects these, into one file. decode: an answer's text. A conversation whose answer is
    missing ends there.
    """
    rows = list(read_conversations(name, limit, skipped))
    skipped.check()
    if not rows:
        raise UserError(f"'{name}' holds no conversations")
    histories = {row_id: list(c.messages) for _, _, row_id, c in rows}
    path = Path()
    for k in itertools.count():
        asked = []
        for file, line, row_id, c in rows:
            ends = ends_of(c)
            if k < len(ends) and row_id in histories:
                label, messages = _turn(row_id, k, len(ends)), histories[row_id][: ends[k]]
                asked.append(
                    (Prompt(label, messages, (), c.tools, c.template_kwargs, file, line), row_id, ends[k])
                )
        if not asked:
            return path
        path = ask([prompt for prompt, _, _ in asked])
        made = {t.id: t.response_ids for t in read_trajectories(path)}
        for prompt, row_id, end in asked:
            if prompt.id not in made:
                del histories[row_id]
            elif end < len(histories[row_id]):
                histories[row_id][end] = {"role": ASSISTANT, "content": decode(made[prompt.id])}
    return path


def answer_ids(
    target: TargetInfo, conversation: Conversation, turn: int, thinking: bool | None = None
) -> tuple[list[int], list[int], str]:
    """(prompt ids, answer ids with their stop token, how it ended) of one logged answer.

    The conversation is rendered with and without the answer; what was added is the answer. Where no
    token stands across the seam, both are tokens of one text. Raises `RowProblem` where the template
    writes the history otherwise once the answer follows.
    """
    chat, messages = target.chat, conversation.messages
    answer = messages[turn]
    if not chat.source:
        prompt_ids = chat.ids(messages[:turn], thinking, conversation.tools)
        ids = target.tokenizer.encode(answer["content"], add_special_tokens=False)
        stop = sorted(target.stop_ids)[:1]
        return prompt_ids, [*ids, *stop], "stop" if stop else "length"
    given = (thinking, conversation.tools, conversation.template_kwargs)
    before = chat.text(messages[:turn], *given)
    whole = chat.text(messages[: turn + 1], *given, answer_follows=False)
    if not whole.startswith(before):
        raise RowProblem("the chat template writes the history otherwise once the answer follows")
    prompt_ids, ids = _split(target, before, whole[len(before) :])
    for k, token in enumerate(ids):
        if token in target.stop_ids:
            return prompt_ids, ids[: k + 1], "stop"
    return prompt_ids, ids, "length"


def _split(target: TargetInfo, before: str, answer: str) -> tuple[list[int], list[int]]:
    tokenizer = target.tokenizer
    prompt_ids = tokenizer.encode(before, add_special_tokens=False)
    together = tokenizer.encode(before + answer, add_special_tokens=False)
    if together[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, together[len(prompt_ids) :]
    # A token would stand across the seam. The target answers behind the prompt's own tokens.
    return prompt_ids, tokenizer.encode(answer, add_special_tokens=False)


def answer_trajectories(
    target: TargetInfo,
    name: str | Path,
    skipped: Skipped,
    *,
    limit: int | None = None,
    thinking: bool | None = None,
) -> list[Trajectory]:
    """A trajectory for every logged answer. Conversations without one, and answers that cannot be
    cut out exactly, are errors or skipped. Raises `UserError` where nothing is left."""
    found = []
    for file, line, row_id, conversation in read_conversations(name, limit, skipped):
        turns = turns_of(conversation)
        skipped.seen += max(0, len(turns) - 1)  # the unit is an answer
        if not turns:
            skipped.add(file, line, "there is no answer")
        for k, turn in enumerate(turns, 1):
            try:
                prompt_ids, ids, finish = answer_ids(target, conversation, turn, thinking)
                if not ids:
                    raise RowProblem("an answer is empty")
                if len(prompt_ids) + len(ids) > target.max_positions:
                    room, size = target.max_positions, len(prompt_ids) + len(ids)
                    raise RowProblem(f"{size} tokens, the target's context holds {room}")
            except RowProblem as problem:
                skipped.add(file, line, str(problem))
                continue
            label = row_id if len(turns) == 1 else f"{row_id}/turn-{k}"
            found.append(Trajectory(prompt_ids, ids, label, finish, meta={"source": "answers"}))
    skipped.check()
    if not found:
        raise UserError(f"'{name}' holds no answers")
    return found


@torch.no_grad()
def scored(target: Target, rows: list[Trajectory], batch_size: int = 8) -> tuple[list[Trajectory], dict]:
    """The same with `meta` {"nll", "not_argmax"}, and over all: the share of answer tokens that the
    target would not have said greedily, and the mean of -log p (nats)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    made: dict[int, Trajectory] = {}
    tokens, wrong, total = 0, 0, 0.0
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        hidden = target.trajectories(pad_rows([rows[i].ids for i in chosen], target.device)).hidden
        for place, i in enumerate(chosen):
            row, at = rows[i], len(rows[i].prompt_ids) - 1
            said = torch.tensor(row.response_ids, device=target.device)
            states = hidden[place, at : at + len(said)]
            nll, misses = 0.0, 0
            for part in range(0, len(said), max(1, SCORED // target.vocab_size)):
                piece = slice(part, part + max(1, SCORED // target.vocab_size))
                logits = target.logits(states[piece]).float()
                nll += torch.nn.functional.cross_entropy(logits, said[piece], reduction="sum").item()
                misses += int((logits.argmax(-1) != said[piece]).sum())
            made[i] = replace(
                row, meta={**row.meta, "nll": nll / len(said), "not_argmax": misses / len(said)}
            )
            tokens, wrong, total = tokens + len(said), wrong + misses, total + nll
    figures = {"tokens": tokens, "not_argmax": wrong / tokens, "mean_nll": total / tokens}
    return [made[i] for i in range(len(rows))], figures
