"""What is known of a target without its weights: tokenizer, chat template, shape, limits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from draft_opd.models.chat_template import ChatTemplate
from draft_opd.models.hub import find_target_files, is_drafter
from draft_opd.utils.errors import RowProblem, UserError, one_line


def find_target(path_or_id: str, weights: bool = True) -> str:
    """What transformers loads a target from. Raises `UserError` for what cannot be one: no folder
    and no hub id, a drafter, weights that are pickles only."""
    path, config = find_target_files(path_or_id, weights)
    if config is not None and is_drafter(config):
        raise UserError(f"'{path}' is a drafter, not a target: it goes to --drafter")
    return path


def check_tokenizer(tokenizer: Any) -> None:
    """Raises ValueError for one that knows no words: transformers makes it where there are no
    files."""
    if len(tokenizer) < 2:
        raise ValueError("it has no tokenizer files")


def check_prompt(ids: Sequence[int], target: TargetInfo, name: str) -> None:
    """Raises `UserError` for token ids that the target does not have."""
    if ids and max(ids) >= target.vocab_size:
        raise UserError(
            f"prompt {name} has token id {max(ids)}, the target's vocabulary ends at "
            f"{target.vocab_size - 1}: its tokenizer belongs to another model"
        )


def config_number(config: Any, name: str) -> Any:
    """A number of a transformers config; None where it has none, or where its layers differ in it."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # configs of unequal layers raise it
        return None
    return value if isinstance(value, (int, float)) else None  # others list a number a layer


def longest_context(config: Any) -> int:
    """Positions that a target is used with. LongRoPE has two sets of frequencies, and transformers
    chooses by the longest row of a forward, so that a text would depend on what stands beside it: such
    a target is used up to the length where the first set ends."""
    longest = getattr(config, "max_position_embeddings", None) or 1 << 30
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) == "longrope":
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        longest = min(longest, original or longest)
    return longest


class TargetInfo:
    """A target without its weights: for what a server decodes, and for what is written to disk."""

    def __init__(self, config: Any, generation_config: Any, tokenizer: Any, name: str):
        self.config = config.get_text_config()
        self.tokenizer = tokenizer
        self.name = name
        self.vocab_size: int = self.config.vocab_size
        self.num_layers: int = self.config.num_hidden_layers
        self.hidden_size: int = self.config.hidden_size
        self.architectures: list[str] = config.architectures or []
        self.max_positions: int = longest_context(self.config)
        self._generation = generation_config
        self.chosen_stop_ids: frozenset[int] | None = None  # instead of what the files say

    @classmethod
    def from_pretrained(cls, path_or_id: str, *, trust_remote_code: bool = False) -> TargetInfo:
        """Reads configuration and tokenizer only. Raises `UserError` when there are none."""
        path = find_target(path_or_id, weights=False)
        trust = {"trust_remote_code": trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(path, **trust)
            tokenizer = AutoTokenizer.from_pretrained(path, **trust)
            check_tokenizer(tokenizer)
        except Exception as error:
            line = one_line(error)
            raise UserError(
                f"target '{path_or_id}' has no readable configuration and tokenizer ({line})"
            ) from error
        try:
            generation = GenerationConfig.from_pretrained(path)
        except OSError:  # it has none
            generation = None
        return cls(config, generation, tokenizer, str(path_or_id))

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template, and what it is given."""
        return ChatTemplate(self.tokenizer)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a response: `chosen_stop_ids`, or all that `stop_sources` names."""
        return self.chosen_stop_ids or frozenset(i for ids in self.stop_sources.values() for i in ids)

    @cached_property
    def stop_sources(self) -> dict[str, list[int]]:
        """Who says that a token ends a response: {source: token ids}. Files often disagree; a token
        that one of them names ends it."""
        found = {
            "generation_config": getattr(self._generation, "eos_token_id", None),
            "config": getattr(self.config, "eos_token_id", None),
            "tokenizer": getattr(self.tokenizer, "eos_token_id", None),
            "chat template's end of turn": self.chat.turn_end if self.tokenizer is not None else None,
        }
        lists = {k: [v] if isinstance(v, int) else list(v) for k, v in found.items() if v is not None}
        return {k: [i for i in v if 0 <= i < self.vocab_size] for k, v in lists.items()}

    @cached_property
    def stops_inside_turns(self) -> list[int]:
        """Stop tokens that the template also writes before a turn's end, where an answer calls a tool:
        they would cut such an answer. `chosen_stop_ids` may leave them out."""
        if self.tokenizer is None or not self.chat.source:
            return []
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        question: dict = {"role": "user", "content": "?"}
        try:
            before, whole = (self.chat.text(m, answer_follows=False) for m in ([question], [question, turn]))
        except RowProblem:
            return []
        ids = self.tokenizer.encode(whole.removeprefix(before), add_special_tokens=False)
        return sorted({i for i in ids[:-1] if i in self.stop_ids and i != self.chat.turn_end})

    def chat_ids(
        self,
        messages: list[dict],
        thinking: bool | None = None,
        tools: list[dict] | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """Messages through the chat template, ready for the response to begin. Raises `RowProblem`
        where the template refuses them."""
        return self.chat.ids(messages, thinking, tools, template_kwargs)
