"""What all sections of a recipe have in common, and how their errors are worded."""

from __future__ import annotations

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
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return Problem(".".join(map(str, first["loc"])), first["type"], message, first["input"])
