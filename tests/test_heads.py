"""DSpark and DFlash2: a second implementation, files, losses, and drafters that begin as DFlash ones."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import draft_opd as d
from draft_opd.cli.options import to_confidences
from draft_opd.data.prompts import read_prompts
from draft_opd.data.tasks import Task
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.step import DecodeStep
from draft_opd.decoding.verification import verify_with_noise
from draft_opd.drafters import FAMILIES
from draft_opd.drafters.dflash2 import NOT_LOADED
from draft_opd.evaluation.analysis import analyse
from draft_opd.evaluation.measure import sides_of
from draft_opd.evaluation.run import Evaluation
from draft_opd.losses import objectives
from draft_opd.losses.chunked import chunked_score
from draft_opd.losses.config import Heads, Objective
from draft_opd.losses.divergences import cross_entropy, forward_kl, reverse_kl, total_variation
from draft_opd.losses.heads import confidence_loss, reached, with_heads
from draft_opd.losses.objectives import ReplayedBlocks
from draft_opd.losses.sft import SFT_LOSSES
from draft_opd.models.logit_map import LogitMap
from draft_opd.report.page import Report
from draft_opd.serving.export import export
from draft_opd.training.batches import BatchSource
from draft_opd.training.config import Model, Opd, load_recipe
from draft_opd.training.rollouts import hindsight_rollout
from draft_opd.training.setup import grown_drafter, unused_keys
from draft_opd.training.stage_opd import opd_loss
from draft_opd.training.stage_sft import sft_loss
from draft_opd.training.trainer import Run

EVERY_FAMILY = True
SHAPES = {
    "vanilla": ("dspark", {"markov_head_type": "vanilla"}),
    "gated": ("dspark", {"markov_head_type": "gated"}),
    "rnn": ("dspark", {"markov_head_type": "rnn", "sample_from_anchor": False}),
    "dflash2": ("dflash2", {"conv_kernel_size": 3, "selector_top_k": 5}),
    "capped": ("dflash2", {"selector_top_k": 5}),
    "gemma4": ("dspark", {"markov_head_type": "vanilla"}),
    "gemma4, own values": ("dspark", {"markov_head_type": "gated"}),
}
KEYS = {"capped": {"output_multiplier": 0.5, "final_logit_softcapping": 4.0}}  # of dflash_config
SMALL = {"dspark": {"block_size": 5, "markov_rank": 8}, "dflash2": {"block_size": 6, "selector_rank": 8}}


def of_gemma4(drafter, shared):
    """An untrained drafter of that size with DeepSpec's body for Gemma 4."""
    config = {
        **drafter.config_dict(),
        "architectures": ["Gemma4DSparkModel"],
        "model_type": "gemma4_text",
        "head_dim": 8,
        "global_head_dim": 32,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": shared,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 4.0,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000.0,
            }
        },
    }
    confidence = {"confidence_head.proj.weight": drafter.confidence_head.proj.weight}
    return type(drafter).from_files(config, confidence)[0]


def made(target, name, seed=0):
    """A random drafter whose heads matter."""
    family, own = SHAPES[name]
    torch.manual_seed(seed)
    drafter = FAMILIES[family].create(target, num_layers=2, **SMALL[family], **own)
    if name in KEYS:
        drafter.config.dflash_config.update(KEYS[name])
        drafter = FAMILIES[family](drafter.config)
    if name.startswith("gemma4"):
        drafter = of_gemma4(drafter, name == "gemma4")
        for layer in drafter.layers:
            layer.layer_scalar.fill_(0.7)
    drafter.eval()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        drafter.fc.weight.mul_(5)
    return drafter.requires_grad_(False)


# -- a second implementation, from the published equations: no cache, no packing, one block at a time -------


