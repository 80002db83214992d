"""Contracts of the inside: what a check may change, how families and engines are known."""

import copy
import json
from pathlib import Path

import pytest

import draft_opd as d
from draft_opd.drafters.registry import FAMILIES, register
from draft_opd.models.hub import is_drafter, read_config, resolve_path
from draft_opd.serving.engines import ENGINES, serve_command


def test_a_check_changes_nothing_and_binding_completes_the_drafter(target, family, trained_folder, tmp_path):
    """From a file that names no layers, where the family allows that."""
    drafter = d.Drafter.from_pretrained(str(trained_folder), device="cpu")
    drafter.save_pretrained(tmp_path / "d")
    if family == "eagle3":
        path = tmp_path / "d" / "config.json"
        config = json.loads(path.read_text())
        for key in ("eagle_config", "eagle_aux_hidden_state_layer_ids"):
            config.pop(key, None)
        path.write_text(json.dumps(config))
    drafter = d.Drafter.from_pretrained(str(tmp_path / "d"), device="cpu")

    def state():
        plain = (int, str, bool, tuple, type(None))
        own = {k: v for k, v in vars(drafter).items() if isinstance(v, plain)}
        return json.dumps([own, drafter.config.to_dict()], default=str)

    before = state()
    drafter.check_target(target)
    assert state() == before
    drafter.bind(target)
    once = state()
    drafter.bind(target)
    assert state() == once and drafter.target_layers
    if family == "eagle3":
        assert before != once


def test_a_family_is_registered_once():
    for name, family in FAMILIES.items():
        assert family.family == name

        class Another(family):  # a subclass takes nobody's place
            pass

        assert FAMILIES[name] is family
        with pytest.raises(ValueError, match="registered already"):
            register(name)(Another)


def test_unknown_engines_are_refused(trained):
    with pytest.raises(d.UserError, match="engine 'tensorrt': choose one of vllm"):
        serve_command(trained, "t", "d", "tensorrt")
    for engine in ENGINES:
        assert "d" in serve_command(trained, "t", "d", engine)


def test_drafters_are_told_from_targets_by_their_config(trained_folder):
    assert is_drafter(read_config(trained_folder, "drafter"))
    assert not is_drafter(read_config(Path(resolve_path("embedded")), "target"))


class Wrapped:
    """A draft cache of another kind: no attribute but the protocol's methods can be reached."""

    def __init__(self, inner):
        self._inner = inner
        for name in ("reserve", "set_bound", "select", "snapshot", "rollback", "allocate", "first_rows"):
            setattr(self, name, getattr(inner, name))


def test_decoding_uses_no_more_of_a_draft_cache_than_its_protocol(target, trained, heldout):
    class Other(type(trained)):
        def build_cache(self, *given):
            return Wrapped(super().build_cache(*given))

        def extend_cache(self, cache, *given):
            super().extend_cache(cache._inner, *given)

        def propose(self, target, cache, *given):
            return super().propose(target, cache._inner, *given)

    other = copy.deepcopy(trained)
    other.__class__ = Other
    prompts = [t.prompt_ids for t in heldout[:3]]
    made = d.speculate(target, other, prompts, max_new_tokens=30)
    usual = d.speculate(target, trained, prompts, max_new_tokens=30)
    assert [g.rounds for g in made] == [g.rounds for g in usual]
