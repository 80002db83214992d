"""DSpark on disk: DeepSpec's flat config.json, SpecForge's nested one, and speculators'.

What is written can be read by all that read DSpark: the flat keys, the same in `dflash_config`, and the slot
convention by name. Tensors are those of a DFlash body and `markov_head.*`, `confidence_head.*`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import Tensor

from draft_opd.drafters.layouts import dflash as body
from draft_opd.drafters.layouts import gemma4
from draft_opd.utils.errors import UserError

if TYPE_CHECKING:
    from draft_opd.drafters.dspark import DSparkDrafter

log = logging.getLogger(__name__)

ARCHITECTURE = "Qwen3DSparkModel"
HEAD_KEYS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
ANCHORS = 512  # blocks a text in DeepSpec's training: its reader asks for the key, drafting does not use it
CONFIDENCE = "confidence_head.proj.weight"


def matches(config: dict) -> bool:
    return body.kind_of(config) == "dspark"


def read(config: dict, tensors: dict[str, Tensor]) -> body.Files:
    """From any of the layouts. Raises `UserError` for what is none of them."""
    files = body.read(config, tensors, "dspark", HEAD_KEYS)
    o = files.config["dflash_config"]
    if files.layout == "z-lab":  # z-lab has no DSpark
        files.layout = "deepspec" if "markov_rank" in config else "specforge"
    body.whole_number(o, "markov_rank", needed=False)
    if not o.get("markov_rank"):
        raise UserError(
            "the DSpark config.json has no markov_rank: no drafter without that head is supported"
        )
    # vLLM takes an absent key for false, SGLang for true: the tensors tell.
    if (weight := files.tensors.get(CONFIDENCE)) is None:
        if o.get("enable_confidence_head"):
            log.warning("config.json has enable_confidence_head, but no tensors of that head: it is off")
        o["enable_confidence_head"] = False
    elif o.get("enable_confidence_head") is False:
        log.warning("config.json turns the confidence head off: its tensors in the file are passed over")
        files.tensors = {k: v for k, v in files.tensors.items() if not k.startswith("confidence_head.")}
    else:
        o.setdefault("enable_confidence_head", True)
        o.setdefault("confidence_head_with_markov", weight.shape[-1] != files.config["hidden_size"])
    # speculators' first DSpark files have no such key, and B - 1 tokens a block; all others draft B.
    o.setdefault("sample_from_anchor", files.layout != "speculators")
    return files


def config_of(drafter: DSparkDrafter) -> dict:
    """config.json: flat keys, as DeepSpec and vLLM read them, and nested ones, as SGLang does."""
    config = body.config_of(drafter)
    own: dict[str, Any] = {
        **config["dflash_config"],
        "markov_head_type": drafter.markov_head.kind,
        "enable_confidence_head": drafter.has_confidence,
        "confidence_head_with_markov": drafter.with_markov,
        "sample_from_anchor": drafter.anchor_first,
        "projector_type": "dspark",
    }
    config.setdefault("num_anchors", ANCHORS)
    flat = {k: own[k] for k in (*HEAD_KEYS, "mask_token_id", "target_layer_ids", "sample_from_anchor")}
    if not gemma4.matches(config):
        config["architectures"] = [ARCHITECTURE]
    return {**config, **flat, "dflash_config": own}


def speculators_config(drafter: DSparkDrafter, verifier: dict) -> dict:
    """config.json in speculators' layout; `verifier` names the target."""
    own = {k: drafter.config_dict()[k] for k in HEAD_KEYS}
    return body.speculators_config(drafter, verifier, "dspark", "DSparkDraftModel", own)
