"""What every drafter family promises: replay is inference, and folders keep what they hold."""

import pytest
import torch

import draft_opd as d
from draft_opd.hindsight.trace import hindsight_traces
from draft_opd.training.batches import BatchSource
from draft_opd.training.blocks import attach_drafts, pack_anchors, replay_hidden

EVERY_FAMILY = True


def test_replay_gives_the_logits_of_decoding(target, trained, heldout):
    """Packed anchors with gradient against what the decoder saw, round by round."""
    seen = []
    propose = trained.propose

    def spy(target, context, anchors, ids, length, choose):
        parts = []
        made = propose(target, context, anchors, ids, length, lambda x: (parts.append(x), choose(x))[1])
        seen.append((int(anchors[0, 0]), torch.cat(parts, 1)[0]))
        return made

    for t in heldout[:3]:
        seen.clear()
        trained.propose = spy
        try:
            rounds = d.generate(target, trained, t.prompt_ids, max_new_tokens=320).rounds
        finally:
            del trained.propose
        batch = BatchSource(target, trained.target_layers).batch([t])
        anchors = [r.anchor for r in rounds]
        blocks = attach_drafts(pack_anchors(batch, [anchors], trained.draft_length), [rounds])
        hidden = replay_hidden(target, trained, batch, blocks)
        assert hidden.requires_grad and [a for a, _ in seen] == anchors
        logits = trained.logits(target, hidden.detach())
        for j, (_, lived) in enumerate(seen):
            torch.testing.assert_close(logits[0, j], lived, rtol=1e-4, atol=1e-4)


def test_batched_anchors_are_single_anchors(target, untrained, heldout):
    rows = heldout[:3]
    source = BatchSource(target, untrained.target_layers)
    together = source.batch(rows)
    anchors = [[len(t.prompt_ids) - 1 + 7 * j for j in range(3)] for t in rows]
    hidden = replay_hidden(target, untrained, together, pack_anchors(together, anchors, 15))
    for i, t in enumerate(rows):
        for j, a in enumerate(anchors[i]):
            alone = source.batch([t])
            one = replay_hidden(target, untrained, alone, pack_anchors(alone, [[a]], 15))
            torch.testing.assert_close(hidden[i, j], one[0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}])
def test_prompts_of_one_token(target, trained, options):
    """Nothing to condition on: the first round has an empty context."""
    for prompt in ([5], [40]):
        result = d.generate(target, trained, prompt, max_new_tokens=12, **options)
        assert len(result.token_ids) > 0
        if not options:
            alone = d.generate(target, None, prompt, max_new_tokens=12)
            assert result.token_ids == alone.token_ids
    mixed = d.speculate(target, trained, [[5], [5, 6, 7]], max_new_tokens=12)
    alone = d.speculate(target, None, [[5], [5, 6, 7]], max_new_tokens=12)
    assert [g.token_ids for g in mixed] == [g.token_ids for g in alone]


def test_saving_and_loading_changes_nothing(target, trained, tmp_path):
    trained.save_pretrained(tmp_path / "copy")
    again = d.Drafter.from_pretrained(str(tmp_path / "copy"), device="cpu")
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert again.draft_length == trained.draft_length


def test_a_cast_leaves_the_rotary_frequencies_alone(trained, tmp_path):
    trained.save_pretrained(tmp_path / "d")
    half = d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu", dtype=torch.bfloat16)
    assert half.fc.weight.dtype == torch.bfloat16
    assert torch.equal(half.rotary.inv_freq, trained.rotary.inv_freq)


def test_damaged_weights_say_so(trained, tmp_path):
    trained.save_pretrained(tmp_path / "d")
    (tmp_path / "d" / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(d.UserError, match="safetensors"):
        d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu")
    (tmp_path / "d" / "model.safetensors").unlink()
    with pytest.raises(d.UserError, match=r"no model\.safetensors"):
        d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu")


@pytest.mark.gpu
def test_cuda_decoding_is_lossless(trained_folder, heldout):
    target = d.Target.from_pretrained("embedded", device="cuda", dtype="float32")
    drafter = d.Drafter.from_pretrained(str(trained_folder), device="cuda")
    prompts = [t.prompt_ids for t in heldout]
    alone = d.speculate(target, None, prompts, max_new_tokens=320)
    made = d.speculate(target, drafter, prompts, max_new_tokens=320)
    assert [g.token_ids for g in made] == [g.token_ids for g in alone]
    traces = hindsight_traces(target, drafter, [d.Trajectory(g.prompt_ids, g.token_ids) for g in made])
    assert traces == [g.rounds for g in made]
