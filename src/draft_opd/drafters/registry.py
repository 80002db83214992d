"""Drafter families by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from draft_opd.drafters.base import Drafter

FAMILIES: dict[str, type[Drafter]] = {}
Family = TypeVar("Family", bound="type[Drafter]")


def register(name: str) -> Callable[[Family], Family]:
    """Class decorator: makes a family known under `name`. Raises ValueError for a name that is
    taken."""

    def add(family: Family) -> Family:
        if name in FAMILIES:
            raise ValueError(f"the drafter family '{name}' is registered already")
        family.family = name
        FAMILIES[name] = family
        return family

    return add


def family_of(config: dict) -> type[Drafter] | None:
    """The family that a drafter's config.json is of; None for any other model's."""
    return next((f for f in FAMILIES.values() if f.matches(config)), None)
