"""DFlash on disk: z-lab's folder, which SGLang and vLLM read too, and speculators'. Also the part of DSpark's
and DFlash2's files that is a DFlash body's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from draft_opd.drafters.layouts import gemma4
from draft_opd.drafters.layouts.speculators import flatten, is_speculators, wrap
from draft_opd.drafters.layouts.vocabulary import as_buffers, checked_ids
from draft_opd.drafters.target_config import older_rope_keys
from draft_opd.drafters.weights import split_copies
from draft_opd.utils.errors import UserError, one_line

if TYPE_CHECKING:
    from draft_opd.drafters.dflash import DFlashDrafter

ARCHITECTURE = "DFlashDraftModel"
# DeepSpec trains DFlash with these classes, heads off.
DEEPSPEC = ("Qwen3DSparkModel", "DSparkDraftModel", gemma4.ARCHITECTURE)
KNOWN = (ARCHITECTURE, *DEEPSPEC, "DFlash2DraftModel")
KINDS = {  # families of a DFlash body, by keys that only they have
    "dspark": ("markov_rank", "enable_confidence_head"),
    "dflash2": ("conv_kernel_size", "selector_rank"),
}
SPECULATORS_KEYS = ("draft_vocab_size", "target_hidden_size")
# What is done to logits behind the head: keys of `dflash_config`, as published DFlash2 drafters have them.
SCALE, CAP = "output_multiplier", "final_logit_softcapping"


def shown(value: object) -> str:
    """A config's value in a message; it may be anything, of any length."""
    return one_line(repr(value), 60)


def whole_number(config: dict, key: str, least: int = 0, needed: bool = True) -> None:
    """Raises `UserError` where that key is no whole number from `least` on."""
    value = config.get(key)
    if (value is not None or needed) and (type(value) is not int or value < least):
        raise UserError(f"{key} in config.json is {shown(value)}: it must be a whole number from {least} on")


def _check(config: dict, own_keys: tuple[str, ...]) -> None:
    """Raises `UserError` for values of `dflash_config` that nothing can be made of."""
    options = config["dflash_config"]
    whole_number(options, "mask_token_id")
    for where in (config, options):
        whole_number(where, "block_size", 2, needed=False)
        if not isinstance(where.get("sample_from_anchor"), bool | None):
            raise UserError(
                f"sample_from_anchor in config.json is {shown(where['sample_from_anchor'])}: true or false"
            )
    layers = options.get("target_layer_ids")
    if layers is not None and not (isinstance(layers, list) and all(type(i) is int for i in layers)):
        raise UserError(
            f"target_layer_ids in config.json is {shown(layers)}: it must be a list of whole numbers"
        )
    for key in (SCALE, CAP):
        value = options.get(key)
        if value is None or (key == CAP and value == 0):  # engines take that for none
            continue
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise UserError(f"{key} in config.json is {shown(value)}: it must be a number above 0")
    for key in ("block_size", "sample_from_anchor", *own_keys):
        if key in options and config.get(key) is not None and config[key] != options[key]:
            one, other = shown(config[key]), shown(options[key])
            raise UserError(
                f"config.json has {key} twice, {one} and, in dflash_config, {other}: "
                "readers take one or the other. Keep the one that the drafter was trained with"
            )


def kind_of(config: dict) -> str | None:
    """dflash, dspark or dflash2; None for a config.json of none of them."""
    named = config.get("speculators_model_type")
    if not any(n in KNOWN for n in config.get("architectures") or []) and named not in KINDS:
        return None
    every = _with_nested(config)
    return next((kind for kind, keys in KINDS.items() if any(every.get(k) for k in keys)), "dflash")


def matches(config: dict) -> bool:
    return kind_of(config) == "dflash"


def _with_nested(config: dict) -> dict:
    options = config.get("dflash_config")
    return {**config, **options} if isinstance(options, dict) else config


@dataclass
class Files:
    """What a drafter is made from: config in z-lab's keys, tensors under the drafter's own names, and copies
    of the target's."""

    config: dict
    tensors: dict[str, Tensor]
    layout: str
    copies: dict[str, Tensor]
    own_embeddings: bool
    own_head: bool


