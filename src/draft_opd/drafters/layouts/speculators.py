"""The layout of the speculators project: layer, proposal and verifier in sections of config.json.

Keys are those of speculators 0.9 (`SpeculatorModelConfig`) as vLLM's reader takes them
(`transformers_utils/configs/speculators`). Tapped layers are counted as hidden_states, one higher
than the layers whose outputs they are.
"""

from __future__ import annotations

from typing import Any

from draft_opd.utils.errors import UserError

VERSION = "0.9.0"  # the release whose keys are written


def is_speculators(config: dict) -> bool:
    return "speculators_model_type" in config or "transformer_layer_config" in config


def flatten(config: dict, own: tuple[str, ...]) -> tuple[dict[str, Any], int | None]:
    """(the layer's keys with those of `own` laid over them, tokens proposed a round if told).

    Raises `UserError` for a layer that is not of the Llama or the Qwen3 kind.
    """
    layer = config.get("transformer_layer_config") or {}
    kind = layer.get("model_type", "qwen3")  # as speculators reads it
    if kind not in ("llama", "qwen3"):
        raise UserError(f"drafters with layers of kind '{kind}' are not supported")
    methods = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    given = {k: config[k] for k in own if config.get(k) is not None}
    return {**layer, "model_type": kind, **given}, methods[0].get("speculative_tokens")


def wrap(
    algorithm: str, architecture: str, layer: dict, own: dict, length: int, verifier: dict
) -> dict[str, Any]:
    """config.json of a drafter of `algorithm` ("eagle3", "dflash") proposing `length` tokens.

    layer: a plain transformers config; own: the algorithm's keys; verifier: `name_or_path` and
    `architectures` of the target.
    """
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": length,
        "accept_tolerance": 0.0,
        "verifier_accept_k": 1,
    }
    return {
        "architectures": [architecture],
        "speculators_model_type": algorithm,
        "speculators_version": VERSION,
        **own,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
        "transformer_layer_config": layer,
    }
