"""Trajectories (prompt + the target's own response) and the JSONL files that hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from draft_opd.utils.errors import UserError
from draft_opd.utils.files import append

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


LONGEST_LINE = 64 << 20  # bytes


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """Yields (line number, object); `UserError` names the first line that is not one."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror})") from error
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        if len(line) > LONGEST_LINE:
            raise UserError(f"{path}:{number}: the line has {len(line) >> 20} MB: give a JSON object a line")
        try:
            row = json.loads(line.decode("utf-8-sig"))
            if b"\\u" in line:  # a lone surrogate is no UTF-8 text
                json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeError:
            raise UserError(f"{path}:{number}: not UTF-8 text") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: must be a JSON object, one a line")
        yield number, row


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

    Raises `UserError` naming file and line for anything malformed: an empty response too.
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
        if limit is not None and len(result) == limit:
            break
    if not result:
        raise UserError(f"'{path}' holds no trajectories")
    return result


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


class TrajectoryWriter:
    """Appends trajectories so that a kill costs at most the line being written.

    On opening, a torn last line is cut off, and `done` lists the ids that are already there.
    """

    def __init__(self, path: Path):
        self.path = path
        self.done: dict[str, list[int]] = {}
        try:
            if path.exists():
                self._repair()
                for _, row in read_jsonl(path):
                    self.done[str(row.get("id"))] = row.get("prompt_ids") or []
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
