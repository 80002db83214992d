"""Drafter families. Importing a family's module registers it."""

from draft_opd.drafters import dflash, dflash2, dspark, eagle3  # noqa: F401
from draft_opd.drafters.base import Drafter
from draft_opd.drafters.registry import FAMILIES, register

__all__ = ["FAMILIES", "Drafter", "register"]
