"""The EAGLE-3 drafter: the published layout, its draft vocabulary, and a head that is trained."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import draft_opd as d
from draft_opd.drafters.base import over_target
from draft_opd.drafters.eagle3 import FLAGS, Eagle3Drafter, default_target_layers
from draft_opd.drafters.layouts.vocabulary import as_buffers, checked_ids, most_frequent
from draft_opd.hindsight.trace import hindsight_traces
from draft_opd.losses.chunked import chunked_score
from draft_opd.losses.config import Objective
from draft_opd.losses.divergences import (
    cross_entropy,
    forward_kl,
    overlap,
    reverse_kl,
    up_to_first_rejection,
)
from draft_opd.losses.objectives import decayed_cross_entropy, objective_loss
from draft_opd.serving.export import export
from draft_opd.training.batches import BatchSource
from draft_opd.training.blocks import attach_drafts, pack_anchors, replay, text_states

FAMILY = "eagle3"


# -- a second implementation, from the files alone ------------------------------------------------


def norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x, positions, theta):
    """RoPE in its half-split form, x [tokens, heads, dim]."""
    half = x.shape[-1] // 2
    rates = theta ** (-torch.arange(half) / half)
    angle = positions[:, None, None] * rates
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def reference_draft(folder, target, ids, steps):
    """Greedy drafts after `ids`, as cnets.py and llama_eagle3.py compute them: every step runs the
    whole sequence again, with a plain causal mask and no cache."""
    config = json.loads((folder / "config.json").read_text())
    w = load_file(folder / "model.safetensors")
    w = {k.replace("layers.0.", "midlayer."): v for k, v in w.items()}
    w = {k: v.float() if v.is_floating_point() else v for k, v in w.items()}
    flags = [k for k in FLAGS if config.get(k)]
    if "transformer_layer_config" in config:
        config = {**config, **config["transformer_layer_config"]}
    table = w.get("embed_tokens.weight", target.model.get_input_embeddings().weight)
    head = w.get("lm_head.weight", target.model.get_output_embeddings().weight)
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    heads, kv, dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    with torch.no_grad():
        out = target.model(input_ids=torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
        taps = config["eagle_aux_hidden_state_layer_ids"]  # hidden_states indices, as vLLM's
        features = [out[i][0] for i in taps]
        if "fc_norm" in flags:
            features = [norm(f, w[f"fc_norm.{i}.weight"], eps) for i, f in enumerate(features)]
        features = torch.cat(features, -1)
        if "norm_before_fc" in flags:
            features = norm(features, w["input_norm.weight"], eps)
        hidden = features @ w["fc.weight"].T
        tokens, drafts = list(ids[1:]), []
        for _ in range(steps):
            embedded = norm(table[tokens], w["midlayer.input_layernorm.weight"], eps)
            normed = norm(hidden, w["midlayer.hidden_norm.weight"], eps)
            x = torch.cat([embedded, normed], -1)
            at = torch.arange(len(tokens))
            q, k, v = ((x @ w[f"midlayer.self_attn.{n}_proj.weight"].T).view(len(x), -1, dim) for n in "qkv")
            if "midlayer.self_attn.q_norm.weight" in w:
                q = norm(q, w["midlayer.self_attn.q_norm.weight"], eps)
                k = norm(k, w["midlayer.self_attn.k_norm.weight"], eps)
            q, k = turn(q, at, theta), turn(k, at, theta)
            k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5
            scores = scores.masked_fill(at[None, :] > at[:, None], -torch.inf).softmax(-1)
            mixed = torch.einsum("hqk,khd->qhd", scores, v).flatten(1)
            residual = normed if "norm_before_residual" in flags else hidden
            y = residual + mixed @ w["midlayer.self_attn.o_proj.weight"].T
            z = norm(y, w["midlayer.post_attention_layernorm.weight"], eps)
            gate, up = (z @ w[f"midlayer.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            y = y + (torch.nn.functional.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T
            final = norm(y, w["norm.weight"], eps)
            best = int((final[-1] @ head.T).argmax())
            drafts.append(best + int(w["d2t"][best]) if "d2t" in w else best)
            tokens.append(drafts[-1])
            # The drafter's own state stands where the target's features will be.
            hidden = torch.cat([hidden, final[-1:] if "norm_output" in flags else y[-1:]])
    return drafts


def test_drafts_are_those_of_a_second_implementation(target, trained_folder, trained, heldout):
    compared = 0
    for t in heldout[:6]:
        for r in d.hindsight_trace(target, trained, t)[:8]:
            text = t.ids[: r.anchor + 1]
            assert reference_draft(trained_folder, target, text, 15) == r.drafted
            compared += len(r.drafted)
    assert compared > 500


def own_embeddings(config, tensors, target):
    tensors["embed_tokens.weight"] = target.model.get_input_embeddings().weight.flip(0).clone()


def no_head(config, tensors, target):
    """As SGLang reads it: the target's head over the whole vocabulary."""
    del tensors["lm_head.weight"]
    config["draft_vocab_size"] = None


