"""NAME=PATH arguments, and short names for paths that have none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from draft_opd.utils.errors import UserError


def named(text: str) -> tuple[str | None, str]:
    """NAME=PATH as its two parts; a path that has a = itself is a path.

    >>> named("new=runs/a/last"), named("runs/lr=0.1/last")
    (('new', 'runs/a/last'), (None, 'runs/lr=0.1/last'))
    """
    name, equals, path = text.partition("=")
    if not equals or not name or "/" in name or Path(text).exists():
        return None, text
    return name, path


def names_of(paths: Sequence[str]) -> list[str]:
    """Short names for folders and hub ids, NAME=PATH or by what tells their paths apart.

    Raises `UserError` where nothing does.
    """
    given = [named(text) for text in paths]
    parts = [PurePath(path).parts for _, path in given]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    names = []
    for (name, _), left in zip(given, parts, strict=True):
        width = 1
        while sum(p[-width:] == left[-width:] for p in parts) > 1 and width < len(left):
            width += 1
        names.append(name or "/".join(left[-width:]))
    if len(set(names)) < len(names):
        raise UserError(f"{', '.join(paths)}: not told apart by name, write NAME=PATH")
    return names


def by_name(texts: Sequence[str]) -> dict[str, str]:
    """{short name: path}, as `names_of` has them."""
    return dict(zip(names_of(texts), (named(text)[1] for text in texts), strict=True))
