"""DFlash on disk: z-lab's folder, which SGLang and vLLM read too, and speculators'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from draft_opd.drafters.layouts.speculators import flatten, is_speculators, wrap
from draft_opd.drafters.target_config import older_rope_keys
from draft_opd.utils.errors import UserError

if TYPE_CHECKING:
    from draft_opd.drafters.dflash import DFlashDrafter

ARCHITECTURE = "DFlashDraftModel"


def read(config: dict) -> tuple[dict, str]:
    """config.json of either layout in z-lab's keys, and the layout's name. Raises `UserError`."""
    layout = "z-lab"
    if is_speculators(config):
        layout, config = "speculators", _from_speculators(config)
    options = config.get("dflash_config")
    if not isinstance(options, dict) or not isinstance(options.get("mask_token_id"), int):
        raise UserError(
            "the DFlash config.json has no dflash_config.mask_token_id (z-lab's layout) and no "
            "mask_token_id (speculators')"
        )
    if not options.get("target_layer_ids") and not config.get("num_target_layers"):
        raise UserError("the DFlash config.json names neither target layers nor their number")
    return {**config, "model_type": "qwen3"}, layout


def _from_speculators(config: dict) -> dict:
    """speculators' config.json in z-lab's keys. Raises `UserError` for what has no counterpart."""
    flat, num_draft_tokens = flatten(config, ("block_size",))
    taps = config.get("aux_hidden_state_layer_ids")
    if not isinstance(taps, list) or not taps:
        raise UserError("the DFlash config.json names no aux_hidden_state_layer_ids")
    size = config.get("draft_vocab_size")
    if size not in (None, flat.get("vocab_size")):
        raise UserError("DFlash drafters with a draft vocabulary are not supported")
    if config.get("sample_from_anchor"):
        raise UserError("DFlash drafters that sample from the anchor are not supported")
    sliding = "sliding_attention" in (flat.get("layer_types") or [])
    causal = None if sliding and not config.get("sliding_window_non_causal") else False
    flat.setdefault("block_size", (num_draft_tokens or 15) + 1)
    options = {
        "mask_token_id": config.get("mask_token_id"),
        "target_layer_ids": [i - 1 for i in taps],
    }
    return {**flat, "is_causal": causal, "dflash_config": options, "num_target_layers": None}


def config_of(drafter: DFlashDrafter) -> dict:
    """config.json in z-lab's layout."""
    config = drafter.config.to_dict()
    config.update(
        architectures=[ARCHITECTURE],
        model_type="qwen3",
        block_size=drafter.block_size,
        num_target_layers=getattr(drafter.config, "num_target_layers", None),
        **older_rope_keys(drafter.config),
    )
    config.pop("is_causal", None)
    if drafter.causal is not None:
        config["is_causal"] = drafter.causal
    config["dflash_config"] = {
        **(getattr(drafter.config, "dflash_config", None) or {}),
        "mask_token_id": drafter.mask_token_id,
        "target_layer_ids": list(drafter.target_layers),
        "block_size": drafter.block_size,
    }
    return config


def speculators_config(drafter: DFlashDrafter, verifier: dict) -> dict:
    """config.json in speculators' layout; `verifier` names the target."""
    config = config_of(drafter)
    for key in ("dflash_config", "block_size", "num_target_layers", "is_causal"):
        config.pop(key, None)
    own = {
        "block_size": drafter.block_size,
        "mask_token_id": drafter.mask_token_id,
        "aux_hidden_state_layer_ids": [i + 1 for i in drafter.target_layers],
        "draft_vocab_size": config["vocab_size"],
        "target_hidden_size": config["hidden_size"],
        "sample_from_anchor": False,
        # vLLM 0.33 makes every layer causal where this is false.
        "sliding_window_non_causal": True,
    }
    return wrap("dflash", ARCHITECTURE, config, own, drafter.draft_length, verifier)
