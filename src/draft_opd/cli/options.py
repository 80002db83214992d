"""Options that several commands share, and what they become."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draft_opd.utils.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
TargetName = Annotated[
    str, typer.Option("--target", help="Folder, hub id, or 'embedded' (the shipped target).")
]
DrafterName = Annotated[str, typer.Option("--drafter", help="Drafter folder or hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: best there is.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32 or bfloat16; default: float32 on CPU, else as stored.")
]
Compile = Annotated[str, typer.Option("--compile", help="auto: decode in CUDA graphs on a GPU; off: never.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that ships with the target.")]
Length = Annotated[int | None, typer.Option("--draft-length", help="Tokens drafted a round; default: all.")]
AutoLength = Annotated[
    str | None,
    typer.Option(
        "--draft-length",
        help="Tokens drafted a round, or 'auto': what is fastest here. Default: auto when greedy "
        "and neither --tree nor --confidence is given, else all.",
    ),
]
Tree = Annotated[
    str | None,
    typer.Option("--tree", help="Draft a tree: nodes at depth 1, 2, ..., as 4,4,2 (EAGLE-3)."),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="0 keeps all tokens.")]
TopP = Annotated[float, typer.Option(help="1 keeps all tokens.")]
Thinking = Annotated[
    bool | None, typer.Option("--thinking/--no-thinking", help="For templates that know it.")
]


def _in_range(seed: int) -> int:
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: must be from 0 to {2**32 - 1}")
    return seed


Seed = Annotated[int, typer.Option(help="Of everything that is drawn.", callback=_in_range)]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest response.")]
Config = Annotated[
    Path,
    typer.Option("--config", help="Recipe, YAML; or 'embedded', 'embedded:FAMILY': the demo's."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override recipe keys.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]


def example(text: str) -> str:
    return f"Example: {text}"


def to_sampling(temperature: float, top_k: int, top_p: float, draft: str = "sample"):
    from pydantic import ValidationError

    from draft_opd.decoding.sampling import Sampling
    from draft_opd.utils.config import first_problem

    try:
        return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, draft=draft)
    except ValidationError as error:
        problem = first_problem(error)
        raise UserError(
            f"--{problem.key.replace('_', '-')} {problem.given}: {problem.message.lower()}"
        ) from None


def to_numbers(text: str | None, option: str) -> list[int] | None:
    """2,4,8 as a list, ascending."""
    if text is None:
        return None
    try:
        found = sorted({int(x) for x in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise UserError(f"{option} {text}: give numbers from 1 on, as 2,4,8")
    return found


def to_lengths(text: str | None) -> list[int | str] | None:
    """2,4,auto as a list, ascending, "auto" last."""
    if text is None:
        return None
    words = {w.strip() for w in text.split(",")}
    auto, numbers = words & {"auto"}, words - {"auto"}
    if any(not w.isdecimal() or int(w) < 1 for w in numbers):
        raise UserError(f"--draft-length {text}: give numbers from 1 on, as 2,4,8, or auto")
    return [*sorted(map(int, numbers)), *auto]


def one_length(text: str | None) -> int | str | None:
    """A number or "auto"."""
    found = to_lengths(text)
    if found and len(found) > 1:
        raise UserError(f"--draft-length {text}: give one number, or 'auto'")
    return found and found[0]


def to_confidences(text: str | None) -> list[float | None]:
    """0,0.3,0.5 ascending, with None for 0 (drafts never end early)."""
    try:
        found = sorted({float(x) for x in ("0" if text is None else text).split(",")})
    except ValueError:
        found = [-1.0]
    if not all(0 <= x < 1 for x in found):
        raise UserError(f"--confidence {text}: give chances from 0 to below 1, as 0,0.3,0.5")
    return [x or None for x in found]


def to_widths(tree: str | None) -> list[int] | None:
    if tree is None:
        return None
    try:
        return [int(x) for x in tree.split(",")]
    except ValueError:
        raise UserError(f"--tree {tree}: give the nodes at each depth, as 4,4,2") from None


def to_target(name: str, device: str | None, dtype: str | None, trust: bool, compile: str = "auto"):
    import torch

    from draft_opd.models.target import Target
    from draft_opd.utils.machine import warn_if_slow

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: choose float32, bfloat16 or float16")
    if compile not in ("auto", "off"):
        raise UserError(f"--compile {compile}: choose auto or off")
    try:
        where = torch.device(device) if device else None
        if where is not None:
            torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not usable here ({str(error).splitlines()[0]})") from None
    if dtype:
        here = where or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        warn_if_slow(f"--dtype {dtype}", getattr(torch, dtype), here)
    return Target.from_pretrained(
        name, dtype=dtype, device=where, trust_remote_code=trust, captured=compile == "auto"
    )


def to_drafter(name: str, target):
    from draft_opd.drafters import Drafter

    drafter = Drafter.from_pretrained(name, device=target.device)
    drafter.bind(target)
    return drafter.to(target.dtype)


SkipInvalid = Annotated[
    bool, typer.Option("--skip-invalid", help="Leave out rows that cannot be used, counted by reason.")
]
MaxSkipShare = Annotated[float, typer.Option(help="The largest share of rows that may be left out.")]
TemplateKwargs = Annotated[
    list[str] | None,
    typer.Option(help="KEY=VALUE for the chat template (VALUE as YAML); repeatable."),
]
Template = Annotated[Path | None, typer.Option(help="A chat template (Jinja), instead of the target's own.")]
StopIds = Annotated[
    str | None, typer.Option(help="Token ids that end an answer, as 2,7; default: all the files name.")
]


def to_skipped(allowed: bool, share: float):
    from draft_opd.data.skipped import Skipped

    if not 0 <= share <= 1:
        raise UserError(f"--max-skip-share {share}: must be from 0 to 1")
    return Skipped(allowed, share)


def to_template_kwargs(pairs: list[str] | None) -> dict:
    """KEY=VALUE pairs as an object."""
    import yaml

    found = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise UserError(f"--template-kwargs {pair}: give KEY=VALUE")
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--template-kwargs {key}: the value is not valid YAML") from None
    return found


def set_chat(target, template: Path | None, kwargs: list[str] | None, stop_ids: str | None = None) -> None:
    """Gives a target another chat template, its arguments, and other stop tokens."""
    if template is not None:
        try:
            target.tokenizer.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--template {template}: cannot be read ({type(error).__name__})") from None
    target.chat.kwargs.update(to_template_kwargs(kwargs))
    if stop_ids is not None:
        words = stop_ids.split(",")
        if not all(w.isdecimal() and int(w) < target.vocab_size for w in words):
            raise UserError(f"--stop-ids {stop_ids}: give token ids of the target, as 2,7")
        target.chosen_stop_ids = frozenset(map(int, words))


MARKS = ("auto", "brackets", "none")  # how `generate` shows accepted draft tokens


def at_least(value: int | None, least: int, option: str) -> None:
    if value is not None and value < least:
        raise UserError(f"{option} {value}: must be at least {least}")