def no_t2d(config, tensors, target):
    del tensors["t2d"]


def speculators(config, tensors, target):
    """The keys of speculators 0.9's Eagle3SpeculatorConfig."""
    inner = {k: v for k, v in config.items() if k not in (*FLAGS, "draft_vocab_size")}
    outer = {k: config.pop(k) for k in (*FLAGS, "draft_vocab_size") if k in config}
    taps = inner.pop("eagle_aux_hidden_state_layer_ids")
    del inner["eagle_config"]
    config.clear()
    config |= {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        **outer,
        "eagle_aux_hidden_state_layer_ids": taps,
        "transformer_layer_config": inner,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 9}],
        },
    }
    for k in [k for k in tensors if k.startswith("midlayer.")]:
        tensors[k.replace("midlayer.", "layers.0.")] = tensors.pop(k)


VARIANTS = {
    "qwen3": ({"attention": "qwen3"}, None),
    "norm_before_residual": ({"norm_before_residual": True}, None),
    "norm_output": ({"norm_output": True}, None),
    "norm_before_fc": ({"norm_before_fc": True}, None),
    "fc_norm": ({"fc_norm": True}, None),
    "five layers": ({"target_layers": (0, 1, 2, 3, 4)}, None),
    "own embeddings": ({}, own_embeddings),
    "no head": ({"draft_vocab_size": None}, no_head),
    "no t2d": ({}, no_t2d),
    "speculators": ({"attention": "qwen3", "norm_before_residual": True}, speculators),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_layout_draft_as_the_second_implementation(target, heldout, tmp_path, variant):
    """What published files hold, written, read again, and drafting; each differs from the plain."""
    options, change = VARIANTS[variant]
    counts = torch.arange(target.vocab_size).flip(0)
    plain = {"draft_length": 9, "draft_vocab_size": 150}
    drafters = []
    for shape in ({**plain, **options}, plain):
        torch.manual_seed(3)
        made = Eagle3Drafter.create(target, counts, **shape)
        with torch.no_grad():
            for name, p in sorted(made.named_parameters()):
                g = torch.Generator().manual_seed(len(name))
                scale = 0.3 if p.ndim == 1 else 0.06
                p.copy_((p.ndim == 1) + scale * torch.randn(p.shape, generator=g))
        drafters.append(made)
    folder = tmp_path / "d"
    drafters[0].save_pretrained(folder)
    if change:
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        change(config, tensors, target)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors")
    ours = d.Drafter.from_pretrained(str(folder), device="cpu")
    ours.bind(target)
    assert ours.draft_length == 9
    again = tmp_path / "again"
    ours.save_pretrained(again)
    differs, seen = change in (no_t2d,), set()
    for t in heldout[:3]:
        t = d.Trajectory(prompt_ids=t.prompt_ids, response_ids=t.response_ids[:10])
        traces = [d.hindsight_trace(target, x, t) for x in (ours, drafters[1])]
        differs |= [r.drafted for r in traces[0]] != [r.drafted for r in traces[1]]
        for r in traces[0]:
            text = t.ids[: r.anchor + 1]
            assert reference_draft(folder, target, text, 9) == r.drafted
            assert reference_draft(again, target, text, 9) == r.drafted
            seen |= set(r.drafted)
    assert differs and len(seen) > 8


# -- the layout ---------------------------------------------------------------------------------


def test_a_folder_is_the_layout_engines_serve(target, trained, trained_folder):
    config = json.loads((trained_folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == 1
    assert config["vocab_size"] == target.vocab_size and config["draft_vocab_size"] == 150
    taps = config["eagle_aux_hidden_state_layer_ids"]  # one apart, as SGLang and vLLM count
    assert [i - 1 for i in taps] == config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert config["norm_before_residual"] is False and config["tie_word_embeddings"] is False
    assert "norm_output" not in config and isinstance(config["rope_theta"], float)
    tensors = load_file(trained_folder / "model.safetensors")
    assert set(tensors) == {
        "fc.weight",
        "norm.weight",
        "lm_head.weight",
        "d2t",
        "t2d",
        "midlayer.hidden_norm.weight",
        "midlayer.input_layernorm.weight",
        "midlayer.post_attention_layernorm.weight",
        *(f"midlayer.self_attn.{n}_proj.weight" for n in "qkvo"),
        *(f"midlayer.mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
    }
    hidden = target.hidden_size
    assert tensors["fc.weight"].shape == (hidden, 3 * hidden)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape[1] == 2 * hidden
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    ids = tensors["d2t"] + torch.arange(150)
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], ids) and torch.equal(ids, trained.vocabulary)


def test_half_precision_keeps_the_tables(trained, tmp_path):
    trained.save_pretrained(tmp_path / "d", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    assert tensors["fc.weight"].dtype == torch.bfloat16 and tensors["d2t"].dtype == torch.int64


def test_the_other_layer_prefix_is_read(target, trained, trained_folder, tmp_path, heldout):
    """speculators writes `layers.0.`; the drafts are the same."""
    trained.save_pretrained(tmp_path / "d")
    path = tmp_path / "d" / "model.safetensors"
    save_file({k.replace("midlayer.", "layers.0."): v for k, v in load_file(path).items()}, path)
    again = d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu")
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_layers_of_published_drafters():
    """hidden_states[2], [n // 2], [n - 3] of Qwen3-8B (36 layers) and Llama-3.1-8B (32)."""
    assert default_target_layers(36) == (1, 17, 32)
    assert default_target_layers(32) == (1, 15, 28)
    for count in range(4, 12):  # short targets, where the three would collide
        layers = default_target_layers(count)
        assert len(set(layers)) == 3 and layers == tuple(sorted(layers)) and layers[-1] <= count - 2


def tap(*layers):
    return lambda c, w: c["eagle_config"].update(eagle_aux_hidden_state_layer_ids=[*layers])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, w: c.update(num_hidden_layers=2), "more than one layer"),
        (lambda c, w: c.pop("vocab_size"), "vocab_size"),
        (lambda c, w: c.update(draft_vocab_size=149), "lm_head.weight|d2t"),
        (lambda c, w: w.pop("lm_head.weight"), "lacks the tensor"),
        (lambda c, w: w["d2t"].add_(torch.arange(150)), "must hold offsets"),  # absolute ids
        (lambda c, w: c.update(architectures=["Eagle3Qwen3ForCausalLM"]), "lacks the tensor.*norm"),
        (lambda c, w: c.update(fc_norm=True), "lacks the tensor.*fc_norm"),
        (lambda c, w: c.update(transformer_layer_config={"model_type": "gpt2"}), "gpt2"),
        (tap(1, 1, 3), "must be 3"),
        (tap(1, 3, 7), "usable"),
    ],
)
def test_a_broken_folder_says_what_is_wrong(target, trained, tmp_path, change, message):
    trained.save_pretrained(tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    change(config, tensors)
    (tmp_path / "d" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "d" / "model.safetensors")
    with pytest.raises(d.UserError, match=message):
        d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu").bind(target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_vocab_size": 840}, "more than the target's"),
        ({"draft_vocab_size": 9}, "chosen from"),
        ({"num_attention_heads": 5, "num_key_value_heads": 3}, "multiple"),
    ],
)
def test_impossible_shapes_are_refused(target, options, message):
    with pytest.raises(d.UserError, match=message):
        Eagle3Drafter.create(target, **options)


