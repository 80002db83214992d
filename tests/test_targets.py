"""Every kind of target that people have: loaded, trained on, decoded without loss, or refused by name."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_targets import BASE, GATED, KINDS, PAGE, table, tiny_target

import draft_opd as d
from draft_opd.data.trajectory import Trajectory, check_trajectories
from draft_opd.drafters import FAMILIES
from draft_opd.drafters.target_config import adopt_final_norm
from draft_opd.hindsight.trace import hindsight_traces
from draft_opd.losses.config import Objective
from draft_opd.models import stateful
from draft_opd.models.loading import is_target_folder
from draft_opd.models.logit_map import LogitMap
from draft_opd.models.stateful import snapshot
from draft_opd.training.batches import BatchSource
from draft_opd.training.blocks import attach_drafts, pack_anchors
from draft_opd.training.config import Opd
from draft_opd.training.rollouts import hindsight_rollout
from draft_opd.training.stage_opd import opd_loss, teacher_states
from draft_opd.training.stage_sft import sft_loss

PROMPTS = [[3, 5, 7, 11, 13], [4, 9, 2, 8], [6]]
OPTIONS = {
    "dflash": {"block_size": 6, "mask_token_id": 95},
    "eagle3": {"draft_length": 4, "draft_vocab_size": 60},
}
# One objective of each class: on the text, with the target's states along it, behind rejections.
OBJECTIVES = ("dpace", "expected_overlap", "acceptance_aware")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tiny(kind):
    return tiny_target(kind)


@pytest.fixture(scope="module")
def texts(tiny):
    """What the target says greedily, one row longer than the others."""
    made = d.speculate(tiny, None, PROMPTS, max_new_tokens=[14, 9, 12], stop_ids=[])
    return [Trajectory(g.prompt_ids, g.token_ids, str(i), "length") for i, g in enumerate(made)]


@pytest.fixture(params=OPTIONS)
def drafter(request, tiny):
    torch.manual_seed(1)
    counts = torch.arange(96).flip(0)
    drafter = FAMILIES[request.param].create(tiny, counts, **OPTIONS[request.param])
    drafter.bind(tiny)
    return drafter


def test_decoding_is_generate(tiny, texts, drafter):
    """Alone, and in a batch that accepts unevenly, with a drafter that is nearly always wrong."""
    for text in texts:
        ids = torch.tensor([text.prompt_ids])
        options = {"max_new_tokens": len(text.response_ids), "do_sample": False, "eos_token_id": None}
        alone = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert alone[0, ids.shape[1] :].tolist() == text.response_ids
    limits = [len(t.response_ids) for t in texts]
    made = d.speculate(tiny, drafter, PROMPTS, max_new_tokens=limits, stop_ids=[])
    assert [g.token_ids for g in made] == [t.response_ids for t in texts]
    # The rounds follow from the text.
    assert hindsight_traces(tiny, drafter, texts) == [g.rounds for g in made]


def test_a_step_of_every_objective(tiny, texts, drafter):
    source = BatchSource(tiny, drafter.target_layers)
    options = {"num_draft_tokens": drafter.draft_length, "seed": "0"}
    losses = [sft_loss(tiny, drafter, source.batch(texts), anchors=4, decay=None, **options)[0]]
    for name in OBJECTIVES:
        batch = source.batch(texts, with_cache=name == "acceptance_aware")
        whole = name == "acceptance_aware"
        traces = hindsight_rollout(tiny, drafter, batch, drafter.draft_length, whole=whole)
        opd = Opd(objective=Objective(kind=name))
        losses.append(opd_loss(tiny, drafter, batch, traces, opd, **options)[0])
    for loss in losses:
        drafter.zero_grad()
        loss.backward()
        norms = [p.grad.norm() for p in drafter.parameters() if p.grad is not None]
        assert torch.isfinite(loss) and all(map(torch.isfinite, norms)) and sum(norms) > 0


def test_states_behind_a_rejection_are_those_of_the_draft(tiny, texts, drafter):
    """The branch forward against one plain forward over text and draft; p is the model's own."""
    batch = BatchSource(tiny, drafter.target_layers).batch(texts, with_cache=True)
    traces = hindsight_traces(tiny, drafter, texts)
    anchors = [[r.anchor for r in trace][:3] for trace in traces]
    blocks = attach_drafts(pack_anchors(batch, anchors, drafter.draft_length), [t[:3] for t in traces])
    states = teacher_states(tiny, batch, blocks)
    for row, (text, trace) in enumerate(zip(texts, traces, strict=True)):
        for j, r in enumerate(trace[:3]):
            valid = int(blocks.valid[row, j].sum())
            ids = torch.tensor([text.ids[: r.anchor + 1] + r.drafted])
            wanted = tiny.model(input_ids=ids, use_cache=False).logits[0, r.anchor : r.anchor + valid]
            found = tiny.logits(states[row, j, :valid])
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_a_drafter_is_served_as_it_was_trained(tiny, drafter, tmp_path):
    """Its files say what its rotary positions are, and it reads itself back bit for bit."""
    drafter.save_pretrained(tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    rope = config["rope_parameters"]
    assert not {"partial_rotary_factor", "mrope_section", "mrope_interleaved"} & set(rope)
    cos, _ = drafter.rotary(torch.zeros(1, 1, 1), torch.arange(4)[None])
    assert cos.shape[-1] == config["head_dim"]
    # What an engine computes from these keys, by itself.
    if rope.get("rope_type", "default") == "default":
        width = config["head_dim"]
        frequency = config["rope_theta"] ** -(torch.arange(0, width, 2) / width)
        torch.testing.assert_close(cos[0, :, : width // 2], torch.cos(torch.arange(4)[:, None] * frequency))
    again = d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu")
    for name, value in load_file(tmp_path / "d" / "model.safetensors").items():
        assert torch.equal(again.state_dict()[name].to(value.dtype), value)
    assert (
        float(drafter.norm.weight.detach().abs().min()) > 0.1
    )  # a useful scale, also where targets hold it minus 1


def test_the_page_says_what_works():
    assert table() in PAGE.read_text(), "python tests/tiny_targets.py writes it"


# -- logits behind the head ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", LogitMap()),
        ("gemma2, capped", LogitMap(cap=0.05)),
        ("granite, scaled", LogitMap(scale=1 / 8)),
        ("cohere2, scaled", LogitMap(scale=0.25)),
    ],
)
def test_the_logit_map_is_found_however_small_logits_are(kind, expected):
    target = tiny_target(kind)
    assert target.logit_map == expected
    with torch.no_grad():
        target.head.weight.mul_(1e-3)
    assert d.Target(target.model, None, kind).logit_map == expected
    ids = torch.arange(3, 9)[None]
    whole = target.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(target.logits(target.trajectories(ids).hidden), whole)


def test_a_map_that_the_config_does_not_name_is_refused():
    target = tiny_target("llama")
    forward = target.model.forward

    def squared(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * out.logits.abs()
        return out

    target.model.forward = squared
    with pytest.raises(d.UserError, match="transforms its logits"):
        d.Target(target.model, None, "odd")


def test_a_scaled_embedding_is_part_of_what_was_trained(tmp_path):
    """Gemma's: the drafter's config says it, and an engine that leaves it out is a known fault."""
    target = tiny_target("gemma3")
    drafter = FAMILIES["dflash"].create(target, **OPTIONS["dflash"])
    drafter.save_pretrained(tmp_path / "d")
    options = json.loads((tmp_path / "d" / "config.json").read_text())["dflash_config"]
    assert options["input_embedding_scale"] == pytest.approx(32**0.5, rel=1e-3)
    made = d.speculate(target, drafter, PROMPTS[:1], max_new_tokens=8, stop_ids=[])[0]
    again = d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu")
    same = d.speculate(target, again, PROMPTS[:1], max_new_tokens=8, stop_ids=[])[0]
    assert same.rounds == made.rounds
    (change,) = (c for name, c in drafter.known_faults(4).items() if "not scaled" in name)
    faulty = drafter.with_fault(change)
    faulty.bind(target)
    context = faulty.build_cache(target, torch.tensor([[3, 4]]), torch.randn(1, 2, faulty.fc.in_features))
    at, ids = torch.tensor([[2]]), torch.tensor([[5]])
    labels = torch.zeros(1, 1, 5, dtype=torch.long)
    one, other = (x.replay(target, context, at, ids, labels) for x in (drafter, faulty))
    assert not torch.allclose(one, other, atol=1e-3)
    assert tiny_target("llama").embedding_scale == 1


# -- states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("replay", [0, 4, 64])
def test_states_are_rolled_back(monkeypatch, replay):
    """However many tokens are run again with a block, or before it."""
    monkeypatch.setattr(stateful, "REPLAY", replay)
    target = tiny_target("qwen3.5")
    ids = torch.arange(40) * 7 % 90
    whole = target.trajectories(ids[None]).hidden
    cache, at = target.cache(), 0
    for accepted in (3, 0, 5, 1, 6, 2, 4):
        block = torch.cat([ids[at : at + 1 + accepted], torch.full((6 - accepted,), 91)])
        positions = torch.arange(at, at + len(block))[None]
        found = target.extend(block[None], positions, cache).hidden[:, : accepted + 1]
        torch.testing.assert_close(found, whole[:, at : at + accepted + 1], rtol=1e-4, atol=1e-4)
        at += accepted + 1
    with pytest.raises(ValueError, match="before the state"):
        target.extend(block[None], torch.zeros_like(positions), cache)


def test_a_snapshot_is_not_changed():
    target = tiny_target("qwen3-next")
    ids = torch.arange(9)[None]
    cache = target.decoder(input_ids=ids, use_cache=True).past_key_values
    kept = snapshot(cache)
    first = target.decoder(input_ids=ids[:, :3], past_key_values=snapshot(kept), use_cache=True)
    target.decoder(input_ids=ids, past_key_values=cache, use_cache=True)  # goes on elsewhere
    second = target.decoder(input_ids=ids[:, :3], past_key_values=snapshot(kept), use_cache=True)
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)


def test_layers_that_go_on_with_single_tokens_only_are_found():
    assert tiny_target("jamba").one_by_one and not tiny_target("nemotron-h").one_by_one


def test_a_target_without_the_usual_cache_is_refused():
    options = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2}
    config = transformers.Mamba2Config(vocab_size=96, hidden_size=32, num_hidden_layers=2, **options)
    with pytest.raises(d.UserError, match=r"cannot be decoded here|is not supported"):
        d.Target(transformers.Mamba2ForCausalLM(config), None, "mamba")


