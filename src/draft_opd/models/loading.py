"""Loading a target's weights by transformers."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from draft_opd.models.hub import EMBEDDED
from draft_opd.models.target_info import check_tokenizer
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import read_json

TOWERS = ("visual", "vision_tower", "vision_model", "audio_tower", "multi_modal_projector", "embed_vision")


def load_model(path: str, dtype: torch.dtype | str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """Model and tokenizer. Of a checkpoint with a vision tower that has no causal LM of its own the
    whole model, whose decoder is the text's. Raises what transformers raises."""
    trust = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(path, **trust)
    options = {"use_safetensors": True, "dtype": dtype, **trust}
    with _no_progress_bar():
        try:
            model = _with_attention(AutoModelForCausalLM, path, options)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error) or config.get_text_config() is config:
                raise
            model = _with_attention(AutoModelForImageTextToText, path, options)
    _drop_towers(model)
    tokenizer = AutoTokenizer.from_pretrained(path, **trust)
    check_tokenizer(tokenizer)
    return model, tokenizer


def _drop_towers(model: nn.Module) -> None:
    """Frees what only images and sounds need."""
    for part in (model, getattr(model, "model", None)):
        for name in TOWERS:
            if isinstance(part, nn.Module) and name in part._modules:
                setattr(part, name, nn.Identity())


def _with_attention(kind: Any, path: str, options: dict) -> Any:
    """SDPA where the model has it. Attention sinks (gpt-oss) and capped scores (Gemma 2) need eager
    attention, which takes our masks as well."""
    try:
        return kind.from_pretrained(path, attn_implementation="sdpa", **options)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return kind.from_pretrained(path, attn_implementation="eager", **options)


@contextmanager
def _no_progress_bar():
    """One bar at a time, and that one is ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def told(error: Exception) -> str:
    """What transformers says of a model that does not load, in a line that helps."""
    text = str(error).strip() or repr(error)
    if "trust_remote_code" in text:
        return "it needs code that ships with it: read that, then pass --trust-remote-code"
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than its config.json asks for"
    if "Unrecognized configuration class" in text:
        return "its config.json is of no causal language model"
    return (
        f"{text.splitlines()[0][:200]}; give a model folder with config.json and safetensors, a "
        f"hub id, or '{EMBEDDED}'"
    )


def is_target_folder(path: Path) -> bool:
    """Whether a folder's config names a causal LM."""
    try:
        config = read_json(path / "config.json")
        names = config.get("architectures") or []
        return any("CausalLM" in a or "ForConditionalGeneration" in a for a in names)
    except (UserError, AttributeError):
        return False
