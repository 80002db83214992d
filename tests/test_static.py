"""Decoding in storage that never moves gives what the dynamic loop gives, token for token."""

import pytest
import torch

import draft_opd as d
from draft_opd.decoding import generate as loop
from draft_opd.decoding.noise import row_keys
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.static import StaticBatch, bucket_of, decode_rows, eager, padded_rows
from draft_opd.models.cpu_linear import unpack

EVERY_FAMILY = ("test_static_equals_dynamic",)

GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.9, top_p=0.9)


@pytest.fixture
def static(monkeypatch):
    """static(...): `speculate` by the static path, uncaptured, with `rows` at a time."""

    def decode(target, drafter, prompts, rows=None, shapes=None, **options):
        def run(batch, *shape):
            if shapes is not None:
                shapes.append(shape)
            eager(batch, *shape)

        def path(job, length, tree, pace, clock, timed):
            loop._decode_static(job, length, rows, pace, clock, run)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "_decode_dynamic", path)
            return d.speculate(target, drafter, prompts, **options)

    return decode


def same(made, wanted):
    for a, b in zip(made, wanted, strict=True):
        assert a.token_ids == b.token_ids and a.finish_reason == b.finish_reason
        assert a.rounds == b.rounds


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafts", [True, False], ids=["drafter", "alone"])
def test_static_equals_dynamic(target, trained, heldout, static, sampling, drafts):
    """In a batch that ends unevenly, alone, and refilled: four prompts in three rows, one of them a
    single token."""
    drafter = trained if drafts else None
    prompts = [*(t.prompt_ids for t in heldout[:3]), heldout[0].prompt_ids[:1]]
    limits = [40, 9, 21, 17]
    options = {"max_new_tokens": limits, "sampling": sampling, "seed": 5}
    wanted = d.speculate(target, drafter, prompts, **options)
    shapes: list[tuple] = []
    same(static(target, drafter, prompts, rows=3, shapes=shapes, **options), wanted)
    assert {rows for rows, _, _ in shapes} == {1, 2, 3}  # rows were given up as they ended
    same(static(target, drafter, prompts, **options), wanted)
    alone = [
        static(target, drafter, [p], max_new_tokens=n, sampling=sampling, seed=5)[0]
        for p, n in zip(prompts, limits, strict=True)
    ]
    same(alone, wanted)


@pytest.mark.parametrize("family", ["dspark"], indirect=True)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_that_end_early_are_static_too(target, family, trained, heldout, static, sampling):
    """Captured rounds draft all tokens and count those before the end; the dynamic loop runs no more."""
    prompts = [t.prompt_ids for t in heldout[:3]]
    options = {"max_new_tokens": 24, "sampling": sampling, "seed": 5, "confidence": 0.5}
    wanted = d.speculate(target, trained, prompts, **options)
    made = static(target, trained, prompts, **options)
    for a, b in zip(made, wanted, strict=True):
        assert a.token_ids == b.token_ids
        assert [r.accepted for r in a.rounds] == [r.accepted for r in b.rounds]


def test_its_state_is_that_of_the_dynamic_loop(target, trained, heldout):
    """Keys and values of what was committed, in target and drafter."""
    prompt = heldout[0].prompt_ids
    batch = StaticBatch(target, trained, GREEDY, 2, 512, 7)
    tokens: list[int] = []

    def take(_, line):
        tokens.extend([*line[2 : 2 + line[0]], line[1]])
        return len(tokens) > 20

    decode_rows(batch, [prompt], [0], take)
    ids = torch.tensor([[*prompt, *tokens]])[:, :-1]  # the last token has not run yet
    cache = target.cache()
    out = target.trajectories(ids, trained.target_layers, cache)
    context = trained.build_cache(target, ids, out.features)
    for mine, theirs in ((batch.cache, cache), (batch.context, context)):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            for x, y in zip(a, b, strict=True):
                width = ids.shape[1]
                assert torch.allclose(x[0, :, :width], y[0, :, :width], atol=1e-4)
    assert int(batch.anchors[0]) == ids.shape[1] and int(batch.last[0]) == tokens[-1]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_table_that_is_read_late_changes_no_text(target, trained, heldout, sampling):
    """Four prompts in two rows; the rows go on for a round before anybody knows that they have ended."""
    prompts, limit = [t.prompt_ids for t in heldout[:4]], 24
    keys, rounds = row_keys([5] * 4, prompts), []
    wanted = d.speculate(target, trained, prompts, max_new_tokens=limit, sampling=sampling, seed=5)
    for late in (False, True):
        batch = StaticBatch(target, trained, sampling, 2, 1024, trained.draft_length)
        texts: dict[int, list[int]] = {i: [] for i in range(4)}
        issued: list[int] = []

        def take(prompt, line, texts=texts):
            texts[prompt] += [*line[2 : 2 + line[0]], line[1]]
            return len(texts[prompt]) >= limit or bool(target.stop_ids & set(texts[prompt]))

        def run(batch, *shape, issued=issued):
            issued.append(shape[0])
            eager(batch, *shape)

        decode_rows(batch, prompts, keys, take, run=run, late=late)
        rounds.append(len(issued))
        for text, made in zip(texts.values(), wanted, strict=True):
            assert text[: len(made.token_ids)] == made.token_ids
    assert rounds[0] < rounds[1] <= rounds[0] + 4


