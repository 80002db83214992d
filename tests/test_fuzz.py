"""Anything may be in a file: readers return what is sound or say what is wrong, in a line."""

import json
import math
import shutil
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import draft_opd as d
from draft_opd.data.prompts import read_prompts
from draft_opd.data.server_collect import AnswerRejected, InvalidResponse, read_answer
from draft_opd.data.trajectory import TrajectoryWriter
from draft_opd.decoding.rounds import Round, by_accepted, committed, tau, tau_of
from draft_opd.models.target_info import TargetInfo
from draft_opd.training.checkpoint import Checkpoints
from draft_opd.training.config import Recipe, load_recipe, parse_recipe
from draft_opd.training.run_folder import read_history, read_metrics

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -(10**400), 1 << 70, "1", "hot", ".inf"])
)
EVERY_FAMILY = ("test_a_drafters_config_may_be_anything",)

VALUES = st.recursive(
    SCALARS,
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=6), x, max_size=4),
    max_leaves=8,
)
IDS = st.lists(st.integers(0, 900), max_size=6)


@pytest.fixture(scope="module")
def shipped_text() -> TargetInfo:
    return TargetInfo.from_pretrained("embedded")


def one_line(error: Exception) -> bool:
    return 0 < len(str(error)) < 1000


# -- trajectories and prompts ----------------------------------------------------------------


@st.composite
def rows(draw):
    """Nearly a trajectory: some fields of it are anything."""
    row = {"id": draw(st.text(max_size=3)), "prompt_ids": draw(IDS), "response_ids": draw(IDS)}
    row |= {"finish_reason": "stop", "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 1}
    for key in draw(st.lists(st.sampled_from([*row, "meta", "other"]), max_size=3)):
        row[key] = draw(VALUES)
    for key in draw(st.lists(st.sampled_from(sorted(row)), max_size=1)):
        del row[key]
    return row


@FUZZ
@given(st.lists(rows(), max_size=4))
def test_rows_that_are_nearly_trajectories(tmp_path, found):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in found))
    try:
        read = d.read_trajectories(path)
    except d.UserError as error:
        assert one_line(error)
        return
    for t, row in zip(read, found, strict=True):
        assert t.ids == row["prompt_ids"] + row["response_ids"] and t.prompt_ids and t.response_ids
        assert all(type(i) is int and i >= 0 for i in t.ids)
        assert isinstance(t.finish_reason, str) and isinstance(t.seed, int)
        assert math.isfinite(t.temperature) and math.isfinite(t.top_p)


@FUZZ
@given(st.binary(max_size=300) | st.text(alphabet='{}[]":,0123\n ab\x00é', max_size=200).map(str.encode))
def test_bytes_that_are_no_jsonl(tmp_path, content):
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    for read in (d.read_trajectories, read_prompts):
        try:
            assert read(path)
        except d.UserError as error:
            assert one_line(error)


@FUZZ
@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=4), IDS.filter(bool), IDS.filter(bool)),
        max_size=5,
        unique_by=lambda x: x[0],
    ),
    st.data(),
)
def test_a_file_cut_anywhere_is_the_lines_before_the_cut(tmp_path, written, data):
    """What a kill leaves is taken up again; nothing sound is lost, nothing is there twice."""
    path = tmp_path / "t.jsonl"
    path.unlink(missing_ok=True)
    writer = TrajectoryWriter(path)
    made = [d.Trajectory(p, r, name) for name, p, r in written]
    writer.write(made)
    writer.close()
    content = path.read_bytes()
    size = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:size])
    writer = TrajectoryWriter(path)
    assert list(writer.done) == [t.id for t in made[: content[:size].count(b"\n")]]
    writer.write([t for t in made if t.id not in writer.done])
    writer.close()
    assert path.read_bytes() == content
    assert not made or d.read_trajectories(path) == made


