"""EAGLE-3 on disk: the folder that SGLang and vLLM share, SafeAILab's, DeepSpec's, and speculators'.

Two engines spell the tapped layers in two ways, one apart: SGLang reads `eagle_config` (layer outputs),
vLLM the key at the top (hidden_states, one higher). Both are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from draft_opd.drafters.layouts.speculators import flatten, is_speculators, wrap
from draft_opd.drafters.layouts.vocabulary import as_buffers, checked_ids
from draft_opd.drafters.target_config import older_rope_keys
from draft_opd.drafters.weights import split_copies
from draft_opd.utils.errors import UserError

if TYPE_CHECKING:
    from draft_opd.drafters.eagle3 import Eagle3Drafter

# Variants that published files name in their config, at the top or in `eagle_config`.
FLAGS = ("norm_before_residual", "norm_output", "norm_before_fc", "fc_norm")
LLAMA, QWEN3 = "LlamaForCausalLMEagle3", "Eagle3Qwen3ForCausalLM"  # SGLang's and vLLM's names
DEEPSPEC, DEEPSPEC_GEMMA4 = "Qwen3Eagle3Model", "Gemma4Eagle3Model"
COPIES = ("embed_tokens.weight", "lm_head.weight")  # frozen ones of the target's, in DeepSpec's files
SPECULATORS_KEYS = ("draft_vocab_size", "target_hidden_size", "eagle_aux_hidden_state_layer_ids", *FLAGS)


def matches(config: dict) -> bool:
    names = config.get("architectures") or []
    if any("Eagle3" in name for name in names):
        return True
    # SafeAILab's own files name a plain LlamaForCausalLM.
    return "draft_vocab_size" in config and "LlamaForCausalLM" in names and not is_speculators(config)


@dataclass
class Files:
    """What a drafter is made from: config of the layer, tensors under the drafter's own names."""

    config: dict
    tensors: dict[str, Tensor]
    layout: str
    qk_norm: bool
    own_embeddings: bool
    own_head: bool
    copies: dict[str, Tensor]


def read(config: dict, tensors: dict[str, Tensor]) -> Files:
    """From any of the layouts. Raises `UserError` for what is none of them."""
    layout, copies = "sglang", {}
    if DEEPSPEC_GEMMA4 in config["architectures"]:
        raise UserError("DeepSpec's EAGLE-3 drafters for Gemma 4 have layers that are not supported")
    if DEEPSPEC in config["architectures"]:
        layout, config = "deepspec", _from_deepspec(config)
        tensors, copies = split_copies(tensors, COPIES)
    if is_speculators(config):
        layout, (config, num_draft_tokens) = "speculators", flatten(config, SPECULATORS_KEYS)
        config["architectures"] = [QWEN3 if config["model_type"] == "qwen3" else LLAMA]
        config["eagle_config"] = {"draft_length": num_draft_tokens} if num_draft_tokens else {}
    if config.get("num_hidden_layers", 1) != 1:
        raise UserError("EAGLE-3 drafters of more than one layer are not supported")
    if not isinstance(config.get("vocab_size"), int):
        raise UserError("the EAGLE-3 config.json has no vocab_size")
    # speculators names the layer `layers.0`.
    tensors = {
        "midlayer." + k.removeprefix("layers.0.") if k.startswith("layers.0.") else k: v
        for k, v in tensors.items()
    }
    size = config.get("draft_vocab_size") or config["vocab_size"]
    whole = size == config["vocab_size"]
    if "d2t" not in tensors and whole:
        tensors["d2t"] = torch.zeros(size, dtype=torch.long)
    if "d2t" in tensors and "t2d" not in tensors:  # engines do not read it
        ids = checked_ids(tensors["d2t"], config["vocab_size"])
        tensors["t2d"] = as_buffers(ids, config["vocab_size"])[1]
    return Files(
        {**config, "draft_vocab_size": size, "model_type": "llama"},
        tensors,
        layout,
        qk_norm=QWEN3 in config["architectures"],
        own_embeddings="embed_tokens.weight" in tensors,
        # Without it the target's head serves, if the vocabulary is the whole one.
        own_head="lm_head.weight" in tensors or not whole,
        copies=copies,
    )


def _from_deepspec(config: dict) -> dict:
    """DeepSpec's flat config.json in the other files' keys; its layers are those whose output is tapped."""
    options = {"eagle_aux_hidden_state_layer_ids": config.get("target_layer_ids")}
    if config.get("ttt_length"):
        options["draft_length"] = config["ttt_length"]
    return {**config, "architectures": [QWEN3], "eagle_config": options}


def config_of(drafter: Eagle3Drafter) -> dict:
    """config.json that SGLang and vLLM read."""
    config = drafter.config.to_dict()
    layers = list(drafter.target_layers)
    config.update(
        architectures=[QWEN3 if drafter.qk_norm else LLAMA],
        model_type="qwen3" if drafter.qk_norm else "llama",
        draft_vocab_size=len(drafter.d2t) if drafter.lm_head else None,  # null: the target's head
        target_hidden_size=drafter.feature_size,
        num_aux_hidden_states=drafter.fc.in_features // drafter.feature_size,
        **older_rope_keys(drafter.config),
    )
    # Readers differ in what they take for absent: norm_before_residual is always written, and
    # norm_output only where it is so (SpecForge means something else by it).
    config = {k: v for k, v in config.items() if k not in FLAGS}
    config |= {k: v for k, v in drafter.flags.items() if v or k == "norm_before_residual"}
    options = getattr(drafter.config, "eagle_config", None) or {}
    options = {k: v for k, v in options.items() if k not in FLAGS}  # said once, at the top
    options |= {"draft_length": drafter.draft_length, "use_aux_hidden_state": True}
    if layers:
        options["eagle_aux_hidden_state_layer_ids"] = layers
        config["eagle_aux_hidden_state_layer_ids"] = [i + 1 for i in layers]
    config["eagle_config"] = options
    return config


def tensors_of(drafter: Eagle3Drafter) -> dict[str, Tensor]:
    tensors = dict(drafter.state_dict())
    if drafter.vocabulary is None:  # vLLM refuses tables for the whole vocabulary
        del tensors["d2t"], tensors["t2d"]
    return tensors


def speculators_files(drafter: Eagle3Drafter, verifier: dict) -> tuple[dict, dict[str, Tensor]]:
    """config.json and tensors in speculators' layout; `verifier` names the target."""
    config = config_of(drafter)
    own = {k: v for k in SPECULATORS_KEYS if (v := config.pop(k, None)) is not None}
    own["draft_vocab_size"] = len(drafter.d2t)
    del config["eagle_config"]
    tensors = {
        "layers.0." + k.removeprefix("midlayer.") if k.startswith("midlayer.") else k: v
        for k, v in tensors_of(drafter).items()
    }
    name = "Eagle3Speculator"
    return wrap("eagle3", name, config, own, drafter.draft_length, verifier), tensors
