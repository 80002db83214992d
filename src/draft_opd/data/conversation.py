"""Rows of logs and data sets as conversations: what the field writes, in one form.

A row is an object in one of the known formats. What changes a prompt is used, or the row is refused with a
reason. A reason never holds the row's own text: that may be secret.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from draft_opd.utils.errors import RowProblem

USER, ASSISTANT, SYSTEM, TOOL = "user", "assistant", "system", "tool"
ROLES = {
    "user": USER,
    "human": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "system": SYSTEM,
    "developer": "developer",
    "tool": TOOL,
    "tool_response": TOOL,
    "function": TOOL,
    "observation": TOOL,
    "ipython": TOOL,
}
TEXT_KEYS = ("prompt", "question", "problem", "instruction", "query", "text")
ANSWER_KEYS = ("completion", "response", "output", "answer")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
# Fields of a row that would change the prompt in a way that we cannot follow.
REFUSED = {
    "image": "an image",
    "images": "images",
    "audio": "audio",
    "audios": "audio",
    "video": "a video",
    "videos": "videos",
    "files": "files",
    "continue_final_message": "an answer to be continued",
}
# Fields of a row that go to the chat template.
TEMPLATE_KEYS: dict[str, type] = {
    "enable_thinking": bool,
    "thinking": bool,
    "reasoning_effort": str,
    "documents": list,
    "date_string": str,
}
# Known fields that change no prompt, beside those that are simply named in the summary.
HARMLESS = {"id", "custom_id", "method", "url", "model", "stream", "n", "user", "metadata", "seed"}


@dataclass(frozen=True)
class Conversation:
    """messages: {role, content, ..} as OpenAI's, content always text; the logged answers included.

    tools: function schemas for the template. template_kwargs: the row's own. kind: the format's name.
    unused: fields that change nothing. id: the row's own, "" where it has none.
    """

    messages: list[dict]
    kind: str
    id: str = ""
    tools: list[dict] | None = None
    template_kwargs: dict = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def prompt(self) -> list[dict]:
        """The messages that the target answers: without the logged last answer."""
        messages = self.messages
        while messages and messages[-1]["role"] == ASSISTANT:
            messages = messages[:-1]
        return messages


def read_row(row: dict) -> Conversation:
    """Raises `RowProblem` for what is none of the formats, or cannot be used as it is."""
    row = dict(row)
    row_id = row.get("id", row.get("custom_id", row.get("uuid")))
    if isinstance(row.get("body"), dict):  # a line of OpenAI's batch API
        body = row.pop("body")
        row = {**body, "id": row_id}
        kind = "OpenAI batch requests"
    else:
        kind = ""
    for key, what in REFUSED.items():
        if row.get(key):
            raise RowProblem(f"the field '{key}' holds {what}, which is not supported")
    tools = _tools(row)
    kwargs = _object(row.pop("chat_template_kwargs", None), "chat_template_kwargs")
    if taken := sorted({"messages", "tools", "add_generation_prompt", "chat_template"} & kwargs.keys()):
        raise RowProblem(f"'chat_template_kwargs' must not hold {', '.join(taken)}")
    kwargs |= {k: row.pop(k) for k, kind in TEMPLATE_KEYS.items() if isinstance(row.get(k), kind)}
    if row.get("response_format") not in (None, {"type": "text"}):
        raise RowProblem("the field 'response_format' constrains the answer, which is not supported")
    if row.get("tool_choice") not in (None, "auto"):
        raise RowProblem("the field 'tool_choice' constrains the answer: only auto is supported")
    for name, read in FORMATS:  # noqa: B007 - the name is used below
        messages, used = read(row)
        if messages is not None:
            break
    else:
        names = ", ".join(TEXT_KEYS)
        raise RowProblem(f"needs messages, conversations, or a text under one of {names}")
    system = next((row[k] for k in ("system", "system_prompt") if row.get(k)), None)
    if system is not None:
        if not isinstance(system, str):
            raise RowProblem("the field 'system' must be a text")
        if messages[0]["role"] in (SYSTEM, "developer"):
            raise RowProblem("there are two system texts: a field and a message")
        messages = [{"role": SYSTEM, "content": system}, *messages]
    if not any(m["role"] in (USER, TOOL) for m in messages):
        raise RowProblem("there is no message of a user")
    known = {
        *used,
        *HARMLESS,
        "system",
        "system_prompt",
        "tools",
        "functions",
        "tool_choice",
        "response_format",
    }
    unused = tuple(sorted(k for k, v in row.items() if k not in known and v not in (None, "", [], {})))
    text = "" if row_id is None else str(row_id)
    return Conversation(messages, kind or name, text, tools, kwargs, unused)


# ---- formats: (row) -> messages or None, and the fields that were used --------------------------

Read = tuple[list[dict] | None, tuple[str, ...]]


def _openai(row: dict) -> Read:
    if row.get("messages") is None:
        return None, ()
    return _messages(row["messages"], "messages"), ("messages",)


def _sharegpt(row: dict) -> Read:
    key = next((k for k in ("conversations", "conversation") if row.get(k) is not None), None)
    return (_messages(row[key], key), (key,)) if key else (None, ())


def _trl(row: dict) -> Read:
    """`prompt` and `completion` as lists of messages."""
    if not isinstance(row.get("prompt"), list):
        return None, ()
    messages = _messages(row["prompt"], "prompt")
    if isinstance(row.get("completion"), list):
        messages += _messages(row["completion"], "completion")
    else:
        messages = _answered(messages, row)
    return messages, ("prompt", *ANSWER_KEYS)


def _alpaca(row: dict) -> Read:
    if not isinstance(row.get("instruction"), str):
        return None, ()
    text, more = row["instruction"], row.get("input")
    if more not in (None, ""):
        if not isinstance(more, str):
            raise RowProblem("the field 'input' must be a text")
        text = f"{text}\n\n{more}"
    messages = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowProblem("the field 'history' must be a list of pairs of texts")
    for pair in history:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            raise RowProblem("the field 'history' must be a list of pairs of texts")
        messages += [{"role": USER, "content": pair[0]}, {"role": ASSISTANT, "content": pair[1]}]
    messages.append({"role": USER, "content": _text(text, "instruction")})
    return _answered(messages, row), ("instruction", "input", "history", *ANSWER_KEYS)


def _plain(row: dict) -> Read:
    key = next((k for k in TEXT_KEYS if isinstance(row.get(k), str)), None)
    if key is None:
        return None, ()
    for other in ("input", "context", "history"):
        if row.get(other):
            raise RowProblem(f"the field '{other}' beside '{key}' would change the prompt: join them")
    messages = [{"role": USER, "content": _text(row[key], key)}]
    return _answered(messages, row), (key, *ANSWER_KEYS)


FORMATS: tuple[tuple[str, Callable[[dict], Read]], ...] = (
    ("OpenAI messages", _openai),
    ("conversations", _sharegpt),
    ("prompts as messages", _trl),
    ("instructions (Alpaca)", _alpaca),
    ("prompts", _plain),
)


def _answered(messages: list[dict], row: dict) -> list[dict]:
    answer = next((row[k] for k in ANSWER_KEYS if isinstance(row.get(k), str) and row[k]), None)
    return messages if answer is None else [*messages, {"role": ASSISTANT, "content": answer}]


def _text(value: str, key: str) -> str:
    if not value.strip():
        raise RowProblem(f"the field '{key}' is empty")
    return value


# ---- messages ------------------------------------------------------------------------------------


def _messages(value: object, key: str) -> list[dict]:
    if isinstance(value, str):  # columns of tables hold JSON as text
        value = _json(value, key)
    if not isinstance(value, list) or not value:
        raise RowProblem(f"'{key}' must be a list of messages")
    return [_message(m, i) for i, m in enumerate(value, 1)]


def _message(value: object, number: int) -> dict:
    where = f"message {number}"
    if not isinstance(value, dict):
        raise RowProblem(f"{where} must be an object with role and content")
    name = value.get("role", value.get("from"))
    call = isinstance(name, str) and name in ("function_call", "tool_call")
    role = ASSISTANT if call else ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowProblem(f"{where} has no role that is known")
    if value.get("prefix"):
        raise RowProblem(f"{where} is an answer to be continued, which is not supported")
    content = value["content"] if "content" in value else value.get("value", value.get("text"))
    made: dict[str, Any] = {"role": role}
    calls = value.get("tool_calls")
    if value.get("function_call"):
        calls = [{"type": "function", "function": value["function_call"]}]
    if call:
        calls, content = [{"type": "function", "function": _json(content, where)}], None
    if calls:
        if not isinstance(calls, list) or role != ASSISTANT:
            raise RowProblem(f"{where}: tool_calls must be a list, in a message of the assistant")
        made["tool_calls"] = [_call(c, where) for c in calls]
    thought = next((value[k] for k in REASONING_KEYS if isinstance(value.get(k), str) and value[k]), None)
    if thought is not None:
        made["reasoning_content"] = thought
    if content is None and isinstance(value.get("refusal"), str):
        content = value["refusal"]
    if value.get("audio"):
        raise RowProblem(f"{where} has audio, which is not supported")
    if content is None and not (calls or thought):
        raise RowProblem(f"{where} has no content")
    made["content"] = _content(content, where)
    for key in ("name", "tool_call_id"):
        if isinstance(value.get(key), str):
            made[key] = value[key]
    return made


def _content(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(p, where) for p in content)
    if isinstance(content, dict):  # a tool's result
        return json.dumps(content, ensure_ascii=False)
    raise RowProblem(f"{where}: content must be a text or a list of parts")


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return part["refusal"]
    shown = (
        kind if isinstance(kind, str) and kind.replace("_", "").isalnum() and len(kind) < 30 else "unknown"
    )
    raise RowProblem(f"{where} has a part of type {shown}, only text is supported")


def _call(call: object, where: str) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem(f"{where}: a tool call has no function with a name")
    # Templates write arguments as JSON themselves: a text would be encoded twice.
    arguments = _object(function.get("arguments", function.get("parameters")), f"{where}: arguments")
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    if isinstance(call.get("id"), str):
        made["id"] = call["id"]
    return made


def _tools(row: dict) -> list[dict] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools")
    if not tools and row.get("functions"):
        functions = row["functions"]
        tools = _json(functions, "functions") if isinstance(functions, str) else functions
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise RowProblem("'tools' must be a list of objects")
    return [t if "function" in t or "type" in t else {"type": "function", "function": t} for t in tools]


def _object(value: object, key: str) -> dict:
    if value in (None, ""):
        return {}
    if isinstance(value, str):
        value = _json(value, key)
    if not isinstance(value, dict):
        raise RowProblem(f"'{key}' must be an object")
    return value


def _json(value: object, key: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise RowProblem(f"'{key}' is not valid JSON") from None