# -- the draft vocabulary -------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=3, max_size=40), st.data())
def test_the_vocabulary_is_the_most_frequent_tokens(counts, data):
    size = data.draw(st.integers(1, len(counts)))
    ids = most_frequent(torch.tensor(counts), size)
    assert ids.tolist() == sorted(set(ids.tolist())) and len(ids) == size
    left = [c for i, c in enumerate(counts) if i not in ids.tolist()]
    assert not left or min(counts[i] for i in ids.tolist()) >= max(left)
    d2t, t2d = as_buffers(ids, len(counts))
    assert torch.equal(checked_ids(d2t, len(counts)), ids)
    assert torch.equal(t2d.nonzero()[:, 0], ids)


def test_tokens_outside_are_never_drafted(target, trained, heldout):
    inside = set(trained.vocabulary.tolist())
    rounds = [r for t in heldout[:6] for r in d.hindsight_trace(target, trained, t)]
    assert all(set(r.drafted) <= inside for r in rounds)
    sampled = d.generate(target, trained, heldout[0].prompt_ids, max_new_tokens=60, temperature=1.5)
    assert all(set(r.drafted) <= inside for r in sampled.rounds)
    assert any(set(t.response_ids) - inside for t in heldout[:20])


V, VD, H, N = 9, 5, 4, 7


