"""Rows of logs as prompts: every format, every kind of template, exactly; or a reason."""

import gzip
import json
import re
import time
from datetime import datetime
from pathlib import Path

import pyarrow
import pytest
import zstandard
from forked import Process
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from servers import served

import draft_opd as d
from draft_opd.cli.main import run
from draft_opd.data.conversation import read_row
from draft_opd.data.prompts import read_prompts, to_prompt
from draft_opd.data.row_files import read_rows, rows_behind
from draft_opd.data.skipped import Skipped
from draft_opd.models.chat_template import ChatTemplate
from draft_opd.models.target_info import TargetInfo
from draft_opd.utils.errors import RowProblem

HERE = Path(__file__).parent
TEMPLATES = sorted(p.stem for p in (HERE / "templates").glob("*.jinja"))
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
# What logs hold; golden_prompts.json has the text that each template makes of it.
ROWS = {
    "system and user": {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    },
    "parts": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Hi "}, {"type": "input_text", "text": "you"}],
            }
        ]
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
        ],
        "tools": [TOOL],
    },
    "reasoning": {
        "messages": [
            {"role": "user", "content": "A?"},
            {"role": "assistant", "content": "B.", "reasoning_content": "Hm."},
            {"role": "user", "content": "C?"},
            {"role": "assistant", "content": "the logged answer"},
        ]
    },
    "developer": {
        "messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    },
    "conversations": {
        "conversations": [
            {"from": "human", "value": "A?"},
            {"from": "gpt", "value": "B."},
            {"from": "human", "value": "C?"},
        ]
    },
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "batch line": {
        "custom_id": "r1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": "Hi", "name": "Ann"}]},
    },
    "trl": {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": "Yes?"}],
    },
    "not thinking": {"prompt": "Hi", "chat_template_kwargs": {"enable_thinking": False, "thinking": False}},
}


@pytest.fixture(scope="module")
def tokenizer():
    return TargetInfo.from_pretrained("embedded").tokenizer


@pytest.fixture
def templated(tokenizer):
    """templated(name): the chat template of that kind, on a day in 2025."""
    before = tokenizer.chat_template

    def make(name: str) -> ChatTemplate:
        tokenizer.chat_template = (HERE / "templates" / f"{name}.jinja").read_text()
        return ChatTemplate(tokenizer, date=datetime(2025, 3, 14))

    yield make
    tokenizer.chat_template = before


def text_of(chat: ChatTemplate, row: dict) -> str:
    """The prompt's text, or the reason why there is none."""
    try:
        prompt = to_prompt(read_row(row), "1")
        return chat.text(prompt.messages, None, prompt.tools, prompt.template_kwargs)
    except RowProblem as problem:
        return f"! {problem}"


GOLDEN = HERE / "golden_prompts.json"


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_is_the_templates_text(templated, template, row):
    assert text_of(templated(template), ROWS[row]) == json.loads(GOLDEN.read_text())[template][row]


def test_the_table_is_whole():
    golden = json.loads(GOLDEN.read_text())
    assert set(golden) == set(TEMPLATES) and all(set(rows) == set(ROWS) for rows in golden.values())
    assert sum(map(len, golden.values())) >= 60


SECRET = "xyzzy-4711"
texts = st.sampled_from(["", SECRET, "user", "assistant", "system", "text", "a"]) | st.text(max_size=6)
leaves = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | texts
keys = st.sampled_from(
    [
        "messages",
        "role",
        "content",
        "type",
        "text",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "tools",
        "conversations",
        "from",
        "value",
        "prompt",
        "completion",
        "instruction",
        "input",
        "system",
        "body",
        "id",
        "chat_template_kwargs",
        "functions",
        "history",
        "reasoning_content",
        "tool_choice",
        "images",
    ]
)
objects = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(keys, objects, max_size=5))
@example({"messages": [{"role": "user", "content": [{"type": SECRET}]}]})
@example({"messages": [{"role": SECRET, "content": "x"}]})
@example(
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": SECRET}}]}]}
)
@settings(max_examples=300)
def test_any_object_is_a_conversation_or_has_a_reason(row):
    """And a reason holds nothing of the row's text."""
    try:
        found = read_row(row)
    except RowProblem as problem:
        assert str(problem) and SECRET not in str(problem)
        return
    assert found.messages and all(isinstance(m["content"], str) for m in found.messages)
    assert any(m["role"] in ("user", "tool") for m in found.prompt) or not found.prompt
    assert found.tools is None or all(isinstance(t, dict) for t in found.tools)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part of type image_url"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 has no content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no message of a user"),
        ({"prompt": "x", "images": ["a.png"]}, "'images' holds images"),
        ({"question": "x", "context": "y"}, "'context' beside 'question'"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, "'response_format' constrains"),
        ({"prompt": "x", "tool_choice": "required"}, "'tool_choice' constrains"),
        ({"instruction": "x", "input": 3}, "'input' must be a text"),
        (
            {
                "system": "a",
                "messages": [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}],
            },
            "two system texts",
        ),
    ],
)
def test_what_would_change_the_prompt_is_never_dropped(row, reason):
    with pytest.raises(RowProblem, match=reason):
        read_row(row)


