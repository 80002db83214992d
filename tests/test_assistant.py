"""A drafter as the assistant of transformers' own DFlash loop."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import draft_opd as d
from draft_opd.drafters import FAMILIES
from draft_opd.models.hub import resolve_path
from draft_opd.serving.transformers_assistant import as_assistant

FAMILY = "dflash"


def test_transformers_own_loop_drafts_the_same(target, trained, heldout):
    """`generate(speculation_type="dflash")` with our drafter as its assistant: text and rounds."""
    pytest.importorskip("transformers.models.muse_glimmer_assistant", reason="transformers before 5.23")
    model = AutoModelForCausalLM.from_pretrained(resolve_path("embedded"), dtype=torch.float32).eval()
    assistant, anchors = as_assistant(trained), []

    def note(_module, _args, kwargs):
        anchors.append(int(kwargs["position_ids"][0, -trained.block_size]))

    assistant.register_forward_pre_hook(note, with_kwargs=True)
    for t in heldout[:3]:
        anchors.clear()
        ids = torch.tensor([t.prompt_ids])
        options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": sorted(target.stop_ids)}
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            assistant_model=assistant,
            speculation_type="dflash",
            **options,
        )
        ours = d.speculate(target, trained, [t.prompt_ids], max_new_tokens=60)[0]
        assert out[0, ids.shape[1] :].tolist() == ours.token_ids
        # Their prefill gives the first token, so their first round begins behind it. The last round, near
        # the limit, may be missing on either side.
        behind = d.Trajectory([*t.prompt_ids, ours.token_ids[0]], ours.token_ids[1:])
        expected = [r.anchor for r in d.hindsight_trace(target, trained, behind)]
        both = min(len(anchors), len(expected))
        assert anchors[:both] == expected[:both] and both >= max(len(anchors), len(expected)) - 1 > 3


def test_an_assistant_that_transformers_does_not_have_is_refused(target, trained, monkeypatch):
    monkeypatch.setattr(trained, "causal", True)
    with pytest.raises(d.UserError, match="are causal"):
        as_assistant(trained)
    other = FAMILIES["eagle3"].create(target, torch.ones(target.vocab_size), draft_length=2)
    with pytest.raises(d.UserError, match="takes DFlash drafters"):
        as_assistant(other)
