"""Small random targets of the kinds that people have; what makes a kind special is in its config.

Every matrix is drawn with a deviation of 0.15: with the usual 0.02 many mistakes would not show.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf

from draft_opd.models.target import Target

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GATED = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LONG = {"original_max_position_embeddings": 32, "max_position_embeddings": 128}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# name: config class, model class, what differs from BASE
KINDS: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
    "gemma2, capped": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "final_logit_softcapping": 0.05},
    ),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 8, "sliding_window": 8}),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "num_hidden_layers": 6,
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 8,
            "final_logit_softcapping": 0.05,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
    "gemma4, shared keys": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "num_hidden_layers": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 4,
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 8,
            "final_logit_softcapping": 0.05,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 96,
            "num_kv_shared_layers": 4,
        },
    ),
    "gemma4, experts": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "num_hidden_layers": 6,
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 8,
            "final_logit_softcapping": 0.05,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "granite, scaled": ("GraniteConfig", "GraniteForCausalLM", {"logits_scaling": 8.0, "pad_token_id": 0}),
    "cohere2, scaled": (
        "Cohere2Config",
        "Cohere2ForCausalLM",
        {"sliding_window": 8, "logit_scale": 0.25, **IDS},
    ),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {"head_dim": 8, "pad_token_id": 0, "eos_token_id": [2]}),
    "glm4, experts": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "qwen3, experts": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"head_dim": 8, **EXPERTS}),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "attn_implementation": "eager",
        },
    ),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", {"head_dim": 8, **IDS}),
    "phi3, longrope": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            **LONG,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0] * 3,
                "long_factor": [4.0] * 3,
                "original_max_position_embeddings": 32,
            },
            **IDS,
        },
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**GATED, **EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    "qwen3.5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", GATED),
    "qwen3.5, experts": (
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        {**GATED, **EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    "nemotron-h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["mamba", "mlp", "attention", "moe", "mamba", "mlp"],
            "num_hidden_layers": 6,
            "head_dim": 8,
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "kimi-linear": (
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        {
            "num_hidden_layers": 5,
            "num_key_value_heads": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            **IDS,
        },
    ),
    "minimax": (
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16},
    ),
    "falcon-h1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {
            "head_dim": 8,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    "bamba": (
        "BambaConfig",
        "BambaForCausalLM",
        {
            "attn_layer_indices": [2],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    "granite, experts and states": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "logits_scaling": 8.0,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    "olmo-hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", {**GATED, **IDS}),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
}


def tiny_target(kind: str, seed: int = 0) -> Target:
    """A target of this kind, without a tokenizer."""
    config_class, model_class, more = KINDS[kind]
    config = getattr(tf, config_class)(**{**BASE, **more})
    build: Callable = getattr(tf, model_class)
    torch.manual_seed(seed)
    model = build(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.15)
    return Target(model, None, kind)


PAGE = Path(__file__).parent.parent / "docs" / "targets.md"
HEAD = (
    "| kind | class in transformers | layers with states | logits | decoding | trees |\n"
    "|---|---|---|---|---|---|\n"
)


def table() -> str:
    """What works for which kind, as docs/targets.md shows it; `python tests/tiny_targets.py` writes it."""
    rows = []
    for kind, (_, model, _) in KINDS.items():
        target = tiny_target(kind)
        can, logits = target.abilities(), target.logit_map
        shown = "plain"
        if logits.cap:
            shown = "soft-capped"
        elif logits.scale != 1:
            shown = "scaled"
        states = ", ".join(f"`{x}`" for x in target.states) or "–"
        decoding = "batches" if not target.states else can["speculative_decoding"].removeprefix("yes, ")
        rows.append(
            f"| {kind} | `{model}` | {states} | {shown} | {decoding} | {can['trees'].split(':')[0]} |\n"
        )
    return HEAD + "".join(rows)


if __name__ == "__main__":
    text = PAGE.read_text()
    start, end = text.index("| kind |"), text.index("\n\n", text.index("| kind |"))
    PAGE.write_text(text[:start] + table().rstrip() + text[end:])
