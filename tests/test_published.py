"""The shapes of published drafters and of their targets: they load, draft losslessly and replay.

Layers, layer kinds, head groups, tapped layers, norms and switches are kept; widths and
vocabularies are small and the weights random. Read from files: SpecForge's qwen3-4b-dflash,
qwen3-30B-A3B-eagle3.1, gpt-oss-20B-eagle3. z-lab's drafters for Llama and gpt-oss, SafeAILab's and
the speculators one follow their loaders' rules (tapped layers spread as z-lab does, EAGLE-3's
default three), and the 30B-A3B one is made to have what newer DFlash files may: sliding layers, and
the block size in dflash_config.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import draft_opd as d
from draft_opd.decoding.generate import speculate
from draft_opd.drafters.registry import family_of
from draft_opd.models.hub import is_drafter, resolve_path
from draft_opd.training.batches import BatchSource
from draft_opd.training.blocks import attach_drafts, pack_anchors, replay

VOCAB, HIDDEN, DRAFT_VOCAB = 320, 64, 200

TARGETS = {  # layers and what differs from a plain decoder
    "Qwen3-4B": ("qwen3", 36, {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "Qwen3-8B": ("qwen3", 36, {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        48,
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "Llama-3.1-8B": (
        "llama",
        32,
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        24,
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "rms_norm_eps": 1e-5,
        },
    ),
}


def dflash(layers, taps, target_layers, **keys):
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": 16,
        "dflash_config": {"mask_token_id": VOCAB - 1, "target_layer_ids": taps},
        "layer_types": ["full_attention"] * layers,
        "num_hidden_layers": layers,
        "num_target_layers": target_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": layers,
        "rms_norm_eps": 1e-6,
        **keys,
    }


def eagle3(**keys):
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": DRAFT_VOCAB,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 36,
        **keys,
    }


DRAFTERS = {
    "z-lab Qwen3-4B": ("Qwen3-4B", dflash(5, [1, 9, 17, 25, 33], 36)),
    "z-lab Qwen3-8B": ("Qwen3-8B", dflash(5, [1, 9, 17, 25, 33], 36)),
    "z-lab Qwen3-30B-A3B": (
        "Qwen3-30B-A3B",
        dflash(
            8,
            [1, 12, 23, 34, 45],
            48,
            num_key_value_heads=1,
            block_size=None,
            layer_types=["sliding_attention"] * 7 + ["full_attention"],
            sliding_window=24,
            use_sliding_window=True,
            dflash_config={"mask_token_id": 7, "target_layer_ids": [1, 12, 23, 34, 45], "block_size": 16},
        ),
    ),
    "z-lab Llama-3.1-8B": (
        "Llama-3.1-8B",
        dflash(5, [1, 8, 15, 22, 29], 32, block_size=10, rope_theta=500000.0),
    ),
    "z-lab gpt-oss-20b": ("gpt-oss-20b", dflash(8, [1, 6, 11, 16, 21], 24, block_size=8)),
    "EAGLE-3 Qwen3-8B": ("Qwen3-8B", eagle3()),
    "EAGLE-3.1 Qwen3-30B-A3B": (
        "Qwen3-30B-A3B",
        eagle3(num_key_value_heads=1, fc_norm=True, norm_output=True),
    ),
    "EAGLE-3 Llama-3.1-8B (SafeAILab)": (
        "Llama-3.1-8B",
        eagle3(architectures=["LlamaForCausalLM"], rms_norm_eps=1e-5, rope_theta=500000.0),
    ),
    "EAGLE-3 Llama-3.1-8B (speculators)": (
        "Llama-3.1-8B",
        {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_version": "0.5.0",
            "draft_vocab_size": DRAFT_VOCAB,
            "norm_before_residual": True,
            "target_hidden_size": None,
            "eagle_aux_hidden_state_layer_ids": [2, 16, 29],
            "speculators_config": {
                "algorithm": "eagle3",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            },
            "transformer_layer_config": {
                "model_type": "llama",
                "hidden_size": HIDDEN,
                "vocab_size": VOCAB,
                "intermediate_size": 96,
                "num_hidden_layers": 1,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
        },
    ),
    "EAGLE-3 gpt-oss-20b": (
        "gpt-oss-20b",
        eagle3(
            num_key_value_heads=1,
            rms_norm_eps=1e-5,
            norm_before_fc=True,
            eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 11, 21]},
        ),
    ),
}


@pytest.fixture(scope="module")
def make_target(tmp_path_factory):
    """A small random target of a published architecture, loaded as a user loads it."""
    made = {}

    def make(name):
        if name not in made:
            kind, layers, keys = TARGETS[name]
            config = AutoConfig.for_model(
                kind,
                vocab_size=VOCAB,
                hidden_size=HIDDEN,
                intermediate_size=96,
                head_dim=8,
                num_hidden_layers=layers,
                max_position_embeddings=512,
                eos_token_id=1,
                pad_token_id=0,
                bos_token_id=2,
                **keys,
            )
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("target") / name
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
            made[name] = d.Target(model, None, name)
        return made[name]

    return make


@pytest.mark.parametrize("name", DRAFTERS)
def test_published_shapes_load_draft_and_replay(make_target, tmp_path, name):
    torch.manual_seed(1)
    target_name, config = DRAFTERS[name]
    target = make_target(target_name)
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "vocab_size": VOCAB,
        "head_dim": 8,
        "max_position_embeddings": 512,
    }
    if "transformer_layer_config" not in config:
        config = {**sizes, **config}
    family = family_of(config)
    assert is_drafter(config)
    # The tensors that such a file has, random.
    tables = {"d2t": torch.arange(DRAFT_VOCAB) // 3, "t2d": torch.zeros(VOCAB, dtype=torch.bool)}
    tables["t2d"][tables["d2t"] + torch.arange(DRAFT_VOCAB)] = True
    head = {"lm_head.weight": torch.zeros(DRAFT_VOCAB, HIDDEN)}
    shape, _ = family.from_files(config, {**tables, **head} if family.sees_drafts else {})
    tensors = {
        k: torch.randn_like(v) / 8 if v.is_floating_point() else v for k, v in shape.state_dict().items()
    }
    tensors.update(tables if family.sees_drafts else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    drafter = d.Drafter.from_pretrained(str(tmp_path), device="cpu")
    drafter.bind(target)

    prompts = [torch.randint(2, VOCAB, (n,)).tolist() for n in (40, 23)]
    alone = speculate(target, None, prompts, max_new_tokens=20)
    made = speculate(target, drafter, prompts, max_new_tokens=20)
    # Written in our own hand and read again, in every layout it has, it drafts the same.
    for verifier in (None, {"name_or_path": target_name, "architectures": []}):
        if verifier is None or "speculators" in drafter.formats:
            drafter.save_pretrained(tmp_path / "again", verifier=verifier)
            again = d.Drafter.from_pretrained(str(tmp_path / "again"), device="cpu")
            again.bind(target)
            other = speculate(target, again, prompts, max_new_tokens=20)
            assert [g.rounds for g in other] == [g.rounds for g in made]
    assert [g.token_ids for g in made] == [g.token_ids for g in alone]

    rows = [d.Trajectory(p, g.token_ids, str(i)) for i, (p, g) in enumerate(zip(prompts, made, strict=True))]
    batch = BatchSource(target, drafter.target_layers).batch(rows)
    traces = [g.rounds for g in made]
    blocks = attach_drafts(
        pack_anchors(batch, [[r.anchor for r in t] for t in traces], drafter.draft_length), traces
    )
    replayed = replay(target, drafter.requires_grad_(), batch, blocks)
    drafted = drafter.logits(target, replayed.hidden).argmax(-1)
    rounds = [r for t in traces for r in t]
    assert len(drafted) == len(rounds) > 20
    for row, r in zip(drafted.tolist(), rounds, strict=True):
        assert row[: len(r.drafted)] == r.drafted
    replayed.hidden.sum().backward()
    assert drafter.fc.weight.grad.abs().sum() > 0


def test_a_target_with_attention_sinks_loads_by_name(make_target, tmp_path):
    """gpt-oss has no sdpa attention in transformers; a folder of it still loads."""
    from transformers import AutoTokenizer

    make_target("gpt-oss-20b").model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(resolve_path("embedded")).save_pretrained(tmp_path)
    target = d.Target.from_pretrained(str(tmp_path), device="cpu")
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        ours = target.logits(target.trajectories(ids).hidden)
        torch.testing.assert_close(ours, target.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