def test_idle_rows_change_nothing(target, trained, heldout):
    prompts = [t.prompt_ids for t in heldout[:2]]
    batch = StaticBatch(target, trained, GREEDY, 2, 512, 7)
    with torch.inference_mode():
        batch.admit([0, 1], prompts, [0, 1])
        batch.round(2, 384, 7)
        batch.release([1])
        kept = [x[1].clone() for x in (batch.anchors, batch.last)]
        behind = int(kept[0])
        before = [x[1, :, :behind].clone() for x in (*batch.cache.keys, *batch.context.keys)]
        other = int(batch.anchors[0])
        for _ in range(3):
            batch.round(2, 384, 7)
    assert [int(x[1]) for x in (batch.anchors, batch.last)] == [int(x) for x in kept]
    after = [x[1, :, :behind] for x in (*batch.cache.keys, *batch.context.keys)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert int(batch.anchors[0]) > other


def test_the_end_of_the_context(target, trained, static):
    prompt = target.chat_ids([{"role": "user", "content": "Mia has 3 apples. " * 200}])[:1012]
    wanted = d.speculate(target, None, [prompt], max_new_tokens=50)[0]
    (made,) = static(target, trained, [prompt], max_new_tokens=50)
    assert made.token_ids == wanted.token_ids and made.finish_reason == wanted.finish_reason


def test_the_automatic_draft_length_keeps_the_text(target, trained, heldout, static):
    from draft_opd.decoding.draft_length import DraftLengthController

    prompts = [t.prompt_ids for t in heldout[:2]]
    shapes: list[tuple] = []
    pace = DraftLengthController(trained.draft_length)
    made = static(target, trained, prompts, shapes=shapes, max_new_tokens=60, pace=pace)
    wanted = d.speculate(target, None, prompts, max_new_tokens=60)
    assert [g.token_ids for g in made] == [g.token_ids for g in wanted]
    assert 1 < len({count for _, _, count in shapes}) <= 4  # each is a graph of its own


def test_few_shapes():
    assert sorted({bucket_of(n, 4000) for n in range(1, 4001)}) == [
        256,
        384,
        512,
        768,
        1024,
        1536,
        2048,
        3072,
        4000,
    ]
    assert all(bucket_of(n, 4000) >= n for n in range(1, 4001))
    assert sorted({padded_rows(n, 24) for n in range(1, 25)}) == [1, 2, 4, 8, 16, 24]


def test_a_round_is_one_graph(trained_folder, family, heldout):
    """`torch.compile(fullgraph=True)` takes it whole: no value is read, no hook is set, no storage
    moves. What it computes is what the round computes. (Without the packed matrices of a CPU.)"""
    sampling = SAMPLED if family == "dflash" else GREEDY  # a compilation takes seconds
    target = d.Target.from_pretrained("embedded", device="cpu", prepacked=False)
    trained = d.Drafter.from_pretrained(str(trained_folder), device="cpu")
    unpack(trained)
    prompts = [t.prompt_ids for t in heldout[:2]]
    batches = [StaticBatch(target, trained, sampling, 2, 512, 7) for _ in range(2)]
    torch._dynamo.reset()
    whole = torch.compile(batches[1].round, fullgraph=True, dynamic=False, backend="eager")
    with torch.inference_mode():
        for batch, round in zip(batches, (batches[0].round, whole), strict=True):
            batch.admit([0, 1], prompts, row_keys([0, 0], prompts))
            for _ in range(2):
                batch.draw()
                round(2, 384, 7)
    assert torch.equal(batches[0].table, batches[1].table)
    assert torch.equal(batches[0].anchors, batches[1].anchors)


def test_compiled_features_are_those_of_the_tapped_layers():
    """For two choices of layers, one after the other: hooks set after compiling would never fire."""
    target = d.Target.from_pretrained("embedded", device="cpu", prepacked=False)
    ids = torch.arange(3, 11).view(1, 8)
    torch._dynamo.reset()

    def features(layers: tuple[int, ...], extend) -> torch.Tensor:
        cache = target.cache(64)
        target.trajectories(ids[:, :5], cache=cache)
        cache.set_bound(32, static=True)
        with torch.inference_mode():
            return extend(ids[:, 5:], torch.arange(5, 8)[None], cache, layers).features

    whole = torch.compile(target.extend, fullgraph=True, dynamic=False, backend="eager")
    for layers in ((0, 2), (1, 4, 6)):
        assert torch.equal(features(layers, whole), features(layers, target.extend))


@pytest.mark.slow
def test_inductor_compiles_a_round(trained_folder, heldout):
    """Kernels that the compiler makes give the same tokens."""
    target = d.Target.from_pretrained("embedded", device="cpu", prepacked=False)
    drafter = d.Drafter.from_pretrained(str(trained_folder), device="cpu")
    unpack(drafter)
    prompts = [t.prompt_ids for t in heldout[:2]]
    batches = [StaticBatch(target, drafter, GREEDY, 2, 512, 7) for _ in range(2)]
    torch._dynamo.reset()
    whole = torch.compile(batches[1].round, fullgraph=True, dynamic=False)
    with torch.inference_mode():
        for batch, round in zip(batches, (batches[0].round, whole), strict=True):
            batch.admit([0, 1], prompts, [0, 1])
            for _ in range(3):
                round(2, 384, 7)
    assert torch.equal(batches[0].table, batches[1].table)


def test_ties_go_to_the_lowest_id(target):
    """Drafting, verifying and what the trace follows: planted ties."""
    logits = torch.zeros(2, 3, 40)
    logits[:, :, [7, 19, 30]] = 2.0
    ids, _ = GREEDY.chooser()(logits)
    assert (ids == 7).all()
    assert d.verify_greedy(torch.tensor([[7, 7], [7, 19]]), logits).tolist() == [2, 1]