def rms(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def turned(x, positions, base, part=1.0):
    """x [heads, n, d] at rotary positions [n]; part: the share of pairs that turn at all."""
    half = x.shape[-1] // 2
    angle = positions[:, None] / base ** (torch.arange(half) / half) * (torch.arange(half) < part * half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def convolved(x, base, dynamic, group):
    """x [B, H]; base [t, H]; dynamic [B, t, H / group]: channel by channel, tap by tap."""
    out = torch.zeros_like(x)
    for i in range(len(x)):
        for j in range(min(len(base), i + 1)):
            out[i] += (base[j] + dynamic[i, j].repeat_interleave(group)) * x[i - j]
    return out


def states(w, config, features, tokens, embed, anchor):
    """The body's normed states [B, H] of one block; features [anchor, F] of all positions in front of it."""
    o, heads, kv = config["dflash_config"], config["num_attention_heads"], config["num_key_value_heads"]
    gemma, size = "global_head_dim" in config, config.get("global_head_dim", config["head_dim"])
    rope = config["rope_parameters"]["full_attention"] if gemma else config["rope_parameters"]
    base, part = rope["rope_theta"], rope.get("partial_rotary_factor", 1.0)
    shared = gemma and config["attention_k_eq_v"]
    kv = config["num_global_key_value_heads"] if shared else kv
    scale, act = (1, partial(F.gelu, approximate="tanh")) if gemma else (size**0.5, F.silu)
    context = rms(features @ w["fc.weight"].T, w["hidden_norm.weight"])
    at = torch.arange(anchor + len(tokens), dtype=torch.float32)
    x = embed[tokens]

    def split(y, count):
        return y.view(len(y), count, size).transpose(0, 1)

    for i in range(config["num_hidden_layers"]):
        p = {k.removeprefix(f"layers.{i}."): v for k, v in w.items() if k.startswith(f"layers.{i}.")}

        def around(name, part, y, p=p):
            if f"{name}.base_kernel" not in p:
                return part(y)
            kernels = (y @ p[f"{name}.kernel_projection.weight"].T).view(len(y), 2, o["conv_kernel_size"], -1)
            bases, group = p[f"{name}.base_kernel"], o["conv_group_size"]
            inner = part(convolved(y, bases[0], kernels[:, 0], group))
            return convolved(inner, bases[1], kernels[:, 1], group)

        def attention(y, p=p):
            every = torch.cat([context, y])
            q = rms(split(y @ p["self_attn.q_proj.weight"].T, heads), p["self_attn.q_norm.weight"])
            k = rms(split(every @ p["self_attn.k_proj.weight"].T, kv), p["self_attn.k_norm.weight"])
            v = split(every @ p[f"self_attn.{'k' if shared else 'v'}_proj.weight"].T, kv)
            v = (rms(v, 1.0) if gemma else v).repeat_interleave(heads // kv, 0)
            q, k = turned(q, at[anchor:], base, part), turned(k, at, base, part)
            k = k.repeat_interleave(heads // kv, 0)
            weights = (q @ k.transpose(1, 2) / scale).softmax(-1)
            return (weights @ v).transpose(0, 1).flatten(1) @ p["self_attn.o_proj.weight"].T

        def mlp(y, p=p):
            gate = act(y @ p["mlp.gate_proj.weight"].T)
            return (gate * (y @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T

        out = around("attention_conv", attention, rms(x, p["input_layernorm.weight"]))
        if gemma:  # norms behind attention and MLP, too
            x = x + rms(out, p["post_attention_layernorm.weight"])
            out = mlp(rms(x, p["pre_feedforward_layernorm.weight"]))
            x = (x + rms(out, p["post_feedforward_layernorm.weight"])) * p["layer_scalar"]
            continue
        x = x + out
        x = x + around("mlp_conv", mlp, rms(x, p["post_attention_layernorm.weight"]))
    return rms(x, w["norm.weight"])


def walk(w, config, h, head, anchor_token):
    """Greedy tokens and the logits [N, V] that they were taken from."""
    o, token, state = config["dflash_config"], anchor_token, None
    tokens, logits = [], []
    for slot in h:
        base = (head @ slot) * o.get("output_multiplier", 1.0)
        if cap := o.get("final_logit_softcapping"):
            base = cap * (base / cap).tanh()
        if "markov_rank" in o:
            row, kind = w["markov_head.markov_w1.weight"][token], o["markov_head_type"]
            if kind == "gated":
                z = torch.cat([slot, row])
                row = (
                    torch.sigmoid(w["markov_head.gate_proj.weight"] @ z + w["markov_head.gate_proj.bias"])
                    * row
                )
            if kind == "rnn":
                state = torch.zeros_like(row) if state is None else state
                z = torch.cat([state, row, slot])
                z = w["markov_head.joint_proj.weight"] @ z + w["markov_head.joint_proj.bias"]
                u, c, out = z.view(3, -1)
                state = torch.sigmoid(u) * state + (1 - torch.sigmoid(u)) * torch.tanh(c)
                row = torch.tanh(out)
            found = base + w["markov_head.markov_w2.weight"] @ row
        else:
            a = w["candidate_selector.predecessor_codebook"][token]
            r = w["candidate_selector.hidden_projection.weight"] @ slot
            edges = w["candidate_selector.successor_codebook"] @ (a * r)
            least = base.sort(descending=True).values[o["selector_top_k"] - 1]
            found = torch.where(base >= least, base + edges, -torch.inf)
        token = int(found.argmax())
        tokens.append(token)
        logits.append(found)
    return tokens, torch.stack(logits)


@pytest.mark.parametrize("name", SHAPES)
def test_a_second_implementation_agrees(target, heldout, tmp_path, name):
    """From the file that we write; drafts, logits, and logits of replay."""
    drafter = made(target, name)
    drafter.save_pretrained(tmp_path / "d")
    w = load_file(tmp_path / "d" / "model.safetensors")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    ids = torch.tensor([heldout[0].ids[:40]])
    out = target.trajectories(ids, drafter.target_layers)
    context = drafter.build_cache(target, ids, out.features)
    anchors = torch.tensor([[12, 13, 30]])
    first, count = config["dflash_config"].get("sample_from_anchor", False), drafter.draft_length
    seen = []

    def choose(logits):
        seen.append(logits[:, 0])
        return logits.argmax(-1), None

    at = ids.gather(1, anchors)
    drafted, _ = drafter.propose(target, context, anchors, at, count, choose)
    again = drafter.logits(target, drafter.replay(target, context, anchors, at, drafted))
    embed, head = target.model.get_input_embeddings().weight.detach(), target.head.weight.detach()
    chosen = set()
    for i, anchor in enumerate(anchors[0].tolist()):
        tokens = torch.full((count + (0 if first else 1),), config["dflash_config"]["mask_token_id"])
        tokens[0] = ids[0, anchor]
        h = states(w, config, out.features[0, :anchor], tokens, embed, anchor)[-count:]
        wanted, logits = walk(w, config, h, head, int(ids[0, anchor]))
        assert drafted[0, i].tolist() == wanted
        torch.testing.assert_close(torch.stack([x[i] for x in seen]), logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(again[0, i], logits, rtol=1e-3, atol=1e-3)
        chosen.add(tuple(wanted))
    assert len(chosen) == 3  # or nothing was compared


def deepspec(target, tmp_path, **keys):
    """A DSpark folder as DeepSpec writes it: flat keys, no convention named, copies of the target's."""
    c, rank = target.config, 4
    hidden, vocab, taps = target.hidden_size, target.vocab_size, [1, 3]
    config = {
        **{k: v for k, v in c.to_dict().items() if k not in ("architectures", "transformers_version")},
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "num_hidden_layers": 1,
        "num_target_layers": target.num_layers,
        "layer_types": ["full_attention"],
        "block_size": 7,
        "mask_token_id": 3,
        "target_layer_ids": taps,
        "num_anchors": 512,
        "markov_rank": rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "tie_word_embeddings": False,
        **keys,
    }
    heads, kv, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    shapes = {
        "fc.weight": (hidden, len(taps) * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        "layers.0.input_layernorm.weight": (hidden,),
        "layers.0.post_attention_layernorm.weight": (hidden,),
        "layers.0.self_attn.q_proj.weight": (heads * size, hidden),
        "layers.0.self_attn.k_proj.weight": (kv * size, hidden),
        "layers.0.self_attn.v_proj.weight": (kv * size, hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, heads * size),
        "layers.0.self_attn.q_norm.weight": (size,),
        "layers.0.self_attn.k_norm.weight": (size,),
        "layers.0.mlp.gate_proj.weight": (config["intermediate_size"], hidden),
        "layers.0.mlp.up_proj.weight": (config["intermediate_size"], hidden),
        "layers.0.mlp.down_proj.weight": (hidden, config["intermediate_size"]),
        "markov_head.markov_w1.weight": (vocab, rank),
        "markov_head.markov_w2.weight": (vocab, rank),
        "confidence_head.proj.weight": (1, hidden + rank),
        "confidence_head.proj.bias": (1,),
    }
    tensors = {k: torch.zeros(v) for k, v in shapes.items()}
    tensors["embed_tokens.weight"] = target.model.get_input_embeddings().weight.detach().clone()
    tensors["lm_head.weight"] = target.head.weight.detach().clone()
    # Known numbers. The body's states are zero (its norm's weight is), so the Markov head decides: token v is
    # followed by v + 1, as points on a circle: the next one has the largest product.
    angle = torch.arange(vocab) * 2 * torch.pi / vocab
    step = 2 * torch.pi / vocab
    circle = torch.stack([angle.cos(), angle.sin(), 0 * angle, 0 * angle], 1)
    ahead = torch.stack([(angle - step).cos(), (angle - step).sin(), 0 * angle, 0 * angle], 1)
    tensors["markov_head.markov_w1.weight"], tensors["markov_head.markov_w2.weight"] = circle, 1e4 * ahead
    tensors["confidence_head.proj.bias"] = torch.tensor([0.75])
    folder = tmp_path / "deepspec"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_deepspec_file_with_known_numbers(target, heldout, tmp_path, caplog):
    """Seven tokens a block, the first of them by the anchor's slot; the head's walk is known."""
    drafter = d.Drafter.from_pretrained(str(deepspec(target, tmp_path)), device="cpu")
    drafter.bind(target)
    assert not caplog.records  # its copies are the target's
    assert (drafter.family, drafter.layout, drafter.draft_length) == ("dspark", "deepspec", 7)
    ids = torch.tensor([heldout[0].ids[:20]])
    out = target.trajectories(ids, drafter.target_layers)
    context = drafter.build_cache(target, ids, out.features)
    anchors, last = torch.tensor([[4, 9]]), torch.tensor([[100, 600]])
    drafted, _ = drafter.propose(target, context, anchors, last, 7, lambda logits: (logits.argmax(-1), None))
    assert drafted[0].tolist() == [list(range(101, 108)), list(range(601, 608))]
    hidden = drafter.replay(target, context, anchors, last, drafted)
    assert drafter.confidence(hidden, drafted).unique().tolist() == [0.75]


def test_who_reads_what_is_written(target, tmp_path):
    """Keys that DeepSpec and vLLM (flat) and SGLang (nested and flat) look for; who can serve which."""
    spark = made(target, "vanilla")
    assert spark.formats == ("vllm", "sglang", "speculators", "deepspec")
    config = spark.config_dict()
    assert config["architectures"] == ["Qwen3DSparkModel"] and config["block_size"] == 5
    for where in (config, config["dflash_config"]):
        assert where["markov_rank"] == 8 and where["markov_head_type"] == "vanilla"
        assert where["sample_from_anchor"] is True and where["enable_confidence_head"] is True
        assert where["target_layer_ids"] == list(spark.target_layers)
    assert spark.sglang_flags() == {"algorithm": "DSPARK", "num-draft-tokens": 6}
    # vLLM has no gate, SGLang only blocks whose first slot predicts.
    assert made(target, "gated").formats == ("sglang", "deepspec") and made(target, "rnn").formats == ()
    two = made(target, "dflash2")
    assert two.formats == ("z-lab", "sglang", "vllm", "speculators")
    assert set(two.tensors()) >= {f"candidate_selector.{x}_codebook" for x in ("predecessor", "successor")}
    assert two.config_dict()["dflash_config"]["conv_kernel_size"] == 3


def test_a_file_for_deepspec_holds_what_its_code_asks_for(target, tmp_path, caplog):
    """Its reader wants the target's embeddings and head in the file; here they are copies."""
    spark = made(target, "gated")
    spark.save_pretrained(tmp_path / "own")
    export("embedded", str(tmp_path / "own"), "deepspec", tmp_path / "out", dtype="float32")
    tensors, config = (
        load_file(tmp_path / "out" / "model.safetensors"),
        json.loads((tmp_path / "out" / "config.json").read_text()),
    )
    assert torch.equal(tensors["lm_head.weight"], target.head_weight())
    assert torch.equal(tensors["embed_tokens.weight"], target.model.get_input_embeddings().weight)
    assert {"num_anchors", "target_layer_ids", "mask_token_id", "markov_head_type"} <= set(config)
    again = d.Drafter.from_pretrained(str(tmp_path / "out"), device="cpu")
    again.bind(target)
    assert not caplog.records and again.layout == "deepspec" and again.lm_head is None
    kept = again.state_dict()
    assert kept.keys() == spark.state_dict().keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in spark.state_dict().items())
    made(target, "dflash2").save_pretrained(tmp_path / "other")
    with pytest.raises(d.UserError, match="--format deepspec: this dflash2 drafter has z-lab"):
        export("embedded", str(tmp_path / "other"), "deepspec", tmp_path / "no")


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("dspark", {"markov_head_type": "lstm"}, "markov_head_type 'lstm': known are vanilla, gated, rnn"),
        ("dspark", {"markov_rank": 0}, "no markov_rank"),
        ("dspark", {"markov_head_type": "gated"}, "lacks the tensor 'markov_head.gate_proj"),
        ("dflash2", {"selector_top_k": None}, r"whole number from 1 on for selector_top_k \(None\)"),
        ("dflash2", {"selector_top_k": 0}, r"selector_top_k \(0\)"),
        ("dflash2", {"selector_top_k": 10**6}, "selector_top_k: there are 839 tokens"),
        ("dflash2", {"conv_kernel_size": "2"}, r"conv_kernel_size \('2'\)"),
        ("dflash2", {"output_multiplier": -1.0}, "output_multiplier in config.json is -1.0"),
        ("dflash2", {"output_multiplier": 0}, "output_multiplier in config.json is 0"),
        ("dflash2", {"final_logit_softcapping": "30"}, "it must be a number above 0"),
        ("dspark", {"sample_from_anchor": "false"}, "sample_from_anchor in config.json is 'false'"),
        ("dspark", {"target_layer_ids": "1,2"}, "it must be a list of whole numbers"),
        ("dspark", {"markov_rank": 4, "at": "top"}, "config.json has markov_rank twice"),
        ("dspark", {"markov_rank": "8"}, "markov_rank in config.json is '8'"),
        ("dflash2", {"conv_group_size": 7}, "not a multiple of 7"),
        ("dflash2", {"sample_from_anchor": True}, "sample_from_anchor must be false"),
        ("dflash2", {"final_logit_softcapping": 30.0, "at": "top"}, "put it into dflash_config"),
        ("dspark", {"output_multiplier": 2.0, "at": "top"}, "put it into dflash_config"),
    ],
)
def test_wrong_configs_get_one_line(target, tmp_path, family, change, message):
    made(target, {"dspark": "vanilla"}.get(family, family)).save_pretrained(tmp_path / "d")
    path = tmp_path / "d" / "config.json"
    config = json.loads(path.read_text())
    change = dict(change)
    if change.pop("at", None) == "top":
        config.update(change)
    else:
        config["dflash_config"].update(change)
        config.update({k: v for k, v in change.items() if k in config})
    path.write_text(json.dumps(config))
    with pytest.raises(d.UserError, match=message):
        d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu")


def test_a_confidence_head_that_is_not_in_the_file_is_told(target, tmp_path, caplog):
    made(target, "vanilla").save_pretrained(tmp_path / "d")
    path = tmp_path / "d" / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if not k.startswith("confidence")}, path)
    assert not d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu").has_confidence
    assert "no tensors of that head" in caplog.text


# -- losses ---------------------------------------------------------------------------------------------


def parts(seed=0, n=9, widths=(6, 4), vocab=23):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, sum(widths), generator=g, dtype=torch.double, requires_grad=True)
    heads = [torch.randn(vocab, w, generator=g, dtype=torch.double) for w in widths]
    heads[1].requires_grad_()
    target = torch.randn(n, 5, generator=g, dtype=torch.double)
    weight = torch.randn(vocab, 5, generator=g, dtype=torch.double)
    labels = torch.randint(vocab, (n,), generator=g)
    return hidden, heads, target, weight, labels


@pytest.mark.parametrize("draft_map", [LogitMap(), LogitMap(0.5, 2.0), LogitMap(3.0)])
@pytest.mark.parametrize("candidates", [None, 4])
@pytest.mark.parametrize("score", [cross_entropy, reverse_kl, forward_kl, total_variation])
def test_a_head_of_two_parts_is_scored_like_one(score, candidates, draft_map):
    """Values and gradients, of the hidden states and the trained parts, chunk by chunk."""
    hidden, heads, target, weight, labels = parts()
    trained = [w.requires_grad_() for w in heads[int(draft_map.is_identity) :]]
    by_label = score is cross_entropy
    found = chunked_score(
        score,
        hidden,
        heads,
        teacher_hidden=None if by_label else target,
        teacher_weight=weight,
        labels=labels if by_label else None,
        num_candidates=candidates,
        draft_map=draft_map,
        chunk=2,
    )
    unary = draft_map(hidden[:, :6] @ heads[0].T)
    logits = unary + hidden[:, 6:] @ heads[1].T
    if candidates:
        out = torch.ones_like(unary, dtype=torch.bool).scatter(
            1, unary.argsort(1, descending=True)[:, :4], False
        )
        if by_label:
            out = out.scatter(1, labels[:, None], False)
        logits = logits.masked_fill(out, -torch.inf)
    slow = score(logits, labels) if by_label else score(logits, target @ weight.T)
    torch.testing.assert_close(found, slow)
    scale = torch.linspace(0.5, 2, len(found), dtype=torch.double)
    for ours, theirs in zip(
        torch.autograd.grad((found * scale).sum(), (hidden, *trained)),
        torch.autograd.grad((slow * scale).sum(), (hidden, *trained)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def blocks(candidates=None, confidence=True):
    hidden, heads, target, weight, labels = parts(n=6)
    g = torch.Generator().manual_seed(5)
    return ReplayedBlocks(
        hidden=hidden.view(2, 3, -1),
        states=target.view(2, 3, -1),
        labels=labels.view(2, 3),
        drafted=labels.view(2, 3),
        accepted=torch.tensor([1, 3]),
        valid=torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(),
        weight=torch.ones(2),
        head=heads,
        target_head=weight,
        decay=4.0,
        num_candidates=candidates,
        confidence=torch.randn(2, 3, generator=g, requires_grad=True) if confidence else None,
    )


def test_the_published_loss_of_dspark():
    """0.1 CE + 0.9 L1 + 1.0 BCE with weights exp(-(k-1)/4), offset by offset in plain loops."""
    r = blocks()
    q = (r.hidden[..., :6] @ r.head[0].T + r.hidden[..., 6:] @ r.head[1].T).softmax(-1)
    p = (r.states @ r.target_head.T).softmax(-1)
    ce = l1 = bce = mass = 0.0
    for i in range(2):
        for k in range(3):
            if not r.valid[i, k]:
                continue
            w = torch.exp(torch.tensor(-k / 4))
            distance = (q[i, k] - p[i, k]).abs().sum()
            c = torch.sigmoid(r.confidence[i, k])
            a = (1 - distance / 2).detach()
            ce, l1 = ce - w * q[i, k, r.labels[i, k]].log(), l1 + w * distance
            bce = bce - w * (a * c.log() + (1 - a) * (1 - c).log())
            mass = mass + w
    wanted = (0.1 * ce + 0.9 * l1 + bce) / mass
    found, figures = with_heads(
        r, lambda x: (SFT_LOSSES["dspark"].loss(x, None), {}), Heads(), agreement=False, along_text=True
    )
    torch.testing.assert_close(found, wanted.double(), rtol=1e-5, atol=1e-6)
    assert figures["confidence_loss"] == pytest.approx((bce / mass).item(), rel=1e-5)


def test_the_confidence_learns_what_verification_goes_by():
    r = blocks()
    logits = r.hidden[..., :6] @ r.head[0].T + r.hidden[..., 6:] @ r.head[1].T
    r.labels[0, 0], r.labels[0, 1] = logits[0, 0].argmax(), logits[0, 1].argmin()
    c = torch.sigmoid(r.confidence)
    where = torch.zeros(2, 3, dtype=torch.bool)
    where[0, :2] = True
    w = torch.exp(torch.tensor(-1 / 4))
    wanted = (-c[0, 0].log() - w * (1 - c[0, 1]).log()) / (1 + w)
    torch.testing.assert_close(confidence_loss(r, where, agreement=True).float(), wanted.float())


def test_the_body_gets_the_same_loss():
    r = blocks(candidates=3, confidence=False)
    loss = SFT_LOSSES["cross_entropy"].loss
    both, _ = with_heads(
        r, lambda x: (loss(x, None), {}), Heads(body_weight=0.5), agreement=True, along_text=True
    )
    body = (r.hidden[..., :6] @ r.head[0].T).log_softmax(-1).gather(-1, r.labels[..., None])[..., 0]
    w = r.valid * torch.exp(-torch.arange(3) / 4)
    torch.testing.assert_close(both - loss(r, None), -0.5 * (body * w).sum() / w.sum(), rtol=1e-5, atol=1e-6)


# -- beginning with a DFlash drafter ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dspark", "dflash2"])
def test_a_dflash_drafter_becomes_another_family(target, data, heldout, tmp_path, caplog, family):
    """`drafter:` of another family is taken up, and says what was taken; at step 0 it drafts the same."""
    source = FAMILIES["dflash"].create(target, num_layers=1, block_size=6)
    source.save_pretrained(tmp_path / "dflash")
    source.bind(target)
    own = {"dspark": "markov_rank: 8", "dflash2": "selector_rank: 8, selector_top_k: 4"}[family]
    pairs = [
        f"data.trajectories={data / 'train'}",
        f"data.heldout={data / 'heldout'}",
        "data.limit=4",
        "data.heldout_limit=2",
        "steps=2",
        "evaluation.every=2",
        "precision=float32",
        f"model.options={{{own}}}",
        f"drafter={tmp_path / 'dflash'}",
        f"out={tmp_path / 'run'}",
    ]
    run = Run("sft", load_recipe(f"embedded:{family}", pairs, "sft"), target=target)
    grown = run.drafter
    assert grown.family == family and grown.draft_length == source.draft_length == 5
    assert any("tensors are taken over" in r.message for r in caplog.records)
    with torch.no_grad():
        traces = [d.hindsight_trace(target, x.eval(), heldout[0]) for x in (source, grown)]
    assert traces[0] == traces[1]
    result = run.train()
    again = d.Drafter.from_pretrained(str(result.last), device="cpu")
    assert again.family == family
    # It goes on as what it is, whatever family the recipe names.
    recipe = load_recipe(
        "embedded", [*pairs[:-3], f"drafter={result.last}", f"out={tmp_path / 'two'}"], "opd"
    )
    assert Run("opd", recipe, target=target).drafter.family == family


# -- faults ----------------------------------------------------------------------------------------


def drafts_of(target, drafter, text):
    drafter.bind(target)
    return [r.drafted for r in d.hindsight_trace(target, drafter, text)]


def test_known_faults_are_what_engines_do(target, heldout):
    """A misnamed file is served as its body alone; the other slot convention drafts as many tokens."""
    text = heldout[0]
    two = made(target, "dflash2")
    faults = two.known_faults(target.num_layers)
    wrong = two.with_fault(faults[NOT_LOADED])
    plain = FAMILIES["dflash"].create(target, num_layers=2, block_size=6).eval()
    plain.load_state_dict({k: v for k, v in two.state_dict().items() if k in plain.state_dict()})
    assert drafts_of(target, wrong, text) == drafts_of(target, plain, text) != drafts_of(target, two, text)
    for drafter in (made(target, "vanilla"), made(target, "rnn")):
        name = next(n for n in drafter.known_faults(target.num_layers) if "anchor's slot" in n)
        other = drafter.with_fault(drafter.known_faults(target.num_layers)[name])
        assert other.anchor_first is not drafter.anchor_first and other.draft_length == drafter.draft_length
        assert drafts_of(target, other, text) != drafts_of(target, drafter, text)
        (read,) = drafter.misreadings().values()
        assert drafter.with_fault(read).block_size == drafter.block_size


def test_a_loop_of_another_tool_is_not_offered(target):
    """transformers' loop knows the DFlash body only."""
    from draft_opd.serving.transformers_assistant import as_assistant

    with pytest.raises(d.UserError, match="takes DFlash drafters; this is one of dspark"):
        as_assistant(made(target, "vanilla"))


# -- drafts that end where the drafter is unsure --------------------------------------------------------


@pytest.fixture(scope="module")
def spark(target):
    drafter = d.Drafter.from_pretrained(
        str(Path(__file__).parent / "drafters" / "dspark" / "last"), device="cpu"
    )
    drafter.bind(target)
    return drafter


def test_drafts_end_by_confidence_and_the_text_stays(target, heldout, spark):
    prompts, wanted = [t.prompt_ids for t in heldout[:3]], [t.response_ids for t in heldout[:3]]
    lengths = []
    for least in (0.01, 0.5, 0.99):
        made = d.speculate(target, spark, prompts, max_new_tokens=320, confidence=least)
        assert [g.token_ids for g in made] == wanted
        lengths.append(sum(sum(i >= 0 for i in r.drafted) for g in made for r in g.rounds))
        assert all(r.accepted <= sum(i >= 0 for i in r.drafted) for g in made for r in g.rounds)
        # One at a time is the same as in a batch.
        alone = [d.generate(target, spark, p, max_new_tokens=320, confidence=least) for p in prompts]
        assert [[r.accepted for r in g.rounds] for g in alone] == [
            [r.accepted for r in g.rounds] for g in made
        ]
    assert lengths[0] > lengths[1] > lengths[2]


def test_an_evaluation_compares_confidences(target, spark):
    other = made(target, "dflash2")
    sides = sides_of({"x": ("x", spark)}, confidences=[None, 0.7])
    run = Evaluation(target, sides, [Task("t", read_prompts("embedded:heldout", 2))], max_new_tokens=48)
    run.run()
    report = run.report().to_json()
    assert [(s["side"], s["confidence"]) for s in report["sides"]] == [
        ("x whole drafts", None),
        ("x confidence 0.7", 0.7),
    ]
    assert all(t["lossless"] == {"matched": 2, "of": 2} for s in report["sides"] for t in s["tasks"])
    drafted = [
        sum(len(r.drafted) for a in run.answers["t"][s.name] for r in a.made.rounds) for s in run.sides
    ]
    assert drafted[1] < drafted[0]
    (pair,) = {(c["side"], c["against"]) for c in report["comparison"]}
    assert pair == ("x confidence 0.7", "x whole drafts")
    for wrong in ("x", "1", "0.5,-1", ""):
        with pytest.raises(d.UserError, match="give chances"):
            to_confidences(wrong)
    with pytest.raises(d.UserError, match="has no confidence head"):
        sides_of({"y": ("y", other)}, confidences=[0.5])


def test_a_draft_that_ended_is_verified_like_a_shorter_one(target, spark):
    """The same random numbers give the same accepted length and bonus token: what lies behind has no part."""
    g = torch.Generator().manual_seed(0)
    p = torch.randn(64, 5, 12, generator=g).softmax(-1)
    q = torch.randn(64, 4, 12, generator=g).mul(0.5).softmax(-1)
    drafted = torch.multinomial(q.flatten(0, 1), 1, generator=g).view(64, 4)
    coin, bonus = torch.rand(64, 4, generator=g), torch.rand(64, 5, generator=g)
    for end in range(4):
        cut = torch.where(torch.arange(4) < end, drafted, -1)
        step = DecodeStep(target, spark, None, None, Sampling(temperature=1.0), confidence=0.5)
        ended, probs, _ = step._cut(cut, q, None)
        found = verify_with_noise(ended.clamp_min(0), probs, p, coin, bonus)
        short = verify_with_noise(
            drafted[:, :end], q[:, :end], p[:, : end + 1], coin[:, :end], bonus[:, : end + 1]
        )
        assert all(torch.equal(a, b) for a, b in zip(found, short, strict=True))


def test_where_a_draft_ends_says_nothing_of_its_last_token(target, heldout, spark):
    """Confidence comes from the tokens before: another token at an offset cannot move an end up to it."""
    ids = torch.tensor([heldout[0].ids[:30]])
    out = target.trajectories(ids, spark.target_layers)
    anchors = torch.tensor([[14]])
    ends = []
    for pick in (0, 1):
        context = spark.build_cache(target, ids, out.features)
        used = []

        def choose(logits, pick=pick, used=used):
            used.append(1)
            order = logits.argsort(-1, descending=True)
            return order[..., pick if len(used) == 3 else 0], None  # the third token differs

        at = ids.gather(1, anchors)
        drafted, _ = spark.propose(target, context, anchors, at, 15, choose, confidence=0.2)
        ends.append((drafted[0, 0] >= 0).tolist())
    assert ends[0][:3] == ends[1][:3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 1.5}, "give a chance above 0 and below 1"),
        ({"confidence": 0.5, "draft_length": "auto"}, "not two of them"),
    ],
)
def test_silly_confidences_are_refused(target, spark, options, message):
    with pytest.raises(d.UserError, match=message):
        d.generate(target, spark, [1, 2, 3], **options)
    with pytest.raises(d.UserError, match="has no confidence head"):
        d.generate(target, made(target, "dflash2"), [1, 2, 3], confidence=0.5)


def test_calibration_counts_what_was_reached(target, heldout, spark, tmp_path):
    value = analyse(target, spark, heldout[:8])
    found = value["confidence"]
    rounds = [r for t in heldout[:8] for r in d.hindsight_trace(target, spark, t)]
    assert found["by_offset"][0]["tokens"] == len(rounds)
    passed = sum(r.accepted > 0 for r in rounds) / len(rounds)
    assert found["by_offset"][0]["passed"] == pytest.approx(passed)
    assert sum(b["tokens"] for b in found["bins"]) == sum(b["tokens"] for b in found["by_offset"])
    assert found["error"] < 0.15  # it was trained
    other = analyse(target, made(target, "dflash2"), heldout[:1])
    assert other["confidence"] is None and other["support"] == 5 and value["support"] is None
    Report("Analysis", analyses={"spark": value, "flash": other}).write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Expected calibration error: spark" in page and (tmp_path / "plots" / "confidence.svg").exists()
    assert "KL(p‖q) of flash is over the 5 tokens" in page and "KL(p‖q) of spark" not in page


def test_keys_that_count_nothing_are_told(target):
    heads = Heads(confidence_weight=0.5, confidence_target="overlap", body_weight=2)
    wanted = {"vanilla": ["body_weight"], "dflash2": ["confidence_weight", "confidence_target"]}
    for name, keys in wanted.items():
        assert unused_keys(heads, made(target, name)) == keys
        assert unused_keys(Heads(), made(target, name)) == []


# -- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vanilla", "gated", "dflash2"])
def test_every_objective_reaches_every_part(target, heldout, name):
    """Losses and gradients are finite, of the body and of the new parts, greedy and sampled."""
    drafter = made(target, name).requires_grad_()
    rows = [dataclasses.replace(t, response_ids=t.response_ids[:24]) for t in heldout[:2]]
    for kind, spec in objectives.OBJECTIVES.items():
        for sampling in (Sampling(), Sampling(temperature=1.0)):
            if spec.needs_values and not sampling.takes_argmax:
                continue
            batch = BatchSource(target, drafter.target_layers).batch(rows, with_cache=spec.needs_branches)
            traces = hindsight_rollout(target, drafter, batch, 5, sampling, 0, True)
            loss, figures = opd_loss(
                target,
                drafter,
                batch,
                traces,
                Opd(objective={"kind": kind}),
                num_draft_tokens=5,
                seed="0",
                sampling=sampling,
            )
            drafter.zero_grad()
            loss.backward()
            assert torch.isfinite(loss) and figures["supervised"]
            for n, p in drafter.named_parameters():
                assert p.grad is not None and torch.isfinite(p.grad).all(), (kind, n)
                # Body and correction learn, whatever is minimised.
            assert drafter.correction_weight().grad.abs().sum() > 0, kind
            assert drafter.fc.weight.grad.abs().sum() > 0, kind


@pytest.mark.parametrize("name", ["rnn", "dflash2"])
def test_sixteen_bit_steps_train_the_new_parts(target, heldout, name):
    """Under autocast, with layers computed again in the backward pass, every parameter gets a gradient."""
    drafter = made(target, name).requires_grad_()
    drafter.gradient_checkpointing = True
    batch = BatchSource(target, drafter.target_layers).batch(heldout[:2])
    with torch.autocast("cpu", torch.bfloat16):
        options = {"anchors": 4, "num_draft_tokens": 5, "decay": None, "sampling": Sampling(temperature=1.0)}
        loss, _ = sft_loss(target, drafter, batch, seed="0", **options)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in drafter.parameters())