def test_trees_are_refused_before_anything_runs():
    target = tiny_target("lfm2")
    drafter = FAMILIES["eagle3"].create(target, torch.ones(96), draft_length=3)
    with pytest.raises(d.UserError, match="it has no trees"):
        d.speculate(target, drafter, PROMPTS, max_new_tokens=4, tree=[2, 2])


# -- others -----------------------------------------------------------------------------------------


VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "patch_size": 4,
    "spatial_merge_size": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}


@pytest.mark.parametrize(
    ("config", "model", "text", "vision"),
    [
        ("Qwen3_5Config", "Qwen3_5ForConditionalGeneration", GATED, {}),
        (
            "Qwen3VLConfig",
            "Qwen3VLForConditionalGeneration",
            {"head_dim": 8},
            {"deepstack_visual_indexes": [0]},
        ),
    ],
)
def test_a_checkpoint_with_a_vision_tower_is_a_text_target(tmp_path, target, config, model, text, vision):
    """With a causal LM class of its own, and without."""
    torch.manual_seed(0)
    parts = {"text_config": {**BASE, **text, "rope_parameters": ROPE}, "vision_config": {**VISION, **vision}}
    ids = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    whole = getattr(transformers, model)(getattr(transformers, config)(**parts, **ids)).eval()
    whole.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    found = d.Target.from_pretrained(str(tmp_path), device="cpu")
    text = torch.arange(5, 12)[None]
    with torch.no_grad():
        wanted = whole(input_ids=text).logits
    torch.testing.assert_close(found.logits(found.trajectories(text).hidden), wanted, rtol=1e-3, atol=1e-4)
    assert not any("visual" in name for name, _ in found.model.named_parameters())
    assert is_target_folder(tmp_path)
    made = d.speculate(found, None, [[3, 4, 5]], max_new_tokens=5, stop_ids=[])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = whole.generate(torch.tensor([[3, 4, 5]]), attention_mask=torch.ones(1, 3), **options)
    assert made[0].token_ids == expected[0, 3:].tolist()


