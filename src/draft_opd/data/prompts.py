"""Prompt files: what a line may look like, and how it becomes token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from draft_opd.data.trajectory import read_jsonl
from draft_opd.models.hub import EMBEDDED
from draft_opd.utils.errors import UserError

if TYPE_CHECKING:
    from draft_opd.models.target_info import TargetInfo

_EMBEDDED = Path(__file__).parent.parent / EMBEDDED
TEXT_KEYS = ("prompt", "question", "problem", "instruction")


@dataclass(frozen=True)
class Prompt:
    """`later`: user turns that follow, once the one before is answered (MT-Bench)."""

    id: str
    messages: list[dict]
    later: tuple[str, ...] = ()

    def ids(self, target: TargetInfo, thinking: bool | None = None) -> list[int]:
        """Through the target's chat template; as plain text when it has none."""
        if getattr(target.tokenizer, "chat_template", None):
            return target.chat_ids(self.messages, thinking)
        return target.tokenizer.encode("\n".join(m["content"] for m in self.messages))


def prompts_path(name: str | Path) -> Path:
    """`embedded:train` and `embedded:heldout` are the shipped prompts."""
    if str(name).startswith(f"{EMBEDDED}:"):
        return _EMBEDDED / f"{str(name).partition(':')[2]}.jsonl"
    return Path(name)


def read_prompt(row: dict, where: str, default_id: str = "") -> Prompt:
    """One line: `{"prompt"}`, `{"messages"}` or a task's row (`{"question"}`). Raises `UserError`,
    beginning with `where`, when it is none of these."""
    messages = row.get("messages")
    if messages is None:
        text = next((row[k] for k in TEXT_KEYS if k in row), None)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: needs a text under one of {', '.join(TEXT_KEYS)}, or messages")
        messages = [{"role": "user", "content": text}]
    elif not (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    ):
        raise UserError(f"{where}: 'messages' must be a list of {{role, content}} objects")
    while len(messages) > 1 and messages[-1]["role"] == "assistant":
        messages = messages[:-1]  # a logged conversation: its last answer is ours to give
    return Prompt(str(row.get("id", default_id)), messages)


def read_prompts(name: str | Path, limit: int | None = None) -> list[Prompt]:
    """A JSONL file of what `read_prompt` takes.

    Raises `UserError` naming file and line when a line is none of these, or the file is empty.
    """
    path = prompts_path(name)
    prompts = []
    for number, row in read_jsonl(path):
        prompts.append(read_prompt(row, f"{path}:{number}", str(number)))
        if limit is not None and len(prompts) == limit:
            break
    if not prompts:
        raise UserError(f"'{path}' holds no prompts")
    return prompts