def sides(seed: int):
    g = torch.Generator().manual_seed(seed)
    hidden, teacher = (torch.randn(N, H, generator=g, dtype=torch.float64) for _ in range(2))
    head = torch.randn(VD, H, generator=g, dtype=torch.float64)
    target_head = torch.randn(V, H, generator=g, dtype=torch.float64)
    vocabulary = torch.randperm(V, generator=g)[:VD].sort().values
    return hidden, teacher, head, target_head, vocabulary


@pytest.mark.parametrize("score", [forward_kl, reverse_kl, overlap])
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_divergences_over_a_draft_vocabulary(score, seed):
    """p is whole in the overlap and in KL(q || p), and restricted and normalised in KL(p || q)."""
    hidden, teacher, head, target_head, vocabulary = sides(seed)
    got = chunked_score(
        score,
        hidden,
        head,
        teacher_hidden=teacher,
        teacher_weight=target_head,
        vocabulary=vocabulary,
        chunk=3,
    )
    for i in range(N):
        p = (teacher[i] @ target_head.T).softmax(-1).tolist()
        q = dict(zip(vocabulary.tolist(), (hidden[i] @ head.T).softmax(-1).tolist(), strict=True))
        mass = sum(p[v] for v in q)
        if score is overlap:
            value = sum(min(p[v], q[v]) for v in q)
        elif score is reverse_kl:
            value = sum(x * torch.tensor(x / p[v]).log().item() for v, x in q.items())
        else:
            value = sum(p[v] / mass * torch.tensor(p[v] / mass / x).log().item() for v, x in q.items())
        assert got[i].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("score", [forward_kl, reverse_kl, overlap])
