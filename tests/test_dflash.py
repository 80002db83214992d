"""The DFlash drafter: its attention, and a folder that is what other tools expect."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

import draft_opd as d
from draft_opd.drafters.attention import TILE, BlockMask, attend
from draft_opd.drafters.dflash import DFlashDrafter
from draft_opd.drafters.dflash_options import default_target_layers
from draft_opd.training.batches import BatchSource
from draft_opd.training.blocks import pack_anchors, replay_hidden

FAMILY = "dflash"


def test_flex_attention_and_sdpa_agree():
    """The two kernels on the same packed blocks (flex_attention's eager form, on any device)."""
    torch.manual_seed(0)
    anchors = torch.tensor([[3, 9, 20], [0, 5, 11]])
    for kind, causal, window in (
        ("full_attention", False, None),
        ("full_attention", True, None),
        ("sliding_attention", False, 4),
    ):
        seen = BlockMask(anchors, 6, 24, causal, window)
        q = torch.randn(2, 4, 18, 8)
        k, v = torch.randn(2, 2, 42, 8), torch.randn(2, 2, 42, 8)
        dense = attend(q, k, v, seen, kind)
        flex = flex_attention(q, k, v, block_mask=seen.sparse(kind), enable_gqa=True)
        torch.testing.assert_close(dense, flex, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(2, 33), count=st.integers(1, 40), context=st.integers(1, 400), seed=st.integers(0, 999)
)
def test_tiles_that_are_skipped_hold_nothing(size, count, context, seed):
    """No visible key lies in a tile that is skipped, no hidden one in a tile that is taken whole."""
    g = torch.Generator().manual_seed(seed)
    anchors = torch.randint(0, context, (2, count), generator=g)
    for kind, window in (("full_attention", None), ("sliding_attention", 40)):
        seen = BlockMask(anchors, size, context, None, window)
        dense = seen.dense(kind)[:, 0]
        rows, columns = dense.shape[1:]
        some, whole = (
            x.repeat_interleave(TILE, 1)[:, :rows].repeat_interleave(TILE, 2)[:, :, :columns]
            for x in seen.tiles(kind)
        )
        assert not (dense & ~some).any() and not (whole & ~dense).any()


def test_flex_attention_is_compiled_once_for_all_shapes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    flex = torch.compile(flex_attention, dynamic=True, backend=counter)
    for count, context in ((70, 200), (90, 200), (65, 333)):
        anchors = torch.randint(1, context, (2, count), generator=torch.Generator().manual_seed(0))
        seen = BlockMask(anchors, 16, context, False)
        q = torch.randn(2, 4, count * 16, 8)
        k, v = torch.randn(2, 2, seen.keys, 8), torch.randn(2, 2, seen.keys, 8)
        found = flex(q, k, v, block_mask=seen.sparse("full_attention"), enable_gqa=True)
        torch.testing.assert_close(found, attend(q, k, v, seen, "full_attention"), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_visibility_is_what_its_docstring_says():
    anchors = torch.tensor([[2, 4]])
    mask = BlockMask(anchors, 2, 5).dense("full_attention")[0, 0]
    expected = torch.tensor(
        [
            [1, 1, 0, 0, 0, 1, 1, 0, 0],
            [1, 1, 0, 0, 0, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 1, 1],
            [1, 1, 1, 1, 0, 0, 0, 1, 1],
        ]
    ).bool()
    assert torch.equal(mask, expected)


def test_a_folder_is_the_z_lab_layout(target, trained, trained_folder):
    config = json.loads((trained_folder / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"] and config["model_type"] == "qwen3"
    assert config["block_size"] == 16 and config["num_target_layers"] == target.num_layers
    assert config["dflash_config"]["mask_token_id"] == target.tokenizer.mask_token_id
    assert config["dflash_config"]["target_layer_ids"] == list(trained.target_layers)
    assert isinstance(config["rope_theta"], float)
    names = set(load_file(trained_folder / "model.safetensors"))
    assert {"fc.weight", "hidden_norm.weight", "norm.weight"} <= names
    layer = {n.removeprefix("layers.0.") for n in names if n.startswith("layers.0.")}
    assert layer == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
    }
    assert not any("embed" in n or "lm_head" in n for n in names)


def test_published_layer_choices_are_reproduced():
    """z-lab's Qwen3-4B (36 layers) and Qwen3-8B checkpoints tap these."""
    assert default_target_layers(36, 5) == (1, 9, 17, 25, 33)


def _wrong(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(architectures=["Unknown"]), "not a drafter we know"),
        (lambda c: c["dflash_config"].pop("mask_token_id"), "mask_token_id"),
        (lambda c: c["dflash_config"].update(target_layer_ids=[1, 2]), "fc.weight"),
        (lambda c: c.update(num_hidden_layers=3, layer_types=None), "lacks the tensor"),
        (lambda c: c.update(hidden_size="wide"), "describes no drafter"),
        (lambda c: c.update(block_size="wide"), "block_size in config.json is 'wide'"),
        (lambda c: c.update(block_size=1), "block_size in config.json is 1"),
    ],
)
def test_a_broken_folder_says_what_is_wrong(trained, tmp_path, change, message):
    trained.save_pretrained(tmp_path / "d")
    _wrong(tmp_path / "d", change)
    with pytest.raises(d.UserError, match=message):
        d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 64, "hidden size"),
        ("vocab_size", 100, "vocabulary"),
        ("mask_token_id", 839, "mask token"),
        ("target_layers", (2, 7), "tapped layers"),
        ("target_layers", (3, 2), "ascending"),
    ],
)
def test_a_drafter_that_does_not_fit_is_refused(target, field, value, message):
    drafter = DFlashDrafter.create(target)
    place = drafter.config if field in ("hidden_size", "vocab_size") else drafter
    setattr(place, field, value)
    with pytest.raises(d.UserError, match=message):
        drafter.bind(target)


@pytest.mark.gpu
def test_cuda_flex_replay_equals_sdpa(trained_folder, heldout):
    """Enough anchors for flex_attention on CUDA, against the dense mask on the CPU."""
    target = d.Target.from_pretrained("embedded", device="cuda", dtype="float32")
    there = d.Drafter.from_pretrained(str(trained_folder), device="cuda")
    cpu_target = d.Target.from_pretrained("embedded", device="cpu")
    here = d.Drafter.from_pretrained(str(trained_folder), device="cpu")
    found = []
    for model, drafter in ((target, there), (cpu_target, here)):
        batch = BatchSource(model, drafter.target_layers).batch(heldout[:2])
        anchors = [list(range(len(t.prompt_ids) - 1, len(t.ids) - 1)) for t in batch.trajectories]
        blocks = pack_anchors(batch, anchors, 15)
        hidden = replay_hidden(model, drafter, batch, blocks)
        hidden[blocks.valid].square().sum().backward()
        found.append((hidden[blocks.valid].detach().cpu(), drafter.fc.weight.grad.cpu()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
