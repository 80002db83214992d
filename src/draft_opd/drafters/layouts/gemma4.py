"""config.json of DeepSpec's drafters for Gemma 4: a copy of the target's text config, with its names.

They are read into the keys of the other DFlash bodies, and written back as they were.
"""

from __future__ import annotations

from draft_opd.drafters.target_config import full_attention
from draft_opd.utils.errors import UserError

ARCHITECTURE = "Gemma4DSparkModel"
KEY = "gemma4"  # of the config, while a drafter is in memory: what was replaced, and `attention_k_eq_v`
REFUSED = {  # parts of Gemma 4 that DeepSpec's class does not have either
    "enable_moe_block": "experts",
    "hidden_size_per_layer_input": "inputs of every layer",
    "use_double_wide_mlp": "wider MLPs of shared layers",
}


# Keys that the other bodies' config has or changes, and this one does not.
OTHERS = ("rope_theta", "rope_scaling", "sliding_window", "use_sliding_window", "per_layer_config")


def matches(config: dict) -> bool:
    return ARCHITECTURE in (config.get("architectures") or [])


def plain(config: dict) -> dict:
    """The same in the other bodies' keys. Raises `UserError` for what no such drafter has."""
    for key, what in REFUSED.items():
        if config.get(key):
            raise UserError(f"the config.json has {key} ({what}), which is not supported in a drafter")
    shared = bool(config.get("attention_k_eq_v"))
    # transformers 5.23 writes what the full-attention layers have otherwise layer by layer.
    layer = (config.get("per_layer_config") or {}).get("0") or {}
    kv_heads = config.get("num_global_key_value_heads") or layer.get("num_key_value_heads")
    options = dict(config.get("dflash_config") or {})
    if cap := config.get("final_logit_softcapping"):
        options["final_logit_softcapping"] = cap
    new = {
        "model_type": "qwen3",
        "head_dim": config.get("global_head_dim") or layer.get("head_dim") or config.get("head_dim"),
        "num_key_value_heads": (shared and kv_heads) or config.get("num_key_value_heads"),
        "hidden_act": config.get("hidden_activation") or "gelu_pytorch_tanh",
        "rope_parameters": full_attention(config.get("rope_parameters") or {}),
        "final_logit_softcapping": None,
    }
    replaced = {key: config[key] for key in (*new, *OTHERS) if key in config}
    found = {**config, **new, KEY: {"attention_k_eq_v": shared, "new": list(new), "replaced": replaced}}
    if options:
        found["dflash_config"] = options
    return found


def restored(config: dict) -> dict:
    """config.json with the names of Gemma 4; any other as it is."""
    if KEY not in config:
        return config
    here = config[KEY]
    kept = {k: v for k, v in config.items() if k not in (KEY, *here["new"], *OTHERS)}
    return {**kept, **here["replaced"], "architectures": [ARCHITECTURE]}
