"""The phases of scripts/evidence.py: what each measures, and how long it will take.

A phase is a class with `name`, `title`, `estimate()` in seconds and `run()`, which returns what its
JSON file holds: `table` (columns and rows, for the report) and whatever it was made of. All paths
are relative to the output folder, so that a folder that was copied goes on.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import limits
import torch
from decode import decode
from transformers import Qwen3Config, Qwen3ForCausalLM

from draft_opd.data.collect import collect, summary
from draft_opd.data.prompts import read_prompts
from draft_opd.decoding.captured import GraphRunner
from draft_opd.decoding.generate import speculate
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.static import StaticBatch, bucket_of, eager
from draft_opd.decoding.step import DecodeStep
from draft_opd.drafters import Drafter
from draft_opd.evaluation.draft_length_advice import weights_read
from draft_opd.models.hub import EMBEDDED
from draft_opd.models.kv_cache import PositionCache
from draft_opd.models.target import Target
from draft_opd.training.config import Model, parse_recipe
from draft_opd.training.setup import new_drafter
from draft_opd.training.trainer import Run
from draft_opd.utils.machine import speed_over_float32

QWEN3 = {  # the shapes of Qwen3-0.6B and 4B (their config.json on the hub); weights are random
    "Qwen3-0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "Qwen3-4B": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


@dataclass(frozen=True)
class Size:
    """How much is measured. `seconds`: what a phase takes at that size, before it was tried."""

    shapes: tuple[str, ...]  # of `rounds`: in QWEN3, or EMBEDDED
    contexts: tuple[int, ...]
    rows: tuple[int, ...]  # of the static step
    repeats: int
    lossless: int  # prompts
    train: int  # prompts
    heldout: int
    tokens: int
    batch: int
    drafter: dict
    sft_steps: int
    every: int
    league_steps: int
    objectives: tuple[str, ...]  # beside D-PACE and the paper's
    steps: int  # of a measurement of their cost
    step_repeats: int
    decode: int  # prompts
    megabytes: int  # that the copy moves
    seconds: dict[str, float] = field(default_factory=dict)


SIZES = {
    "tiny": Size(
        shapes=(EMBEDDED,),
        contexts=(64,),
        rows=(1, 2),
        repeats=3,
        lossless=2,
        train=8,
        heldout=2,
        tokens=24,
        batch=4,
        drafter={"num_layers": 1, "block_size": 4},
        sft_steps=4,
        every=2,
        league_steps=2,
        objectives=("auf",),
        steps=1,
        step_repeats=1,
        decode=1,
        megabytes=16,
        seconds={
            "machine": 5,
            "lossless": 15,
            "rounds": 10,
            "collect": 10,
            "sft": 15,
            "league": 40,
            "steps": 20,
            "seeds": 40,
            "objectives": 40,
            "eagle3": 40,
            "decode": 20,
        },
    ),
    "gpu": Size(
        shapes=("Qwen3-0.6B", "Qwen3-4B"),
        contexts=(256, 2048),
        rows=(1, 4, 16, 32),
        repeats=10,
        lossless=200,
        train=7473,
        heldout=128,
        tokens=256,
        batch=64,
        drafter={"num_layers": 3, "block_size": 16},
        sft_steps=2000,
        every=200,
        league_steps=250,
        objectives=(
            "cross_entropy",
            "auf",
            "forward_kl",
            "expected_length",
            "expected_overlap",
            "chain_tv",
        ),
        steps=5,
        step_repeats=4,
        decode=12,
        megabytes=4096,
        seconds={
            "machine": 20,
            "lossless": 90,
            "rounds": 90,
            "collect": 450,
            "sft": 540,
            "league": 300,
            "steps": 60,
            "seeds": 600,
            "objectives": 500,
            "eagle3": 600,
            "decode": 120,
        },
    ),
}


@dataclass
class Setup:
    """What phases share. target: a model folder, or EMBEDDED. prompts: of each part."""

    size: Size
    device: torch.device
    target_name: str
    prompts: dict[str, str]

    @cached_property
    def target(self) -> Target:
        return Target.from_pretrained(self.target_name, device=self.device)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def seconds(self, work, repeats: int | None = None) -> dict[str, float]:
        """Median, shortest and longest of several runs, after one that warms up."""
        found = []
        for _ in range((repeats or self.size.repeats) + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - began)
        found = found[1:]
        return {"median": statistics.median(found), "least": min(found), "most": max(found)}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Phase:
    name: str
    title: str

    def __init__(self, setup: Setup):
        self.setup, self.size = setup, setup.size

    def estimate(self) -> float:
        """Seconds, by what it took elsewhere."""
        return self.size.seconds[self.name]

    def run(self) -> dict:
        raise NotImplementedError


def table(columns: list[str], rows: list[list]) -> dict:
    return {"columns": columns, "rows": rows}


class Machine(Phase):
    name, title = "machine", "The machine and its ceilings"

    def run(self) -> dict:
        s, device = self.setup, self.setup.device
        count = self.size.megabytes * 2**20 // 4
        source = torch.ones(count, device=device)
        sink = torch.empty_like(source)
        copy = 2 * 4 * count / s.seconds(lambda: sink.copy_(source))["least"]
        dtypes = [torch.float32, torch.bfloat16, torch.float16]
        rates = {str(d)[6:]: limits.matrix_rate(d, device) for d in dtypes if self._at_speed(d)}
        one, many = torch.zeros(1, device=device), 2000

        def launches() -> None:
            for _ in range(many):
                one.add_(1)

        launch = s.seconds(launches)["least"] / many
        value = {
            "copy_gigabytes_per_second": copy / 1e9,
            "matrix_gigaflops": {k: v / 1e9 for k, v in rates.items()},
            "bfloat16_over_float32": speed_over_float32(torch.bfloat16, device),
            "launch_microseconds": 1e6 * launch,
        }
        rows = [["copy, bytes read and written, GB/s", copy / 1e9]]
        rows += [[f"matrix product, {k}, GFLOP/s", v / 1e9] for k, v in rates.items()]
        rows.append(["an operator on one number, µs", 1e6 * launch])
        return {**value, "table": table(["ceiling", "measured"], rows)}

    def _at_speed(self, dtype: torch.dtype) -> bool:
        """A type that is emulated would take minutes."""
        return speed_over_float32(dtype, self.setup.device) > 0.2


def short_sft(target: Target, family: str, out: str, steps: int) -> Drafter:
    """A drafter that is right now and then, for the shipped target."""
    prompts = read_prompts(f"{EMBEDDED}:train", 8 + 2 * steps)
    collect(target, prompts[4:], Path(out) / "train", max_new_tokens=64, batch_size=64)
    collect(target, prompts[:4], Path(out) / "heldout", max_new_tokens=64, batch_size=64)
    recipe = parse_recipe(
        {
            "target": EMBEDDED,
            "out": f"{out}/{family}",
            "steps": steps,
            "batch_size": 4,
            "data": {"trajectories": f"{out}/train", "heldout": f"{out}/heldout"},
            "model": {"family": family},
            "optim": {"name": "muon", "learning_rate": 3e-3},
            "evaluation": {"every": steps},
            "precision": "float32",
        }
    )
    run = Run("sft", recipe, target=target, resume=Path(recipe.out).exists())
    run.train()
    return run.drafter.eval()


class Lossless(Phase):
    name, title = "lossless", "Losslessness: the shipped target, float32"

    def run(self) -> dict:
        target = Target.from_pretrained(EMBEDDED, device=self.setup.device)
        ids = [p.ids(target) for p in read_prompts(f"{EMBEDDED}:heldout", self.size.lossless)]
        longest = min(256, 4 * self.size.tokens)

        def texts(drafter=None, **more):
            made = []
            for start in range(0, len(ids), 64):
                some = ids[start : start + 64]
                made += speculate(target, drafter, some, max_new_tokens=longest, **more)
            return made

        alone, rows = texts(), []
        for family in ("dflash", "eagle3"):
            steps = min(120, 3 * self.size.sft_steps)
            drafter = short_sft(target, family, "lossless", steps)
            ways = {"chain": {}, "chain of 3": {"draft_length": 3}}
            if drafter.has_trees:
                ways["tree 3,2,1"] = {"tree": (3, 2, 1)}
            for way, more in ways.items():
                made = texts(drafter, **more)
                same = sum(a.token_ids == b.token_ids for a, b in zip(alone, made, strict=True))
                rounds = [r for g in made for r in g.rounds]
                tau = sum(r.accepted + 1 for r in rounds) / len(rounds)
                rows.append([family, way, same, len(ids), tau])
        columns = ["family", "drafts", "same text", "of", "τ"]
        return {
            "matched": sum(r[2] for r in rows),
            "of": sum(r[3] for r in rows),
            "table": table(columns, rows),
        }


def random_target(shape: str, device: torch.device, dtype: torch.dtype) -> Target:
    """A model of that shape with random weights; the shipped target by its name."""
    if shape == EMBEDDED:
        return Target.from_pretrained(EMBEDDED, device=device)
    config = Qwen3Config(
        vocab_size=151_936,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=40_960,
        rope_theta=1e6,
        **QWEN3[shape],
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return Target(model, None, shape)


class RoundCosts(Phase):
    name, title = "rounds", "What a round costs, eager (DFlash, 15 draft tokens)"

    @torch.inference_mode()
    def run(self) -> dict:
        s, rows, found = self.setup, [], []
        for shape in self.size.shapes:
            target = random_target(shape, s.device, s.dtype)
            counts = torch.arange(target.vocab_size).flip(0)
            options = {"num_layers": 5, "block_size": 16, "mask_token_id": target.vocab_size - 1}
            drafter = new_drafter(Model(family="dflash", options=options), target, counts)
            drafter = drafter.to(s.device, target.dtype).eval()
            size = weights_read(target.model, target.head.weight) * target.dtype.itemsize
            reading = size / limits.bandwidth(target.dtype, s.device, max(1, size >> 20))
            for context in self.size.contexts:
                times = self._times(target, drafter, context)
                static = self._static_times(target, drafter, context)
                found.append(
                    {"shape": shape, "context": context, "read_seconds": reading, **times, "static": static}
                )
                ms = [1000 * times[k]["median"] for k in times]
                names = ("one", "round", "one_fused", "round_fused")
                first = [1000 * static[0][k]["median"] if k in static[0] else None for k in names]
                rows.append([shape, context, *ms, *first, 1000 * reading])
            del target, drafter
        columns = [
            "shape",
            "context",
            "target, 1 token",
            "verify 16",
            "draft 15",
            "a round",
            "captured: 1 token",
            "captured: a round",
            "fused: 1 token",
            "fused: a round",
            "read the weights",
        ]
        return {"milliseconds": found, "table": table(columns, rows)}

    def _times(self, target: Target, drafter: Drafter, context: int) -> dict:
        s, length = self.setup, drafter.draft_length
        ids = torch.randint(3, 250, (1, context), device=s.device)
        capacity = context + length + 2
        cache: PositionCache = target.cache(capacity)
        out = target.trajectories(ids, drafter.target_layers, cache)
        memory = drafter.build_cache(target, ids, out.features)
        memory.reserve(capacity)
        anchors = torch.full((1,), context, device=s.device)
        last = torch.full((1,), 5, device=s.device)
        full = DecodeStep(target, drafter, cache, memory, Sampling())
        alone = DecodeStep(target, None, cache, None, Sampling())
        block = torch.randint(3, 250, (1, length + 1), device=s.device)
        at = context + torch.arange(length + 1, device=s.device)[None]

        def one():
            alone.set_bound(context + 1, filled=True)
            return alone(anchors, last, 0)

        def verify():
            alone.set_bound(context + length + 1, filled=True)
            hidden = target.extend(block, at, cache, drafter.target_layers).hidden
            return target.logits(hidden).argmax(-1)

        choose = Sampling().chooser()

        def draft():
            full.set_bound(context + length + 1, filled=True)
            return drafter.propose(target, memory, anchors[:, None], last[:, None], length, choose)

        def whole():
            full.set_bound(context + length + 1, filled=True)
            return full(anchors, last, length).tolist()

        return {
            "one": s.seconds(one),
            "verify": s.seconds(verify),
            "draft": s.seconds(draft),
            "round": s.seconds(whole),
        }

    def _static_times(self, target: Target, drafter: Drafter, context: int) -> list[dict]:
        """The static step, captured on a GPU: target alone and with the drafter, by batch size, there
        with compiled layers too. Rows are not alive, so that they stay where they are: the work is the
        same."""
        s, found = self.setup, []
        on_gpu = s.device.type == "cuda"
        sides = {"one": (None, False), "round": (drafter, False)}
        if on_gpu:
            sides |= {"one_fused": (None, True), "round_fused": (drafter, True)}
        for rows in self.size.rows:
            line = {"rows": rows}
            for name, (helper, fused) in sides.items():
                length = helper.draft_length if helper else 0
                capacity = context + 2 * length + 2
                batch = StaticBatch(target, helper, Sampling(), rows, capacity, length, fused)
                prompts = torch.randint(3, 250, (rows, context)).tolist()
                batch.admit(range(rows), prompts, range(rows))
                batch.alive.zero_()
                run = GraphRunner() if on_gpu else eager
                slots = bucket_of(context + length + 1, batch.capacity)

                def step(batch=batch, run=run, rows=rows, slots=slots, length=length):
                    run(batch, rows, slots, length)
                    return batch.table.tolist()

                line[name] = s.seconds(step)
                if run is not eager:
                    line[f"{name}_capture"] = {"seconds": run.seconds, "megabytes": run.megabytes}
            found.append(line)
        return found


class Collect(Phase):
    name, title = "collect", "Collecting, greedy"

    def run(self) -> dict:
        s, rows, found = self.setup, [], {}
        for part in ("heldout", "train"):
            prompts = read_prompts(s.prompts[part], getattr(self.size, part))
            began = time.perf_counter()
            path = collect(
                s.target,
                prompts,
                Path("data") / part,
                max_new_tokens=self.size.tokens,
                batch_size=8 * self.size.batch,
            )
            value, seconds = summary(path), time.perf_counter() - began
            found[part] = {**value, "seconds": seconds}
            rate = value["response_tokens"] / seconds
            rows.append([part, len(prompts), value["response_tokens"], seconds, rate])
        columns = ["part", "prompts", "tokens", "seconds", "tokens a second"]
        return {"parts": found, "table": table(columns, rows)}


class Decode(Phase):
    name, title = "decode", "Decoding against peers, one prompt at a time"

    def run(self) -> dict:
        folder = "league/dpace-0/last" if Path("league/dpace-0/last").exists() else "sft/best"
        s, size = self.setup, self.size
        value = decode(s.target, folder, s.prompts["heldout"], size.decode, size.tokens)
        rows = [
            [r["side"], r["tokens_per_second"], r["over_target_alone"]["median"], r["same_text"]]
            for r in value["rows"]
        ]
        columns = ["side", "tokens a second", "over the target alone", "same text"]
        return {"drafter": folder, **value, "table": table(columns, rows)}