def test_longrope_stays_where_a_text_does_not_depend_on_others():
    target = tiny_target("phi3, longrope")
    assert target.max_positions == 32
    long = Trajectory(list(range(20)), list(range(20)), "long", "length")
    with pytest.raises(d.UserError, match="32"):
        check_trajectories([long], target, "data")


def test_scales_without_an_axis_have_a_fingerprint():
    target = tiny_target("llama")
    plain = target.fingerprint
    target.decoder.register_parameter("scale", torch.nn.Parameter(torch.tensor(2.0), requires_grad=False))
    assert d.Target(target.model, None, "fp8").fingerprint != plain


def test_a_drafter_that_rotates_a_part_of_its_heads_is_refused(tmp_path):
    target = tiny_target("llama")
    drafter = FAMILIES["dflash"].create(target, **OPTIONS["dflash"])
    drafter.save_pretrained(tmp_path / "d")
    path = tmp_path / "d" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["partial_rotary_factor"] = 0.25
    path.write_text(json.dumps(config))
    with pytest.raises(d.UserError, match="partial_rotary_factor"):
        d.Drafter.from_pretrained(str(tmp_path / "d"))


def test_the_final_norm_is_taken_with_its_scale():
    """Gemma multiplies by 1 + w."""
    for name, offset in (("llama", 0.0), ("gemma3", 1.0)):
        target = tiny_target(name)
        with torch.no_grad():
            target.decoder.norm.weight.uniform_(0.5, 2.0)
        norm = torch.nn.RMSNorm(32)
        adopt_final_norm(norm, target)
        assert torch.equal(norm.weight, target.decoder.norm.weight + offset)
