"""A target's chat template: which variables it reads, and how a conversation becomes its text."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from draft_opd.utils.errors import RowProblem, one_line

# Variables by which templates switch thinking on and off.
SWITCHES = ("enable_thinking", "thinking", "enable_reasoning", "reasoning", "use_thinking")
PROBE = [{"role": "user", "content": "1 + 1?"}]
CLOCK = re.compile(r"""strftime_now\(\s*("[^"]*"|'[^']*')\s*\)""")
REASONING = ("reasoning_content", "thinking", "reasoning")  # where templates look for it in a message
log = logging.getLogger(__name__)


class ChatTemplate:
    """kwargs: given to the template for every conversation, under those of a row. date: what
    `strftime_now` shows; None: now."""

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any] | None = None, date: datetime | None = None):
        self.tokenizer, self.kwargs, self.date = tokenizer, dict(kwargs or {}), date
        self._warned: set[str] = set()

    @property
    def source(self) -> str:
        """The template's text; "" where the tokenizer has none."""
        found = getattr(self.tokenizer, "chat_template", None)
        if isinstance(found, dict):
            found = found.get("default", "")
        return found or ""

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template takes from outside."""
        try:
            tree = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(self.source)
            return frozenset(jinja2.meta.find_undeclared_variables(tree))
        except jinja2.TemplateError:  # tags of transformers' own
            return frozenset(name for name in SWITCHES if name in self.source)

    @property
    def uses_date(self) -> bool:
        return "strftime_now" in self.source

    @property
    def _dated(self) -> str | None:
        """The template with the pinned date in place of calls of the clock; None: as it is."""
        date = self.date
        if date is None or not self.uses_date:
            return None
        return CLOCK.sub(lambda call: repr(date.strftime(call[1][1:-1])), self.source)

    @cached_property
    def thinking_switch(self) -> str | None:
        """The variable that switches thinking; None where none changes the prompt."""
        for name in SWITCHES:
            if name in self.variables:
                try:
                    on, off = (self._text(PROBE, None, {name: value}) for value in (True, False))
                except RowProblem:
                    continue
                if on != off:
                    return name
        return None

    def ids(
        self,
        messages: Sequence[dict],
        thinking: bool | None = None,
        tools: list[dict] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids, ready for the answer to begin. Without a template: the messages' texts, line by
        line. Raises `RowProblem` where the template refuses the conversation."""
        if not self.source:
            self._warn("no chat template: prompts are plain text (--template FILE gives one)")
            if tools:
                raise RowProblem("there are tools, and the target has no chat template to show them")
            return self.tokenizer.encode("\n".join(m["content"] for m in messages))
        return self.tokenizer.encode(self.text(messages, thinking, tools, kwargs), add_special_tokens=False)

    def arguments(self, thinking: bool | None, kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the template is given: the settings, thinking, and the row's own on top."""
        given = dict(self.kwargs)
        if thinking is not None:
            if self.thinking_switch is None:
                self._warn("the chat template has no thinking switch: (no) thinking changes nothing")
            else:
                given[self.thinking_switch] = thinking
        return {**given, **(kwargs or {})}

    def text(
        self,
        messages: Sequence[dict],
        thinking: bool | None = None,
        tools: list[dict] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        answer_follows: bool = True,
    ) -> str:
        """The conversation as text; answer_follows: with the beginning of the answer's turn."""
        if tools and "tools" not in self.variables:
            raise RowProblem("there are tools, and the chat template does not show them")
        return self._text(messages, tools, self.arguments(thinking, kwargs), answer_follows)

    def _text(
        self, messages: Sequence[dict], tools: list[dict] | None, given: dict, answer_follows: bool = True
    ) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [self._message(m) for m in messages],
                tools=tools,
                add_generation_prompt=answer_follows,
                tokenize=False,
                chat_template=self._dated,
                **given,
            )
        except jinja2.TemplateError as error:  # the template's own words, if they hold none of the row's
            words = one_line(error, 120)
            texts = (str(m.get("content") or "").strip() for m in messages)
            if any(text and (text[:20] in words or words[:20] in text) for text in texts):
                words = type(error).__name__
            raise RowProblem(f"the chat template refuses it ({words})") from None
        except Exception as error:  # noqa: BLE001 - its words may hold the row's text
            raise RowProblem(f"the chat template fails on it ({type(error).__name__})") from None

    def _message(self, message: dict) -> dict:
        """With reasoning under the name that the template reads; a developer is a system to templates
        that do not know one."""
        made = dict(message)
        if made["role"] == "developer" and "developer" not in self.source:
            made["role"] = "system"
        thought = made.pop("reasoning_content", None)
        if thought is not None:
            name = next((n for n in REASONING if f".{n}" in self.source or f"['{n}']" in self.source), None)
            if name is None and '"reasoning_content"' in self.source:
                name = "reasoning_content"
            if name is not None:
                made[name] = thought
        return made

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", text)

    @cached_property
    def turn_end(self) -> int | None:
        """The special token behind an assistant's turn; None where the template writes none."""
        if not self.source:
            return None
        marker = "DRAFTOPDTURN"
        try:
            turns = [*PROBE, {"role": "assistant", "content": marker}]
            text = self._text(turns, None, dict(self.kwargs), answer_follows=False)
        except RowProblem:
            return None
        ids = self.tokenizer.encode(text.rpartition(marker)[2], add_special_tokens=False)[:1]
        special = set(getattr(self.tokenizer, "all_special_ids", ())) | {
            i for i, token in getattr(self.tokenizer, "added_tokens_decoder", {}).items() if token.special
        }
        return ids[0] if ids and ids[0] in special else None
