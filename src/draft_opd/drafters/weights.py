"""Tensors of drafter files: shards, prefixes, buffers that are computed, copies of the target's tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from draft_opd.utils.errors import UserError

if TYPE_CHECKING:
    from draft_opd.models.target_info import TargetInfo

PREFIXES = ("model.", "draft_model.")
# Buffers that follow from the config.
COMPUTED = ("inv_freq", "cos_cached", "sin_cached", "position_ids")
# What trainers store of the target beside the drafter (speculators).
VERIFIER = "verifier_"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
log = logging.getLogger(__name__)


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of one or several safetensors files under plain names. Raises `UserError` where a file is
    damaged or a name is there twice."""
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"'{file}' is not a readable safetensors file ({error})") from error
        for full, tensor in tensors.items():
            name = next((full.removeprefix(p) for p in PREFIXES if full.startswith(p)), full)
            if name.rpartition(".")[2] in COMPUTED:
                continue
            if name in found:
                raise UserError(f"'{file}': the tensor '{name}' is there twice")
            if tensor.dtype in FLOATS and not bool(tensor.isfinite().all()):
                raise UserError(f"'{file}': the tensor '{name}' holds values that are no finite numbers")
            found[name] = tensor
    return found


def write_model(folder: Path, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """config.json and model.safetensors in an existing folder."""
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        k: (v.to(dtype) if v.is_floating_point() else v).cpu().contiguous() for k, v in tensors.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def split_copies(
    tensors: dict[str, Tensor], names: Iterable[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what the drafter is made of, copies of the target's tensors): `names`, and the verifier's."""
    known = set(names)
    copies = {k: v for k, v in tensors.items() if k in known or k.startswith(VERIFIER)}
    return {k: v for k, v in tensors.items() if k not in copies}, copies


def compare_copies(copies: Mapping[str, Tensor], target: TargetInfo) -> None:
    """Warns where a file's copy of the target's tensor is another one: the target's is used. Needs its
    weights, not its config alone."""
    model = getattr(target, "model", None)
    if model is None:
        return
    for name, copy in copies.items():
        if "embed_tokens" in name:
            own = model.get_input_embeddings().weight
        elif "lm_head" in name:
            own = model.get_output_embeddings().weight
        else:
            continue  # a norm that no drafter uses
        if copy.shape != own.shape:
            log.warning(
                "the drafter's file has a tensor '%s' of shape %s that is not used: the target's is %s",
                name,
                list(copy.shape),
                list(own.shape),
            )
            continue
        step = max(1, len(own) // 4096)  # rows that are looked at
        mine, theirs = copy[::step].float().cpu(), own[::step].detach().float().cpu()
        far = (mine - theirs).norm() / theirs.norm().clamp_min(1e-12)
        if far > 0.02:  # more than rounding to 16 bit
            cosine = torch.nn.functional.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0)
            what = "looks random" if abs(cosine) < 0.1 else f"differs by {100 * far:.0f} %"
            log.warning(
                "the drafter's file has its own '%s', which %s against the target's: the target's is used. "
                "Was the drafter trained for another target?",
                name,
                what,
            )
