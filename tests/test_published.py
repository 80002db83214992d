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

FAMILY = "dflash"  # of the fixtures
VOCAB, HIDDEN, DRAFT_VOCAB = 320, 64, 200
LONGEST = 8  # tokens of a response: random drafters have a round a token

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
    "Gemma-4-12B": (
        "gemma4_text",
        48,
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "global_head_dim": 16,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 16,
            "final_logit_softcapping": 30.0,
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


def deepspec(**keys):
    """As DeepSpec's DSpark class writes it: flat keys."""
    return {
        **{k: v for k, v in dflash(5, [], 36).items() if k != "dflash_config"},
        "architectures": ["Qwen3DSparkModel"],
        "block_size": 7,
        "mask_token_id": VOCAB - 1,
        "target_layer_ids": [1, 9, 17, 25, 33],
        "num_anchors": 512,
        "markov_head_type": "vanilla",
        "tie_word_embeddings": False,
        **keys,
    }


def deepspec_gemma4(**keys):
    """The same for Gemma 4: a copy of the target's text config."""
    rope = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}
    own = {
        **TARGETS["Gemma-4-12B"][2],
        "architectures": ["Gemma4DSparkModel"],
        "model_type": "gemma4_text",
        "target_layer_ids": [5, 17, 29, 41, 46],
        "num_target_layers": 48,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": rope},
        "enable_moe_block": False,
    }
    plain = deepspec(**own)
    for key in ("rope_theta", "rope_scaling", "use_sliding_window", "max_window_layers"):
        del plain[key]
    return {**plain, **keys}


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


def speculators_dflash(**keys):
    """As RedHat's speculators write it."""
    layer = dflash(2, [], 36)
    for key in ("dflash_config", "block_size", "num_target_layers", "auto_map"):
        del layer[key]
    return {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_version": "0.9.0",
        "block_size": 8,
        "mask_token_id": VOCAB - 1,
        "aux_hidden_state_layer_ids": [2, 18, 34],
        "draft_vocab_size": VOCAB,
        "sample_from_anchor": False,
        "sliding_window_non_causal": True,
        "target_hidden_size": HIDDEN,
        "speculators_config": {"algorithm": "dflash", "proposal_methods": [{"speculative_tokens": 7}]},
        "transformer_layer_config": {**SIZES, **layer},
        **keys,
    }


SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
# What files of these also hold. copies: the target's embeddings and head; prefix: of every name; shards: two
# files; rotary: a buffer; verifier: what trainers keep of the target.
EXTRAS = {
    "z-lab Qwen3-8B, sharded": {"shards", "prefix", "rotary"},
    "speculators DFlash Qwen3-8B": {"copies", "verifier"},
    "speculators DFlash Qwen3-8B, draft vocabulary": {"verifier"},
    "DeepSpec DFlash Qwen3-4B": {"copies"},
    "DeepSpec DSpark Qwen3-4B": {"copies"},
    "DeepSpec DSpark Gemma-4-12B": {"copies"},
    "DeepSpec EAGLE-3 Qwen3-4B": {"copies"},
    "EAGLE-3 Qwen3-8B (NVIDIA)": {"rotary", "verifier"},
}
DRAFTERS = {
    "z-lab Qwen3-8B, sharded": ("Qwen3-8B", dflash(3, [1, 17, 33], 36)),
    "z-lab Qwen3-8B, biases": ("Qwen3-8B", dflash(1, [1, 17, 33], 36, attention_bias=True)),
    "speculators DFlash Qwen3-8B": ("Qwen3-8B", speculators_dflash()),
    "speculators DFlash Qwen3-8B, draft vocabulary": (
        "Qwen3-8B",
        speculators_dflash(draft_vocab_size=DRAFT_VOCAB),
    ),
    "speculators DFlash Qwen3-8B, anchor first": (
        "Qwen3-8B",
        speculators_dflash(
            sample_from_anchor=True,
            speculators_config={"algorithm": "dflash", "proposal_methods": [{"speculative_tokens": 8}]},
        ),
    ),
    "DFlash narrower than Qwen3-8B": (
        "Qwen3-8B",
        dflash(1, [1, 17, 33], 36, hidden_size=32, target_hidden_size=HIDDEN),
    ),
    "DeepSpec DFlash Qwen3-4B": (  # flat keys; the anchor's slot predicts
        "Qwen3-4B",
        deepspec(markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=False),
    ),
    "DeepSpec DSpark Qwen3-4B": (
        "Qwen3-4B",
        # num_nextn_predict_layers is the target's, which its config is a copy of.
        deepspec(
            markov_rank=16,
            enable_confidence_head=True,
            confidence_head_with_markov=True,
            num_nextn_predict_layers=1,
        ),
    ),
    "DeepSpec DFlash Gemma-4-12B": (
        "Gemma-4-12B",
        deepspec_gemma4(markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=False),
    ),
    "DeepSpec DSpark Gemma-4-12B": (
        "Gemma-4-12B",
        deepspec_gemma4(markov_rank=16, enable_confidence_head=True, confidence_head_with_markov=True),
    ),
    "SpecForge DSpark Qwen3-8B": (
        "Qwen3-8B",
        dflash(
            2,
            [1, 17, 33],
            36,
            architectures=["DSparkDraftModel"],
            block_size=7,
            dflash_config={
                "mask_token_id": VOCAB - 1,
                "target_layer_ids": [1, 17, 33],
                "projector_type": "dspark",
                "markov_rank": 16,
                "markov_head_type": "gated",
                "enable_confidence_head": True,
                "confidence_head_with_markov": False,
                "confidence_head_alpha": 1.0,
                "attention_mode": "gqa",
            },
        ),
    ),
    "speculators DSpark Qwen3-8B, draft vocabulary": (
        "Qwen3-8B",
        speculators_dflash(
            architectures=["DSparkDraftModel"],
            speculators_model_type="dspark",
            draft_vocab_size=DRAFT_VOCAB,
            sample_from_anchor=True,
            markov_rank=16,
            markov_head_type="vanilla",
            enable_confidence_head=False,
            speculators_config={"algorithm": "dspark", "proposal_methods": [{"speculative_tokens": 8}]},
        ),
    ),
    "speculators DSpark Qwen3-8B, before sample_from_anchor": (
        "Qwen3-8B",
        {
            k: v
            for k, v in speculators_dflash(
                architectures=["DSparkDraftModel"], speculators_model_type="dspark", markov_rank=16
            ).items()
            if k != "sample_from_anchor"
        },
    ),
    "z-lab DFlash2 (the 27B's keys)": (
        "Qwen3-8B",
        dflash(
            5,
            [1, 9, 17, 25, 33],
            36,
            architectures=["DFlash2DraftModel"],
            block_size=None,
            layer_types=["sliding_attention"] * 5,
            sliding_window=24,
            use_sliding_window=True,
            is_causal=False,
            dflash_config={
                "block_size": 8,
                "mask_token_id": VOCAB - 1,
                "target_layer_ids": [1, 9, 17, 25, 33],
                "conv_kernel_size": 2,
                "conv_group_size": 16,
                "selector_rank": 16,
                "selector_top_k": 16,
            },
        ),
    ),
    "speculators DFlash2 Qwen3-8B": (
        "Qwen3-8B",
        speculators_dflash(
            architectures=["DFlash2DraftModel"],
            speculators_model_type="dflash2",
            conv_kernel_size=2,
            conv_group_size=16,
            selector_rank=16,
            selector_top_k=8,
        ),
    ),
    "EAGLE-3 Qwen3-8B (NVIDIA)": (
        "Qwen3-8B",
        eagle3(eagle_config={"eagle_aux_hidden_state_layer_ids": [], "use_aux_hidden_state": True}),
    ),
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
    "DeepSpec EAGLE-3 Qwen3-4B": (
        "Qwen3-4B",
        {
            **{k: v for k, v in deepspec(num_hidden_layers=1).items() if "markov" not in k},
            "architectures": ["Qwen3Eagle3Model"],
            "layer_types": ["full_attention"],
            "ttt_length": 7,
            "step_loss_decay": 0.8,
            "draft_num_hidden_layers": 1,
        },
    ),
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


def write_tensors(folder, tensors, extras, target) -> None:
    more = {}
    if "copies" in extras:
        more |= {"embed_tokens.weight": target.model.get_input_embeddings().weight.clone()}
        more |= {"lm_head.weight": target.head.weight.clone()}
    if "verifier" in extras:
        more |= {"verifier_norm.weight": torch.ones(HIDDEN)}
        more |= {"verifier_lm_head.weight": target.head.weight.clone()}
    if "rotary" in extras:
        more |= {"rotary_emb.inv_freq": torch.ones(4)}
    tensors = {**tensors, **more}
    if "prefix" in extras:
        tensors = {f"model.{k}": v for k, v in tensors.items()}
    if "shards" not in extras:
        save_file(tensors, folder / "model.safetensors")
        return
    names = sorted(tensors)
    files = {k: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, k in enumerate(names)}
    for file in set(files.values()):
        save_file({k: tensors[k] for k in names if files[k] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", DRAFTERS)
def test_published_shapes_load_draft_and_replay(make_target, tmp_path, name):
    torch.manual_seed(1)
    target_name, config = DRAFTERS[name]
    target = make_target(target_name)
    if "transformer_layer_config" not in config:
        config = {**SIZES, **config}
    family = family_of(config)
    assert is_drafter(config)
    # The tensors that such a file has, random.
    tables = {"d2t": torch.arange(DRAFT_VOCAB) // 3, "t2d": torch.zeros(VOCAB, dtype=torch.bool)}
    tables["t2d"][tables["d2t"] + torch.arange(DRAFT_VOCAB)] = True
    head = {"lm_head.weight": torch.zeros(DRAFT_VOCAB, HIDDEN)}
    reduced = config.get("draft_vocab_size") == DRAFT_VOCAB
    own = {**tables, **head} if reduced else {}
    keys = {**config, **(config.get("dflash_config") or {})}
    if keys.get("enable_confidence_head"):  # its tensors say that it is there
        width = HIDDEN + (16 if keys["confidence_head_with_markov"] else 0)
        own["confidence_head.proj.weight"] = torch.zeros(1, width)
    shape, _ = family.from_files(config, own)
    assert getattr(shape, "has_confidence", False) is bool(keys.get("enable_confidence_head"))
    tensors = {
        k: torch.randn_like(v) / 8 if v.is_floating_point() else v for k, v in shape.state_dict().items()
    }
    tensors.update(tables if reduced else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tensors(tmp_path, tensors, EXTRAS.get(name, set()), target)
    drafter = d.Drafter.from_pretrained(str(tmp_path), device="cpu")
    drafter.bind(target)
    length = {"DeepSpec DFlash Qwen3-4B": 7, "speculators DFlash Qwen3-8B, anchor first": 8}
    length |= {
        "DeepSpec DFlash Gemma-4-12B": 7,
        "DeepSpec DSpark Gemma-4-12B": 7,
        "DeepSpec DSpark Qwen3-4B": 7,
        "SpecForge DSpark Qwen3-8B": 7,
        "z-lab DFlash2 (the 27B's keys)": 7,
    }
    length |= {n: 8 if "draft vocabulary" in n else 7 for n in DRAFTERS if n.startswith("speculators DSpark")}
    assert drafter.draft_length == length.get(name, drafter.draft_length)

    prompts = [torch.randint(2, VOCAB, (n,)).tolist() for n in (40, 23)]
    alone = speculate(target, None, prompts, max_new_tokens=LONGEST)
    made = speculate(target, drafter, prompts, max_new_tokens=LONGEST)
    # Written in our own hand and read again, in every layout it has, it drafts the same.
    for verifier in (None, {"name_or_path": target_name, "architectures": []}):
        if verifier is None or "speculators" in drafter.formats:
            drafter.save_pretrained(tmp_path / "again", verifier=verifier)
            again = d.Drafter.from_pretrained(str(tmp_path / "again"), device="cpu")
            again.bind(target)
            other = speculate(target, again, prompts, max_new_tokens=LONGEST)
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
    assert len(drafted) == len(rounds) > LONGEST
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


def test_copies_of_another_target_are_told(make_target, tmp_path, caplog):
    """A file with embeddings that are not the target's: they are not used, and that is said."""
    target = make_target("Qwen3-8B")
    _, config = DRAFTERS["speculators DFlash Qwen3-8B"]
    shape, _ = family_of(config).from_files(config, {})
    tensors = dict(shape.state_dict())
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = target.model.get_input_embeddings().weight
    for copy, message in (
        (own.half().float(), None),  # rounded
        (own * 1.2, "differs by 20 %"),
        (torch.randn_like(own), "looks random"),
        (own[:, :8].clone(), "not used: the target's is"),
    ):
        save_file({**tensors, "embed_tokens.weight": copy.contiguous()}, tmp_path / "model.safetensors")
        drafter = d.Drafter.from_pretrained(str(tmp_path), device="cpu")
        caplog.clear()
        drafter.bind(target)
        drafter.bind(target)  # once is enough
        assert [message in r.message for r in caplog.records] == ([True] if message else [])


@pytest.mark.parametrize(
    ("key", "what"),
    [("enable_moe_block", "experts"), ("hidden_size_per_layer_input", "inputs of every layer")],
)
def test_parts_of_gemma4_that_no_drafter_has_are_refused(tmp_path, key, what):
    config = {**SIZES, **DRAFTERS["DeepSpec DSpark Gemma-4-12B"][1], key: 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"fc.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(d.UserError, match=f"{key} \\({what}\\), which is not supported"):
        d.Drafter.from_pretrained(str(tmp_path), device="cpu")


def test_the_slot_convention_shifts_by_one(make_target):
    """A block of B slots drafts B tokens where the anchor's slot predicts, else B - 1."""
    target = make_target("Qwen3-8B")
    _, config = DRAFTERS["speculators DFlash Qwen3-8B"]
    drafters = []
    for first in (False, True):
        torch.manual_seed(3)
        made, _ = family_of(config).from_files({**config, "sample_from_anchor": first}, {})
        made.bind(target)
        drafters.append(made.eval())
    plain, first = drafters
    assert (plain.draft_length, first.draft_length) == (7, 8)
    ids = torch.randint(2, VOCAB, (1, 30))
    out = target.trajectories(ids, plain.target_layers)
    anchors, labels = torch.tensor([[9, 20]]), torch.zeros(1, 2, 8, dtype=torch.long)
    states = []
    with torch.no_grad():
        for drafter in drafters:
            context = drafter.build_cache(target, ids, out.features)
            count = drafter.draft_length
            at = ids.gather(1, anchors)
            states.append(drafter.replay(target, context, anchors, at, labels[:, :, :count]))
    # The same eight slots: one convention throws the first one's output away.
    torch.testing.assert_close(states[1][:, :, 1:], states[0])


def test_shards_that_are_not_there(tmp_path):
    _, config = DRAFTERS["z-lab Qwen3-8B, sharded"]
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **config}))
    index = tmp_path / "model.safetensors.index.json"
    save_file({"fc.weight": torch.ones(2)}, tmp_path.parent / "other.safetensors")
    for text, message in (
        (json.dumps({"weight_map": {"fc.weight": "model-00001-of-00002.safetensors"}}), "is not there"),
        (json.dumps({"weight_map": {"fc.weight": "../other.safetensors"}}), "not a file of its folder"),
        (json.dumps({"weight_map": {"fc.weight": 3}}), "no index of shards"),
        ("{", "no index of shards"),
    ):
        index.write_text(text)
        with pytest.raises(d.UserError, match=message):
            d.Drafter.from_pretrained(str(tmp_path), device="cpu")


def test_pickles_become_safetensors(make_target, tmp_path, capsys):
    """SafeAILab's files are pickles: a command of its own converts them, and says what it did."""
    from draft_opd.cli.main import run

    _, config = DRAFTERS["EAGLE-3 Qwen3-8B (NVIDIA)"]
    tables = {"d2t": torch.arange(DRAFT_VOCAB) // 3, "lm_head.weight": torch.zeros(DRAFT_VOCAB, HIDDEN)}
    shape, _ = family_of(config).from_files({**SIZES, **config}, dict(tables))
    tensors = {**shape.state_dict(), "d2t": tables["d2t"]}
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({**SIZES, **config}))
    torch.save(tensors, source / "pytorch_model.bin")
    torch.save({"lr": 1.0}, source / "optimizer.pt")
    assert run(["inspect", str(source)]) == 2
    assert f"draft-opd convert {source} OUT" in capsys.readouterr().err
    assert run(["convert", str(source), str(out), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["tensors"] == len(tensors) and value["left_out"] == ["optimizer.pt"]
    drafter = d.Drafter.from_pretrained(str(out), device="cpu")
    assert all(torch.equal(v, tensors[k]) for k, v in drafter.state_dict().items() if k != "t2d")
    assert run(["convert", str(source), str(out)]) == 2 and "exists" in capsys.readouterr().err


def test_pickles_that_are_not_read(tmp_path, capsys):
    """Code, other objects, no pickle at all: one line, and nothing is written."""
    from draft_opd.cli.main import run

    (tmp_path / "config.json").write_text("{}")
    file, out = tmp_path / "pytorch_model.bin", tmp_path / "out"

    class Evil:
        def __reduce__(self):
            return (print, ("this must never be printed",))

    for content, message in (
        ({"fc.weight": torch.ones(2), "x": Evil()}, "holds more than tensors"),
        ({"fc.weight": torch.ones(2), "step": 3}, "'step', which is no plain tensor"),
        ({3: torch.ones(2)}, "'3', which is no plain tensor"),
        ({"fc.weight": torch.eye(2).to_sparse()}, "which is no plain tensor"),
        ({"fc.weight": torch.ones(2, dtype=torch.complex128)}, "cannot be stored"),
        ([torch.ones(2)], "no tensors by name"),
    ):
        torch.save(content, file)
        assert run(["convert", str(tmp_path), str(out)]) == 2
        said = capsys.readouterr()
        assert message in said.err and "never be printed" not in said.out + said.err and not out.exists()
    torch.save({"fc.weight": torch.ones(999)}, file)
    whole = file.read_bytes()
    for content, message in ((b"no pickle", "not a pickle"), (whole[:900], "not a"), (b"\x80", "not a")):
        file.write_bytes(content)
        assert run(["convert", str(tmp_path), str(out)]) == 2
        assert message in capsys.readouterr().err
    file.unlink()
    assert run(["convert", str(tmp_path), str(out)]) == 2 and "no pickled weights" in capsys.readouterr().err
    assert run(["convert", str(file), str(out)]) == 2 and "not a folder" in capsys.readouterr().err


def test_the_wrong_slot_convention_is_noticed(target, heldout, trained_folder, tmp_path):
    """A trained drafter, and the same file with the other convention in its config."""
    from draft_opd.evaluation.misreadings import better_misreadings

    right = d.Drafter.from_pretrained(str(trained_folder), device="cpu")
    right.bind(target)
    texts = [d.Trajectory(t.prompt_ids, t.response_ids[:40], t.id) for t in heldout[:32]]
    right.save_pretrained(tmp_path / "d")
    path = tmp_path / "d" / "config.json"
    config = json.loads(path.read_text())
    config["dflash_config"]["sample_from_anchor"] = True
    path.write_text(json.dumps(config))
    wrong = d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu")
    wrong.bind(target)
    assert wrong.draft_length == right.draft_length + 1
    assert better_misreadings(target, right, texts) == []
    (line,) = better_misreadings(target, wrong, texts)
    assert "predicts nothing" in line
    assert better_misreadings(target, wrong, texts[:31]) == []  # too few to tell