def test_one_reader_for_files_of_every_kind(tmp_path):
    rows = [{"id": f"r{i}", "prompt": f"Question {i}?"} for i in range(4)]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(lines)
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=3)
    half = lines.index("\n", len(lines) // 2) + 1  # two frames, as `cat a.zst b.zst` gives
    frames = [zstandard.compress(part.encode()) for part in (lines[:half], lines[half:])]
    (tmp_path / "e.jsonl.zst").write_bytes(b"".join(frames))
    names = ("a.jsonl", "b.json", "c.jsonl.gz", "d.parquet", "e.jsonl.zst")
    for name in names:
        behind = list(rows_behind(tmp_path / name, 1))
        assert [(number, row.value) for number, row in behind] == list(enumerate(rows, 1))[1:]
        said: list[str] = []
        found = read_prompts(tmp_path / name, say=said.append)
        assert [(p.id, p.messages[0]["content"]) for p in found] == [(r["id"], r["prompt"]) for r in rows]
        assert said == ["4 rows, prompts"]
    # A folder of them: equal ids are told apart by content, equal rows by number.
    together = read_prompts(tmp_path)
    assert len({p.id for p in together}) == 4 * len(names)
    assert sum(1 for _ in read_rows(tmp_path)) == 4 * len(names)
    assert [number for number, _ in rows_behind(tmp_path, 5)] == list(range(6, 4 * len(names) + 1))
    # A line that is being written is left for later.
    (tmp_path / "a.jsonl").write_text(lines + '{"prompt": "hal')
    assert len(list(rows_behind(tmp_path / "a.jsonl", 0))) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": "a"}]\n[{"prompt": "b"}]', "goes on behind its JSON array"),
        ('[{"prompt": "a \\ud800"}]', "b.json:1: not UTF-8 text"),
        ('[{"prompt": "a"}', "not a valid JSON array"),
    ],
)
def test_a_broken_array_loses_nothing_in_silence(tmp_path, content, message):
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(d.UserError, match=message):
        read_prompts(tmp_path / "b.json")


def test_a_corrupt_archive_is_one_line(tmp_path):
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 999)[:40] + b"xxxx")
    with pytest.raises(d.UserError, match="cannot be read"):
        read_prompts(tmp_path / "c.jsonl.gz")


def test_a_log_that_grows_keeps_its_ids(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"id": "x", "prompt": "a"}\n')
    before = [p.id for p in read_prompts(path)]
    path.write_text('{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}\n{"id": "x", "prompt": "b"}\n')
    after = [p.id for p in read_prompts(path)]
    assert after[:1] == before == ["x"] and len(set(after)) == 3


def test_rows_settings_reach_every_decoding(target, trained):
    """`eval` measures the prompt that a row means: its template arguments too."""
    from draft_opd.data.tasks import Task
    from draft_opd.evaluation.measure import measure, sides_of

    row = {"prompt": "A row begins with 3, 5.", "chat_template_kwargs": {"enable_thinking": False}}
    prompt = to_prompt(read_row(row), "1")
    answers = measure(target, sides_of({"x": ("x", trained)}), Task("t", [prompt]), max_new_tokens=4)
    for side in answers.values():
        assert side[0].made.prompt_ids == prompt.ids(target)
    assert prompt.ids(target) != target.chat_ids(prompt.messages)