def read(
    config: dict, tensors: dict[str, Tensor], family: str = "dflash", own_keys: tuple[str, ...] = ()
) -> Files:
    """From any of the layouts. own_keys: of the family, taken into `dflash_config` wherever they stand.
    Raises `UserError` for what is none of them."""
    given = _with_nested(config)
    config, layout = _read_config(config)
    _check(config, own_keys)
    config["dflash_config"] |= {k: given[k] for k in own_keys if given.get(k) is not None}
    if family != "dflash" and "sample_from_anchor" in given:
        config["dflash_config"]["sample_from_anchor"] = given["sample_from_anchor"]
    hidden, vocab = config.get("hidden_size"), config.get("vocab_size")
    size = config.get("draft_vocab_size") or vocab
    narrow = (config.get("target_hidden_size") or hidden) != hidden
    own = {"embed_tokens.weight"} if narrow else set()
    own |= {"lm_head.weight"} if narrow or size != vocab else set()
    tensors, copies = split_copies(tensors, {"embed_tokens.weight", "lm_head.weight"} - own)
    if size == vocab:  # tables of a whole vocabulary say nothing
        tensors = {k: v for k, v in tensors.items() if k not in ("d2t", "t2d") or (v.any() and k == "d2t")}
    elif "d2t" in tensors and "t2d" not in tensors:
        tensors["t2d"] = as_buffers(checked_ids(tensors["d2t"], vocab), vocab)[1]
    return Files(config, tensors, layout, copies, "embed_tokens.weight" in own, "lm_head.weight" in own)


def _read_config(config: dict) -> tuple[dict, str]:
    """config.json of any layout in z-lab's keys, and the layout's name."""
    if _with_nested(config).get("gru_hidden_dim"):
        raise UserError(
            "the config.json has gru_hidden_dim: it is that of a Domino drafter, which is not supported"
        )
    layout = "z-lab"
    if any(n in (config.get("architectures") or []) for n in DEEPSPEC) and "dflash_config" not in config:
        layout, config = "deepspec", _from_deepspec(config)
    if gemma4.matches(config):
        config = gemma4.plain(config)
    for key, none in ((SCALE, 1.0), (CAP, None)):
        if config.get(key) not in (None, none):
            raise UserError(
                f"the config.json has {key}, which some engines apply to a drafter's logits and some pass "
                "over: put it into dflash_config if the drafter was trained with it, else remove it"
            )
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
    return {**config, "model_type": "qwen3", "dflash_config": dict(options)}, layout


def _from_speculators(config: dict) -> dict:
    """speculators' config.json in z-lab's keys. Raises `UserError` for what has no counterpart."""
    flat, num_draft_tokens = flatten(config, ("block_size", *SPECULATORS_KEYS))
    taps = config.get("aux_hidden_state_layer_ids")
    if not isinstance(taps, list) or not taps:
        raise UserError("the DFlash config.json names no aux_hidden_state_layer_ids")
    sliding = "sliding_attention" in (flat.get("layer_types") or [])
    causal = None if sliding and not config.get("sliding_window_non_causal") else False
    anchor_first = bool(config.get("sample_from_anchor"))
    flat.setdefault("block_size", (num_draft_tokens or 15) + (0 if anchor_first else 1))
    options = {
        "mask_token_id": config.get("mask_token_id"),
        "target_layer_ids": [i - 1 for i in taps],
        "sample_from_anchor": anchor_first,
    }
    return {**flat, "is_causal": causal, "dflash_config": options, "num_target_layers": None}


def _from_deepspec(config: dict) -> dict:
    """DeepSpec's flat config.json in z-lab's keys. Its DFlash drafters are DSpark ones without the heads, so
    their anchor's slot predicts, unless the file says otherwise."""
    options = {
        "mask_token_id": config.get("mask_token_id"),
        "target_layer_ids": config.get("target_layer_ids"),
        "sample_from_anchor": config.get("sample_from_anchor", True),
    }
    return {**config, "is_causal": False, "dflash_config": options}


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
    if drafter.vocabulary is None:
        config.pop("draft_vocab_size", None)
    if drafter.feature_size == drafter.config.hidden_size:
        config.pop("target_hidden_size", None)
    config["dflash_config"] = {
        **(getattr(drafter.config, "dflash_config", None) or {}),
        "mask_token_id": drafter.mask_token_id,
        "target_layer_ids": list(drafter.target_layers),
        "block_size": drafter.block_size,
    }
    if drafter.anchor_first:
        config["dflash_config"]["sample_from_anchor"] = True
    return gemma4.restored(config)


def speculators_config(
    drafter: DFlashDrafter,
    verifier: dict,
    algorithm: str = "dflash",
    architecture: str = ARCHITECTURE,
    more: dict | None = None,
) -> dict:
    """config.json in speculators' layout; `verifier` names the target; more: keys of the family's own."""
    config = config_of(drafter)
    for key in ("dflash_config", "block_size", "num_target_layers", "is_causal", *SPECULATORS_KEYS):
        config.pop(key, None)
    own = {
        "block_size": drafter.block_size,
        "mask_token_id": drafter.mask_token_id,
        "aux_hidden_state_layer_ids": [i + 1 for i in drafter.target_layers],
        "draft_vocab_size": drafter.config.vocab_size if drafter.vocabulary is None else len(drafter.d2t),
        "target_hidden_size": drafter.feature_size,
        "sample_from_anchor": drafter.anchor_first,
        # vLLM 0.33 makes every layer causal where this is false.
        "sliding_window_non_causal": True,
        **(more or {}),
    }
    return wrap(algorithm, architecture, config, own, drafter.draft_length, verifier)
