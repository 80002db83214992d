"""Drafters for inference engines.

A drafter folder is in the layout that engines read already: for DFlash that of z-lab, for EAGLE-3
the one that SGLang and vLLM share. `speculators` is the other one that vLLM reads; `deepspec` is DSpark's
with copies of the target's embeddings and head, as DeepSpec's own code reads it. An export fixes
the type of the weights, and its README.md says what the drafter is and how to serve it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from draft_opd.drafters import Drafter
from draft_opd.models.hub import resolve_path
from draft_opd.models.target import Target
from draft_opd.models.target_info import TargetInfo
from draft_opd.serving.engines import ENGINES, serve_command
from draft_opd.serving.model_card import model_card
from draft_opd.utils.errors import UserError

log = logging.getLogger(__name__)


def format_for_vllm(drafter: Drafter) -> str:
    """The layout in which vLLM gets this drafter. Raises `UserError` where it reads none of them."""
    for name in ("vllm", "speculators"):
        if name in drafter.formats:
            return name
    raise UserError(f"this {drafter.family} drafter has no layout that vLLM reads: its blocks are other ones")


def verifier_of(path: str, model: TargetInfo) -> dict:
    """What speculators' layout says of the target."""
    return {"name_or_path": path, "architectures": model.architectures}


def export(
    target: str,
    drafter: str,
    format: str,
    out: Path,
    *,
    dtype: str = "bfloat16",
    trust_remote_code: bool = False,
) -> dict:
    """Writes the folder `out`, once it is certain that the drafter fits the target."""
    formats = (*ENGINES, "speculators")
    if format not in formats:
        raise UserError(f"--format {format}: choose one of {', '.join(formats)}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: choose float32, bfloat16 or float16")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"'{out}' exists and is not empty: choose a new folder")
    helper = Drafter.from_pretrained(drafter, device="cpu")
    model = TargetInfo.from_pretrained(target, trust_remote_code=trust_remote_code)
    helper.bind(model)
    if format not in helper.formats:
        only = f"has {', '.join(helper.formats)} only" if helper.formats else "is read by no engine"
        raise UserError(f"--format {format}: this {helper.family} drafter {only}")
    scale = getattr(helper, "embedding_scale", None)
    if scale not in (None, 1.0):
        log.warning(
            "this drafter was trained on embeddings multiplied by %.4g, as its target does. An engine that "
            "shares the table without that accepts less: run check-serving, which names it",
            scale,
        )
    path = resolve_path(target)
    serve = serve_command(helper, path, out, format if format in ENGINES else "vllm")
    verifier = verifier_of(path, model) if format == "speculators" else None
    card = model_card(helper, drafter, target, serve)
    copies = _copies(target, trust_remote_code) if format == "deepspec" else {}
    helper.save_pretrained(out, dtype=getattr(torch, dtype), verifier=verifier, card=card, copies=copies)
    return {
        "kind": "drafter",
        "path": str(out),
        "family": helper.family,
        "format": format,
        "dtype": dtype,
        "serve": serve,
    }


def _copies(target: str, trust_remote_code: bool) -> dict[str, torch.Tensor]:
    """The target's embeddings and head, [V, H] each."""
    model = Target.from_pretrained(target, device="cpu", prepacked=False, trust_remote_code=trust_remote_code)
    embeddings = model.model.get_input_embeddings().weight.detach()
    return {"embed_tokens.weight": embeddings, "lm_head.weight": model.head_weight().detach().clone()}