def test_parquet(tmp_path):
    table = pyarrow.table({"conversations": [[{"from": "human", "value": "Hi"}]], "source": ["x"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    said: list[str] = []
    (prompt,) = read_prompts(tmp_path / "a.parquet", say=said.append)
    assert prompt.messages == [{"role": "user", "content": "Hi"}]
    assert said == ["1 rows, conversations; fields not used: source"]


def test_every_row_is_used_or_named(tmp_path):
    good, bad = '{"prompt": "x"}', '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}'
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join([good, bad, good, "{", *[good] * 20]))
    with pytest.raises(d.UserError, match=r"log.jsonl:2: message 1 has a part of type image_url"):
        read_prompts(path)
    skipped = Skipped(allowed=True)
    assert len(read_prompts(path, skipped=skipped)) == 22
    assert [(r["line"], r["file"]) for r in skipped.rows] == [(2, str(path)), (4, str(path))]
    skipped.check()
    skipped.max_share = 0.05
    with pytest.raises(d.UserError, match="2 of 24 rows cannot be used"):
        skipped.check()


@pytest.mark.parametrize(
    ("template", "switch"),
    [
        ("qwen3", "enable_thinking"),
        ("smollm3", "enable_thinking"),
        ("glm-4.5", "enable_thinking"),
        ("deepseek-v3.1", "thinking"),
        ("gpt-oss", None),
        ("llama3", None),
        ("gemma", None),
    ],
)
def test_the_thinking_switch_is_found_in_the_template(templated, template, switch, caplog):
    chat = templated(template)
    assert chat.thinking_switch == switch
    messages = [{"role": "user", "content": "Hi"}]
    on, off = (chat.text(messages, thinking) for thinking in (True, False))
    assert (on != off) == (switch is not None)
    assert ("no thinking switch" in caplog.text) == (switch is None)


def test_the_date_is_that_of_the_collection(tmp_path, target, templated, monkeypatch):
    """A collection that goes on a day later asks what it asked."""
    from draft_opd.data.collect import collect

    monkeypatch.setattr(target.tokenizer, "chat_template", (HERE / "templates" / "gpt-oss.jinja").read_text())
    monkeypatch.setitem(target.__dict__, "chat", ChatTemplate(target.tokenizer))
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    options = {"max_new_tokens": 2}
    collect(target, read_prompts(rows, 1), tmp_path / "out", **options)
    about = json.loads((tmp_path / "out" / "collect.json").read_text())
    (tmp_path / "out" / "collect.json").write_text(json.dumps({**about, "date": "2024-02-03T04:05:06"}))
    monkeypatch.setitem(target.__dict__, "chat", ChatTemplate(target.tokenizer))
    path = collect(target, read_prompts(rows), tmp_path / "out", **options)
    first, second = d.read_trajectories(path)
    assert "2024-02-03" in target.tokenizer.decode(second.prompt_ids)
    assert "2024-02-03" not in target.tokenizer.decode(first.prompt_ids)
    rows.write_text('{"prompt": "other"}\n{"prompt": "b"}\n')
    with pytest.raises(d.UserError, match="another prompt under the id '1'"):
        collect(target, read_prompts(rows), tmp_path / "out", **options)


def test_stop_tokens_are_all_that_are_named(tmp_path):
    """Files that disagree: the union ends an answer; `--stop-ids` chooses."""
    text = TargetInfo.from_pretrained("embedded")
    stop = min(text.stop_ids)
    text._generation.eos_token_id = [7]
    text.config.eos_token_id = 9
    del text.__dict__["stop_sources"]
    assert text.stop_sources["generation_config"] == [7] and text.stop_sources["config"] == [9]
    assert text.stop_ids == {7, 9, stop}
    text.chosen_stop_ids = frozenset([7])
    assert text.stop_ids == {7}


def test_collecting_a_log_with_broken_rows(tmp_path, capsys):
    """The good ones are answered, the others named; a prompt of the held-out set is left out."""
    rows = [json.dumps({"prompt": f"A row begins with {i}. What comes next?"}) for i in range(30)]
    rows[4], rows[9] = "{", '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}'
    (tmp_path / "log.jsonl").write_text("\n".join(rows))
    (tmp_path / "held.jsonl").write_text(rows[0])
    words = ["collect", "--target", "embedded", "--prompts", str(tmp_path / "log.jsonl"), "--json"]
    words += [
        "--out",
        str(tmp_path / "out"),
        "--max-new-tokens",
        "2",
        "--exclude",
        str(tmp_path / "held.jsonl"),
    ]
    assert run(words) == 2
    assert "log.jsonl:5: not valid JSON" in capsys.readouterr().err
    assert run([*words, "--skip-invalid"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["trajectories"] == 27 and sum(value["skipped"].values()) == 2
    named = [json.loads(x) for x in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [r["line"] for r in named] == [5, 10] and all(
        r.keys() == {"file", "line", "reason"} for r in named
    )


def test_every_example_of_the_page_is_read(target):
    """docs/data.md: each block is one row."""
    page = (HERE.parent / "docs" / "data.md").read_text()
    blocks = re.findall(r"```json\n(.*?)\n```", page, re.S)
    assert len(blocks) == 8
    for block in blocks:
        prompt = to_prompt(read_row(json.loads(block)), "1")
        assert target.chat.ids(prompt.messages, kwargs=prompt.template_kwargs)


def test_filters_leave_out_what_was_asked(tmp_path, capsys):
    rows = ["Short?", "A row begins with 3, 5, 7. " * 6, "Short?", "Other?"]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": r}) for r in rows))
    words = ["collect", "--target", "embedded", "--prompts", str(tmp_path / "p.jsonl"), "--json"]
    words += ["--out", str(tmp_path / "out"), "--max-new-tokens", "2", "--max-prompt-tokens", "40"]
    assert run([*words, "--drop-duplicates"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["left_out"] == {"longer than --max-prompt-tokens": 1, "the same prompt again": 1}
    assert value["trajectories"] == 2 and value["finish_reasons"] == {"length": 2}
    words[words.index("--out") + 1] = str(tmp_path / "other")
    for _ in range(2):  # the second time nothing is asked again
        assert run([*words, "--drop-truncated"]) == 2
        assert "holds no trajectories" in capsys.readouterr().err
    assert (tmp_path / "other" / "truncated.jsonl").read_text().count("\n") == 3


@pytest.mark.slow
def test_ten_thousand_rows_across_a_kill(tmp_path):
    """A mixed log with 200 broken rows, a server, and a SIGKILL in the middle: every good row is answered
    once, every broken one is named."""
    rows = []
    for i in range(10_000):
        text = f"A row begins with {i}, {i + 2}. What comes next?"
        if i % 50 == 7:
            rows.append(["{", "3", '{"txt": 1}', '{"prompt": ""}'][i // 50 % 4])
        elif i % 3 == 0:
            rows.append(json.dumps({"conversations": [{"from": "human", "value": text}]}))
        elif i % 3 == 1:
            rows.append(json.dumps({"instruction": "Go on.", "input": text, "output": "x"}))
        else:
            rows.append(json.dumps({"messages": [{"role": "user", "content": text}]}))
    (tmp_path / "log.jsonl").write_text("\n".join(rows))
    with served() as url:
        words = ["collect", "--target", "embedded", "--prompts", str(tmp_path / "log.jsonl"), "--server", url]
        words += ["--out", str(tmp_path / "out"), "--max-new-tokens", "2", "--skip-invalid"]
        path = tmp_path / "out" / "trajectories.jsonl"
        process = Process(*words, log=tmp_path / "log")
        while not path.exists() or path.read_bytes().count(b"\n") < 2_000:
            time.sleep(0.2)
        process.kill()
        process.wait()
        assert Process(*words, log=tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()
    found = d.read_trajectories(path)
    assert len(found) == 9_800 and len({t.id for t in found}) == 9_800
    named = [json.loads(x) for x in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [r["line"] for r in named] == [i + 1 for i in range(10_000) if i % 50 == 7]


def test_logged_answers_keep_the_date_that_their_prompts_show(tmp_path):
    rows = tmp_path / "log.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows.write_text(json.dumps({"messages": messages}) + "\n")
    words = ["collect", "--target", "embedded", "--from-answers", str(rows), "--out", str(tmp_path / "out")]
    assert run([*words, "--template", str(HERE / "templates" / "gpt-oss.jinja")]) == 0
    date = json.loads((tmp_path / "out" / "collect.json").read_text())["date"]
    (answer,) = d.read_trajectories(tmp_path / "out")
    assert date[:10] in TargetInfo.from_pretrained("embedded").tokenizer.decode(answer.prompt_ids)
