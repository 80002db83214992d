"""A DFlash drafter as the assistant of transformers' own loop:

    model.generate(ids, assistant_model=as_assistant(drafter), speculation_type="dflash")

transformers has the loop since 5.23, with the drafter of Muse Glimmer as its model: the same layers under a
few other names. Greedy, one prompt at a time.
"""

from __future__ import annotations

from torch import nn

from draft_opd.drafters.dflash import DFlashDrafter
from draft_opd.utils.errors import UserError

NAMES = {"fc.": "encoder.fc.", "hidden_norm.": "encoder.output_norm_enc."}


def as_assistant(drafter: DFlashDrafter) -> nn.Module:
    """transformers' model with this drafter's weights (copied), on its device and in its type.

    Raises `UserError` for a drafter of another family, one with causal blocks (transformers' see
    themselves both ways), and a transformers without that loop.
    """
    if type(drafter) is not DFlashDrafter:
        raise UserError(f"transformers' loop takes DFlash drafters; this is one of {drafter.family}")
    if drafter.causal is not False:
        raise UserError("transformers' DFlash blocks see themselves both ways, this drafter's are causal")
    try:
        from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel
    except ImportError:
        raise UserError("this transformers has no DFlash loop: it came with 5.23") from None
    ours = drafter.config
    same = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_parameters",
        "max_position_embeddings",
        "layer_types",
    )
    config = MuseGlimmerAssistantConfig(
        **{name: getattr(ours, name) for name in same},
        sliding_window=getattr(ours, "sliding_window", None) or ours.max_position_embeddings,
        block_size=drafter.block_size,
        mask_token_id=drafter.mask_token_id,
        target_layer_ids=list(drafter.target_layers),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    made = MuseGlimmerAssistantModel(config)
    weights = {}
    for name, value in drafter.state_dict().items():
        for mine, theirs in NAMES.items():
            if name.startswith(mine):
                name = theirs + name.removeprefix(mine)
        weights[name] = value.detach().clone()
    made.load_state_dict(weights)
    weight = next(drafter.parameters())
    return made.to(weight.device, weight.dtype).eval()