@FUZZ
@given(st.data())
def test_a_servers_answers_may_be_anything(shipped_text, data):
    choice = {"text": "The next", "finish_reason": "stop", "token_ids": [5, 6, 2]}
    value: dict = {"choices": [choice], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}
    for part in (choice, value, value["usage"]):
        for key in data.draw(st.lists(st.sampled_from(sorted(part)), max_size=1)):
            part[key] = data.draw(VALUES)
    for name in data.draw(
        st.lists(st.sampled_from(["message", "prompt_token_ids", "stop_reason"]), max_size=1)
    ):
        choice[name] = data.draw(VALUES)
    found = data.draw(st.just(value) | VALUES)
    try:
        ids, finish = read_answer(shipped_text, [1, 2], found)
    except (AnswerRejected, InvalidResponse) as error:
        assert one_line(error)
    else:
        assert ids and max(ids) < shipped_text.vocab_size and finish in ("stop", "length")
        assert finish == "length" or ids[-1] in shipped_text.stop_ids


# -- recipes ---------------------------------------------------------------------------------


def keys(model=Recipe, path=()):
    for name, field in model.model_fields.items():
        yield ".".join((*path, name))
        kind = field.annotation
        if hasattr(kind, "model_fields"):
            yield from keys(kind, (*path, name))


KEYS = sorted(keys())
WORDS = st.text(alphabet=string.ascii_letters + "._={}[]:#&*!|>'\"% \n\t-0123é", max_size=12)


@FUZZ
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_recipes_with_any_values(found):
    tree: dict = {}
    for key, value in found:
        *parents, last = key.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                break
        else:
            node[last] = value
    base = {"target": "t", "out": "o", "steps": 1, "data": {"trajectories": "a", "heldout": "b"}}
    try:
        recipe = parse_recipe(base | tree)
    except d.UserError as error:
        assert one_line(error)
        return
    # Whatever passes is written to the run folder, and is the same when it is read again.
    again = parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json"))))
    assert again == recipe


@FUZZ
@given(st.sampled_from(KEYS) | WORDS, WORDS | VALUES.map(json.dumps))
def test_pairs_on_the_command_line(key, value):
    try:
        recipe = load_recipe("embedded", [f"{key}={value}"], "opd")
    except d.UserError as error:
        assert one_line(error)
    else:
        assert isinstance(recipe, Recipe)


