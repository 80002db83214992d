"""The target: cached decoding, rollback and branches say what a plain forward says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import draft_opd as d
from draft_opd.hindsight.trace import hindsight_traces
from draft_opd.models.gqa_attention import NAME, grouped
from draft_opd.models.hub import resolve_path
from draft_opd.models.rows import pad_rows
from draft_opd.training.batches import BatchSource
from draft_opd.training.blocks import attach_drafts, pack_anchors
from draft_opd.training.stage_opd import teacher_states

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def plain(target, ids: list[int]) -> torch.Tensor:
    """Logits by transformers itself, without our cache or masks."""
    with torch.no_grad():
        return target.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def tiny(kind: str) -> d.Target:
    torch.manual_seed(1)
    shape = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "eos_token_id": 1,
    }
    if kind == "llama":
        return d.Target(LlamaForCausalLM(LlamaConfig(**shape)), None, kind)
    if kind == "mistral":  # slides everywhere, and says nothing by layer
        from transformers import MistralConfig, MistralForCausalLM

        return d.Target(MistralForCausalLM(MistralConfig(sliding_window=6, **shape)), None, kind)
    if kind == "sliding":
        layers = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
        shape |= {"layer_types": layers, "sliding_window": 6, "use_sliding_window": True}
    return d.Target(Qwen3ForCausalLM(Qwen3Config(head_dim=8, **shape)), None, kind)


@pytest.fixture(params=["qwen3", "llama", "sliding", "mistral"])
def model(request) -> d.Target:
    return tiny(request.param)


def test_a_padded_batch_is_its_rows_alone(model):
    rows = [torch.randint(2, 61, (n,)).tolist() for n in (5, 17, 11)]
    hidden = model.trajectories(pad_rows(rows, model.device)).hidden
    for row, ids in enumerate(rows):
        found = model.logits(hidden[row, : len(ids)])
        torch.testing.assert_close(found, plain(model, ids), **TOLERANCE)


def test_features_are_transformers_hidden_states(model):
    ids = torch.randint(2, 61, (1, 9))
    found = model.trajectories(ids, [1, 3]).features
    with torch.no_grad():
        states = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, torch.cat([states[2], states[4]], -1), **TOLERANCE)


def test_decoding_with_rollback_equals_a_forward_over_what_was_kept(model):
    """Rows keep different numbers of drafted tokens; rejected ones leave no trace."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 61, (n,), generator=generator).tolist() for n in (4, 9, 6)]
    cache = model.cache()
    model.trajectories(pad_rows([r[:-1] for r in rows], model.device), cache=cache)
    for _ in range(6):
        drafts = torch.randint(2, 61, (3, 5), generator=generator)
        block = torch.cat([torch.tensor([[r[-1]] for r in rows]), drafts], 1)
        anchors = torch.tensor([len(r) - 1 for r in rows])
        positions = anchors[:, None] + torch.arange(6)
        logits = model.logits(model.extend(block, positions, cache).hidden)
        kept = torch.randint(0, 6, (3,), generator=generator).tolist()
        for row, ids in enumerate(rows):
            expected = plain(model, ids + drafts[row].tolist())[len(ids) - 1 :]
            torch.testing.assert_close(logits[row], expected, **TOLERANCE)
            ids += drafts[row, : kept[row]].tolist()
            ids.append(int(torch.randint(2, 61, (1,), generator=generator)))


def test_branches_see_their_own_prefix_and_themselves_only(model):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 61, (n,), generator=generator).tolist() for n in (14, 20)]
    cache = model.cache()
    model.trajectories(pad_rows(rows, model.device), cache=cache)
    before = [k.clone() for k in cache.keys]
    # Per row: two branches of 3 and 2 tokens behind different prefixes, and one padded token.
    prefixes = [(4, 9), (11, 18)]
    ids = torch.randint(2, 61, (2, 6), generator=generator)
    branch = torch.tensor([[0, 0, 0, 1, 1, -1]] * 2)
    prefix = torch.tensor([[a] * 3 + [b] * 2 + [0] for a, b in prefixes])
    offset = torch.tensor([0, 1, 2, 0, 1, 0])
    at = prefix + offset
    own = (branch[:, :, None] == branch[:, None, :]) & (at[:, None, :] <= at[:, :, None])
    hidden = model.branches(ids, at, own, prefix, cache).hidden
    for row, (a, b) in enumerate(prefixes):
        for start, end, length in ((0, 3, a), (3, 5, b)):
            expected = plain(model, rows[row][:length] + ids[row, start:end].tolist())[length:]
            found = model.logits(hidden[row, start:end])
            torch.testing.assert_close(found, expected, **TOLERANCE)
    assert all(torch.equal(x, y) for x, y in zip(before, cache.keys, strict=True))


