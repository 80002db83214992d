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

from draft_opd.data.collect import collect, summary
from draft_opd.data.prompts import read_prompts
from draft_opd.decoding.generate import speculate
from draft_opd.drafters import Drafter
from draft_opd.models.hub import EMBEDDED
from draft_opd.models.target import Target
from draft_opd.training.config import parse_recipe
from draft_opd.training.trainer import Run
from draft_opd.utils.machine import speed_over_float32


@dataclass(frozen=True)
class Size:
    """How much is measured. `seconds`: what a phase takes at that size, before it was tried."""

    shapes: tuple[str, ...]  # of `rounds`: in `phases_rounds.QWEN3`, or EMBEDDED
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
            "extents": 60,
            "late": 15,
        },
    ),
    "gpu": Size(
        shapes=("Qwen3-0.6B", "Qwen3-4B", "Qwen3-8B"),
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
            "rounds": 240,
            "collect": 450,
            "sft": 540,
            "league": 300,
            "steps": 60,
            "seeds": 600,
            "objectives": 500,
            "eagle3": 600,
            "decode": 120,
            "extents": 60,
            "late": 60,
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
