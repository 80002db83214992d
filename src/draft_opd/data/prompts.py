"""Prompts: what the target is asked, and how that becomes token ids."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from draft_opd.data.conversation import Conversation, read_row
from draft_opd.data.row_files import Row, read_rows, rows_path
from draft_opd.data.skipped import Skipped
from draft_opd.utils.errors import RowProblem, UserError

if TYPE_CHECKING:
    from draft_opd.models.target_info import TargetInfo


@dataclass(frozen=True)
class Prompt:
    """later: user turns that follow, once the one before is answered (MT-Bench). tools and
    template_kwargs go to the chat template. file, line: where it stands."""

    id: str
    messages: list[dict]
    later: tuple[str, ...] = ()
    tools: list[dict] | None = None
    template_kwargs: dict = field(default_factory=dict)
    file: str = ""
    line: int = 0

    def ids(self, target: TargetInfo, thinking: bool | None = None) -> list[int]:
        """Through the target's chat template; as plain text when it has none. Raises `UserError`
        where the template refuses it."""
        try:
            return target.chat.ids(self.messages, thinking, self.tools, self.template_kwargs)
        except RowProblem as problem:
            raise UserError(f"{self.where}: {problem}") from None

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.file else f"prompt {self.id}"

    @property
    def content(self) -> str:
        """What makes it this prompt: messages, tools, template arguments."""
        return json.dumps([self.messages, self.tools, self.template_kwargs], sort_keys=True, default=str)


def to_prompt(conversation: Conversation, default_id: str, file: str = "", line: int = 0) -> Prompt:
    """The prompt of a conversation; a logged last answer is the target's to give."""
    return Prompt(
        conversation.id or default_id,
        conversation.prompt,
        tools=conversation.tools,
        template_kwargs=conversation.template_kwargs,
        file=file,
        line=line,
    )


def read_prompt(row: dict, where: str, default_id: str = "") -> Prompt:
    """One row. Raises `UserError`, beginning with `where`, when it is in none of the formats."""
    try:
        return to_prompt(read_row(row), default_id)
    except RowProblem as problem:
        raise UserError(f"{where}: {problem}") from None


def conversations_in(rows: Iterable[Row], skipped: Skipped) -> Iterator[tuple[Row, str, Conversation]]:
    """Rows that can be used: the row, the id that its place gives it, and its conversation."""
    files: dict[str, int] = {}
    for row in rows:
        skipped.seen += 1
        try:
            if row.value is None:
                raise RowProblem(row.problem)
            conversation = read_row(row.value)
        except RowProblem as problem:
            skipped.add(row.file, row.line, str(problem))
            continue
        first = files.setdefault(row.file, len(files)) == 0
        place = str(row.line) if first else f"{Path(row.file).name}:{row.line}"
        yield row, place, conversation


def read_prompts(
    name: str | Path,
    limit: int | None = None,
    skipped: Skipped | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Prompt]:
    """The prompts of whatever `read_rows` reads, in any of the known formats.

    skipped: what to do with rows that cannot be used (default: the first one is an error). say: gets
    one line about what was found. Raises `UserError` naming file and line, or for no prompts at all.
    """
    skipped = skipped or Skipped()
    prompts: list[Prompt] = []
    kinds: Counter[str] = Counter()
    unused: set[str] = set()
    tools = 0
    for row, default_id, conversation in conversations_in(read_rows(name), skipped):
        prompts.append(to_prompt(conversation, default_id, row.file, row.line))
        kinds[conversation.kind] += 1
        unused.update(conversation.unused)
        tools += conversation.tools is not None
        if limit is not None and len(prompts) == limit:
            break
    skipped.check()
    if not prompts:
        raise UserError(f"'{rows_path(name)}' holds no prompts")
    more = f", {tools:,} with tools" if tools else ""
    names = ", ".join(f"{kind}" if len(kinds) == 1 else f"{count:,} {kind}" for kind, count in kinds.items())
    left = f"; fields not used: {', '.join(sorted(unused)[:8])}" if unused else ""
    say(f"{len(prompts):,} rows, {names}{more}{left}")
    return with_unique_ids(prompts)


def with_unique_ids(prompts: list[Prompt]) -> list[Prompt]:
    """The first row keeps its id, so that a log may grow. Later ones with the same id get a part of
    their content's hash; equal rows are numbered."""
    seen: set[str] = set()
    found = []
    for p in prompts:
        if p.id in seen:
            name = f"{p.id}-{hashlib.sha256(p.content.encode()).hexdigest()[:8]}"
            numbered = (f"{name}-{k}" for k in itertools.count(2))
            p = replace(p, id=name if name not in seen else next(n for n in numbered if n not in seen))
        seen.add(p.id)
        found.append(p)
    return found


def usable(
    prompts: list[Prompt],
    target: TargetInfo,
    thinking: bool | None,
    skipped: Skipped,
    check: bool = True,
) -> list[tuple[Prompt, list[int]]]:
    """Prompts with their token ids. One that the template refuses, or that leaves no room in the
    context, is an error or skipped. check: whether these are all rows, so that the share can be
    checked."""
    found = []
    for prompt in prompts:
        try:
            ids = target.chat.ids(prompt.messages, thinking, prompt.tools, prompt.template_kwargs)
            if len(ids) >= target.max_positions:
                raise RowProblem(
                    f"prompt {prompt.id} has {len(ids)} tokens, the target's context holds "
                    f"{target.max_positions}: shorten or remove it"
                )
            if not ids:
                raise RowProblem(f"prompt {prompt.id} has no tokens")
            if max(ids) >= target.vocab_size:
                raise RowProblem(
                    f"prompt {prompt.id} has token id {max(ids)}, the target's vocabulary ends at "
                    f"{target.vocab_size - 1}: its tokenizer belongs to another model"
                )
        except RowProblem as problem:
            if not skipped.allowed and not prompt.file:
                raise UserError(f"{prompt.where}: {problem}") from None
            skipped.add(prompt.file, prompt.line, str(problem))
            continue
        found.append((prompt, ids))
    if check:
        skipped.check()
    return found
