"""Logged answers as trajectories: exactly what the template writes, cut where the answer begins."""

import json
from pathlib import Path

import pytest
import torch

import draft_opd as d
from draft_opd.cli.main import run
from draft_opd.data.answers import answer_ids, answer_trajectories, every_turn, scored
from draft_opd.data.conversation import read_row
from draft_opd.data.skipped import Skipped
from draft_opd.models.chat_template import ChatTemplate
from draft_opd.models.target_info import TargetInfo
from draft_opd.utils.errors import RowProblem

HERE = Path(__file__).parent
CHAT = {
    "id": "c1",
    "messages": [
        {"role": "user", "content": "A row begins with 3, 5. What comes next?"},
        {"role": "assistant", "content": "The next number is 7.", "reasoning_content": "Two more."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "9"},
    ],
}


@pytest.fixture(scope="module")
def text():
    return TargetInfo.from_pretrained("embedded")


def test_the_answer_is_what_the_template_adds(text):
    conversation = read_row(CHAT)
    for turn in (1, 3):
        prompt_ids, ids, finish = answer_ids(text, conversation, turn)
        assert prompt_ids == text.chat_ids(conversation.messages[:turn])
        assert finish == "stop" and ids[-1] in text.stop_ids
        whole = text.chat.text(conversation.messages[: turn + 1], answer_follows=False)
        assert whole.startswith(text.tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=False))
        assert conversation.messages[turn]["content"] in text.tokenizer.decode(ids)


@pytest.mark.parametrize("template", ["qwen3", "llama3", "gemma", "mistral", "glm-4.5", "deepseek-v3.1"])
def test_every_kind_of_template_is_cut_exactly_or_named(template, monkeypatch, text):
    """Rendered again, prompt and answer are the template's text; or the turn has a reason."""
    source = (HERE / "templates" / f"{template}.jinja").read_text()
    monkeypatch.setattr(text.tokenizer, "chat_template", source)
    monkeypatch.setitem(text.__dict__, "chat", ChatTemplate(text.tokenizer))
    conversation = read_row(CHAT)
    for turn in (1, 3):
        try:
            prompt_ids, ids, _ = answer_ids(text, conversation, turn)
        except RowProblem as problem:
            assert "writes the history otherwise" in str(problem)
            continue
        decoded = text.tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=False)
        whole = text.chat.text(conversation.messages[: turn + 1], answer_follows=False)
        assert whole.startswith(decoded) and conversation.messages[turn]["content"] in decoded


def test_a_token_across_the_seam_is_cut_there(text, monkeypatch):
    """Without a separator the tokenizer would join prompt and answer: the prompt keeps its tokens."""
    monkeypatch.setattr(text.tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    monkeypatch.setitem(text.__dict__, "chat", ChatTemplate(text.tokenizer))
    row = {"messages": [{"role": "user", "content": "num"}, {"role": "assistant", "content": "bers are"}]}
    prompt_ids, ids, finish = answer_ids(text, read_row(row), 1)
    assert prompt_ids == text.tokenizer.encode("num", add_special_tokens=False)
    assert text.tokenizer.decode([*prompt_ids, *ids]) == "numbers are" and finish == "length"


def test_answers_become_trajectories(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    path.write_text(
        json.dumps(CHAT) + "\n" + '{"prompt": "x", "completion": "yes"}\n{"prompt": "no answer"}\n'
    )
    words = ["collect", "--target", "embedded", "--from-answers", str(path), "--out", str(tmp_path / "out")]
    assert run([*words, "--json"]) == 2
    assert "log.jsonl:3: there is no answer" in capsys.readouterr().err
    words += ["--skip-invalid", "--max-skip-share", "0.5", "--score", "--json"]
    assert run(words) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["trajectories"] == 3 and value["skipped"] == {"there is no answer": 1}
    assert 0 < value["not_argmax"] <= 1 and value["mean_nll"] > 0
    rows = d.read_trajectories(tmp_path / "out")
    assert [t.id for t in rows] == ["c1/turn-1", "c1/turn-2", "2"]


def test_scores_are_the_targets(target, tmp_path):
    """Its own greedy text has no token that it would not say; NLL by an independent forward."""
    (tmp_path / "log.jsonl").write_text(json.dumps(CHAT))
    rows = answer_trajectories(target, tmp_path / "log.jsonl", Skipped())
    made, figures = scored(target, rows)
    total = 0.0
    for row in rows:
        logits = target.model(torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)
        at = len(row.prompt_ids) - 1
        total -= sum(float(logits[at + k, i]) for k, i in enumerate(row.response_ids))
    tokens = sum(len(r.response_ids) for r in rows)
    assert figures["mean_nll"] == pytest.approx(total / tokens, rel=1e-4) and figures["tokens"] == tokens
    assert all(0 <= t.meta["not_argmax"] <= 1 for t in made)


def test_every_turn_is_answered_on_the_history(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(CHAT) + "\n" + '{"prompt": "alone"}')
    prompts = every_turn(path, None, Skipped())
    assert [p.id for p in prompts] == ["c1/turn-1", "c1/turn-2", "2"]
    assert [len(p.messages) for p in prompts] == [1, 3, 1]


def test_a_history_may_be_the_targets_own(tmp_path, capsys, target):
    """The second turn stands behind the target's answer to the first; going on asks nothing again."""
    (tmp_path / "log.jsonl").write_text(json.dumps(CHAT) + "\n" + '{"prompt": "alone"}')
    words = ["collect", "--target", "embedded", "--prompts", str(tmp_path / "log.jsonl"), "--every-turn"]
    words += ["--history", "regenerated", "--out", str(tmp_path / "out"), "--max-new-tokens", "12"]
    assert run(words) == 0
    before = (tmp_path / "out" / "trajectories.jsonl").read_bytes()
    first, alone, second = d.read_trajectories(tmp_path / "out")
    assert [t.id for t in (first, alone, second)] == ["c1/turn-1", "2", "c1/turn-2"] or first.id == "2"
    rows = {t.id: t for t in (first, alone, second)}
    answer = target.tokenizer.decode(rows["c1/turn-1"].response_ids, skip_special_tokens=True)
    messages = [CHAT["messages"][0], {"role": "assistant", "content": answer}, CHAT["messages"][2]]
    assert rows["c1/turn-2"].prompt_ids == target.chat_ids(messages)
    assert run(words) == 0 and (tmp_path / "out" / "trajectories.jsonl").read_bytes() == before
