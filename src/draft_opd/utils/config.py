"""What all sections of a recipe have in common, and how their errors are worded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError


class Section(BaseModel):
    """Unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Problem(NamedTuple):
    """The first thing that is wrong with a tree: `key` as a.b.c, pydantic's kind of error, a message
    without its prefix, and the value that was given."""

    key: str
    kind: str
    message: str
    given: object


def first_problem(error: ValidationError) -> Problem:
    """Of a key that may be a number or a word, what is wrong with the number, and the word."""
    first, *others = error.errors()
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    place = first["loc"]
    words = [x["ctx"]["expected"] for x in others if x["type"] == "literal_error" and _other_kind(place, x)]
    if words:  # the last part of the place is the kind that was tried
        place, message = place[:-1], f"{message}, or be {words[0]}"
    return Problem(".".join(map(str, place)), first["type"], message, first["input"])


def _other_kind(place: tuple, other: Mapping) -> bool:
    """Whether an error is about the same key, tried as another kind of value."""
    return len(place) > 1 and other["loc"][:-1] == place[:-1] and str(other["loc"][-1]).startswith("literal[")
