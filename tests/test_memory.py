"""What training keeps: features on disk, and layers computed again in the backward pass."""

import json

import pytest
import torch
from safetensors.torch import load_file

import draft_opd as d
from draft_opd.training.batches import BatchSource
from draft_opd.training.blocks import pack_anchors, replay_hidden
from draft_opd.training.feature_store import FeatureFolder, about_features
from draft_opd.training.trainer import Run


def weights(run):
    return load_file(run / "last" / "model.safetensors")


def test_features_on_disk_train_as_those_in_memory(target, recipe_for, trained_folder, tmp_path, monkeypatch):
    """Bit for bit; and a run after it asks the target nothing about its trajectories."""
    pairs = [
        "steps=4",
        "evaluation.every=4",
        "opd.trace_every=1",
        "data.limit=16",
        "batch_size=4",
        "data.max_length=110",
        "data.heldout_limit=2",
    ]
    pairs += [f"drafter={trained_folder}", "opd.objective.kind=dpace"]
    kept = tmp_path / "kept"
    on_disk = ["data.cache_features=disk", f"data.features={kept}"]
    Run("opd", recipe_for("opd", tmp_path / "memory", *pairs), target=target).train()
    Run("opd", recipe_for("opd", tmp_path / "disk", *pairs, *on_disk), target=target).train()
    asked = []
    forward = target.trajectories
    monkeypatch.setattr(target, "trajectories", lambda *a, **k: asked.append(len(a[0])) or forward(*a, **k))
    again = Run("opd", recipe_for("opd", tmp_path / "again", *pairs, *on_disk), target=target)
    before = {p: p.stat().st_mtime_ns for p in kept.iterdir()}
    again.train()
    assert sum(asked) == len(again.held_out)  # the yardstick's
    assert before == {p: p.stat().st_mtime_ns for p in kept.iterdir()}
    expected = weights(tmp_path / "memory")
    for name in ("disk", "again"):
        found = weights(tmp_path / name)
        assert all(torch.equal(expected[k], found[k]) for k in expected)


def test_a_folder_of_features_is_only_taken_for_what_it_is(target, trained, tmp_path):
    about = about_features(target, trained.target_layers, torch.bfloat16)
    folder = FeatureFolder(tmp_path / "f", about)
    said = (torch.randn(3, 8).bfloat16(), torch.randn(3, 4).bfloat16())
    folder[(1, 2, 3)] = said
    assert (1, 2, 3) in folder and (1, 2) not in folder
    folder.flush()
    (tmp_path / "f" / ".half.safetensors.tmp").write_bytes(b"killed while writing")
    again = FeatureFolder(tmp_path / "f", about)
    assert all(torch.equal(a, b) for a, b in zip(again[(1, 2, 3)], said, strict=True))
    other = d.Target.from_pretrained("embedded", device="cpu")
    with torch.no_grad():
        other.head.weight[0, 0] += 1
    for wrong in (
        about_features(other, trained.target_layers, torch.bfloat16),
        about_features(target, (1,), torch.bfloat16),
        about_features(target, trained.target_layers, torch.float16),
    ):
        with pytest.raises(d.UserError, match="other layers"):
            FeatureFolder(tmp_path / "f", wrong)
    next((tmp_path / "f").glob("*.safetensors")).write_bytes(b"not tensors")
    with pytest.raises(d.UserError, match="remove it"):
        FeatureFolder(tmp_path / "f", about)
    (tmp_path / "f" / "features.json").write_text("{")
    with pytest.raises(d.UserError, match="remove it"):
        FeatureFolder(tmp_path / "f", about)


def test_batches_that_are_partly_known_lose_nothing(target, trained, heldout, tmp_path):
    """And what is known is not written again, whoever asks for the target's cache."""
    about = about_features(target, trained.target_layers, torch.bfloat16)
    folder = FeatureFolder(tmp_path, about)
    source = BatchSource(target, trained.target_layers, folder)
    a, b, c = heldout[:3]
    for texts in ([a, b], [a, c], [b, c], [a, b]):
        source.batch(texts, with_cache=texts == [b, c])
        folder.flush()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    for known in (folder, FeatureFolder(tmp_path, about)):
        for t in (a, b, c):
            features, _ = known[tuple(t.ids)]
            assert len(features) == len(t.ids)


def test_large_features_go_to_several_files(target, tmp_path, monkeypatch):
    monkeypatch.setattr("draft_opd.training.feature_store.SHARD", 1000)
    about = {"weights": "x"}
    folder = FeatureFolder(tmp_path, about)
    rows = {(i, i): (torch.full((9, 8), float(i)), torch.full((9, 4), float(i))) for i in range(9)}
    for key, value in rows.items():
        folder[key] = value
    folder.flush()
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert json.loads((tmp_path / "features.json").read_text()) == about
    for key, value in rows.items():
        assert torch.equal(FeatureFolder(tmp_path, about)[key][1], value[1])


def test_gradient_checkpointing_keeps_less_and_changes_nothing(target, trained, heldout):
    batch = BatchSource(target, trained.target_layers).batch(heldout[:4])
    anchors = [list(range(len(t.prompt_ids) - 1, len(t.prompt_ids) + 7)) for t in heldout[:4]]
    blocks = pack_anchors(batch, anchors, trained.draft_length)
    blocks.drafted = blocks.labels
    found = {}
    for again in (False, True):
        trained.zero_grad()
        trained.gradient_checkpointing, kept = again, [0]

        def keep(x, kept=kept):
            kept[0] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = replay_hidden(target, trained, batch, blocks).square().mean()
        loss.backward()
        found[again] = kept[0], [p.grad.clone() for p in trained.parameters() if p.grad is not None]
    trained.gradient_checkpointing = False
    trained.zero_grad()
    assert found[True][0] < 0.6 * found[False][0]
    assert found[True][1] and all(
        torch.equal(a, b) for a, b in zip(found[True][1], found[False][1], strict=True)
    )
