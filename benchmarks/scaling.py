r"""How time and memory of a training step grow: length, vocabulary, block size, blocks, batch.

    python benchmarks/scaling.py

Targets and drafters with random weights (8 layers of width 192, DFlash of one layer), one axis at a
time from the same middle. Memory is the step's peak over what was held before it (on a CPU:
resident pages; on CUDA: the allocator's count), features given. `whole_logits` is what one
[supervised tokens, vocabulary] matrix of the step would take.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from pathlib import Path

import machine
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from draft_opd.data.trajectory import Trajectory
from draft_opd.drafters import FAMILIES
from draft_opd.models.target import Target
from draft_opd.training.batches import BatchSource
from draft_opd.training.config import Opd
from draft_opd.training.rollouts import hindsight_rollout
from draft_opd.training.stage_opd import opd_loss
from draft_opd.training.stage_sft import sft_loss

MIDDLE = {"length": 256, "vocabulary": 32_000, "block": 16, "blocks": 16, "batch": 4}
AXES = {
    "length": [64, 128, 256, 512, 1024, 2048],
    "vocabulary": [281, 4096, 32_000, 64_000, 152_000],
    "block": [4, 8, 16, 32],
    "blocks": [4, 8, 16, 32, 64],
    "batch": [1, 2, 4, 8, 16],
}
OBJECTIVES = ("dpace", "acceptance_aware")


def make_target(vocabulary: int, device: str) -> Target:
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Target(Qwen3ForCausalLM(config).to(device), name=f"random {vocabulary}")


class Peak:
    """Bytes above what was held when it was made."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back first (glibc)
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak (Linux)
            self.before = self._status("VmRSS")

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(name + ":"))

    def bytes(self) -> int:
        now = torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")
        return now - self.before


def steps(shape: dict, device: str, repeats: int) -> dict:
    """Seconds and peak bytes of each kind of step at one shape."""
    target = make_target(shape["vocabulary"], device)
    drafter = FAMILIES["dflash"].create(target, block_size=shape["block"], mask_token_id=0, num_layers=1)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(shape["batch"]):
        size = (shape["length"],)
        ids = torch.randint(3, shape["vocabulary"], size, generator=generator).tolist()
        rows.append(Trajectory(ids[:16], ids[16:], str(i), "length"))
    length, found = shape["block"] - 1, {}
    source = BatchSource(target, drafter.target_layers)
    plain, cached = source.batch(rows), source.batch(rows, with_cache=True)
    traces = hindsight_rollout(target, drafter, plain, length)

    def sft():
        return sft_loss(
            target, drafter, plain, anchors=shape["blocks"], num_draft_tokens=length, decay=None, seed="0"
        )

    def opd(kind):
        options = Opd(max_anchors=shape["blocks"], objective={"kind": kind})
        batch = cached if kind == "acceptance_aware" else plain
        return opd_loss(target, drafter, batch, traces, options, num_draft_tokens=length, seed="0")

    kinds = {"sft": sft, **{kind: lambda kind=kind: opd(kind) for kind in OBJECTIVES}}
    for name, work in kinds.items():
        seconds, peaks, supervised = [], [], 0
        for _ in range(repeats + 1):
            drafter.zero_grad()
            peak, began = Peak(target.device), time.perf_counter()
            loss, figures = work()
            loss.backward()
            if target.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            peaks.append(peak.bytes())
            supervised = figures["supervised"]
        found[name] = {
            "seconds": min(seconds[1:]),
            "peak_megabytes": max(peaks) / 1e6,
            "supervised": supervised,
            "whole_logits_megabytes": 4 * supervised * shape["vocabulary"] / 1e6,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--axes", nargs="+", default=list(AXES))
    parser.add_argument("--name", default="scaling")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for axis in args.axes:
        for value in AXES[axis]:
            shape = {**MIDDLE, axis: value}
            rows.append({"axis": axis, **shape, "steps": steps(shape, args.device, args.repeats)})
            print(json.dumps(rows[-1]))
    machine.write(args.name, {"arguments": vars(args), "middle": MIDDLE, "rows": rows})


if __name__ == "__main__":
    main()
