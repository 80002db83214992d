"""What a round costs: eager, captured, fused; where attention ends; when its table is read."""

from __future__ import annotations

import time

import limits
import machine
import torch
from phases import Phase, Setup, table
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import Qwen3Config, Qwen3ForCausalLM

from draft_opd.data.prompts import read_prompts
from draft_opd.decoding.captured import GraphRunner
from draft_opd.decoding.noise import row_keys
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.static import StaticBatch, bucket_of, decode_rows, eager
from draft_opd.decoding.step import DecodeStep
from draft_opd.drafters import Drafter
from draft_opd.drafters.dflash import Unwritten
from draft_opd.evaluation.draft_length_advice import weights_read
from draft_opd.evaluation.measure import rotated
from draft_opd.models.gqa_attention import grouped
from draft_opd.models.hub import EMBEDDED
from draft_opd.models.kv_cache import PositionCache
from draft_opd.models.target import Target
from draft_opd.training.config import Model
from draft_opd.training.setup import new_drafter

TILE = 128  # keys that flex_attention computes or skips

QWEN3 = {  # the shapes of Qwen3-0.6B, 4B and 8B (their config.json on the hub); weights are random
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
    "Qwen3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}


def random_target(shape: str, device: torch.device, dtype: torch.dtype) -> Target:
    """A model of that shape with random weights; the shipped target by its name."""
    if shape == EMBEDDED:
        return Target.from_pretrained(EMBEDDED, device=device)
    config = Qwen3Config(
        vocab_size=151_936,
        head_dim=128,
        max_position_embeddings=40_960,
        rope_theta=1e6,
        **{"tie_word_embeddings": True, **QWEN3[shape]},
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
        before = context - 7 + torch.arange(7, device=s.device)[None]

        def draft():
            full.set_bound(context + length + 1, filled=True)
            return drafter.propose(target, memory, anchors[:, None], last[:, None], length, choose)

        def whole():
            # A real round finds the features of the one before: of six accepted tokens and the next.
            memory.unwritten = Unwritten(out.features[:, -7:], before, context - 7)
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


class Extents(Phase):
    """Attention of a verification: over a bucket, with a mask; or over tiles up to each row's length, which
    the device alone knows. One layer of a Qwen3-4B shape, rows of uneven length."""

    name, title = "extents", "Where attention ends: buckets against lengths on the device"

    @torch.inference_mode()
    def run(self) -> dict:
        s, rows, found = self.setup, [], []
        capacity, heads, kv_heads, width, block = 2 * max(self.size.contexts), 32, 8, 128, 16
        on_gpu = s.device.type == "cuda"
        flex = torch.compile(flex_attention, dynamic=on_gpu)  # torch 2.13 cannot make one for a CPU
        for count in self.size.rows if on_gpu else self.size.rows[-1:]:
            shape = {"device": s.device, "dtype": s.dtype}
            q = torch.randn(count, heads, block, width, **shape)
            k, v = (torch.randn(count, kv_heads, capacity, width, **shape) for _ in range(2))
            for context in self.size.contexts:
                spread = torch.linspace(0.3, 1.0, count, device=s.device) if count > 1 else torch.ones(1)
                anchors = (spread.to(s.device) * context).long() - 1
                slots = bucket_of(context + block, capacity)
                position = anchors[:, None] + torch.arange(block, device=s.device)

                def bucket(q=q, k=k, v=v, position=position, slots=slots) -> Tensor:
                    key = torch.arange(slots, device=q.device)
                    mask = (key <= position[:, :, None])[:, None]
                    return grouped(q, k[:, :, :slots], v[:, :, :slots], mask)

                def extent(q=q, k=k, v=v, anchors=anchors) -> Tensor:
                    tiles = tiles_up_to(anchors, block, capacity)
                    return flex(q, k, v, block_mask=tiles, enable_gqa=True)

                difference = (bucket() - extent()).abs().max().item()
                times = {"bucket": [], "extent": []}
                for turn in range(self.size.repeats):
                    for name, work in rotated([("bucket", bucket), ("extent", extent)], turn):
                        times[name].append(s.seconds(work, 3)["median"])
                over = machine.ratio(times["extent"], times["bucket"])
                found.append({"rows": count, "context": context, "over": over, "difference": difference})
                rows.append([count, context, slots, 1e6 * min(times["bucket"]), over["median"], difference])
        columns = ["rows", "longest", "bucket", "bucket, µs", "lengths over bucket", "largest difference"]
        return {"found": found, "table": table(columns, rows)}


def tiles_up_to(anchors: Tensor, block: int, capacity: int) -> BlockMask:
    """Tiles of keys that some query of a block of `block` tokens sees, by the rows' lengths [rows]."""
    tiles = capacity // TILE
    whole = (anchors + 1) // TILE  # every query sees all of them
    some = (anchors + block + TILE - 1) // TILE - whole
    index = torch.arange(tiles, device=anchors.device, dtype=torch.int32)
    order = ((index + whole[:, None]) % tiles).int()

    def visible(b, h, q, k):
        return k <= anchors[b] + q

    return BlockMask.from_kv_blocks(
        some.int()[:, None, None],
        order[:, None, None],
        whole.int()[:, None, None],
        index.expand(len(anchors), 1, 1, tiles).contiguous(),
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(block, capacity),
    )


class Late(Phase):
    """The same prompts with tables read at once, or while the next round runs."""

    name, title = "late", "Tables read at once, or one round late"

    def run(self) -> dict:
        s, size = self.setup, self.size
        prompts = [p.ids(s.target) for p in read_prompts(s.prompts["heldout"], size.heldout)]
        drafter = Drafter.from_pretrained("sft/best", device=s.device).to(s.target.dtype)
        rows, found = [], []
        for name, helper in (("target alone", None), ("with the drafter", drafter)):
            value = read_late(s, helper, prompts, size.tokens, min(size.batch, len(prompts)), size.repeats)
            found.append({"side": name, **value})
            rows.append([name, value["rows"], value["tokens_per_second"], value["late_over_now"]["median"]])
        columns = ["side", "rows", "tokens a second", "time, late over at once"]
        return {"found": found, "table": table(columns, rows)}


def read_late(s: Setup, drafter: Drafter | None, prompts: list, tokens: int, rows: int, repeats: int) -> dict:
    """Times of both ways, in alternation, over the same storage and graphs."""
    if drafter:
        drafter.bind(s.target)
    length = drafter.draft_length if drafter else 0
    capacity = max(map(len, prompts)) + tokens + 3 * (length + 1)
    batch = StaticBatch(s.target, drafter, Sampling(), rows, capacity, length)
    run = GraphRunner() if s.device.type == "cuda" else eager
    keys = row_keys([0] * len(prompts), prompts)
    times: dict[bool, list[float]] = {False: [], True: []}
    texts = []
    for turn in range(repeats + 1):
        for late in rotated([False, True], turn):
            made: dict[int, list[int]] = {i: [] for i in range(len(prompts))}

            def take(i: int, line: list[int], made=made) -> bool:
                made[i] += [*line[2 : 2 + line[0]], line[1]]
                return len(made[i]) >= tokens or bool(s.target.stop_ids & set(made[i]))

            s.wait()
            began = time.perf_counter()
            decode_rows(batch, prompts, keys, take, run=run, late=late)
            s.wait()
            if turn:  # the first one captures
                times[late].append(time.perf_counter() - began)
            texts.append(made)
    assert all(made == texts[0] for made in texts)
    count = sum(map(len, texts[0].values()))
    return {
        "rows": rows,
        "tokens_per_second": count / min(times[False]),
        "late_over_now": machine.ratio(times[True], times[False]),
    }