def test_rejected_suffixes_are_scored_as_verification_scores_them(target, trained, heldout):
    """The branch forward against one plain forward over prefix + draft, for every round."""
    rows = heldout[:4]
    batch = BatchSource(target, trained.target_layers).batch(rows, with_cache=True)
    traces = hindsight_traces(target, trained, rows)
    blocks = attach_drafts(
        pack_anchors(batch, [[r.anchor for r in t] for t in traces], trained.draft_length), traces
    )
    states = teacher_states(target, batch, blocks)
    checked = 0
    for row, (t, trace) in enumerate(zip(rows, traces, strict=True)):
        for j, r in enumerate(trace[::5]):
            valid = int(blocks.valid[row, 5 * j].sum())
            text = t.ids[: r.anchor + 1] + r.drafted
            expected = plain(target, text)[r.anchor : r.anchor + valid]
            found = target.logits(states[row, 5 * j, :valid])
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
            checked += valid - min(valid, r.accepted + 1)
    assert checked > 50  # suffixes, or nothing was tested


def test_a_head_with_a_bias_is_refused():
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    with pytest.raises(d.UserError, match="no bias"):
        d.Target(PhiForCausalLM(config), None, "phi")


def test_layers_that_cannot_be_tapped_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(d.UserError, match="layers"):
        d.Target(GPT2LMHeadModel(config), None, "gpt2")


def test_bfloat16_runs(target):
    half = d.Target.from_pretrained("embedded", device="cpu", dtype="bfloat16")
    result = d.generate(half, None, [1, 2, 3], max_new_tokens=4)
    assert len(result.token_ids) == 4 or result.finish_reason == "stop"


def test_the_shipped_target_is_small_and_thinks(target):
    folder = resolve_path("embedded")
    from pathlib import Path

    size = sum(p.stat().st_size for p in Path(folder).parent.rglob("*") if p.is_file())
    assert size <= 12 * 2**20
    ids = target.chat_ids([{"role": "user", "content": "Mia has 3 apples and buys 4 more."}])
    text = target.tokenizer.decode(d.generate(target, None, ids, max_new_tokens=320).token_ids)
    assert text.startswith("<think>") and "</think>" in text


@given(
    heads=st.sampled_from([(6, 2), (4, 4), (8, 1)]),
    count=st.integers(1, 9),
    keys=st.integers(1, 20),
    batch=st.integers(1, 3),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=40)
def test_grouped_attention_is_attention_over_repeated_heads(heads, count, keys, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, n, m, 8, generator=generator)
        for n, m in ((heads[0], count), (heads[1], keys), (heads[1], keys))
    )
    mask = torch.rand(batch, 1, count, keys, generator=generator) < 0.5
    mask[..., 0] = True
    wide = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=mask)
    assert torch.allclose(grouped(q, k, v, mask), expected, atol=1e-5)


@torch.no_grad()
def test_a_target_attends_as_transformers_does(target):
    """Few queries (grouped) and many, with and without a cache."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(
        resolve_path("embedded"), dtype=torch.float32, attn_implementation="sdpa"
    )
    assert target.config._attn_implementation == NAME
    ids = torch.randint(3, 250, (2, 90), generator=torch.Generator().manual_seed(0))
    expected = plain(ids).logits
    assert torch.allclose(target.logits(target.trajectories(ids).hidden), expected, atol=1e-4)
    cache = target.cache(90)
    target.trajectories(ids[:, :80], cache=cache)
    at = torch.arange(80, 90).expand(2, -1)
    found = target.logits(target.extend(ids[:, 80:], at, cache).hidden)
    assert torch.allclose(found, expected[:, 80:], atol=1e-4)


def test_layers_are_walked_as_the_model_runs_them(model):
    """For two choices of tapped layers, over a cache; and a decoder of another kind keeps its hooks."""
    assert model.walk is not None
    ids = torch.arange(12).view(2, 6) % model.vocab_size
    found = []
    for walk in (model.walk, None):
        before, model.walk = model.walk, walk
        try:
            for layers in ((0, 2), (1,)):
                cache = model.cache()
                model.trajectories(ids[:, :4], cache=cache)
                positions = torch.arange(4, 6).expand(2, -1)
                out = model.extend(ids[:, 4:], positions, cache, layers)
                found.append((out.hidden, out.features))
        finally:
            model.walk = before
    for (a, b), (c, e) in zip(found[:2], found[2:], strict=True):
        assert torch.equal(a, c) and torch.equal(b, e)
    config = GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=99
    )
    assert d.Target(GPTNeoXForCausalLM(config)).walk is None