def test_a_trained_head_gets_the_gradient_of_the_whole(score):
    """In chunks, against autograd over everything at once."""
    found = []
    for chunk in (2, None):
        hidden, teacher, head, target_head, vocabulary = sides(1)
        hidden.requires_grad_(), head.requires_grad_()
        weights = torch.arange(1.0, N + 1, dtype=torch.float64)
        if chunk:
            values = chunked_score(
                score,
                hidden,
                head,
                teacher_hidden=teacher,
                teacher_weight=target_head,
                vocabulary=vocabulary,
                chunk=chunk,
            )
        else:
            values = score(over_target(hidden @ head.T, vocabulary, V), teacher @ target_head.T)
        (values * weights).sum().backward()
        found.append((values.detach(), hidden.grad, head.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.isfinite(a).all()


def test_nothing_to_supervise_is_a_loss_of_zero(target, trained, heldout):
    """No label is draftable: zero, with zero gradients."""
    batch = BatchSource(target, trained.target_layers).batch(heldout[:1])
    blocks = pack_anchors(batch, [[len(heldout[0].prompt_ids) - 1]], 3)
    blocks.labels = torch.full_like(blocks.labels, int((~trained.t2d).nonzero()[0, 0]))
    r = replay(target, trained, batch, blocks)
    loss = decayed_cross_entropy(r)
    loss.backward()
    assert loss.item() == 0 and not r.reachable.any()
    trained.zero_grad()


def test_the_trajectory_term_stops_where_q_leaves_the_text(target, trained, heldout):
    """Behind the first wrong proposal the replayed states are not the text's."""
    batch = BatchSource(target, trained.target_layers).batch(heldout[:4], with_cache=True)
    traces = hindsight_traces(target, trained, heldout[:4])
    blocks = attach_drafts(pack_anchors(batch, [[r.anchor for r in t] for t in traces], 15), traces)
    fed = {"drafts": blocks, "text": replace(blocks, drafted=blocks.labels)}
    states = text_states(batch, blocks)
    objective = Objective(kind="forward_kl", suffix=False, trajectory_weight=1.0)
    found = {}
    for name, made in fed.items():
        r = replay(target, trained, batch, made, states, objective)
        found[name] = objective_loss(r, objective)[0].item()
        assert not torch.equal(r.valid, up_to_first_rejection(r.accepted, r.valid))
    assert found["drafts"] == pytest.approx(found["text"], rel=1e-5)


def test_labels_outside_end_what_a_block_can_reach(target, trained, heldout):
    batch = BatchSource(target, trained.target_layers).batch(heldout[:8])
    anchors = [list(range(len(t.prompt_ids) - 1, len(t.ids) - 1)) for t in batch.trajectories]
    blocks = pack_anchors(batch, anchors, 15)
    blocks.drafted = blocks.labels
    r = replay(target, trained, batch, blocks)
    inside = torch.isin(r.labels, trained.vocabulary)
    missed = r.valid & ~inside
    assert missed.any() and not (r.reachable & ~inside).any()
    for block in missed.any(1).nonzero()[:20, 0]:
        first = int(missed[block].long().argmax())
        assert not r.reachable[block, first:].any()
        assert torch.equal(r.reachable[block, :first], r.valid[block, :first])
    loss = decayed_cross_entropy(r)
    loss.backward()
    assert torch.isfinite(loss) and trained.lm_head.weight.grad.abs().sum() > 0
    trained.zero_grad()
    known = r.label_nll[r.reachable]
    logits = trained.logits(target, r.hidden[r.reachable])
    torch.testing.assert_close(known, cross_entropy(logits, r.labels[r.reachable]))


def test_an_export_says_how_to_serve_it(trained_folder, tmp_path):
    made = export("embedded", str(trained_folder), "sglang", tmp_path / "s", dtype="bfloat16")
    assert "--speculative-algorithm EAGLE3" in made["serve"] and str(tmp_path / "s") in made["serve"]
    for part in (
        "--speculative-num-steps 15",
        "--speculative-eagle-topk 1",
        "--speculative-num-draft-tokens 16",
    ):
        assert part in made["serve"]
    made = export("embedded", str(trained_folder), "vllm", tmp_path / "v")
    assert '"method": "eagle3"' in made["serve"] and '"num_speculative_tokens": 15' in made["serve"]
    with pytest.raises(d.UserError, match="has sglang, vllm, speculators only"):
        export("embedded", str(trained_folder), "z-lab", tmp_path / "z")
    assert not (tmp_path / "z").exists()
