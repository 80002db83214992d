"""DFlash2 on disk: z-lab's folder, which SGLang and vLLM read, and speculators'.

Its four sizes are in `dflash_config` (flat in speculators' layout). The selector's two tables have no suffix
`.weight` in published files; files that have it are read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from draft_opd.drafters.layouts import dflash as body
from draft_opd.utils.errors import UserError

if TYPE_CHECKING:
    from draft_opd.drafters.dflash2 import DFlash2Drafter

ARCHITECTURE = "DFlash2DraftModel"
SIZES = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
TABLES = tuple(f"candidate_selector.{x}_codebook" for x in ("predecessor", "successor"))


def matches(config: dict) -> bool:
    return body.kind_of(config) == "dflash2"


def read(config: dict, tensors: dict[str, Tensor]) -> body.Files:
    """From either layout. Raises `UserError` for what is neither."""
    renamed = {f"{k}.weight" if k in TABLES else k: v for k, v in tensors.items()}
    files = body.read(config, renamed, "dflash2", SIZES)
    sizes = files.config["dflash_config"]
    if wrong := [k for k in SIZES if type(sizes.get(k)) is not int or sizes[k] < 1]:
        found = ", ".join(f"{k} ({body.shown(sizes.get(k))})" for k in wrong)
        raise UserError(f"the DFlash2 config.json needs a whole number from 1 on for {found}")
    return files


def without_suffixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of published files."""
    ours = {f"{name}.weight": name for name in TABLES}
    return {ours.get(k, k): v for k, v in tensors.items()}


def config_of(drafter: DFlash2Drafter) -> dict:
    """config.json in z-lab's layout."""
    return {**body.config_of(drafter), "architectures": [ARCHITECTURE]}


def speculators_config(drafter: DFlash2Drafter, verifier: dict) -> dict:
    """config.json in speculators' layout; `verifier` names the target."""
    own = {k: drafter.config.dflash_config[k] for k in SIZES}
    return body.speculators_config(drafter, verifier, "dflash2", ARCHITECTURE, own)
