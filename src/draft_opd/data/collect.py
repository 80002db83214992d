"""Prompts -> trajectories: a file that a killed run goes on with, whoever answers."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from draft_opd.data.prompts import Prompt, usable
from draft_opd.data.skipped import Filters, Skipped
from draft_opd.data.trajectory import Trajectory, TrajectoryWriter, read_trajectories
from draft_opd.decoding.generate import Generation, speculate
from draft_opd.decoding.sampling import Sampling
from draft_opd.drafters.base import Drafter
from draft_opd.models.target import Target
from draft_opd.models.target_info import TargetInfo
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import lock_folder, make_folder, read_json, write_json

GROUP = 8  # batches that share their rows where rounds are captured


@dataclass(frozen=True)
class Request:
    """A prompt to be answered: its name in the file, its token ids, and what they are made of."""

    id: str
    prompt_ids: list[int]
    prompt: Prompt


# Answers requests, handing trajectories to its second argument as they are made.
Answer = Callable[[list[Request], Callable[[list[Trajectory]], None]], None]


def decode_trajectories(
    target: Target,
    requests: list[tuple[str, list[int]]],
    emit: Callable[[list[Trajectory]], None],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    sampling: Sampling | None = None,
    seed: int = 0,
    drafter: Drafter | None = None,
) -> None:
    """Decodes (id, prompt ids) pairs in length-sorted groups, handing trajectories to `emit` as they end.

    A group is a batch; where rounds are captured, several, whose prompts take the place of ended ones.
    """
    sampling = sampling or Sampling()
    ordered = sorted(requests, key=lambda r: len(r[1]))
    size = batch_size * (GROUP if target.capturable else 1)
    ended: dict[int, Trajectory] = {}

    def write() -> None:
        emit([ended[i] for i in sorted(ended)])
        ended.clear()

    for start in range(0, len(ordered), size):
        group = ordered[start : start + size]
        # From the names, so that a collection that goes on later draws the same.
        seeds = [seed + zlib.crc32(name.encode()) for name, _ in group]

        def on_end(index: int, made: Generation, group=group, seeds=seeds) -> None:
            (name, ids), how = group[index], (made.finish_reason, *sampling.as_tuple)
            ended[index] = Trajectory(ids, made.token_ids, name, *how, seeds[index])
            if len(ended) == batch_size:  # a write waits for the disk
                write()

        speculate(
            target,
            drafter,
            [ids for _, ids in group],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seeds,
            rows=batch_size,
            on_end=on_end,
        )
        if ended:
            write()


def gather(
    target: TargetInfo,
    prompts: list[Prompt],
    out: Path,
    answer: Answer,
    about: dict,
    *,
    samples: int = 1,
    thinking: bool | None = None,
    skipped: Skipped | None = None,
    filters: Filters | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> Path:
    """Writes `out/trajectories.jsonl`; what is already there is not asked for again.

    about: how the trajectories are made; a folder that was made otherwise is refused, and one that
    another process is writing. `collect.json` says so and, once all was asked, how many answered.
    A prompt is known by its content, and its token ids are those that were stored: a template that shows the
    date shows the date of the first time. skipped: what to do with prompts that cannot be used; they go to
    `out/skipped.jsonl`. filters: what is left out on request, counted there. `progress(done, total,
    tokens)` is called after every write. Raises `UserError` when the folder holds trajectories of other
    prompts under the same ids, or a prompt cannot be used.
    """
    path = make_folder(out) / "trajectories.jsonl"
    with lock_folder(out):
        return _gather(
            target,
            prompts,
            path,
            answer,
            about,
            samples,
            thinking,
            skipped or Skipped(),
            filters or Filters(),
            progress,
        )


def _gather(target, prompts, path, answer, about, samples, thinking, skipped, filters, progress) -> Path:
    writer = TrajectoryWriter(path)
    aside = TrajectoryWriter(path.with_name("truncated.jsonl")) if not filters.truncated else None
    about = {"target": target.name, "stop_ids": sorted(target.stop_ids), **about}
    made = path.with_name("collect.json")
    try:
        if writer.done:
            _check_made(made, about)
        if target.chat.uses_date:
            about["date"] = pin_date(target, made)
        settings = json.dumps([target.chat.kwargs, thinking, target.chat.source], default=str)
        todo, seen, hashes, contents = [], set(), {}, set()
        gone = aside.done if aside else {}
        for prompt, ids in usable(prompts, target, thinking, skipped):
            content = hashlib.sha256((prompt.content + settings).encode()).hexdigest()[:16]
            if filters.longest_prompt and len(ids) > filters.longest_prompt:
                filters.left_out["longer than --max-prompt-tokens"] += 1
                continue
            if not filters.duplicates and content in contents:
                filters.left_out["the same prompt again"] += 1
                continue
            contents.add(content)
            for sample in range(samples):
                name = prompt.id if samples == 1 else f"{prompt.id}-{sample}"
                if name in seen:
                    raise UserError(f"two prompts have the id '{name}': make ids unique")
                seen.add(name)
                hashes[name] = content
                if name in gone:
                    filters.left_out["truncated"] += 1
                elif name not in writer.done:
                    todo.append(Request(name, ids, prompt))
                elif writer.hashes.get(name, content) != content or (
                    name not in writer.hashes and writer.done[name] != ids
                ):
                    raise UserError(
                        f"'{path}' already holds another prompt under the id '{name}': use another --out"
                    )
        skipped.write(path.parent)
        counts = {"done": len(seen) - len(todo), "tokens": 0}

        def emit(batch: list[Trajectory]) -> None:
            batch = [replace(t, meta={**t.meta, "prompt": hashes[t.id]}) for t in batch]
            ended = [t for t in batch if aside is None or t.finish_reason != "length"]
            if aside and len(ended) < len(batch):
                aside.write(t for t in batch if t.finish_reason == "length")
                filters.left_out["truncated"] += len(batch) - len(ended)
            writer.write(ended)
            counts["done"] += len(batch)
            counts["tokens"] += sum(len(t.response_ids) for t in batch)
            if progress:
                progress(counts["done"], len(seen), counts["tokens"])

        write_json(made, about)
        emit([])
        if todo:
            answer(todo, emit)
        ended = {"asked": len(seen), "answered": len(seen & writer.done.keys())}
        write_json(made, {**about, "ended": ended})
    finally:
        writer.close()
        if aside:
            aside.close()
    return path


def collect(
    target: Target,
    prompts: list[Prompt],
    out: Path,
    *,
    max_new_tokens: int = 512,
    samples: int = 1,
    batch_size: int = 16,
    sampling: Sampling | None = None,
    thinking: bool | None = None,
    seed: int = 0,
    drafter: Drafter | None = None,
    skipped: Skipped | None = None,
    filters: Filters | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> Path:
    """`gather` with a target that decodes here."""
    sampling = sampling or Sampling()

    def answer(requests: list[Request], emit) -> None:
        decode_trajectories(
            target,
            [(r.id, r.prompt_ids) for r in requests],
            emit,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            sampling=sampling,
            seed=seed,
            drafter=drafter,
        )

    about = how_made(sampling, seed, max_new_tokens, samples)
    return gather(
        target,
        prompts,
        out,
        answer,
        about,
        samples=samples,
        thinking=thinking,
        skipped=skipped,
        filters=filters,
        progress=progress,
    )


def pin_date(target: TargetInfo, made: Path) -> str:
    """The date that the template shows in this collection: of the first time."""
    try:
        before = read_json(made).get("date") if made.exists() else None
        date = datetime.fromisoformat(before) if before else datetime.now().replace(microsecond=0)
    except (UserError, AttributeError, ValueError):
        date = datetime.now().replace(microsecond=0)
    target.chat.date = date
    return date.isoformat()


def how_made(sampling: Sampling, seed: int, max_new_tokens: int, samples: int) -> dict:
    """What `collect.json` remembers. Raises `UserError` where samples would all be equal."""
    if samples > 1 and sampling.greedy:
        raise UserError("samples > 1 needs temperature > 0: greedy samples would all be equal")
    return {"sampling": sampling.model_dump(), "seed": seed, "max_new_tokens": max_new_tokens}


def _check_made(path: Path, about: dict) -> None:
    """Refuses to go on in another way than the file says."""
    if path.exists():
        try:
            before = read_json(path)
        except UserError:
            before = None
        if not isinstance(before, dict):
            raise UserError(f"'{path}' is damaged: remove it, or use another --out")
        if before.get("source"):
            raise UserError(f"'{path.parent}' holds logged answers, not the target's own: use another --out")
        changed = [k for k in about if k in before and before[k] != about[k]]
        if changed:
            changes = "; ".join(f"{k} {before.get(k)} before, {about[k]} now" for k in changed)
            raise UserError(f"'{path.parent}' was collected otherwise ({changes}): use another --out")


def summary(path: Path) -> dict:
    """What a trajectories file holds, in figures."""
    rows = read_trajectories(path)
    ends = Counter(t.finish_reason for t in rows)
    prompt, response = (sum(len(getattr(t, name)) for t in rows) for name in ("prompt_ids", "response_ids"))
    return {
        "kind": "trajectories",
        "path": str(path),
        "trajectories": len(rows),
        "prompt_tokens": prompt,
        "response_tokens": response,
        "mean_response": response / len(rows),
        "longest": max(len(t.ids) for t in rows),
        "finish_reasons": dict(ends),
    }
