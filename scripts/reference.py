"""Writes docs/recipe.md and docs/commands.md from the config types and the command line.

    python scripts/reference.py

`tests/test_docs.py` fails when they are not what this makes.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from draft_opd.cli.main import app
from draft_opd.drafters import FAMILIES
from draft_opd.training.config import Recipe

DOCS = Path(__file__).parent.parent / "docs"
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def recipe_page() -> str:
    """Every key, section by section."""
    parts = [
        "# Recipe reference\n",
        "A recipe is YAML. `KEY=VALUE` behind `--config` overrides one key (`optim.learning_rate="
        "1e-3`); an unknown key is an error that names the nearest right one. `stages: {sft: …, "
        "opd: …}` lays keys over the common ones for one command, so one file serves both stages. "
        "A run folder holds its whole tree (`recipe.yaml`). This page is made from "
        "the types (`scripts/reference.py`).\n",
        *_section(Recipe, ""),
    ]
    for name, family in FAMILIES.items():
        parts += _table(f"`model.options` of `{name}`", family.options, "model.options.")
    return "\n".join(parts)


def _section(model: type[BaseModel], path: str) -> list[str]:
    title = f"`{path.rstrip('.')}`" if path else "Top level"
    parts = _table(title, model, path)
    for name, field in model.model_fields.items():
        inner = next((t for t in _options(field.annotation) if _is_model(t)), None)
        if inner:
            parts += _section(inner, f"{path}{name}.")
    return parts


def _table(title: str, model: type[BaseModel], path: str) -> list[str]:
    first = (model.__doc__ or "").strip().split("\n\n")[0].split("\n  ")[0].strip()
    lines = [f"## {title}\n", f"{' '.join(first.split())}\n" if first else ""]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if not field.description:
            raise ValueError(f"{path}{name} has no description")
        if any(_is_model(t) for t in _options(field.annotation)):
            shown, default = "section", ""
        else:
            shown = " or ".join(_name(t) for t in _options(field.annotation)) + _bounds(field.metadata)
            default = _default(field)
        lines.append(f"| `{path}{name}` | {shown} | {default} | {_cell(field.description)} |")
    return [*lines, ""]


def _options(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [t for t in get_args(annotation) if t is not type(None)]
    return [annotation]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _name(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        inner, *limits = get_args(kind)
        return _name(inner) + _bounds([m for x in limits for m in x.metadata])
    if get_origin(kind) is Literal:
        return ", ".join(f"`{v}`" for v in get_args(kind))
    if get_origin(kind) is tuple:
        return "list"
    names = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}
    return names.get(kind, "keys" if get_origin(kind) is dict else str(kind))


def _bounds(metadata: list[Any]) -> str:
    found = [
        f" {sign} {getattr(m, key):g}"
        for m in metadata
        for key, sign in BOUNDS.items()
        if getattr(m, key, None) is not None
    ]
    return ",".join(found)


def _default(field) -> str:
    if field.is_required():
        return "**required**"
    value = field.default
    if value is PydanticUndefined:
        value = field.default_factory()
    if value is None:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def commands_page() -> str:
    """Every command with its options."""
    parts = [
        "# Commands\n",
        "Every command has `--help` with an example and `--json`, which prints exactly one JSON "
        "object on standard output and everything else on standard error. Exit status: 0 done, 2 "
        "your input is wrong (one line says what, where and how to mend it), 1 anything else. This "
        "page is made from the program (`scripts/reference.py`).\n",
    ]
    for name, command in typer.main.get_command(app).commands.items():
        parts += [f"## {name}\n", f"{command.help.strip()}\n"]
        parts += ["```sh", command.epilog.removeprefix("Example: "), "```\n"]
        parts += ["| option | default | meaning |", "|---|---|---|"]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            shown = " / ".join([*parameter.opts, *parameter.secondary_opts])
            if parameter.param_type_name == "argument":
                shown = parameter.metavar or parameter.name
            default = parameter.default
            if parameter.required:
                default = "**required**"
            elif default is None or default is False or default == "":
                default = ""
            else:
                default = f"`{default}`"
            help_text = getattr(parameter, "help", None) or ""
            parts.append(f"| `{shown}` | {default} | {_cell(help_text)} |")
        parts.append("")
    return "\n".join(parts)


PAGES = {"recipe.md": recipe_page, "commands.md": commands_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(f"wrote {DOCS / name}")
