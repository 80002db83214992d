"""Rows that cannot be used: the first one stops, or all are counted, named and left out."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from draft_opd.utils.errors import UserError
from draft_opd.utils.files import make_folder, write_lines

MAX_SHARE = 0.1


@dataclass
class Filters:
    """What a collection leaves out on request. left_out: how many, by reason.

    longest_prompt: in tokens. duplicates: whether prompts of equal content are asked again. truncated:
    whether answers that reached the limit are kept; else they go to `truncated.jsonl`.
    """

    longest_prompt: int | None = None
    duplicates: bool = True
    truncated: bool = True
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass
class Skipped:
    """What to do with a row that cannot be used. allowed: go on (`--skip-invalid`); max_share: the
    largest share of all rows that may be lost."""

    allowed: bool = False
    max_share: float = MAX_SHARE
    rows: list[dict] = field(default_factory=list)
    seen: int = 0  # rows looked at

    def add(self, file: str, line: int, reason: str) -> None:
        """Raises `UserError` where rows may not be skipped."""
        if not self.allowed:
            raise UserError(f"{file}:{line}: {reason}")
        self.rows.append({"file": file, "line": line, "reason": reason})

    @property
    def reasons(self) -> Counter[str]:
        """Numbers are left out, so that equal reasons are counted together."""
        return Counter(re.sub(r"\d+", "N", row["reason"]) for row in self.rows)

    def check(self) -> None:
        """Raises `UserError` where more were lost than may be."""
        if self.rows and len(self.rows) > self.max_share * self.seen:
            first = self.rows[0]
            raise UserError(
                f"{len(self.rows)} of {self.seen} rows cannot be used, more than the share of "
                f"{self.max_share:g} that --max-skip-share allows; the first: {first['file']}:"
                f"{first['line']}: {first['reason']}"
            )

    def write(self, out: Path) -> None:
        """`skipped.jsonl` in that folder, where rows were skipped."""
        if self.rows:
            write_lines(make_folder(out) / "skipped.jsonl", map(json.dumps, self.rows))

    def lines(self) -> list[str]:
        """What the screen says."""
        return [f"{count} skipped: {reason}" for reason, count in self.reasons.most_common()]
