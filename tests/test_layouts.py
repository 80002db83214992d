"""Files that engines and other tools read: written, read again, written again, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import draft_opd as d
from draft_opd.report.inspection import describe
from draft_opd.serving.export import export

EVERY_FAMILY = True

LAYOUTS = {"dflash": "z-lab", "eagle3": "sglang", "dspark": "deepspec", "dflash2": "z-lab"}
VERIFIER = {"name_or_path": "org/target", "architectures": ["Qwen3ForCausalLM"]}


def drafts(target, drafter, trajectories):
    return [[r.drafted for r in d.hindsight_trace(target, drafter, t)] for t in trajectories]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_round_trip_bit_for_bit(target, family, trained, heldout, tmp_path, dtype):
    """ours -> speculators -> ours -> speculators: the same bytes, and the same drafts."""
    folders = [tmp_path / n for n in ("plain", "other", "plain2", "other2")]
    at = trained
    for folder, verifier in zip(folders, (None, VERIFIER, None, VERIFIER), strict=True):
        at.save_pretrained(folder, dtype=dtype, verifier=verifier)
        at = d.Drafter.from_pretrained(str(folder), device="cpu", dtype=dtype)
        at.bind(target)
        assert at.layout == ("speculators" if verifier else LAYOUTS[family])
    for one, two in (folders[::2], folders[1::2]):
        a, b = (load_file(f / "model.safetensors") for f in (one, two))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert all(a[k].dtype == b[k].dtype for k in a)
    other = [json.loads((f / "config.json").read_text()) for f in folders[1::2]]
    assert other[0] == other[1]
    if dtype == torch.float32:
        assert drafts(target, at, heldout[:4]) == drafts(target, trained, heldout[:4])


def test_the_speculators_layout(target, family, trained, tmp_path):
    trained.save_pretrained(tmp_path / "d", verifier=VERIFIER)
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["speculators_model_type"] == family
    assert config["speculators_config"]["verifier"] == VERIFIER
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 15
    layer = config["transformer_layer_config"]
    assert layer["hidden_size"] == target.hidden_size and isinstance(layer["rope_theta"], float)
    taps = [i + 1 for i in trained.target_layers]
    names = set(load_file(tmp_path / "d" / "model.safetensors"))
    if family != "eagle3":
        assert config["aux_hidden_state_layer_ids"] == taps
        assert config["block_size"] == (15 if family == "dspark" else 16)
        assert config["sample_from_anchor"] is (family == "dspark")
        # False would make vLLM serve every layer causally.
        assert config["sliding_window_non_causal"] is True
        assert config["draft_vocab_size"] == target.vocab_size
    else:
        assert config["eagle_aux_hidden_state_layer_ids"] == taps
        assert config["norm_before_residual"] is False and config["draft_vocab_size"] == 150
        assert {"d2t", "t2d", "lm_head.weight", "layers.0.hidden_norm.weight"} <= names
        assert not any(n.startswith("midlayer") for n in names)


@pytest.mark.parametrize("verifier", [None, VERIFIER])
def test_a_whole_vocabulary_has_no_tables(target, tmp_path, verifier):
    """vLLM refuses them (seen with 0.32), SGLang and speculators do not need them."""
    from draft_opd.drafters.eagle3 import Eagle3Drafter

    drafter = Eagle3Drafter.create(target)
    drafter.save_pretrained(tmp_path / "d", verifier=verifier)
    assert not {"d2t", "t2d"} & set(load_file(tmp_path / "d" / "model.safetensors"))
    again = d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu")
    assert again.vocabulary is None and torch.equal(again.d2t, drafter.d2t)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("dflash", {"draft_vocab_size": 150}, "lacks the tensor 'd2t'"),
        ("dflash", {"gru_hidden_dim": 64}, "Domino drafter"),
        ("dflash", {"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids"),
        ("dflash", {"mask_token_id": None}, "mask_token_id"),
        ("eagle3", {"transformer_layer_config": {"model_type": "gpt2"}}, "gpt2"),
        ("eagle3", {"architectures": ["Gemma4Eagle3Model"]}, "EAGLE-3 drafters for Gemma 4"),
    ],
    indirect=["family"],
)
def test_what_speculators_files_may_hold_and_we_do_not(target, family, untrained, tmp_path, change, message):
    untrained.save_pretrained(tmp_path / "d", verifier=VERIFIER)
    path = tmp_path / "d" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(d.UserError, match=message):
        d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu").bind(target)


@pytest.mark.parametrize("family", ["eagle3"], indirect=True)
def test_safe_ai_labs_files_are_known(target, family, untrained, tmp_path):
    """Their config names a plain LlamaForCausalLM, with a draft vocabulary and no layers."""
    untrained.save_pretrained(tmp_path / "d")
    path = tmp_path / "d" / "config.json"
    config = {**json.loads(path.read_text()), "architectures": ["LlamaForCausalLM"]}
    del config["eagle_config"], config["eagle_aux_hidden_state_layer_ids"]
    path.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()},
        tmp_path / "d" / "model.safetensors",
    )
    drafter = d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu")
    drafter.bind(target)
    assert drafter.family == "eagle3" and drafter.draft_length == 7


def test_an_export_is_documented(target, family, trained_folder, tmp_path):
    for format in ("vllm", "speculators"):
        out = tmp_path / format
        made = export("embedded", str(trained_folder), format, out, dtype="float32")
        card = (out / "README.md").read_text()
        assert made["serve"] in card and str(out) in made["serve"]
        assert "Stage `sft`" in card and "learning_rate: 0.00" in card and "| 600 |" in card
        value, _ = describe(str(out))
        assert value["layout"] == ("speculators" if format == "speculators" else LAYOUTS[family])
    plain, other = (load_file(tmp_path / f / "model.safetensors") for f in ("vllm", "speculators"))
    assert sum(v.numel() for v in plain.values()) == sum(v.numel() for v in other.values())