@FUZZ
@given(st.binary(max_size=200) | WORDS.map(str.encode) | VALUES.map(yaml.safe_dump).map(str.encode))
def test_files_that_are_no_recipe(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(d.UserError) as caught:
        load_recipe(path, [], "sft")
    assert one_line(caught.value)


# -- drafters, checkpoints and runs ------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(trained_folder, tmp_path_factory):
    return shutil.copytree(trained_folder, tmp_path_factory.mktemp("fuzz") / "last")


@pytest.fixture(scope="module")
def checkpoint(family, tmp_path_factory):
    run = Path(__file__).parent / "old_runs" / "0.1" / f"{family}-sft"
    return shutil.copytree(run, tmp_path_factory.mktemp("fuzz") / "run") / "last"


def spoiled(path, change):
    """The file with a change, for the time being."""
    before = path.read_bytes()

    class Spoiled:
        def __enter__(self):
            path.write_bytes(change(before))

        def __exit__(self, *_):
            path.write_bytes(before)

    return Spoiled()


@FUZZ
@given(st.data())
def test_a_drafters_config_may_be_anything(folder, data):
    config = json.loads((folder / "config.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2)):
        config[key] = data.draw(VALUES)
    if data.draw(st.booleans()):
        options = config.get("dflash_config")
        if isinstance(options, dict) and options:
            options[data.draw(st.sampled_from(sorted(options)))] = data.draw(VALUES)
    # Sizes that a machine could not hold are refused by their weights' shapes, but made first.
    with spoiled(folder / "config.json", lambda _: json.dumps(config).encode()):
        try:
            drafter = d.Drafter.from_pretrained(str(folder), device="cpu")
        except d.UserError as error:
            assert one_line(error)
        else:
            assert drafter.draft_length >= 1


@FUZZ
@given(
    st.sampled_from(["model.safetensors", "config.json"]),
    st.integers(0, 1 << 30),
    st.binary(min_size=1, max_size=9),
    st.booleans(),
)
def test_a_drafters_files_may_be_broken_anywhere(folder, name, at, content, cut):
    def change(before: bytes) -> bytes:
        place = at % min(len(before), 4000)  # the headers: tensors hold any bytes
        return before[:place] if cut else before[:place] + content + before[place + len(content) :]

    with spoiled(folder / name, change):
        try:
            d.Drafter.from_pretrained(str(folder), device="cpu")
        except d.UserError as error:
            assert one_line(error)


@FUZZ
@given(
    st.sampled_from(["training/files.json", "training/progress.json", "config.json"]),
    st.binary(max_size=60) | VALUES.map(lambda x: json.dumps(x).encode()),
)
def test_a_checkpoints_files_may_be_anything(checkpoint, name, content):
    """Not one of them is taken for a checkpoint: all were something else when it was written."""
    with (
        spoiled(checkpoint / name, lambda _: content),
        pytest.raises(d.UserError) as caught,
    ):
        Checkpoints(checkpoint.parent).newest()
    assert one_line(caught.value)
    assert Checkpoints(checkpoint.parent).newest() == checkpoint


@FUZZ
@given(
    st.binary(max_size=80) | VALUES.map(lambda x: yaml.safe_dump(x).encode()),
    st.binary(max_size=80) | VALUES.map(lambda x: json.dumps(x).encode()),
    st.binary(max_size=80),
)
def test_a_run_folder_may_hold_anything(tmp_path, recipe, about, metrics):
    for name, content in (("recipe.yaml", recipe), ("run.json", about), ("metrics.jsonl", metrics)):
        (tmp_path / name).write_bytes(content)
    assert isinstance(read_metrics(tmp_path / "metrics.jsonl"), list)
    try:
        read_history(tmp_path)
    except d.UserError as error:
        assert one_line(error)


# -- the algebra of traces ---------------------------------------------------------------------


@st.composite
def texts(draw):
    """A text, a drafter that is right at some of its tokens, K, and where the text ends."""
    length = draw(st.integers(1, 40))
    text = draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
    right = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    return text, right, draw(st.integers(1, 6))


@given(texts())
@settings(deadline=None)
def test_rounds_tile_a_text(found):
    """However rounds go, each begins where the one before ended, and together they commit every
    token once; τ, its histogram and the text's length say the same."""
    text, right, k = found
    ids, anchor, rounds, made = [9, *text], 0, [], []
    while anchor < len(text):
        drafted = [ids[i] if i < len(ids) and right[i - 1] else 7 for i in range(anchor + 1, anchor + 1 + k)]
        accepted = 0
        while (
            accepted < k
            and anchor + 1 + accepted < len(ids)
            and (drafted[accepted] == ids[anchor + 1 + accepted])
        ):
            accepted += 1
        bonus = ids[anchor + accepted + 1] if anchor + accepted + 1 < len(ids) else 5
        tokens, drawn, ended = committed(drafted, accepted, bonus, frozenset(), len(text) - len(made))
        assert tokens == text[len(made) : len(made) + len(tokens)]
        assert 0 <= drawn <= accepted and (ended is None) == (len(made) + len(tokens) < len(text))
        rounds.append(Round(anchor, drafted, accepted))
        made += tokens
        anchor += len(tokens)
    assert made == text
    counts = by_accepted(rounds, k)
    assert sum(counts) == len(rounds) and tau(rounds) == pytest.approx(tau_of(counts))
    beyond = sum(r.accepted + 1 for r in rounds) - len(text)
    assert beyond in (0, 1)  # the last bonus token may lie behind the end
    assert tau(rounds) * len(rounds) == pytest.approx(len(text) + beyond)


@given(
    st.lists(st.integers(0, 5), max_size=12),
    st.integers(0, 12),
    st.integers(0, 5),
    st.frozensets(st.integers(0, 5), max_size=3),
    st.integers(1, 14),
)
def test_what_a_round_commits(drafted, accepted, bonus, stops, room):
    accepted = min(accepted, len(drafted))
    tokens, drawn, ended = committed(drafted, accepted, bonus, stops, room)
    everything = [*drafted[:accepted], bonus]
    assert tokens == everything[: len(tokens)] and 1 <= len(tokens) <= room
    assert drawn <= accepted and drawn <= len(tokens)
    assert not stops & set(tokens[:-1])
    assert (ended == "stop") == (tokens[-1] in stops)
    assert ended is not None or len(tokens) == len(everything) < room
