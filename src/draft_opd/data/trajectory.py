"""Trajectories (prompt + the target's own response) and the JSONL files that hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from draft_opd.data.row_files import file_rows
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import append, make_folder, write_json, write_lines

if TYPE_CHECKING:
    from draft_opd.models.target import Target


@dataclass(frozen=True)
class Trajectory:
    """A verified response of the target, stop token included, and how it was sampled.

    >>> Trajectory(prompt_ids=[5, 6], response_ids=[7, 2]).ids
    [5, 6, 7, 2]
    """

    prompt_ids: list[int]
    response_ids: list[int]
    id: str = ""
    finish_reason: str = "stop"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    meta: dict = field(default_factory=dict)

    @property
    def ids(self) -> list[int]:
        return [*self.prompt_ids, *self.response_ids]


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """Yields (line number, object); `UserError` names the first line that is not one."""
    for row in file_rows(Path(path)):
        if row.value is None:
            raise UserError(f"{row.where}: {row.problem}")
        yield row.line, row.value


NUMBER = ((int, float), "a number")
SAMPLED: dict[str, tuple[type | tuple[type, ...], str]] = {
    "finish_reason": (str, "a text"),
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": (int, "a whole number"),
    "seed": (int, "a whole number"),
}


def _ids(row: dict, key: str, where: str, vocab_size: int | None) -> list[int]:
    ids = row.get(key)
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{where}: '{key}' must be a list of token ids")
    if not ids:
        raise UserError(f"{where}: '{key}' is empty; remove the line")
    if vocab_size is not None and max(ids) >= vocab_size:
        raise UserError(
            f"{where}: token id {max(ids)} is outside the target's vocabulary of {vocab_size}; "
            "was this file made with another target?"
        )
    return ids


def _how(row: dict, where: str) -> dict:
    """What a row says of how it was sampled."""
    found = {k: row[k] for k in SAMPLED if k in row}
    for key, value in found.items():
        kind, expected = SAMPLED[key]
        right = isinstance(value, kind) and not isinstance(value, bool)
        if not right or value != value:  # NaN is a number to JSON
            raise UserError(f"{where}: '{key}' must be {expected} (got {json.dumps(value)[:40]})")
    return found


def read_trajectories(
    path: str | Path, vocab_size: int | None = None, limit: int | None = None
) -> list[Trajectory]:
    """Reads a trajectories file (or the folder that holds `trajectories.jsonl`).

    limit: keep so many, drawn by a hash of their ids, in the file's order. Collecting writes short prompts
    first, so the first ones of a file are not like the rest. Raises `UserError` naming file and line for
    anything malformed: an empty response too.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "trajectories.jsonl"
    result: list[Trajectory] = []
    seen: dict[str, int] = {}
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        result.append(
            Trajectory(
                _ids(row, "prompt_ids", where, vocab_size),
                _ids(row, "response_ids", where, vocab_size),
                str(row.get("id", number)),
                **_how(row, where),
            )
        )
        if "id" in row and seen.setdefault(result[-1].id, number) != number:
            raise UserError(
                f"{where}: line {seen[result[-1].id]} has the id '{result[-1].id}' already: make ids unique"
            )
    if not result:
        raise UserError(f"'{path}' holds no trajectories")
    return result if limit is None else drawn(result, limit)


def drawn(rows: list[Trajectory], count: int) -> list[Trajectory]:
    """`count` of them, in order, the same ones however the rows are ordered."""
    by_hash = sorted(range(len(rows)), key=lambda i: hashlib.sha256(rows[i].id.encode()).digest())
    return [rows[i] for i in sorted(by_hash[:count])]


def check_trajectories(rows: Iterable[Trajectory], target: Target, where: str) -> None:
    """Raises `UserError` for token ids that `target` does not have and texts longer than its
    context."""
    size, room = target.vocab_size, target.max_positions
    for t in rows:
        if max(t.ids) >= size:
            raise UserError(
                f"{where}: trajectory {t.id} has token id {max(t.ids)}, the target's vocabulary "
                f"ends at {size - 1}: was it collected from another target?"
            )
        if len(t.ids) > room:
            raise UserError(
                f"{where}: trajectory {t.id} has {len(t.ids)} tokens, the target's context holds "
                f"{room}: shorten it (in a recipe: data.max_length)"
            )


def write_trajectories(out: Path, rows: Iterable[Trajectory], about: dict) -> Path:
    """`trajectories.jsonl` and `collect.json` of finished trajectories. Raises `UserError` for a folder
    that holds some already."""
    path = make_folder(out) / "trajectories.jsonl"
    if path.exists():
        raise UserError(f"'{path}' exists already: choose another --out")
    write_json(out / "collect.json", about)
    write_lines(path, (json.dumps({"id": t.id, **asdict(t)}) for t in rows))
    return path


class TrajectoryWriter:
    """Appends trajectories so that a kill costs at most the line being written.

    On opening, a torn last line is cut off, and `done` lists the ids that are already there.
    """

    def __init__(self, path: Path):
        self.path = path
        self.done: dict[str, list[int]] = {}
        self.hashes: dict[str, str] = {}  # of the prompts, where they are known
        try:
            if path.exists():
                self._repair()
                for _, row in read_jsonl(path):
                    name, meta = str(row.get("id")), row.get("meta")
                    self.done[name] = row.get("prompt_ids") or []
                    if isinstance(meta, dict) and isinstance(meta.get("prompt"), str):
                        self.hashes[name] = meta["prompt"]
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write '{path}' ({error.strerror})") from error

    def _repair(self) -> None:
        with open(self.path, "rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                file.truncate(whole)

    def write(self, trajectories: Iterable[Trajectory]) -> None:
        """All of them, on the disk, or none. Raises `UserError` where there is no room."""
        rows = list(trajectories)
        lines = (json.dumps({"id": t.id, **asdict(t)}) + "\n" for t in rows)
        append(self._file, "".join(lines).encode(), self.path)
        self.done |= {t.id: t.prompt_ids for t in rows}

    def close(self) -> None:
        self._file.close()