def test_a_label_that_is_no_candidate_has_no_chance(target):
    """Its loss is finite and reaches it; as a chance of passing, its q is zero."""
    r = blocks(candidates=3, confidence=False)
    unary = r.hidden[..., :6] @ r.head[0].T
    r.labels[0, 0], r.labels[0, 1] = unary[0, 0].argmin(), unary[0, 1].argmax()
    assert torch.isfinite(r.label_nll).all() and r.label_nll[0, 0] > 0
    assert r.label_q[0, 0] == 0 < r.label_q[0, 1]
    loss, _ = objectives.objective_loss(r, Objective(kind="expected_length"))
    loss.backward()
    assert torch.isfinite(r.hidden.grad if r.hidden.is_leaf else loss).all()


def test_what_cannot_be_drafted_counts_as_a_failure_of_the_confidence():
    r = dataclasses.replace(blocks(), draftable=torch.tensor([[True, False, True], [True, True, True]]))
    assert reached(r).tolist() == [[True, True, False], [True, True, False]]
    assert r.reachable.tolist() == [[True, False, False], [True, True, False]]


def test_options_and_families_that_count_nothing_are_told(target, caplog):
    source = FAMILIES["dflash"].create(target, num_layers=1, block_size=6)
    source.bind(target)
    options = {"num_layers": 3, "markov_rank": 8, "sample_from_anchor": True}
    grown_drafter(Model(family="dspark", options=options), source, target)
    assert "model.options num_layers, sample_from_anchor are not used" in caplog.text
    assert grown_drafter(Model(family="eagle3"), source, target) is source
    assert "goes on as that" in caplog.text
    with pytest.raises(d.UserError, match="unknown drafter family 'dsprak'"):
        grown_drafter(Model(family="dsprak"), source, target)


def test_a_confidence_without_a_loss_still_gets_a_gradient():
    """Processes that share a batch wait for every parameter's."""
    r = blocks()
    loss = SFT_LOSSES["cross_entropy"].loss
    found, figures = with_heads(
        r, lambda x: (loss(x, None), {}), Heads(confidence_weight=0), agreement=True, along_text=True
    )
    found.backward()
    assert not figures and r.confidence.grad is not None and not r.confidence.grad.any()
